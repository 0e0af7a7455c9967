"""AdamW (arXiv:1711.05101), with moments in float32 or, as DeepSeek-V3 keeps them, in bfloat16."""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, in_, le
from torch import nn

from tangram.core.registry import component

COARSE = 0.98
"""Largest second decay rate that bfloat16 moments bear: past it a step moves a moment by less than its rounding."""


def check_betas(betas: tuple[float, float]) -> None:
    """Refuse decay rates outside [0, 1).

    Raises:
        ValueError: One is.
    """
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {list(betas)}")


@component("optimizer", use="adamw")
@frozen(kw_only=True)
class AdamWConfig:
    """AdamW; matrices decay, norms do not.

    Attributes:
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of tensors with two dimensions or more, times the learning rate.
        moments: Dtype that keeps the moments between steps. With bfloat16 the update is still computed in float32,
            on float32 weights (arXiv:2412.19437, section 3.3.3).
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = field(default=1e-8, validator=[gt(0.0), le(1.0)])
    weight_decay: float = field(default=0.1, validator=[ge(0.0), le(100.0)])
    moments: Literal["float32", "bfloat16"] = field(default="float32", validator=in_(("float32", "bfloat16")))

    def __attrs_post_init__(self) -> None:
        check_betas(self.betas)

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Build it; the learning rate is set before every step."""
        matrices = [p for _, p in parameters if p.ndim >= 2]
        vectors = [p for _, p in parameters if p.ndim < 2]
        every = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in every if group["params"]]
        if self.moments == "float32":
            return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, fused=True)
        if self.betas[1] > COARSE:
            warnings.warn(
                f"moments: bfloat16 rounds to nearest and does not follow betas[1] = {self.betas[1]}: "
                f"take one of at most {COARSE}, or moments: float32",
                stacklevel=2,
            )
        return CoarseAdamW(groups, self.betas, self.eps)


class CoarseAdamW(torch.optim.Optimizer):
    """AdamW whose moments are bfloat16 between steps, rounded to nearest; everything else is in the weights' dtype.

    Args:
        groups: Parameters, each group with its `weight_decay`.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
    """

    def __init__(self, groups: list[dict[str, object]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["betas"], group["eps"], group["weight_decay"])
        return loss

    def _update(self, parameter: nn.Parameter, lr: float, betas: tuple[float, float], eps: float, decay: float) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        steps = float(state["step"])
        first = state["exp_avg"].to(parameter.dtype).lerp_(grad, 1 - betas[0])
        second = state["exp_avg_sq"].to(parameter.dtype).mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)
        root = second.div_(1 - betas[1] ** steps).sqrt_().add_(eps)
        parameter.mul_(1 - lr * decay).addcdiv_(first, root, value=-lr / (1 - betas[0] ** steps))
