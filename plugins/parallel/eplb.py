"""Where replicas of busy experts go: DeepSeek's load balancer for experts (github.com/deepseek-ai/EPLB).

Ranks have slots, each for one expert, and more slots than there are experts. An expert with much load is given several
slots, among which its tokens are spread; slots are packed on ranks so that these have about the same load. The
hierarchical policy keeps groups of experts together on a node, as routing that is limited to a few groups wants them;
the global one is the same with one group and one node.
"""

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor


@frozen(eq=False)
class Placement:
    """Which expert each slot holds.

    Attributes:
        experts: Expert of each slot, int64 [layers, slots]; ranks have as many consecutive slots each.
        slots: Slots of each expert, -1 after its last one, int64 [layers, E, most replicas].
        replicas: How many slots each expert has, int64 [layers, E].
        ranks: Ranks that share out the slots.
    """

    experts: Tensor
    slots: Tensor
    replicas: Tensor
    ranks: int

    def rows(self, load: Tensor) -> Tensor:
        """Return the rows of each rank [layers, ranks], float64, if load [layers, E] is spread evenly over replicas."""
        each = (load.double() / self.replicas).gather(1, self.experts)
        return each.view(len(each), self.ranks, -1).sum(2)

    def imbalance(self, load: Tensor) -> Tensor:
        """Return the rows of the busiest rank over those of the mean, float64 [layers]; 1 where there are none."""
        rows = self.rows(load)
        return torch.where(rows.sum(1) > 0, rows.amax(1) / rows.mean(1), 1.0)


def once(n_layers: int, n_experts: int, ranks: int) -> Placement:
    """Return the placement in which every expert has one slot, in order: how experts lie in training."""
    experts = torch.arange(n_experts).expand(n_layers, -1)
    return Placement(experts, experts.unsqueeze(2), torch.ones_like(experts), ranks)


def place(load: Tensor, slots: int, groups: int, nodes: int, ranks: int) -> Placement:
    """Return where replicas go under a load.

    Args:
        load: Tokens of each expert [layers, E].
        slots: Slots of all ranks, R.
        groups: Groups of consecutive experts, each of which stays on one node.
        nodes: Nodes, of consecutive ranks; with one group and one node the policy is the global one.
        ranks: Ranks of all nodes.

    Raises:
        ValueError: The numbers do not divide, there are fewer slots than experts, or a load is negative or not finite.
    """
    n_experts = load.shape[1]
    for some, many, words in (
        (groups, n_experts, "experts in {} groups"),
        (nodes, groups, "groups on {} nodes"),
        (nodes, ranks, "ranks on {} nodes"),
        (ranks, slots, "slots on {} ranks"),
    ):
        if some < 1 or many % some:
            raise ValueError(f"{many} {words.format(some)}: each must have as many")
    if slots < n_experts:
        raise ValueError(f"{slots} slots are fewer than {n_experts} experts")
    if not bool((load.isfinite() & (load >= 0)).all()):
        raise ValueError("a load is negative or not finite")
    experts = [_layer(each, slots, groups, nodes, ranks) for each in load.double().tolist()]
    return _placement(torch.tensor(experts).view(-1, slots), n_experts, ranks)


def _placement(experts: Tensor, n_experts: int, ranks: int) -> Placement:
    replicas = experts.new_zeros(len(experts), n_experts).scatter_add_(1, experts, torch.ones_like(experts))
    found = experts.new_full((*replicas.shape, int(replicas.max())), -1)
    for layer, held in enumerate(experts.tolist()):
        taken = [0] * n_experts
        for slot, expert in enumerate(held):
            found[layer, expert, taken[expert]] = slot
            taken[expert] += 1
    return Placement(experts, found, replicas, ranks)


def _layer(load: Sequence[float], slots: int, groups: int, nodes: int, ranks: int) -> list[int]:
    """Return the expert of each slot."""
    size, held = len(load) // groups, list[int]()
    heavy = [sum(load[group * size : (group + 1) * size]) for group in range(groups)]
    for some in _packed(heavy, nodes):
        members = [group * size + i for group in some for i in range(size)]
        copies = _replicated([load[expert] for expert in members], slots // nodes)
        share = [load[members[i]] / copies.count(i) for i in copies]
        held += [members[copies[slot]] for rank in _packed(share, ranks // nodes) for slot in rank]
    return held


def _packed(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Return items in packs of as many each: the heaviest first, into the lightest pack that has room."""
    size = len(weights) // packs
    if size == 1:
        return [[item] for item in range(packs)]
    found, heavy = [list[int]() for _ in range(packs)], [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        pack = min((pack for pack in range(packs) if len(found[pack]) < size), key=heavy.__getitem__)
        found[pack].append(item)
        heavy[pack] += weights[item]
    return found


def _replicated(load: Sequence[float], slots: int) -> list[int]:
    """Return what each slot holds: everything once, then always what has most load for each of its slots."""
    held, copies = list(range(len(load))), [1] * len(load)
    while len(held) < slots:
        busiest = max(range(len(load)), key=lambda i: load[i] / copies[i])
        held.append(busiest)
        copies[busiest] += 1
    return held
