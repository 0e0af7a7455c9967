"""Every rank keeps every parameter."""

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import nn

from tangram.core.context import Parallel
from tangram.core.contracts import Sharding
from tangram.core.model import Model
from tangram.core.records import GradientNorm
from tangram.core.registry import component


@component("sharding", use="replicate")
@frozen(kw_only=True)
class ReplicateConfig:
    """Keep every parameter, gradient and optimizer state on every rank."""

    def build(self, parallel: Parallel) -> Sharding:
        """Build it."""
        return Replicate()


class Replicate:
    """Whole parameters; on one rank there is nothing to reduce or gather."""

    def __init__(self) -> None:
        self.parameters: list[tuple[str, nn.Parameter]] = []

    def attach(self, model: Model) -> Sequence[tuple[str, nn.Parameter]]:
        """Return the model's parameters with their addresses."""
        self.parameters = list(model.named_parameters())
        return self.parameters

    def reduce(self) -> None:
        """Do nothing: one rank holds the whole sum."""

    def clip(self, limit: float) -> GradientNorm:
        """Scale the gradients down to a global L2 norm of `limit`; leave them if the norm is not finite."""
        held = [(address, p.grad) for address, p in self.parameters if p.grad is not None]
        grads = [grad for _, grad in held]
        if not grads:
            return GradientNorm(0.0)
        norms = torch.stack(torch._foreach_norm(grads)).double()
        value = float(norms.norm())
        if not torch.isfinite(norms).all():
            finite = torch.isfinite(norms).tolist()
            broken = tuple(address for (address, _), ok in zip(held, finite, strict=True) if not ok)
            return GradientNorm(value, broken)
        if value > limit:
            torch._foreach_mul_(grads, limit / value)
        return GradientNorm(value)

    def gather(self) -> None:
        """Do nothing: the optimizer stepped the parameters themselves."""
