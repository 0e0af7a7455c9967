"""The dense feed-forward: SwiGLU (arXiv:2002.05202), as in DeepSeek-V3's first layers and shared experts."""

from attrs import evolve, field, frozen
from attrs.validators import gt
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import FeedForward
from tangram.core.records import Dispatched
from tangram.core.registry import component
from tangram.kernels import swiglu


@component("feedforward", use="swiglu")
@frozen(kw_only=True)
class SwiGLUConfig:
    """A feed-forward that every token passes through: down(silu(gate(x)) * up(x)).

    Attributes:
        hidden: Width I between the products.
    """

    hidden: int = field(validator=gt(0))

    def build(self, ctx: Context) -> FeedForward:
        """Build it."""
        return SwiGLU(self, ctx)


class SwiGLU(FeedForward):
    """down(silu(gate(x)) * up(x)), gate and up in one product, gate rows first."""

    def __init__(self, config: SwiGLUConfig, ctx: Context) -> None:
        super().__init__()
        self.recompute = ctx.recompute
        self.gate_up = ctx.linear(ctx.dim, 2 * config.hidden)
        self.down = ctx.linear(config.hidden, ctx.dim)

    def transform(self, x: Tensor) -> Tensor:
        """Return the output [..., D] for x [..., D]."""
        return self.down(self.recompute(swiglu, self.gate_up(x)))  # type: ignore[no-any-return]

    def compute(self, d: Dispatched) -> Dispatched:
        """Do the work."""
        assert d.hidden is not None
        return evolve(d, hidden=None, shared=self.transform(d.hidden))
