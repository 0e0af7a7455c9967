"""A pipeline schedule as data: who does what, in which order. Pure Python, no torch."""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import accumulate, pairwise

from attrs import frozen


class Op(Enum):
    """What can be done with a slot."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_BACKWARD = "I"
    WEIGHT_BACKWARD = "W"
    OVERLAP = "FB"


@frozen(order=True)
class Slot:
    """One micro-batch in one stage.

    Attributes:
        flow: Direction through the pipeline.
        stage: Slice of the layers.
        microbatch: Number of the micro-batch inside its flow.
    """

    flow: int
    stage: int
    microbatch: int


@frozen
class Action:
    """One thing that a rank does.

    Attributes:
        op: What is done.
        slot: With what; of an overlap, what goes forward.
        other: Of an overlap, what goes backward meanwhile.
    """

    op: Op
    slot: Slot
    other: Slot | None = None

    @property
    def parts(self) -> tuple["Action", ...]:
        """The forward and the backward of an overlap; any other action alone."""
        if self.other is None:
            return (self,)
        return Action(Op.FORWARD, self.slot), Action(Op.BACKWARD, self.other)

    def __str__(self) -> str:
        """Return for example `F>0`: the op, the flow (`>` or `<`) and the micro-batch; of an overlap `(F>7+B<3)`."""
        if self.other is not None:
            return "({}+{})".format(*self.parts)
        return f"{self.op.value}{'><'[self.slot.flow]}{self.slot.microbatch}"


def overlap(forward: Slot, backward: Slot) -> Action:
    """Return the action of one slot going forward beside another one going backward."""
    return Action(Op.OVERLAP, forward, backward)


@frozen
class Plan:
    """The order of one step's work.

    Attributes:
        stages: Slices of the layers.
        microbatches: Micro-batches of each flow.
        place: The rank of each (flow, stage).
        actions: What each rank does, in order.
    """

    stages: int
    microbatches: tuple[int, ...]
    place: Mapping[tuple[int, int], int]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.actions)

    @property
    def trains(self) -> bool:
        """Whether anything runs backward."""
        return any(action.op is not Op.FORWARD for rank in self.actions for action in rank)

    def parts(self, rank: int) -> list[Action]:
        """Return what a rank does in order, overlaps as their two parts."""
        return [part for action in self.actions[rank] for part in action.parts]

    def text(self, rank: int) -> list[str]:
        """Return what a rank does in words such as `F>0`; with `@stage` where it has more than one stage of a flow."""
        held = [flow for (flow, _), place in self.place.items() if place == rank]
        several = len(held) > len(set(held))

        def said(action: Action) -> str:
            if action.other is not None:
                return "({}+{})".format(*map(said, action.parts))
            return f"{action}@{action.slot.stage}" if several else str(action)

        return [said(action) for action in self.actions[rank]]

    def index(self, slot: Slot) -> int:
        """Return the number of the slot's micro-batch in the whole batch: flow 0 takes the first ones."""
        return sum(self.microbatches[: slot.flow]) + slot.microbatch


class PlanError(ValueError):
    """A plan that no executor may run; the message names the first fault."""


def validate(plan: Plan) -> None:
    """Check that every slot is worked once, on its rank, forward before input before weight backward.

    Raises:
        PlanError: Something is missing, doubled, misplaced or out of order.
    """
    expected = {
        Slot(flow, stage, microbatch)
        for flow, count in enumerate(plan.microbatches)
        for stage in range(plan.stages)
        for microbatch in range(count)
    }
    done: dict[tuple[Slot, Op], int] = {}
    for rank in range(plan.ranks):
        for position, action in enumerate(plan.parts(rank)):
            slot = action.slot
            if slot not in expected:
                raise PlanError(f"rank {rank}: {action} works a slot that does not exist: {slot}")
            if plan.place[slot.flow, slot.stage] != rank:
                raise PlanError(f"rank {rank}: {action} belongs to rank {plan.place[slot.flow, slot.stage]}")
            if (slot, action.op) in done:
                raise PlanError(f"rank {rank}: {action} is done twice")
            done[slot, action.op] = position
    for slot in sorted(expected):
        ops = [op for op in Op if (slot, op) in done]
        allowed = [[Op.FORWARD, Op.BACKWARD], [Op.FORWARD, Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD]]
        if ops not in (allowed if plan.trains else [[Op.FORWARD]]):
            raise PlanError(f"{slot} is worked as {[op.value for op in ops]}")
        for first, then in pairwise(ops):
            if done[slot, first] > done[slot, then]:
                raise PlanError(f"{slot}: {then.value} stands before {first.value}")


def one_stage_a_rank(ranks: int, microbatches: int, order: Callable[[int], Sequence[Action]]) -> Plan:
    """Return the plan of one flow in which rank r holds stage r and does `order(r)`.

    Raises:
        ValueError: There is no rank or no micro-batch.
    """
    if ranks < 1 or microbatches < 1:
        raise ValueError(f"a plan is of at least one rank and one micro-batch, not of {ranks} and {microbatches}")
    place = {(0, stage): stage for stage in range(ranks)}
    return Plan(ranks, (microbatches,), place, tuple(tuple(order(rank)) for rank in range(ranks)))


def in_turn(ahead: int, forward: Sequence[Action], backward: Sequence[Sequence[Action]]) -> list[Action]:
    """Return `ahead` forwards, then a forward, while there are any, and a backward in turn."""
    order = list(forward[:ahead])
    for number, then in enumerate(backward):
        order += [*forward[ahead + number : ahead + number + 1], *then]
    return order


def sequential(microbatches: int) -> Plan:
    """Return the plan of one rank: each micro-batch forward, then backward."""
    slots = [Slot(0, 0, microbatch) for microbatch in range(microbatches)]
    actions = [Action(op, slot) for slot in slots for op in (Op.FORWARD, Op.BACKWARD)]
    return Plan(stages=1, microbatches=(microbatches,), place={(0, 0): 0}, actions=(tuple(actions),))


def forward_only(place: Mapping[tuple[int, int], int], microbatches: int) -> Plan:
    """Return the plan that evaluates: every micro-batch through the stages of flow 0, on the ranks that hold them."""
    way = {at: rank for at, rank in place.items() if at[0] == 0}
    actions = tuple(
        tuple(
            Action(Op.FORWARD, Slot(0, stage, microbatch))
            for stage in sorted(stage for (_, stage), held in way.items() if held == rank)
            for microbatch in range(microbatches)
        )
        for rank in range(max(place.values()) + 1)
    )
    return Plan(stages=len(way), microbatches=(microbatches,), place=way, actions=actions)


def split(n_layers: int, n_stages: int) -> list[range]:
    """Divide layers 0 to n_layers - 1 into consecutive stages whose sizes differ by at most one, longer ones first.

    Raises:
        ValueError: A stage would be empty.
    """
    if not 1 <= n_stages <= n_layers:
        raise ValueError(f"{n_layers} layers do not make {n_stages} stages")
    size, longer = divmod(n_layers, n_stages)
    ends: Sequence[int] = list(accumulate(size + (stage < longer) for stage in range(n_stages)))
    return [range(end - size - (stage < longer), end) for stage, end in enumerate(ends)]
