"""When each action of a plan would run, given what each kind costs. Pure Python, no torch."""

from collections.abc import Mapping

from attrs import evolve, field, frozen
from attrs.validators import ge

from tangram.core.plan import Action, Op, Plan, PlanError, Slot


@frozen(kw_only=True)
class Costs:
    """What one action of one stage takes, in any unit of time.

    Attributes:
        forward: F.
        input: I, the gradient of the input.
        weight: W, the gradients of the weights; a whole backward takes I + W.
        overlap: FB, a forward and a whole backward side by side; F + I + W if left out.
        latency: From the end of an action to the start of one that needs it on another rank.
    """

    forward: float = field(default=1.0, validator=ge(0.0))
    input: float = field(default=1.0, validator=ge(0.0))
    weight: float = field(default=1.0, validator=ge(0.0))
    overlap: float | None = None
    latency: float = field(default=0.0, validator=ge(0.0))

    @property
    def backward(self) -> float:
        """B, a whole backward."""
        return self.input + self.weight

    @property
    def pair(self) -> float:
        """FB, what an overlap takes."""
        return self.forward + self.backward if self.overlap is None else self.overlap

    def fill(self, ranks: int) -> float | None:
        """Return (P - 1)(F + B), what filling and draining one stage a rank takes; None if messages take time."""
        return None if self.latency else (ranks - 1) * (self.forward + self.backward)

    def of(self, action: Action) -> float:
        """Return what an action takes."""
        match action.op:
            case Op.FORWARD:
                return self.forward
            case Op.BACKWARD:
                return self.backward
            case Op.INPUT_BACKWARD:
                return self.input
            case Op.WEIGHT_BACKWARD:
                return self.weight
            case Op.OVERLAP:
                return self.pair


@frozen
class Span:
    """An action and when it runs."""

    action: Action
    start: float
    end: float


@frozen
class Timeline:
    """When every action of a plan runs.

    Attributes:
        spans: Of each rank, in order.
        peak: Of each rank, the most slots that are alive at once: from their forward to the last of their backward.
    """

    spans: tuple[tuple[Span, ...], ...]
    peak: tuple[int, ...]

    @property
    def makespan(self) -> float:
        """When the last action ends."""
        return max((rank[-1].end for rank in self.spans if rank), default=0.0)

    @property
    def bubble(self) -> tuple[float, ...]:
        """How long each rank has nothing to do."""
        return tuple(self.makespan - sum(span.end - span.start for span in rank) for rank in self.spans)


def needs(plan: Plan, part: Action) -> list[Action]:
    """Return what must have ended before a forward or backward can begin, besides what stands before it on its rank.

    Of a backward in halves it is the half that gives the gradient of the input.
    """
    slot = part.slot
    if part.op is Op.FORWARD:
        return [Action(Op.FORWARD, evolve(slot, stage=slot.stage - 1))] if slot.stage else []
    if part.op is Op.WEIGHT_BACKWARD:
        return [Action(Op.INPUT_BACKWARD, slot)]
    own = Action(Op.FORWARD, slot)
    if slot.stage + 1 == plan.stages:
        return [own]
    return [own, Action(Op.INPUT_BACKWARD, evolve(slot, stage=slot.stage + 1))]


def simulate(plan: Plan, costs: Costs | None = None) -> Timeline:
    """Return when each action runs: when its rank is free and what it needs has ended, with its way if it has one.

    Both parts of an overlap begin and end with it.

    Raises:
        PlanError: Ranks wait for each other for ever; the message names what each waits for.
    """
    costs = costs or Costs()
    ended: dict[tuple[Op, Slot], float] = {}
    spans: list[list[Span]] = [[] for _ in plan.actions]
    at = [0] * plan.ranks
    while any(place < len(rank) for place, rank in zip(at, plan.actions, strict=True)):
        moved = False
        for rank, actions in enumerate(plan.actions):
            while at[rank] < len(actions):
                start = _ready(plan, rank, actions[at[rank]], ended, costs.latency)
                if start is None:
                    break
                if spans[rank]:
                    start = max(start, spans[rank][-1].end)
                span = Span(actions[at[rank]], start, start + costs.of(actions[at[rank]]))
                spans[rank].append(span)
                for part in span.action.parts:
                    ended[_given(part)] = span.end
                at[rank] += 1
                moved = True
        if not moved:
            waiting = [str(rank[place]) for place, rank in zip(at, plan.actions, strict=True) if place < len(rank)]
            raise PlanError(f"every rank waits: the next actions are {', '.join(waiting)}")
    return Timeline(tuple(map(tuple, spans)), tuple(_peak(plan, rank) for rank in range(plan.ranks)))


def _given(part: Action) -> tuple[Op, Slot]:
    """Return under which name others ask for what a part gives: a whole backward gives the gradient of the input."""
    return (Op.INPUT_BACKWARD if part.op is Op.BACKWARD else part.op), part.slot


def _ready(
    plan: Plan, rank: int, action: Action, ended: Mapping[tuple[Op, Slot], float], latency: float
) -> float | None:
    """Return when all that an action needs has arrived; None if some of it has not ended."""
    start = 0.0
    for part in action.parts:
        for need in needs(plan, part):
            end = ended.get((need.op, need.slot))
            if end is None:
                return None
            far = plan.place[need.slot.flow, need.slot.stage] != rank
            start = max(start, end + latency * far)
    return start


def _peak(plan: Plan, rank: int) -> int:
    alive = most = 0
    for action in plan.actions[rank]:
        # A pair holds what goes forward beside what goes backward.
        for part in action.parts:
            alive += part.op is Op.FORWARD
            most = max(most, alive)
        for part in action.parts:
            alive -= part.op in (Op.BACKWARD, Op.WEIGHT_BACKWARD)
    return most
