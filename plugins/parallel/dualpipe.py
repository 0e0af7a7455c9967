"""Micro-batches from both ends of the pipeline at once (arXiv:2412.19437, section 3.2.1), and its V-shaped half.

With R ranks and flows 0 and 1 that begin at the first and the last rank, rank r holds stage r of flow 0 and stage
R - 1 - r of flow 1; in the middle of a step each rank works a forward of one flow beside a backward of the other. The
V shape folds the pipeline instead: one flow, of which rank r holds stages r and 2R - 1 - r. Both follow the order of
the authors' program (github.com/deepseek-ai/DualPipe); its eight parts are numbered below.
"""

from collections.abc import Callable

from attrs import frozen

from tangram.core.contracts import Pipeline, Promise
from tangram.core.plan import Action, Op, Plan, Slot, overlap
from tangram.core.registry import component
from tangram.core.simulator import Costs


@component("pipeline", use="dualpipe")
@frozen(kw_only=True)
class DualPipeConfig:
    """Micro-batches from both ends, forward and backward overlapped; two stages and twice the weights on each rank."""

    def build(self) -> Pipeline:
        """Build it."""
        return DualPipe()


@component("pipeline", use="dualpipev")
@frozen(kw_only=True)
class DualPipeVConfig:
    """DualPipe folded to a V: half the ranks for as many stages, each weight once."""

    def build(self) -> Pipeline:
        """Build it."""
        return DualPipeV()


class _Rank:
    """The actions of one rank, as its two halves are counted on.

    A half is the flow in DualPipe, and in the V the way down or up. Weight gradients that wait are taken first come,
    first served.
    """

    def __init__(self, slot: Callable[[int, int], Slot]) -> None:
        self._slot = slot
        self._forward, self._backward = [0, 0], [0, 0]
        self._waiting: list[Slot] = []
        self.actions: list[Action] = []

    def _next(self, counts: list[int], half: int) -> Slot:
        counts[half] += 1
        return self._slot(half, counts[half] - 1)

    def forward(self, half: int) -> None:
        self.actions.append(Action(Op.FORWARD, self._next(self._forward, half)))

    def backward(self, half: int, later: bool = False) -> None:
        slot = self._next(self._backward, half)
        self.actions.append(Action(Op.INPUT_BACKWARD if later else Op.BACKWARD, slot))
        if later:
            self._waiting.append(slot)

    def weight(self) -> None:
        self.actions.append(Action(Op.WEIGHT_BACKWARD, self._waiting.pop(0)))

    def pair(self, forward: int, backward: int) -> None:
        self.actions.append(overlap(self._next(self._forward, forward), self._next(self._backward, backward)))


def _order(slot: Callable[[int, int], Slot], edge: int, depth: int, pairs: int, turns: bool) -> tuple[Action, ...]:
    """Return what a rank does.

    Args:
        slot: The slot of a half and a number.
        edge: Ranks between this one and the nearer end of the pipeline, r'.
        depth: Ranks between an end and the middle, h.
        pairs: How often part 4 is done.
        turns: Whether it is a rank in the middle, whose first pair is two actions.
    """
    rank, inward = _Rank(slot), depth - edge - 1
    for _ in range(2 * inward):  # 1
        rank.forward(0)
    for _ in range(edge + 1):  # 2
        rank.forward(0)
        rank.forward(1)
    for _ in range(inward):  # 3
        rank.backward(1, later=True)
        rank.weight()
        rank.forward(1)
    for turn in range(pairs):  # 4
        if turn == 0 and turns:
            rank.forward(0)
            rank.backward(1)
        else:
            rank.pair(0, 1)
        rank.pair(1, 0)
    for _ in range(inward):  # 5
        rank.backward(1)
        rank.pair(1, 0)
    later = False
    for turn in range(edge + 1):  # 6: from its middle on, the gradients of weights wait
        later = later or (turn == (edge + 1) // 2 and edge % 2 == 1)
        rank.backward(1, later)
        later = later or (turn == (edge + 1) // 2 and edge % 2 == 0)
        rank.backward(0, later)
    for _ in range(inward):  # 7
        rank.weight()
        rank.backward(0, later=True)
    for _ in range(edge + 1):  # 8
        rank.weight()
    return tuple(rank.actions)


def _bubble(depth: int, costs: Costs) -> float | None:
    """Return (P/2 - 1)(FB + B - 3W), the bubble of the ranks in the middle.

    It holds where F = I, W is no longer, and a pair is between its longer part and both parts.
    """
    between = costs.backward <= costs.pair <= costs.forward + costs.backward
    if costs.latency or not between or costs.forward != costs.input or costs.weight > costs.forward:
        return None
    return (depth - 1) * (costs.pair + costs.backward - 3 * costs.weight)


class DualPipe:
    """Two flows towards each other."""

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        """Return the plan.

        Raises:
            ValueError: The ranks or the micro-batches are odd, or the latter are fewer than two for each rank.
        """
        if ranks < 2 or ranks % 2:
            raise ValueError(f"dualpipe needs an even number of pipeline ranks, not {ranks}")
        if microbatches % 2 or microbatches < 2 * ranks:
            raise ValueError(
                f"dualpipe on {ranks} ranks needs an even number of micro-batches, at least {2 * ranks}: not "
                f"{microbatches}"
            )
        actions = []
        for rank in range(ranks):
            edge, far = min(rank, ranks - 1 - rank), int(rank >= ranks // 2)

            def slot(half: int, number: int, rank: int = rank, far: int = far) -> Slot:
                flow = half ^ far
                return Slot(flow, ranks - 1 - rank if flow else rank, number)

            depth, pairs = ranks // 2, microbatches // 2 - ranks + edge + 1
            actions.append(_order(slot, edge, depth, pairs, edge == depth - 1))
        place = {(flow, stage): ranks - 1 - stage if flow else stage for flow in (0, 1) for stage in range(ranks)}
        return Plan(ranks, (microbatches // 2,) * 2, place, tuple(actions))

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        """Return (P/2 - 1)(FB + B - 3W) where it holds, and one live micro-batch more than ranks."""
        return Promise(_bubble(ranks // 2, costs), ranks + 1)


class DualPipeV:
    """One flow down the ranks and up again."""

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        """Return the plan.

        Raises:
            ValueError: The micro-batches are fewer than two for each rank.
        """
        if ranks < 1:
            raise ValueError(f"dualpipev needs at least one pipeline rank, not {ranks}")
        if microbatches < 2 * ranks:
            raise ValueError(f"dualpipev on {ranks} ranks needs at least {2 * ranks} micro-batches, not {microbatches}")
        actions = []
        for rank in range(ranks):

            def slot(half: int, number: int, rank: int = rank) -> Slot:
                return Slot(0, 2 * ranks - 1 - rank if half else rank, number)

            pairs = microbatches - 2 * ranks + rank + 1
            actions.append(_order(slot, rank, ranks, pairs, rank == ranks - 1))
        place = {(0, stage): min(stage, 2 * ranks - 1 - stage) for stage in range(2 * ranks)}
        return Plan(2 * ranks, (microbatches,), place, tuple(actions))

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        """Return (P - 1)(FB + B - 3W) of P ranks where it holds, and one live stage more than there are stages."""
        return Promise(_bubble(ranks, costs), 2 * ranks + 1)
