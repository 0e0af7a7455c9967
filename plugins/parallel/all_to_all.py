"""Expert parallelism by one exchange: every row goes straight to the rank of its expert."""

from attrs import field, frozen
from attrs.validators import in_
from torch import Tensor, stack

from tangram.core.context import Context, Parallel
from tangram.core.contracts import Dispatcher
from tangram.core.records import Rows
from tangram.core.registry import component
from tangram.kernels import Order, order_by_expert, permute, unpermute
from tangram.plugins.parallel.exchange import WIRES, Peers, Way, Wire, exchange, homeward, regroup


@component("dispatcher", use="all_to_all", capabilities=["ranks", "wire"])
@frozen(kw_only=True)
class AllToAllConfig:
    """Send a row for each token and expert straight to the rank that holds the expert.

    Attributes:
        wire: How rows travel: `compute`, as they are; `bf16`; or `fp8`, with a scale for each 1 x 128, on their way to
            the experts, and in bfloat16 home (gradients alike).
    """

    wire: Wire = field(default="compute", validator=in_(WIRES))

    def build(self, ctx: Context, n_experts: int) -> Dispatcher:
        """Build it."""
        return AllToAll(self.wire, ctx.parallel, n_experts)


@frozen(eq=False)
class _Sent:
    """How rows find home: their order there, the way they came, and how to put them as they came."""

    order: Order
    way: Way
    back: Order


class AllToAll:
    """Sorts tokens by expert, and so by rank; what arrives is sorted by expert, rank of origin and token.

    Args:
        wire: How rows travel.
        parallel: Which ranks share out the experts.
        n_experts: Experts of all ranks.

    Raises:
        ValueError: The experts cannot be shared out evenly.
    """

    def __init__(self, wire: Wire, parallel: Parallel, n_experts: int) -> None:
        self.wire, self.parallel, self.n_experts = wire, parallel, n_experts
        self.n_local = len(parallel.layout.share(n_experts))
        self.peers = Peers(parallel.layout.experts, parallel.groups)

    def dispatch(self, x: Tensor, ids: Tensor) -> Rows:
        """Return the rows for this rank's experts, of all ranks' tokens; here x is [N, D] and ids [N, K]."""
        order = order_by_expert(ids, self.n_experts)
        leaving = order.counts.view(-1, self.n_local)  # [ranks, experts of each]
        arriving = self.peers.swap(leaving)  # [ranks, experts here]
        sent = received = [ids.numel()]  # alone, no count need be read
        if len(self.peers.ranks) > 1:
            sent, received = stack([leaving.sum(1), arriving.sum(1)]).tolist()  # the one wait for the device
        way = Way(self.peers, sent, received)
        there, back = regroup(arriving, sum(received))
        rows = exchange(permute(x, order), way, self.wire, homeward(self.wire))
        return Rows(permute(rows, there), arriving.sum(0), _Sent(order, way, back))

    def combine(self, rows: Rows, gates: Tensor) -> Tensor:
        """Return the sum [N, D] of each token's rows, weighted by gates [N, K], which stay at home."""
        sent = rows.handle
        assert isinstance(sent, _Sent)
        home = exchange(permute(rows.rows, sent.back), sent.way.back, homeward(self.wire), self.wire)
        return unpermute(home, gates, sent.order)

    def among(self, slots: int) -> "AllToAll":
        """Return the dispatcher that sends to so many slots."""
        return AllToAll(self.wire, self.parallel, slots)
