"""One transformer block, written once as phases (arXiv:2412.19437, figure 2)."""

from typing import TYPE_CHECKING, TypeVar

from attrs import evolve
from torch import Tensor, nn

from tangram.core.context import Context
from tangram.core.contracts import Cache
from tangram.core.layers import norm
from tangram.core.records import Carry, FeedForwardOut, Phase

if TYPE_CHECKING:
    from tangram.core.experiment import BlockConfig

_T = TypeVar("_T")


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: "BlockConfig", ctx: Context) -> None:
        super().__init__()
        self.layer, self.recompute = ctx.layer, ctx.recompute
        self.attention_norm = norm(ctx, ctx.dim)
        self.attention = ctx.child("attention", config.attention.build)
        self.feedforward_norm = norm(ctx, ctx.dim)
        self.feedforward = ctx.child("feedforward", config.feedforward.build)

    def phases(self, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> list[Phase]:
        """Return the block as `attend`, `dispatch`, `compute`, `combine`; positions and segments are int64 [B, S]."""

        def attended(hidden: Tensor) -> Tensor:
            normed = self.recompute(self.attention_norm, hidden)
            return hidden + self.attention(normed, positions, segments, cache)

        def attend(carry: Carry) -> Carry:
            hidden = _given(carry.hidden)
            # A cache is written, once; and the router's choice is kept, for what went to the experts has gone.
            hidden = self.recompute.whole(attended, hidden) if cache is None else attended(hidden)
            dispatched = self.feedforward.route(self.recompute(self.feedforward_norm, hidden))
            return evolve(carry, hidden=hidden, dispatched=dispatched)

        def dispatch(carry: Carry) -> Carry:
            return evolve(carry, dispatched=self.feedforward.dispatch(_given(carry.dispatched)))

        def compute(carry: Carry) -> Carry:
            dispatched = self.recompute.whole(self.feedforward.compute, _given(carry.dispatched))
            return evolve(carry, dispatched=dispatched)

        def combine(carry: Carry) -> Carry:
            out, stats = self.feedforward.combine(_given(carry.dispatched))
            counted = carry.stats if stats is None else (*carry.stats, (self.layer, stats))
            return evolve(carry, hidden=_given(carry.hidden) + out, dispatched=None, stats=counted)

        return [
            Phase("attend", "compute", attend),
            Phase("dispatch", "comm", dispatch),
            Phase("compute", "compute", compute),
            Phase("combine", "comm", combine),
        ]

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor, cache: Cache | None = None) -> FeedForwardOut:
        """Return the residual stream [B, S, D] after the block, and its router's statistics."""
        carry = Carry(hidden=x)
        for phase in self.phases(positions, segments, cache):
            carry = phase.fn(carry)
        return FeedForwardOut(_given(carry.hidden), carry.stats[0][1] if carry.stats else None)

    if TYPE_CHECKING:
        __call__ = forward


def _given(value: _T | None) -> _T:
    assert value is not None
    return value
