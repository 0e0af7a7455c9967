"""Pipelines with one known fault each."""

from collections.abc import Callable, Sequence

from attrs import evolve

from tangram.core.contracts import Pipeline, Promise
from tangram.core.plan import Action, Op, Plan
from tangram.core.simulator import Costs


class _Replanned:
    """A pipeline whose plans are changed."""

    def __init__(self, pipeline: Pipeline, change: Callable[[Plan], Plan]) -> None:
        self._pipeline, self._change = pipeline, change

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        return self._change(self._pipeline.schedule(ranks, microbatches))

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        return self._pipeline.promises(ranks, microbatches, costs)


def _each_rank(pipeline: Pipeline, change: Callable[[list[Action]], Sequence[Action]]) -> _Replanned:
    """Return the pipeline with the actions of every rank changed."""
    return _Replanned(
        pipeline, lambda plan: evolve(plan, actions=tuple(tuple(change(list(rank))) for rank in plan.actions))
    )


def drops_a_microbatch(pipeline: Pipeline) -> Pipeline:
    """The last micro-batch is never worked."""
    return _each_rank(
        pipeline,
        lambda rank: [action for action in rank if action.slot.microbatch != max(a.slot.microbatch for a in rank)],
    )


def repeats_an_action(pipeline: Pipeline) -> Pipeline:
    """The last action is done twice."""
    return _each_rank(pipeline, lambda rank: [*rank, rank[-1]])


def goes_backward_first(pipeline: Pipeline) -> Pipeline:
    """A micro-batch goes backward before it went forward."""
    return _each_rank(pipeline, lambda rank: rank[::-1])


def forgets_the_weight_gradients(pipeline: Pipeline) -> Pipeline:
    """Of a backward only the gradient of the input is computed."""
    return _each_rank(
        pipeline,
        lambda rank: [
            evolve(action, op=Op.INPUT_BACKWARD) if action.op is Op.BACKWARD else action
            for action in rank
            if action.op is not Op.WEIGHT_BACKWARD
        ],
    )


class _Fewer:
    """A pipeline that plans for one micro-batch less, where there is more than one."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        return self._pipeline.promises(ranks, microbatches, costs)

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        return self._pipeline.schedule(ranks, max(1, microbatches - 1))


def loses_the_last_microbatch(pipeline: Pipeline) -> Pipeline:
    """The plan is whole, but of one micro-batch less than it was asked for."""
    return _Fewer(pipeline)


def moves_the_stages(pipeline: Pipeline) -> Pipeline:
    """A rank works stages that another one holds."""
    return _Replanned(pipeline, lambda plan: evolve(plan, place={key: rank + 1 for key, rank in plan.place.items()}))


def plans_otherwise_each_time(pipeline: Pipeline) -> Pipeline:
    """Every second plan has its micro-batches in another order."""
    asked: list[None] = []

    def change(plan: Plan) -> Plan:
        asked.append(None)
        if len(asked) % 2:
            return plan

        def other(action: Action) -> Action:
            last = plan.microbatches[action.slot.flow] - 1
            return evolve(action, slot=evolve(action.slot, microbatch=last - action.slot.microbatch))

        return evolve(plan, actions=tuple(tuple(map(other, rank)) for rank in plan.actions))

    return _Replanned(pipeline, change)


class _Silent:
    """A pipeline that refuses without a word."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        return self._pipeline.promises(ranks, microbatches, costs)

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        try:
            return self._pipeline.schedule(ranks, microbatches)
        except ValueError:
            raise ValueError from None


def refuses_without_a_word(pipeline: Pipeline) -> Pipeline:
    """What it does not plan it refuses, and does not say why."""
    return _Silent(pipeline)


class _Promising:
    """A pipeline that promises something else."""

    def __init__(self, pipeline: Pipeline, change: Callable[[Promise], Promise]) -> None:
        self._pipeline, self._change = pipeline, change

    def schedule(self, ranks: int, microbatches: int) -> Plan:
        return self._pipeline.schedule(ranks, microbatches)

    def promises(self, ranks: int, microbatches: int, costs: Costs) -> Promise:
        return self._change(self._pipeline.promises(ranks, microbatches, costs))


def promises_too_much(pipeline: Pipeline) -> Pipeline:
    """It says that its ranks idle for less than they do."""
    return _Promising(pipeline, lambda promise: promise._replace(bubble=(promise.bubble or 0.0) - 1.0))


def promises_too_little_memory(pipeline: Pipeline) -> Pipeline:
    """It says that a rank keeps one slot less alive than it does."""
    return _Promising(pipeline, lambda promise: promise._replace(peak=(promise.peak or 1) - 1))
