"""The dispatcher of one process: tokens are sorted by expert and put back."""

from attrs import frozen
from torch import Tensor

from tangram.core.context import Context
from tangram.core.contracts import Dispatcher
from tangram.core.records import Rows
from tangram.core.registry import component
from tangram.kernels import Order, order_by_expert, permute, unpermute


@component("dispatcher", use="local")
@frozen(kw_only=True)
class LocalConfig:
    """Sort the tokens by expert; every expert lives on this rank."""

    def build(self, ctx: Context, n_experts: int) -> Dispatcher:
        """Build it."""
        ranks = ctx.parallel.layout.expert_ranks
        if ranks > 1:
            raise ValueError(f"local has every expert on its rank and none to send to; not for {ranks} expert ranks")
        return Local(n_experts)


class Local:
    """Sorts tokens by expert and back."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts

    def dispatch(self, x: Tensor, ids: Tensor) -> Rows:
        """Return a row for each (token, expert) of x [N, D] and ids [N, K], sorted by expert."""
        order = order_by_expert(ids, self.n_experts)
        return Rows(rows=permute(x, order), counts=order.counts, handle=order)

    def combine(self, rows: Rows, gates: Tensor) -> Tensor:
        """Return the sum [N, D] of each token's rows, weighted by gates [N, K]."""
        assert isinstance(rows.handle, Order)
        return unpermute(rows.rows, gates, rows.handle)
