"""Redundant experts: while a model only runs forward, busy experts are held by several ranks (arXiv:2412.19437, 3.4).

    with Redundancy(model, parallel, spare=32, every=100) as redundancy:
        for batch in batches:
            result = executor.run(batch, now)
            balance = redundancy.after(result.load)

In training each expert has one copy: so what is held here is dropped at the end.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from attrs import frozen
from torch import Tensor, nn

from tangram.core.context import Parallel
from tangram.core.contracts import Dispatcher, FeedForward
from tangram.core.model import Model
from tangram.core.records import Rows
from tangram.kernels import order_by_expert
from tangram.plugins.parallel.eplb import Placement, once, place
from tangram.plugins.parallel.exchange import Peers, Way


@runtime_checkable
class Placeable(Protocol):
    """A dispatcher that can as well send to slots, of which the ranks share out another number."""

    def among(self, slots: int) -> Dispatcher:
        """Return the dispatcher that sends to so many slots."""
        ...


@runtime_checkable
class _Dispatching(Protocol):
    """A feed-forward that sends its tokens to experts."""

    dispatcher: Dispatcher


class Redundant:
    """Sends the tokens of an expert to its slots in turn. Only forward: replicas serve, and are not trained.

    Args:
        dispatcher: Sends to slots.
        slots: Slots of each expert, int64 [E, most replicas].
        replicas: How many each has, int64 [E].
        first: With which of them this rank begins, so that not all ranks begin with the same.
    """

    def __init__(self, dispatcher: Dispatcher, slots: Tensor, replicas: Tensor, first: int) -> None:
        self.dispatcher, self.slots, self.replicas, self.first = dispatcher, slots, replicas, first

    def dispatch(self, x: Tensor, ids: Tensor) -> Rows:
        """Send x [N, D] to a slot of each of the experts `ids` [N, K].

        Raises:
            RuntimeError: A gradient might be wanted.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("replicas of experts serve and are not trained: run the model under torch.no_grad()")
        turn = order_by_expert(ids, len(self.slots)).inverse + self.first  # one after the other for each expert
        return self.dispatcher.dispatch(x, self.slots[ids, turn % self.replicas[ids]])

    def combine(self, rows: Rows, gates: Tensor) -> Tensor:
        """Return the sum [N, D] of each token's rows, weighted by gates [N, K]."""
        return self.dispatcher.combine(rows, gates)


@frozen
class Balance:
    """Rows of the busiest rank over those of the mean, under the load that was measured.

    Attributes:
        before: As experts lay then.
        after: As they lie now.
    """

    before: float
    after: float


class Redundancy:
    """Holds experts of a model more than once, and after every so many batches chooses anew which.

    Until the first choice they lie as in training. A choice that would not be better than what is there is not made.
    Each rank keeps its own experts besides what its slots hold.

    Args:
        model: What runs forward.
        parallel: Which ranks share out the experts.
        spare: Slots of all ranks beyond one for each expert.
        groups: Groups of experts that a node keeps together.
        nodes: Nodes of the ranks.
        every: Batches between two choices.

    Raises:
        ValueError: A dispatcher cannot send to slots, or the numbers do not divide.
    """

    def __init__(
        self, model: Model, parallel: Parallel, *, spare: int, groups: int = 1, nodes: int = 1, every: int
    ) -> None:
        self.spare, self.groups, self.nodes, self.every = spare, groups, nodes, every
        self._layout, self._batches, self._load = parallel.layout, 0, torch.zeros(model.load_shape, dtype=torch.int64)
        self._peers = Peers(parallel.layout.experts, parallel.groups)
        self._layers = {layer: each for layer, each in model.feedforwards().items() if each.n_experts}
        self._own = {layer: _Own.of(layer, each) for layer, each in self._layers.items()}
        self._placed = {layer: self._at_first(each.n_experts) for layer, each in self._layers.items()}

    def _at_first(self, n_experts: int) -> Placement:
        ranks = self._layout.expert_ranks
        place(torch.zeros(1, n_experts), n_experts + self.spare, self.groups, self.nodes, ranks)  # that it can be
        return once(1, n_experts, ranks)

    def __enter__(self) -> "Redundancy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let experts lie as in training."""
        for layer, own in self._own.items():
            own.restore(self._layers[layer])

    def after(self, load: Tensor) -> Mapping[int, Balance]:
        """Count a batch, and place the experts anew if it is time; then return the balance of each layer.

        Args:
            load: Tokens of each expert in the batch of all ranks, int64 [layers, E].
        """
        self._load += load.to(self._load.device)
        self._batches += 1
        if self._batches % self.every:
            return {}
        found = {layer: self._replaced(layer, self._load[layer : layer + 1]) for layer in self._layers}
        self._load.zero_()
        return found

    def _replaced(self, layer: int, load: Tensor) -> Balance:
        feedforward, ranks = self._layers[layer], self._layout.expert_ranks
        load, now = load[:, : feedforward.n_experts], self._placed[layer]
        wanted = place(load, feedforward.n_experts + self.spare, self.groups, self.nodes, ranks)
        before, after = (float(each.imbalance(load)) for each in (now, wanted))
        if after >= before:
            return Balance(before, before)
        self._placed[layer] = wanted
        self._own[layer].hold(feedforward, wanted, self._peers, self._layout.expert_rank)
        return Balance(before, after)


@frozen(eq=False)
class _Own:
    """What a layer has in training: its dispatcher, and the modules that hold experts with their weights."""

    dispatcher: Dispatcher
    weights: Mapping[nn.Module, nn.Parameter]

    @classmethod
    def of(cls, layer: int, feedforward: FeedForward) -> "_Own":
        if not isinstance(feedforward, _Dispatching) or not isinstance(feedforward.dispatcher, Placeable):
            raise ValueError(f"layer {layer} holds every expert once: name a dispatcher such as all_to_all")
        modules = [module for module in feedforward.modules() if getattr(module, "axis", "") == "expert"]
        return cls(feedforward.dispatcher, {module: module.get_parameter("weight") for module in modules})

    def hold(self, feedforward: FeedForward, placement: Placement, peers: Peers, rank: int) -> None:
        """Give the layer what its rank's slots are to hold, and a dispatcher that sends to slots."""
        assert isinstance(feedforward, _Dispatching) and isinstance(self.dispatcher, Placeable)
        experts = placement.experts[0].tolist()
        for module, weight in self.weights.items():
            held = _fetched(weight.detach(), experts, peers, rank)
            module.register_parameter("weight", nn.Parameter(held, requires_grad=False))
        device = next(iter(self.weights.values())).device
        slots, replicas = (each[0].to(device) for each in (placement.slots, placement.replicas))
        feedforward.dispatcher = Redundant(self.dispatcher.among(len(experts)), slots, replicas, rank)

    def restore(self, feedforward: FeedForward) -> None:
        """Give it back what it had."""
        assert isinstance(feedforward, _Dispatching)
        feedforward.dispatcher = self.dispatcher
        for module, weight in self.weights.items():
            module.register_parameter("weight", weight)


def _fetched(weight: Tensor, experts: Sequence[int], peers: Peers, rank: int) -> Tensor:
    """Return the weights of the experts in this rank's slots, from the ranks that have them in training.

    Args:
        weight: Those of this rank's share [share, ...].
        experts: Expert of each slot of all ranks.
        peers: Those ranks.
        rank: Which of them this is.
    """
    ranks, share = len(peers.ranks), len(weight)
    slots = len(experts) // ranks
    held = [experts[each * slots : (each + 1) * slots] for each in range(ranks)]
    given = [[expert % share for expert in some if expert // share == rank] for some in held]
    owners = [expert // share for expert in held[rank]]
    way = Way(peers, [len(some) for some in given], [owners.count(each) for each in range(ranks)])
    index = torch.tensor([i for some in given for i in some], dtype=torch.int64, device=weight.device)
    arrived = way.carry(weight.flatten(1).index_select(0, index))
    places = torch.tensor(owners, device=weight.device).argsort(stable=True)  # what came first is the first owner's
    return torch.empty_like(arrived).index_copy_(0, places, arrived).view(-1, *weight.shape[1:])
