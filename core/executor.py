"""Runs any plan over any program. It knows phases and carries, nothing of models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from attrs import define, evolve, field
from torch import Tensor

from tangram.core.channels import Channels
from tangram.core.context import Parallel
from tangram.core.islands import Link, back, cut
from tangram.core.lanes import Lanes
from tangram.core.lowering import Instruction, Lowered, Receive, Reduce, Send, check, lower, needed
from tangram.core.plan import Action, Op, Plan, Slot, validate
from tangram.core.records import Batch, Carry, Phase, Progress, Result


class Program(Protocol):
    """What is run: stages of phases. A `Model` is one."""

    @property
    def n_stages(self) -> int:
        """Slices of the layers."""
        ...

    @property
    def dim(self) -> int:
        """Width of the hidden states that pass from stage to stage."""
        ...

    @property
    def compute(self) -> torch.dtype:
        """Their dtype."""
        ...

    @property
    def load_shape(self) -> tuple[int, int]:
        """Layers (with those of the objectives) and the largest number of experts."""
        ...

    def phases(self, stage: int, batch: Batch, now: Progress) -> Sequence[Phase]:
        """Return the phases of one stage for one micro-batch."""
        ...

    def weights(self, now: Progress) -> Mapping[str, float]:
        """Return each loss's weight: the gradient put on it."""
        ...


@define(eq=False)
class _Live:
    """A slot between its forward and its backward."""

    entry: Tensor | None
    carry: Carry
    islands: list[tuple[str, list[Link]]] = field(factory=list)  # each with the lane of the phase before the cut
    lane: str = "compute"  # of the last phase
    pending: list[Callable[[], None]] = field(factory=list)


class Executor:
    """One step of work, in the order of a plan.

    Args:
        program: What is run.
        plans: The plan for a number of micro-batches.
        micro_sequences: Sequences of a micro-batch.
        parallel: Which rank this is, and where its weight gradients wait.
        reduce: Sums the gradients over all who hold them.
    """

    def __init__(
        self,
        program: Program,
        plans: Callable[[int], Plan],
        micro_sequences: int,
        parallel: Parallel,
        reduce: Callable[[], None],
    ) -> None:
        self.program, self.micro_sequences, self.parallel = program, micro_sequences, parallel
        self._lanes = Lanes(parallel.device)
        self._plans, self._checked = plans, dict[int, Lowered]()
        self._reduce = reduce
        self._channels = Channels(program.compute, parallel, program.n_stages)

    def lowered(self, microbatches: int) -> Lowered:
        """Return what every rank does for so many micro-batches, checked and its channels opened once."""
        if microbatches not in self._checked:
            plan = self._plans(microbatches)
            validate(plan)
            if plan.stages != self.program.n_stages:
                raise ValueError(f"the plan has {plan.stages} stages and the program {self.program.n_stages}")
            if any(self.parallel.layout.place.get(at) != rank for at, rank in plan.place.items()):
                raise ValueError("the plan places a stage where the layout does not")
            lowered = lower(plan)
            check(lowered)
            self._channels.open(lowered.channels)
            self._checked[microbatches] = lowered
        return self._checked[microbatches]

    def run(self, batch: Batch, now: Progress) -> Result:
        """Work this rank's part of the global batch; gradients are left in the parameters, reduced.

        Each data rank takes as many micro-batches, of consecutive rows; where an evaluation's do not suffice, the last
        ones are smaller or empty.
        """
        layout = self.parallel.layout
        count = -(-len(batch.tokens) // (self.micro_sequences * layout.data_ranks))
        first = layout.data_rank * count * self.micro_sequences
        lowered = self.lowered(count)
        plan = lowered.plan
        with nullcontext() if plan.trains else torch.no_grad():
            mine = batch.rows(first, first + count * self.micro_sequences).to(self.parallel.device)
            step = _Step(self.program, plan, mine, now, self.parallel, self.micro_sequences, self._lanes)
            for instruction in lowered.ranks[layout.pipeline_rank]:
                self._follow(instruction, step)
            self._channels.flush()
        if plan.trains:
            self._reduce()
        return step.result()

    def _follow(self, instruction: Instruction, step: "_Step") -> None:
        match instruction:
            case Send(message):
                self._channels.send(message, step.waiting(message.backward).pop(message.slot))
            case Receive(message):
                self._channels.receive(message, (*step.micro(message.slot).tokens.shape, self.program.dim))
            case Action():
                for message in needed(step.plan, self.parallel.layout.pipeline_rank, instruction):
                    step.waiting(message.backward)[message.slot] = self._channels.take(message)
                step.do(instruction)
            case Reduce():
                pass  # the sharding sums all stages, in this order


class _Step:
    """The state of one run of a plan."""

    def __init__(
        self,
        program: Program,
        plan: Plan,
        batch: Batch,
        now: Progress,
        parallel: Parallel,
        micro_sequences: int,
        lanes: Lanes,
    ) -> None:
        self.program, self.plan, self.batch, self.now = program, plan, batch, now
        self.parallel, self.micro_sequences, self.lanes = parallel, micro_sequences, lanes
        self.weights = program.weights(now)
        self.live: dict[Slot, _Live] = {}
        self.outputs: dict[Slot, Tensor] = {}  # hidden states on their way to the next stage
        self.grads: dict[Slot, Tensor] = {}  # gradients on their way to the stage before
        self.losses: dict[str, list[Tensor]] = {}
        self.load = torch.zeros(program.load_shape, dtype=torch.int64, device=batch.tokens.device)
        self.peak = 0
        pairs = [action for rank in plan.actions for action in rank if action.other is not None]
        self.paired = {part.slot for action in pairs for part in action.parts}

    def waiting(self, backward: bool) -> dict[Slot, Tensor]:
        """Return what waits for the slots that need it: hidden states, or their gradients."""
        return self.grads if backward else self.outputs

    def do(self, action: Action) -> None:
        match action.op:
            case Op.FORWARD:
                self.lanes.side_by_side(self._forward(action.slot))
            case Op.BACKWARD:
                self.lanes.side_by_side(self._backward(action.slot))
            case Op.INPUT_BACKWARD:
                with self.parallel.weight_grads.deferred() as pending:
                    self.lanes.side_by_side(self._backward(action.slot))
                self.live[action.slot] = _Live(None, Carry(), pending=pending)
            case Op.WEIGHT_BACKWARD:
                for add in self.live.pop(action.slot).pending:
                    add()
            case Op.OVERLAP:
                assert action.other is not None
                self.lanes.side_by_side(self._forward(action.slot), self._backward(action.other))

    def micro(self, slot: Slot) -> Batch:
        """Return the micro-batch of a slot."""
        start = self.plan.index(slot) * self.micro_sequences
        return self.batch.rows(start, start + self.micro_sequences)

    def _forward(self, slot: Slot) -> Iterator[str]:
        """Work a slot forward, and before each phase yield its lane: that of a pair alone leaves the computing one."""
        entry, paired = None, slot in self.paired
        if slot.stage > 0:
            entry = self.outputs.pop(slot).detach()
            entry.requires_grad_(torch.is_grad_enabled())
        carry, islands, lane = Carry(hidden=entry), list[tuple[str, list[Link]]](), ""
        for phase in self.program.phases(slot.stage, self.micro(slot), self.now):
            yield (now := phase.lane if paired else "compute")
            if lane and paired:
                carry, links = cut(carry)
                islands.append((lane, links))
            if lane != now:
                self.lanes.hold(carry)
            carry, lane = phase.fn(carry), now
        yield "compute"  # what all slots add to
        self.lanes.hold(carry)
        for layer, stats in carry.stats:
            counts = stats.load.sum(0)
            self.load[layer, : len(counts)] += counts
        for name, loss in carry.losses:
            self.losses.setdefault(name, []).append(loss.value.detach())
        if slot.stage + 1 < self.plan.stages:
            assert carry.hidden is not None
            self.outputs[evolve(slot, stage=slot.stage + 1)] = carry.hidden
        if torch.is_grad_enabled():
            self.live[slot] = _Live(entry, carry, islands, lane)
            self.peak = max(self.peak, len(self.live))

    def _backward(self, slot: Slot) -> Iterator[str]:
        """Work a slot backward, and before each phase yield its lane: all phases at once where they are not cut."""
        live = self.live.pop(slot)
        yield live.lane
        roots, grads = [], []
        for root, grad in self._roots(slot, live.carry):
            if root.requires_grad:
                roots.append(root)
                grads.append(grad)
        self.lanes.hold(*grads)
        torch.autograd.backward(roots, grads)
        while live.islands:  # the graph of each goes with it; what W still needs is held by its closures
            lane, links = live.islands.pop()
            yield lane
            self.lanes.hold(*(leaf.grad for _, leaf in links))
            back(links)
        if live.entry is not None and live.entry.grad is not None:
            self.grads[evolve(slot, stage=slot.stage - 1)] = live.entry.grad

    def _roots(self, slot: Slot, carry: Carry) -> Iterator[tuple[Tensor, Tensor]]:
        for name, loss in carry.losses:
            yield loss.value, torch.full_like(loss.value, self.weights[name])
        if slot.stage + 1 < self.plan.stages:
            assert carry.hidden is not None
            yield carry.hidden, self.grads.pop(slot)

    def result(self) -> Result:
        """Return the losses and loads of the step, of all ranks."""
        names = sorted(self.weights)
        nothing = [torch.zeros((), device=self.load.device)]
        found = [torch.stack(self.losses.get(name, nothing)).double().sum() for name in names]
        found += [torch.tensor(float(name in self.losses), device=self.load.device) for name in names]
        # Counts are exact in float64 up to 2^53: one message for all.
        whole = torch.cat([each.double().view(1) for each in found] + [self.load.double().flatten()])
        self.parallel.groups.sum(whole, range(self.parallel.layout.ranks))
        load = whole[len(found) :].to(torch.int64).view_as(self.load)
        values = whole[: len(found)].tolist()  # one read for the whole step: each one waits for the device
        losses = {name: value for name, value, some in zip(names, values, values[len(names) :], strict=False) if some}
        total = sum(self.weights[name] * value for name, value in losses.items())
        return Result(losses=losses, total=total, load=load, peak_live=self.peak)
