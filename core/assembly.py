"""From an experiment to what a step works on."""

from collections.abc import Iterator
from itertools import repeat

from attrs import evolve

from tangram.core.context import BuildError, Parallel, built
from tangram.core.executor import Executor
from tangram.core.experiment import Experiment
from tangram.core.model import build_model
from tangram.core.records import Progress
from tangram.core.step import Trainer

MOST_STEPS, MOST_MICROBATCHES = 1_000_000, 100_000
"""Beyond which a number is a slip of the keyboard; DeepSeek-V3 took a quarter of the steps."""


def assemble(experiment: Experiment) -> Trainer:
    """Build everything a step works on.

    Raises:
        BuildError: A component refuses its surroundings; the message begins with its dotted path.
    """
    train, parallel = experiment.train, Parallel()
    data = built("data", experiment.data.build, train, experiment.model.vocab_size)
    model = build_model(experiment, train.seed, parallel=parallel)
    sharding = built("parallel.sharding", experiment.parallel.sharding.build, parallel)
    pipeline = built("parallel.pipeline", experiment.parallel.pipeline.build)
    parameters = sharding.attach(model)
    return Trainer(
        experiment=experiment,
        model=model,
        executor=Executor(
            model,
            lambda microbatches: pipeline.schedule(1, microbatches),
            train.micro_sequences,
            parallel.weight_grads,
            sharding.reduce,
        ),
        sharding=sharding,
        optimizer=built("optimizer", experiment.optimizer.build, parameters),
        guard=built("guard", experiment.guard.build),
        data=data,
        progress=Progress(),
    )


def rehearse(experiment: Experiment) -> int:
    """Build what surrounds the model, lay out every step, and return their number.

    Raises:
        BuildError: A component refuses its surroundings, or a schedule a number of micro-batches.
    """
    train = experiment.train
    built("data", experiment.data.build, train, experiment.model.vocab_size)
    built("guard", experiment.guard.build)
    for name, observer in experiment.observers.items():
        built(f"observers.{name}", observer.build)
    model = build_model(experiment, device="meta")
    sharding = built("parallel.sharding", experiment.parallel.sharding.build, Parallel())
    built("optimizer", experiment.optimizer.build, sharding.attach(model))
    pipeline = built("parallel.pipeline", experiment.parallel.pipeline.build)
    sizes, n_steps = set[int](), 0
    for sequences in laid_out(experiment):
        if sequences // train.micro_sequences > MOST_MICROBATCHES:
            message = f"makes a step of more than {MOST_MICROBATCHES:,} micro-batches: raise train.micro_sequences"
            raise BuildError("train.batch_sequences", message)
        sizes.add(sequences // train.micro_sequences)
        n_steps += 1
    for microbatches in {min(sizes), max(sizes)}:
        built("parallel.pipeline", pipeline.schedule, 1, microbatches)
    return n_steps


def laid_out(experiment: Experiment) -> Iterator[int]:
    """Yield the sequences of every step of a run, if none is skipped.

    Raises:
        BuildError: There are too many.
    """
    now, train = Progress(), experiment.train
    while now.tokens < train.tokens:
        sequences = sequences_at(experiment, now)
        tokens, n_steps = sequences * train.sequence_length, 1
        if train.batch_sequences.settled(now):  # all that are left are alike, and there may be many
            n_steps = -(-(train.tokens - now.tokens) // tokens)
        if now.step + n_steps > MOST_STEPS:
            message = f"takes more than {MOST_STEPS:,} steps: raise train.batch_sequences or train.sequence_length"
            raise BuildError("train.tokens", message)
        yield from repeat(sequences, n_steps)
        now = Progress(now.step + n_steps, now.tokens + n_steps * tokens, now.sequences + n_steps * sequences)


def sequences_at(experiment: Experiment, now: Progress) -> int:
    """Return the sequences of the step at `now`: the curve, rounded to a multiple of the micro-batch."""
    micro = experiment.train.micro_sequences
    return max(1, round(experiment.train.batch_sequences(now) / micro)) * micro


def past_skipped(experiment: Experiment, now: Progress) -> Progress:
    """Return `now` with the cursor moved past batches that are not to be trained on; they count as no step."""
    while now.sequences in now.skipped:
        now = evolve(now, sequences=now.sequences + sequences_at(experiment, now))
    return now
