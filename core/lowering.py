"""From what each rank computes to what it also sends, receives and sums. Pure Python, no torch.

Between two ranks messages go over one channel for each direction, and some networks deliver them in the order in which
they were sent, whatever they are. So a rank receives in its sender's order and not in the order in which it needs what
comes: before the message that it needs, all that the sender sent before.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum

from attrs import evolve, frozen

from tangram.core.plan import Action, Op, Plan, PlanError, Slot
from tangram.core.simulator import needs, simulate


class Kind(Enum):
    """What passes between ranks."""

    HIDDEN = "hidden states, to the next stage"
    GRADIENT = "their gradient, to the stage before"


@frozen(order=True)
class Message:
    """What one rank sends another.

    Attributes:
        backward: Whether it is a gradient on its way back.
        slot: The slot that needs it.
        source: The rank that sends it.
        target: The rank that receives it.
    """

    backward: bool
    slot: Slot
    source: int
    target: int

    @property
    def kind(self) -> Kind:
        """What it is."""
        return Kind.GRADIENT if self.backward else Kind.HIDDEN

    def __str__(self) -> str:
        """Return for example `hidden F>3@2 from 1 to 2`."""
        action = Action(Op.INPUT_BACKWARD if self.backward else Op.FORWARD, self.slot)
        return f"{self.kind.name.lower()} {action}@{self.slot.stage} from {self.source} to {self.target}"


@frozen
class Send:
    """Give a message to the network and go on."""

    message: Message


@frozen
class Receive:
    """Say where a message is to be put and go on; the action that needs it waits."""

    message: Message


@frozen
class Reduce:
    """Sum the gradients of a stage's parameters over all who hold them."""

    stage: int


Instruction = Action | Send | Receive | Reduce


@frozen
class Lowered:
    """What every rank does, in order.

    Attributes:
        plan: What it was made from.
        ranks: The instructions of each rank.
    """

    plan: Plan
    ranks: tuple[tuple[Instruction, ...], ...]

    @property
    def channels(self) -> list[tuple[int, int]]:
        """Which rank sends to which, in an order that is the same on every rank."""
        sent = [each.message for rank in self.ranks for each in rank if isinstance(each, Send)]
        return sorted({(message.source, message.target) for message in sent})


def needed(plan: Plan, rank: int, action: Action) -> list[Message]:
    """Return the messages that an action needs, of an overlap those of both parts."""
    return [
        Message(need.op is not Op.FORWARD, part.slot, source, rank)
        for part in action.parts
        for need in needs(plan, part)
        if (source := plan.place[need.slot.flow, need.slot.stage]) != rank
    ]


def given(plan: Plan, rank: int, part: Action) -> Message | None:
    """Return the message that goes out once a forward or a backward is done; None if another rank needs nothing."""
    step = {Op.FORWARD: 1, Op.BACKWARD: -1, Op.INPUT_BACKWARD: -1}.get(part.op)
    stage = part.slot.stage + (step or 0)
    if step is None or not 0 <= stage < plan.stages:
        return None
    target = plan.place[part.slot.flow, stage]
    return None if target == rank else Message(step < 0, evolve(part.slot, stage=stage), rank, target)


def lower(plan: Plan) -> Lowered:
    """Derive every transfer and every reduction of a plan.

    A rank sends what an action gave right after it, and sums gradients at the end, stage by stage in the order of the
    model: two ranks that hold the same stages finish them in different orders.
    """
    sent: dict[tuple[int, int], list[Message]] = defaultdict(list)
    for rank in range(plan.ranks):
        for part in plan.parts(rank):
            message = given(plan, rank, part)
            if message is not None:
                sent[message.source, message.target].append(message)
    return Lowered(plan, tuple(_of_rank(plan, rank, sent) for rank in range(plan.ranks)))


def _of_rank(plan: Plan, rank: int, sent: Mapping[tuple[int, int], Sequence[Message]]) -> tuple[Instruction, ...]:
    order = {message: at for channel in sent.values() for at, message in enumerate(channel)}
    posted: dict[int, int] = defaultdict(int)  # how many of each source's messages were asked for
    done: list[Instruction] = []
    for action in plan.actions[rank]:
        for message in needed(plan, rank, action):
            channel = sent[message.source, rank]
            upto = order[message] + 1
            done += [Receive(each) for each in channel[posted[message.source] : upto]]
            posted[message.source] = max(posted[message.source], upto)
        done.append(action)
        done += [Send(out) for part in action.parts if (out := given(plan, rank, part)) is not None]
    if plan.trains:
        held = {stage for (_, stage), place in plan.place.items() if place == rank}
        done += [Reduce(stage) for stage in sorted(held)]
    return tuple(done)


def check(lowered: Lowered) -> None:
    """Prove that a lowered plan can be run to its end.

    Every message is sent once and received once, on each channel in one order, before the action that needs it; no
    rank waits for ever; ranks that share a stage sum it in one order.

    Raises:
        PlanError: It cannot; the message names the first fault.
    """
    plan = lowered.plan
    sent, received = defaultdict(list), defaultdict(list)
    for rank, instructions in enumerate(lowered.ranks):
        here: set[Message] = set()
        for instruction in instructions:
            if isinstance(instruction, Send):
                sent[instruction.message.source, instruction.message.target].append(instruction.message)
            elif isinstance(instruction, Receive):
                received[instruction.message.source, instruction.message.target].append(instruction.message)
                here.add(instruction.message)
            elif isinstance(instruction, Action):
                unasked = [message for message in needed(plan, rank, instruction) if message not in here]
                if unasked:
                    raise PlanError(f"rank {rank}: {instruction} needs the {unasked[0]}, and did not ask for it")
    for source, target in sent.keys() | received.keys():
        pairs = zip(sent[source, target], received[source, target], strict=False)
        for out, back in pairs:
            if out != back:
                raise PlanError(f"rank {source} sends the {out} where rank {target} expects the {back}")
        if len(sent[source, target]) != len(received[source, target]):
            raise PlanError(f"rank {target} does not receive all that rank {source} sends it")
    simulate(plan)
    for rank, instructions in enumerate(lowered.ranks):
        stages = [instruction.stage for instruction in instructions if isinstance(instruction, Reduce)]
        if stages != sorted(stages):
            raise PlanError(f"rank {rank} sums its stages out of order: {stages}")
