"""What every pipeline owes: a plan that works each slot once, can be run to its end, and changes no gradient."""

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any, ClassVar

import torch
from attrs import evolve
from hypothesis import strategies as st
from torch import Tensor, nn

from tangram.core.autograd import WeightGrads
from tangram.core.context import Context, Parallel
from tangram.core.contracts import Pipeline
from tangram.core.executor import Executor
from tangram.core.layers import FullPrecision, Linear
from tangram.core.layout import Layout
from tangram.core.plan import Plan, validate
from tangram.core.records import Batch, Carry, Loss, Phase, Progress
from tangram.core.simulator import Costs, simulate
from tangram.testing.laws import Contract, law
from tangram.testing.mutants import pipeline as mutants
from tangram.testing.samples import documents, filled
from tangram.testing.strategies import seeds
from tangram.testing.tolerance import assert_close, assert_same_gradients

RANKS, MICROBATCHES = range(1, 5), range(1, 9)
"""What a pipeline is asked for; it may refuse some."""

_WIDTH = 4
_UNITS = st.sampled_from((0.5, 1.0, 1.5, 2.0))
_COSTS = st.builds(
    Costs,
    forward=_UNITS,
    input=_UNITS,
    weight=_UNITS,
    overlap=st.none() | st.sampled_from((2.0, 2.5)),
    latency=st.sampled_from((0.0, 0.25)),
)
_PICK = st.integers(0, len(RANKS) * len(MICROBATCHES) - 1)


class PipelineContract(Contract):
    """The laws of the slot `pipeline`."""

    slot = "pipeline"
    optional: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def make(cls, config: Any) -> Pipeline:
        """Return what the config builds."""
        pipeline: Pipeline = config.build()
        return pipeline

    def accepted(self, config: Any) -> list[tuple[int, int, Plan]]:
        """Return ranks, micro-batches and plan of everything small that it accepts."""
        pipeline, found = self.make(config), []
        for ranks in RANKS:
            for microbatches in MICROBATCHES:
                try:
                    found.append((ranks, microbatches, pipeline.schedule(ranks, microbatches)))
                except ValueError:
                    continue
        assert found, (
            f"it refuses every number of ranks up to {RANKS[-1]} and of micro-batches up to {MICROBATCHES[-1]}"
        )
        return found

    @law(
        pick=_PICK,
        kills=[
            mutants.drops_a_microbatch,
            mutants.repeats_an_action,
            mutants.goes_backward_first,
            mutants.forgets_the_weight_gradients,
            mutants.moves_the_stages,
        ],
    )
    def every_slot_is_worked_once_in_order(self, config: Any, pick: int) -> None:
        """Each micro-batch goes through each stage once, on its rank: forward, then backward, whole or in two parts."""
        found = self.accepted(config)
        ranks, _, plan = found[pick % len(found)]
        validate(plan)
        assert plan.trains, "nothing goes backward"
        assert plan.ranks == ranks, f"the plan is of {plan.ranks} ranks, not {ranks}"
        assert all(plan.actions), "a rank has nothing to do"

    @law(kills=[mutants.loses_the_last_microbatch])
    def all_micro_batches_are_in_the_plan(self, config: Any) -> None:
        """The flows of a plan together take as many micro-batches as were asked for, and each knows its rows."""
        for _, microbatches, plan in self.accepted(config):
            slots = {action.slot for rank in range(plan.ranks) for action in plan.parts(rank)}
            taken = sorted(plan.index(slot) for slot in slots if slot.stage == 0)
            assert taken == list(range(microbatches)), f"asked for {microbatches}, the plan takes {taken}"

    @law(pick=_PICK, kills=[mutants.goes_backward_first])
    def no_rank_waits_for_ever(self, config: Any, pick: int) -> None:
        """Ranks that each keep to their order, and wait for what the stage before or after sends, come to the end."""
        found = self.accepted(config)
        on_one_rank(found[pick % len(found)][2])

    @law(costs=_COSTS, kills=[mutants.promises_too_much, mutants.promises_too_little_memory])
    def its_promises_are_kept(self, config: Any, costs: Costs) -> None:
        """Simulated, no rank idles longer or keeps more alive than the closed forms say, and one does as much."""
        pipeline = self.make(config)
        for ranks, microbatches, plan in self.accepted(config):
            promise, timeline = pipeline.promises(ranks, microbatches, costs), simulate(plan, costs)
            asked = f"{ranks} ranks and {microbatches} micro-batches"
            if promise.bubble is not None:
                most = max(timeline.bubble)
                assert isclose(most, promise.bubble, abs_tol=1e-9), f"{asked}: idle for {most}, not {promise.bubble}"
            if promise.peak is not None:
                most_alive = max(timeline.peak)
                assert most_alive == promise.peak, f"{asked}: {most_alive} are alive at once, not {promise.peak}"

    @law(kills=[mutants.plans_otherwise_each_time])
    def a_plan_depends_on_nothing_but_its_arguments(self, config: Any) -> None:
        """The same numbers of ranks and micro-batches have the same plan."""
        pipeline = self.make(config)
        for ranks, microbatches, _ in self.accepted(config):
            one, other = (pipeline.schedule(ranks, microbatches) for _ in range(2))
            assert one == other, f"two plans of {ranks} ranks and {microbatches} micro-batches differ"

    @law(ranks=st.integers(0, 9), microbatches=st.integers(0, 9), kills=[mutants.refuses_without_a_word])
    def what_it_does_not_plan_it_refuses_and_says_why(self, config: Any, ranks: int, microbatches: int) -> None:
        """Whatever it is asked for, it returns a valid plan, or raises a ValueError that says what does not fit."""
        pipeline = self.make(config)
        for asked in ((ranks, microbatches), (0, microbatches), (ranks, 0)):
            try:
                plan = pipeline.schedule(*asked)
            except ValueError as error:
                if not str(error):
                    raise AssertionError(f"it refuses {asked} and does not say why") from error
                continue
            validate(plan)
            assert plan.ranks == asked[0], f"asked for {asked[0]} ranks, the plan is of {plan.ranks}"
            assert sum(plan.microbatches) == asked[1], f"asked for {asked[1]} micro-batches, it has {plan.microbatches}"

    @law(pick=_PICK, seed=seeds(), kills=[mutants.forgets_the_weight_gradients])
    def gradients_are_those_of_one_graph(self, config: Any, pick: int, seed: int) -> None:
        """Run to its end, all ranks in one process, a plan leaves the loss and gradients of one graph of the batch."""
        found = self.accepted(config)
        _, microbatches, plan = found[pick % len(found)]
        program = filled(_Chain(plan.stages), seed)
        batch = _batch(microbatches, seed)
        together = on_one_rank(plan)
        parallel = Parallel(program.queue, Layout(together.place))
        executor = Executor(program, lambda _: together, 1, parallel, lambda: None)
        result = executor.run(batch, Progress())
        actual = {name: p.grad for name, p in program.named_parameters()}
        program.zero_grad()
        carry = Carry()
        for stage in range(plan.stages):
            for phase in program.phases(stage, batch, Progress()):
                carry = phase.fn(carry)
        total = torch.stack([0.5 * loss.value for _, loss in carry.losses]).sum()
        total.backward()
        length = 20 * plan.stages * microbatches * _WIDTH
        assert_close(torch.tensor(result.total, dtype=torch.float64), total, length=length, msg="the loss")
        assert_same_gradients(actual, {name: p.grad for name, p in program.named_parameters()}, length=length)


def on_one_rank(plan: Plan) -> Plan:
    """Return the plan with the work of all ranks on one, in an order in which they could have done it.

    Raises:
        PlanError: There is none: every rank waits.
    """
    spans = sorted((span for rank in simulate(plan).spans for span in rank), key=lambda span: span.end)
    return evolve(plan, place=dict.fromkeys(plan.place, 0), actions=(tuple(span.action for span in spans),))


class _Chain(nn.Module):
    """A program of several stages, each a linear with a loss of its own."""

    load_shape, dim, compute = (1, 1), _WIDTH, torch.float64

    def __init__(self, n_stages: int) -> None:
        super().__init__()
        self.n_stages, self.queue = n_stages, WeightGrads()
        precision = FullPrecision(torch.float64)
        ctx = Context(dim=_WIDTH, parallel=Parallel(self.queue), precision=precision)
        self.linears = nn.ModuleList(Linear(ctx, _WIDTH, _WIDTH) for _ in range(n_stages))

    def phases(self, stage: int, batch: Batch, now: Progress) -> Sequence[Phase]:
        def run(carry: Carry) -> Carry:
            entry = nn.functional.one_hot(batch.tokens, _WIDTH).double() if carry.hidden is None else carry.hidden
            hidden: Tensor = self.linears[stage](entry).tanh()
            loss = Loss(hidden.square().sum() / batch.n_sequences)
            return evolve(carry, hidden=hidden, losses=(*carry.losses, ("square", loss)))

        return [Phase("run", "compute", run)]

    def weights(self, now: Progress) -> Mapping[str, float]:
        return {"square": 0.5}


def _batch(n_sequences: int, seed: int) -> Batch:
    tokens = torch.randint(_WIDTH, (n_sequences, 3), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens, *documents([[0, 0, 0]] * n_sequences), 3 * n_sequences, n_sequences)
