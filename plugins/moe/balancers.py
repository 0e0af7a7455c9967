"""Expert biases against the load: auxiliary-loss-free balancing (arXiv:2408.15664), and none."""

import torch
from attrs import field, frozen
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Balancer
from tangram.core.curve import Curve
from tangram.core.records import Progress
from tangram.core.registry import component


@component("balancer", use="aux_free")
@frozen(kw_only=True)
class AuxFreeConfig:
    """Move a per-expert bias against the last step's load, by a fixed amount.

    Attributes:
        speed: Bias update speed gamma per step; a number or a curve over tokens.
    """

    speed: Curve = field(default=Curve.constant(1e-3))

    def build(self, ctx: Context, n_experts: int) -> Balancer:
        """Build it."""
        return AuxFree(self, n_experts)


class AuxFree(Balancer):
    """b_i += speed * sign(mean load - load_i), once a step over the global batch (algorithm 1)."""

    biases: Tensor

    def __init__(self, config: AuxFreeConfig, n_experts: int) -> None:
        super().__init__()
        self.speed = config.speed
        self.adaptive = config.speed != Curve.constant(0.0)  # else the biases stay as they were learned
        self.register_buffer("biases", torch.empty(n_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the biases to zero."""
        self.biases.zero_()

    def bias(self) -> Tensor:
        """Return the expert biases, float32 [E]."""
        return self.biases

    def update(self, load: Tensor, now: Progress) -> None:
        """Move the biases, given the global batch's load int64 [E]."""
        counts = load.double()
        self.biases += self.speed(now) * torch.sign(counts.mean() - counts).float()


@component("balancer", use="none")
@frozen(kw_only=True)
class NoneConfig:
    """Keep every bias at zero."""

    def build(self, ctx: Context, n_experts: int) -> Balancer:
        """Build it."""
        return Unbalanced(n_experts)


class Unbalanced(Balancer):
    """No balancing by bias."""

    adaptive = False
    zeros: Tensor

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        # Not persistent: a bias that is always zero is no state, and no parameter to count.
        self.register_buffer("zeros", torch.empty(n_experts, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the biases to zero."""
        self.zeros.zero_()

    def bias(self) -> Tensor:
        """Return zeros, float32 [E]."""
        return self.zeros

    def update(self, load: Tensor, now: Progress) -> None:
        """Do nothing."""
