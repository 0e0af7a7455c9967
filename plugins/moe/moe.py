"""DeepSeekMoE: shared experts for every token, routed experts for those a router chose (arXiv:2412.19437, eq. 12)."""

from attrs import evolve, field, frozen
from attrs.validators import ge, gt
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Balancer, BalancerConfig, DispatcherConfig, FeedForward, RouterConfig
from tangram.core.records import Dispatched, FeedForwardOut
from tangram.core.registry import component
from tangram.kernels import swiglu
from tangram.plugins.moe.swiglu import SwiGLU, SwiGLUConfig


@component("feedforward", use="moe")
@frozen(kw_only=True)
class MoEConfig:
    """Fine-grained routed experts beside shared ones; no token is ever dropped.

    Attributes:
        n_experts: Routed experts E.
        n_shared: Shared experts, built as one of `n_shared * hidden`; 0 for none.
        hidden: Width I of one expert.
        router: Chooses the experts.
        balancer: Keeps the biases that even the load.
        dispatcher: Sends the tokens to the experts.
    """

    n_experts: int = field(validator=gt(0))
    n_shared: int = field(default=0, validator=ge(0))
    hidden: int = field(validator=gt(0))
    router: RouterConfig
    balancer: BalancerConfig
    dispatcher: DispatcherConfig

    def build(self, ctx: Context) -> FeedForward:
        """Build it."""
        return MoE(self, ctx)


class MoE(FeedForward):
    """Routed and shared experts."""

    def __init__(self, config: MoEConfig, ctx: Context) -> None:
        super().__init__()
        n = config.n_experts
        self._n_experts, self.recompute = n, ctx.recompute
        self.router = ctx.child("router", config.router.build, n)
        self.balancer: Balancer = ctx.child("balancer", config.balancer.build, n)
        self.dispatcher = ctx.child("dispatcher", config.dispatcher.build, n)
        self.gate_up = ctx.grouped_linear(n, ctx.dim, 2 * config.hidden, input="dispatched")
        self.down = ctx.grouped_linear(n, config.hidden, ctx.dim)
        self.shared = None
        if config.n_shared:
            self.shared = SwiGLU(SwiGLUConfig(hidden=config.n_shared * config.hidden), ctx)

    def route(self, x: Tensor) -> Dispatched:
        """Choose experts for the tokens of x [B, S, D]."""
        return Dispatched(hidden=x, routing=self.router(x, self.balancer.bias()))

    def dispatch(self, d: Dispatched) -> Dispatched:
        """Send the tokens to their experts."""
        assert d.hidden is not None and d.routing is not None
        return evolve(d, rows=self.dispatcher.dispatch(d.hidden.flatten(0, 1), d.routing.ids))

    def compute(self, d: Dispatched) -> Dispatched:
        """Run the routed experts on their rows, and the shared ones on every token while the rows travel."""
        assert d.hidden is not None and d.rows is not None
        inner = self.recompute(swiglu, self.gate_up(d.rows.rows, d.rows.counts))
        rows = evolve(d.rows, rows=self.down(inner, d.rows.counts))
        shared = None if self.shared is None else self.shared.transform(d.hidden)
        return evolve(d, rows=rows, shared=shared)

    def combine(self, d: Dispatched) -> FeedForwardOut:
        """Bring the rows home and weigh them."""
        assert d.hidden is not None and d.rows is not None and d.routing is not None
        out = self.dispatcher.combine(d.rows, d.routing.gates).view_as(d.hidden)
        return FeedForwardOut(out if d.shared is None else out + d.shared, d.routing.stats)

    @property
    def n_experts(self) -> int:
        """Routed experts of the whole model."""
        return self._n_experts

    def active_parameters(self) -> int:
        """Return what one token passes through: all but the experts that were not chosen."""
        routed = sum(p.numel() for part in (self.gate_up, self.down) for p in part.parameters())
        idle = routed - routed * self.router.top_k // self._n_experts
        return super().active_parameters() - idle
