"""Cases of adamw_step: one matrix, its moments in float32 or in bfloat16."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from operations.case import Case, Function, Peer, Result, near
from operations.scale import Scale
from tangram.kernels import adamw_step

LR, BETAS, EPS, DECAY, STEP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 3


def cases(scale: Scale) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield one for each way to keep the moments."""
    for moments, stochastic in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        yield "adamw_step", partial(_case, scale, moments, stochastic)


def _case(scale: Scale, moments: torch.dtype, stochastic: bool) -> Case:
    weight, gradient, first = (scale.draw(*scale.matrix, dtype=torch.float32) for _ in range(3))
    second = scale.draw(*scale.matrix, dtype=torch.float32).square()
    rounding = ", stochastic" if stochastic else ""
    noise = torch.Generator().manual_seed(0) if stochastic else None

    def ours(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Result:
        adamw_step(
            [weight],
            [gradient],
            [first],
            [second],
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=DECAY,
            step=STEP,
            stochastic=noise,
        )
        return weight, first, second

    return Case(
        operation="adamw_step",
        shape=f"{scale.matrix[0]} x {scale.matrix[1]}, {str(moments).removeprefix('torch.')}{rounding}",
        inputs=(weight, gradient, first.to(moments), second.to(moments)),
        ours=ours,
        formula=_formula,
        check=near(12, 12, 12),
        peers={"fused AdamW of torch, float32": Peer(partial(_fused, weight, first, second))},
        in_place=True,
    )


def _formula(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> Result:
    m = first.to(weight.dtype) * BETAS[0] + gradient * (1 - BETAS[0])
    v = second.to(weight.dtype) * BETAS[1] + gradient.square() * (1 - BETAS[1])
    root = (v / (1 - BETAS[1] ** STEP)).sqrt() + EPS
    weight.mul_(1 - LR * DECAY).sub_(LR / (1 - BETAS[0] ** STEP) * m / root)
    return weight, first.copy_(m), second.copy_(v)


def _fused(*state: Tensor) -> Function:
    weight, first, second = (t.clone() for t in state)
    before = torch.full((), STEP - 1.0, device=weight.device)

    def run(_: Tensor, gradient: Tensor, *__: Tensor) -> Result:
        adamw(
            [weight],
            [gradient],
            [first],
            [second],
            [],
            [before],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=LR,
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            weight_decay=DECAY,
        )
        return weight, first, second

    return run
