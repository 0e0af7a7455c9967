"""From an experiment to what a step works on."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

import torch
from attrs import evolve, field, frozen

from tangram.core.context import BuildError, Parallel, built
from tangram.core.contracts import Pipeline
from tangram.core.executor import Executor
from tangram.core.experiment import Experiment
from tangram.core.layout import Layout
from tangram.core.model import Model, build_model
from tangram.core.plan import split
from tangram.core.process import own_device
from tangram.core.provenance import is_run
from tangram.core.records import Progress
from tangram.core.step import Trainer

MOST_STEPS, MOST_MICROBATCHES = 1_000_000, 100_000
"""Beyond which a number is a slip of the keyboard; DeepSeek-V3 took a quarter of the steps."""

_BEGINNING = Progress()

_ASKED = 100_000
"""Micro-batches that a pipeline is asked to order, in sum, to find out which numbers it refuses: a second or two."""


@frozen
class Seat:
    """Which process of a run this is.

    Attributes:
        rank: Its number.
        ranks: How many there are.
        device: Where it computes.
        lives: How often all processes were started before, and one of them died.
    """

    rank: int = 0
    ranks: int = 1
    device: torch.device = field(default=torch.device("cpu"))
    lives: int = 0

    @property
    def leads(self) -> bool:
        """Whether it is the one that speaks."""
        return self.rank == 0


def alone() -> Seat:
    """Return the seat of a process that has no others."""
    return Seat(device=own_device())


def assemble(experiment: Experiment, seat: Seat | None = None, *, trains: bool = True) -> Trainer:
    """Build everything that a rank's steps work on.

    Args:
        experiment: The resolved preset.
        seat: Which rank this is; by default it is alone.
        trains: Whether it is to take steps; else this one process holds the whole model, whatever trained it.

    Raises:
        BuildError: A component refuses its surroundings; the message begins with its dotted path.
    """
    train, seat = experiment.train, seat or alone()
    data = built("data", experiment.data.build, train, experiment.model.vocab_size)
    pipeline = built("parallel.pipeline", experiment.parallel.pipeline.build)
    layout = Layout()
    if trains:
        sequences = sequences_at(experiment, Progress(), data_ranks_of(experiment, seat.ranks))
        layout = layout_of(experiment, pipeline, sequences, seat.rank, seat.ranks)
    parallel = Parallel(layout=layout, device=seat.device)
    model = build_model(experiment, train.seed, seat.device, parallel)
    sharding = built("parallel.sharding", experiment.parallel.sharding.build, parallel)
    parameters = built("parallel.sharding", sharding.attach, model)
    executor = Executor(
        model,
        lambda microbatches: pipeline.schedule(layout.pipeline_ranks, microbatches),
        train.micro_sequences,
        parallel,
        sharding.reduce,
    )
    if layout.ranks > 1:
        parallel.groups.want(range(layout.ranks))
        parallel.groups.open()
    return Trainer(
        experiment=experiment,
        model=model,
        executor=executor,
        sharding=sharding,
        optimizer=built("optimizer", experiment.optimizer.build, parameters),
        guard=built("guard", experiment.guard.build),
        data=data,
        progress=Progress(),
        parallel=parallel,
    )


def data_ranks_of(experiment: Experiment, ranks: int) -> int:
    """Return how many of so many ranks see different data.

    Raises:
        BuildError: The ranks do not make whole pipelines, or whole groups of expert ranks.
    """
    asked = experiment.parallel
    data_ranks, rest = divmod(ranks, asked.pipeline_ranks)
    if rest or not data_ranks:
        raise BuildError(
            "parallel.pipeline_ranks",
            f"{ranks} ranks do not make pipelines of {asked.pipeline_ranks}: say how many with --nproc, or torchrun",
        )
    if data_ranks % asked.expert_ranks:
        raise BuildError(
            "parallel.expert_ranks",
            f"{data_ranks} data ranks ({ranks} ranks in pipelines of {asked.pipeline_ranks}) do not make groups of "
            f"{asked.expert_ranks} that share out experts",
        )
    return data_ranks


def layout_of(experiment: Experiment, pipeline: Pipeline, sequences: int, rank: int, ranks: int) -> Layout:
    """Return where a rank stands, by the plan for a step of so many sequences.

    Raises:
        BuildError: The ranks do not make whole pipelines, the pipeline refuses the number of micro-batches, there are
            too many of them, or there are more stages than layers.
    """
    data_ranks, asked = data_ranks_of(experiment, ranks), experiment.parallel
    microbatches = _microbatches(experiment, sequences, data_ranks)
    plan = built("parallel.pipeline", pipeline.schedule, asked.pipeline_ranks, microbatches)
    built("parallel.pipeline_ranks", split, experiment.model.n_layers, plan.stages)
    return Layout(plan.place, data_ranks, asked.expert_ranks, rank)


def _microbatches(experiment: Experiment, sequences: int, data_ranks: int) -> int:
    """Return the micro-batches that a step of so many sequences is on each data rank.

    Raises:
        BuildError: They are too many.
    """
    count = sequences // (experiment.train.micro_sequences * data_ranks)
    if count > MOST_MICROBATCHES:
        message = f"makes a step of more than {MOST_MICROBATCHES:,} micro-batches: raise train.micro_sequences"
        raise BuildError("train.batch_sequences", message)
    return count


@frozen
class Rehearsal:
    """What a run would be.

    Attributes:
        steps: Number of steps.
        ranks: Number of ranks.
        least: Parameters of the rank that holds the fewest.
        most: Parameters of the rank that holds the most.
        remarks: What will not go well, in words.
    """

    steps: int
    ranks: int
    least: int
    most: int
    remarks: tuple[str, ...]


def rehearse(experiment: Experiment, ranks: int | None = None) -> Rehearsal:
    """Build the model, its experts shared out, and what surrounds it, without weights, and lay out every step.

    Args:
        experiment: The resolved preset.
        ranks: The ranks of the run; by default the fewest that the preset can have.

    Raises:
        BuildError: A component refuses its surroundings, or the pipeline the last step's number of micro-batches.
    """
    train, asked = experiment.train, experiment.parallel
    ranks = ranks or asked.pipeline_ranks * asked.expert_ranks
    data_ranks = data_ranks_of(experiment, ranks)
    built("data", experiment.data.build, train, experiment.model.vocab_size)
    built("guard", experiment.guard.build)
    for name, observer in experiment.observers.items():
        built(f"observers.{name}", observer.build)
    pipeline = built("parallel.pipeline", asked.pipeline.build)
    sizes = list(laid_out(experiment, data_ranks))
    _microbatches(experiment, max(sizes), data_ranks)
    layout = layout_of(experiment, pipeline, sizes[-1], 0, ranks)
    # One rank with all stages: what each pipeline rank holds is a part of it.
    everything = Parallel(layout=evolve(layout, place=dict.fromkeys(layout.place, 0)))
    model = build_model(experiment, device="meta", parallel=everything)
    sharding = built("parallel.sharding", asked.sharding.build, everything)
    built("optimizer", experiment.optimizer.build, built("parallel.sharding", sharding.attach, model))
    held = _held(model, layout)
    remarks = list(_refused_steps(pipeline, asked.pipeline_ranks, sizes, train.micro_sequences * data_ranks))
    if train.init_from and not is_run(Path(train.init_from).expanduser()):
        remarks.append(f"train.init_from: there is no run {train.init_from} yet")
    return Rehearsal(len(sizes), ranks, min(held), max(held), tuple(remarks))


def refuse_unfit(run: Trainer) -> None:
    """Look ahead from where a run stands for a step with a number of micro-batches that its pipeline cannot order.

    Raises:
        BuildError: There is one.
    """
    layout, train = run.parallel.layout, run.experiment.train
    pipeline = built("parallel.pipeline", run.experiment.parallel.pipeline.build)
    sizes = list(laid_out(run.experiment, layout.data_ranks, run.progress))
    unit = train.micro_sequences * layout.data_ranks
    for refused in _refused_steps(pipeline, layout.pipeline_ranks, sizes, unit, run.progress.step):
        raise BuildError("parallel.pipeline", refused)


def _held(model: Model, layout: Layout) -> list[int]:
    """Return how many of the parameters of a model with all stages each pipeline rank holds."""
    held = [0] * layout.pipeline_ranks
    for address, parameter in model.named_parameters():
        stages = model.stages_of(address)
        for rank in {rank for (_, stage), rank in layout.place.items() if stage in stages}:
            held[rank] += parameter.numel()
    return held


def _refused_steps(pipeline: Pipeline, ranks: int, sizes: Sequence[int], unit: int, taken: int = 0) -> Iterator[str]:
    """Say which steps the pipeline refuses for their number of micro-batches.

    Args:
        pipeline: The pipeline.
        ranks: Its ranks.
        sizes: Sequences of each step.
        unit: Sequences of a micro-batch on every data rank.
        taken: Steps before these.
    """
    asked = {count: _refusal(pipeline, ranks, count) for count in _sample(sorted({size // unit for size in sizes}))}
    refused = [step for step, size in enumerate(sizes, start=taken + 1) if asked.get(size // unit)]
    if refused:
        few, after = sizes[refused[0] - taken - 1] // unit, refused[-1] + 1
        fits = f"; from step {after:,} all fit" if after <= taken + len(sizes) else ""
        yield (
            f"{len(refused):,} steps, the first of them step {refused[0]:,} with {few} micro-batches on a data rank, "
            f"are refused: {asked[few]}{fits}; raise train.batch_sequences, or take fewer ranks"
        )


def _sample(counts: Sequence[int]) -> Sequence[int]:
    """Return numbers of micro-batches to ask for: all, or of so many that it would take long some, the ends too."""
    every = -(-sum(counts) // _ASKED)
    return counts if every <= 1 else [*counts[::every], counts[-1]]


def _refusal(pipeline: Pipeline, ranks: int, microbatches: int) -> str:
    try:
        pipeline.schedule(ranks, microbatches)
    except ValueError as error:
        return str(error)
    return ""


def laid_out(experiment: Experiment, data_ranks: int = 1, now: Progress = _BEGINNING) -> Iterator[int]:
    """Yield the sequences of every step of a run on so many data ranks, from `now` on, if none is skipped.

    Raises:
        BuildError: There are too many.
    """
    train = experiment.train
    while now.tokens < train.tokens:
        sequences = sequences_at(experiment, now, data_ranks)
        tokens, n_steps = sequences * train.sequence_length, 1
        if train.batch_sequences.settled(now):  # all that are left are alike, and there may be many
            n_steps = -(-(train.tokens - now.tokens) // tokens)
        if now.step + n_steps > MOST_STEPS:
            message = f"takes more than {MOST_STEPS:,} steps: raise train.batch_sequences or train.sequence_length"
            raise BuildError("train.tokens", message)
        yield from repeat(sequences, n_steps)
        now = Progress(now.step + n_steps, now.tokens + n_steps * tokens, now.sequences + n_steps * sequences)


def sequences_at(experiment: Experiment, now: Progress, data_ranks: int = 1) -> int:
    """Return the sequences of the step at `now`: the curve, rounded to a micro-batch or more for each data rank."""
    unit = experiment.train.micro_sequences * data_ranks
    return max(1, round(experiment.train.batch_sequences(now) / unit)) * unit


def past_skipped(experiment: Experiment, now: Progress, data_ranks: int = 1) -> Progress:
    """Return `now` with the cursor moved past batches that are not to be trained on; they count as no step."""
    while now.sequences in now.skipped:
        now = evolve(now, sequences=now.sequences + sequences_at(experiment, now, data_ranks))
    return now
