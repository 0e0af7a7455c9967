"""Cases of the head: its product, the cross entropy and both gradients in one."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from operations.case import Case, Function, Peer, room, with_gradients, within
from operations.scale import Scale
from tangram.kernels import linear_cross_entropy


def cases(scale: Scale) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield one."""
    yield "linear_cross_entropy", lambda: _case(scale)


def _case(scale: Scale) -> Case:
    tokens, dim, vocabulary = scale.rows, scale.dim, scale.vocabulary
    weight = scale.draw(vocabulary, dim) / dim**0.5  # logits of size one
    targets = torch.randint(vocabulary, (tokens,), device=scale.device)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.t()
        return F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), targets)

    limit = room(scale.dtype, vocabulary + dim, scale.device)
    return Case(
        operation="linear_cross_entropy",
        shape=f"{tokens} x {vocabulary} x {dim}",
        inputs=(scale.draw(tokens, dim), weight),
        ours=lambda x, weight: linear_cross_entropy(x, weight, targets, 1 / tokens, gradients=True),
        formula=with_gradients(loss),
        check=within(limit, limit, limit),
        flops=6.0 * tokens * vocabulary * dim,
        peers={
            "F.linear_cross_entropy": Peer(
                lambda: with_gradients(lambda x, weight: F.linear_cross_entropy(x, weight, targets))
            ),
            "Liger": Peer(lambda: _liger(targets)),
        },
        compiled=lambda compile: with_gradients(compile(loss)),  # type: ignore[arg-type]
    )


def _liger(targets: Tensor) -> Function:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return with_gradients(lambda x, weight: LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)[0])
