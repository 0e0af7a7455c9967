"""Expert parallelism by two hops: between nodes a token travels once, however many of its experts are there."""

import torch
from attrs import field, frozen
from attrs.validators import gt, in_
from torch import Tensor

from tangram.core.context import Context, Parallel
from tangram.core.contracts import Dispatcher
from tangram.core.records import Rows
from tangram.core.registry import component
from tangram.kernels import Order, order_by_expert, permute, unpermute
from tangram.plugins.parallel.exchange import WIRES, Peers, Way, Wire, exchange, homeward, regroup


@component("dispatcher", use="hierarchical", capabilities=["ranks", "wire"])
@frozen(kw_only=True)
class HierarchicalConfig:
    """Send a token once to each node of its experts, and on inside the node (arXiv:2412.19437, section 3.2.2).

    Attributes:
        node_ranks: Ranks of a node, which are neighbours.
        wire: How rows travel: `compute`, as they are; `bf16`; or `fp8`, with a scale for each 1 x 128, on their way to
            the experts, and in bfloat16 home (gradients alike).
    """

    node_ranks: int = field(default=8, validator=gt(0))
    wire: Wire = field(default="compute", validator=in_(WIRES))

    def build(self, ctx: Context, n_experts: int) -> Dispatcher:
        """Build it."""
        return Hierarchical(self.node_ranks, self.wire, ctx.parallel, n_experts)


@frozen(eq=False)
class Hops:
    """How rows find home, and what it cost.

    Attributes:
        home: The copies of this rank's tokens, sorted by node.
        across: Their way to the nodes.
        relay: The rows that this rank passed on, sorted by expert of its node.
        within: Their way inside the node.
        back: How to put the rows of this rank's experts as they came.
        crossed: Copies that this rank sent to other nodes.
    """

    home: Order
    across: Way
    relay: Order
    within: Way
    back: Order
    crossed: int


class Hierarchical:
    """Sends a copy of a token for each node of its experts to the rank with its own place there, which passes it on.

    On the way back that rank sums the token's rows, weighted by the gates, so that one vector goes home for each copy.
    For this the gates travel with the copy when it is brought home: K numbers. What arrives at an expert is sorted by
    rank of origin and token, as if it had come straight.

    Args:
        node_ranks: Ranks of a node.
        wire: How rows travel.
        parallel: Which ranks share out the experts.
        n_experts: Experts of all ranks.

    Raises:
        ValueError: The experts cannot be shared out evenly, or nodes and expert ranks do not fit.
    """

    def __init__(self, node_ranks: int, wire: Wire, parallel: Parallel, n_experts: int) -> None:
        layout = parallel.layout
        size = min(node_ranks, layout.expert_ranks)
        if node_ranks % size or layout.expert_ranks % size:
            raise ValueError(
                f"{layout.expert_ranks} expert ranks and nodes of {node_ranks} ranks do not fit: set node_ranks to a "
                "divisor or a multiple of parallel.expert_ranks"
            )
        self.node_ranks, self.wire, self.parallel = node_ranks, wire, parallel
        self.n_experts, self.n_local = n_experts, len(layout.share(n_experts))
        self.node, place = divmod(layout.expert_rank, size)
        self.per_node = size * self.n_local
        self.across = Peers(layout.experts[place::size], parallel.groups)
        self.within = Peers(layout.experts[self.node * size : (self.node + 1) * size], parallel.groups)

    def dispatch(self, x: Tensor, ids: Tensor) -> Rows:
        """Return the rows for this rank's experts, of all ranks' tokens; here x is [N, D] and ids [N, K]."""
        node = ids // self.per_node
        again = (node.unsqueeze(2) == node.unsqueeze(1)).tril(-1).any(2)  # a node that an earlier slot names [N, K]
        arriving, counts, across, within = self._ways(ids, node, again)
        home = order_by_expert(torch.where(again, -1, node), len(self.across.ranks), sum(across.sent))
        places = across.carry(ids.index_select(0, home.index)) - self.node * self.per_node
        here = (places >= 0) & (places < self.per_node)
        relay = order_by_expert(torch.where(here, places, -1), self.per_node, sum(within.sent))
        there, back = regroup(arriving, sum(within.received))
        copies = self._out(permute(x, home), across)
        rows = permute(self._out(permute(copies, relay), within), there)
        crossed = sum(across.sent) - across.sent[self.node]
        return Rows(rows, counts, Hops(home, across, relay, within, back, crossed))

    def combine(self, rows: Rows, gates: Tensor) -> Tensor:
        """Return the sum [N, D] of each token's rows, weighted by gates [N, K]."""
        hops = rows.handle
        assert isinstance(hops, Hops)
        returned = self._home(permute(rows.rows, hops.back), hops.within)
        weights = exchange(permute(gates, hops.home), hops.across, "compute", "compute")  # [copies here, K]
        sums = self._home(unpermute(returned, weights, hops.relay), hops.across)
        return unpermute(sums, torch.ones_like(gates), hops.home)

    def among(self, slots: int) -> "Hierarchical":
        """Return the dispatcher that sends to so many slots."""
        return Hierarchical(self.node_ranks, self.wire, self.parallel, slots)

    def _out(self, rows: Tensor, way: Way) -> Tensor:
        return exchange(rows, way, self.wire, homeward(self.wire))

    def _home(self, rows: Tensor, way: Way) -> Tensor:
        return exchange(rows, way.back, homeward(self.wire), self.wire)

    def _ways(self, ids: Tensor, node: Tensor, again: Tensor) -> tuple[Tensor, Tensor, Way, Way]:
        """Return rows that arrive [peers, experts here, nodes], and by expert, and how many go which way."""
        nodes, places = len(self.across.ranks), len(self.within.ranks)
        copies = ids.new_zeros(nodes).scatter_add_(0, node.flatten(), (~again).flatten().long())
        chosen = ids.new_zeros(self.n_experts).scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())
        told = torch.cat([copies.unsqueeze(1), chosen.view(nodes, -1)], 1)
        heard = self.across.swap(told)  # [nodes, 1 + experts of this node]
        leaving = heard[:, 1:].view(nodes, places, self.n_local).permute(1, 2, 0)  # [peers, experts of each, nodes]
        arriving = self.within.swap(leaving.contiguous())
        numbers = [len(ids)] * 2 + [ids.numel()] * 2  # alone, no count need be read
        if nodes * places > 1:  # the one wait for the device
            numbers = torch.cat([copies, heard[:, 0], leaving.sum((1, 2)), arriving.sum((1, 2))]).tolist()
        parts = iter(numbers)
        across = Way(self.across, *([next(parts) for _ in range(nodes)] for _ in range(2)))
        within = Way(self.within, *([next(parts) for _ in range(places)] for _ in range(2)))
        return arriving, arriving.sum((0, 2)), across, within
