"""A run: from a resolved preset to a directory with weights, metrics and a verdict on every piece."""

import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import pluggy
import torch
from attrs import asdict, define, evolve, field, frozen

from tangram.core import checkpoint
from tangram.core.config import Origin
from tangram.core.context import Parallel, built
from tangram.core.contracts import NonFiniteError, State, Stateful
from tangram.core.executor import Executor
from tangram.core.experiment import Experiment
from tangram.core.liveness import Liveness, Piece
from tangram.core.model import build_model
from tangram.core.plan import forward_only
from tangram.core.plugins import run_manager
from tangram.core.presets import digest, to_yaml
from tangram.core.records import EvalReport, Progress, StepReport, Verdict
from tangram.core.registry import Mark, mark_of
from tangram.core.step import Trainer, train_step


class RunError(Exception):
    """A run cannot begin; the message says why and what to do."""


@frozen(eq=False)
class RunView:
    """What observers see of a run.

    Attributes:
        experiment: The resolved preset.
        directory: The run directory.
        progress: How far the run had come when it began: not zero if it was resumed.
        references: Bits per byte of general compressors on the held-out text, by name.
        n_bytes: UTF-8 bytes of the held-out text; 0 where there is none.
    """

    experiment: Experiment
    directory: Path
    progress: Progress
    references: Mapping[str, float]
    n_bytes: int


@frozen(eq=False)
class Outcome:
    """How a run ended.

    Attributes:
        directory: The run directory.
        evaluation: The evaluation on all held-out text; None where there is none.
        references: Bits per byte of general compressors on the same text, by name.
        pieces: What became of each named piece.
        sample: The continued prompt; empty where there is none.
        peak_rss: Largest resident memory of the process, bytes.
    """

    directory: Path
    evaluation: EvalReport | None
    references: Mapping[str, float]
    pieces: tuple[Piece, ...]
    sample: str
    peak_rss: int

    @property
    def dead(self) -> tuple[Piece, ...]:
        """Pieces that are named and had no effect."""
        return tuple(piece for piece in self.pieces if piece.alive is False)


def sequences_at(experiment: Experiment, now: Progress) -> int:
    """Return the sequences of the step at `now`: the curve, rounded to a multiple of the micro-batch."""
    micro = experiment.train.micro_sequences
    return max(1, round(experiment.train.batch_sequences(now) / micro)) * micro


def past_skipped(experiment: Experiment, now: Progress) -> Progress:
    """Return `now` with the cursor moved past batches that are not to be trained on; they count as no step."""
    while now.sequences in now.skipped:
        now = evolve(now, sequences=now.sequences + sequences_at(experiment, now))
    return now


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
    now, sizes = Progress(), set[int]()
    while now.tokens < train.tokens:
        sequences = sequences_at(experiment, now)
        sizes.add(sequences // train.micro_sequences)
        now = Progress(now.step + 1, now.tokens + sequences * train.sequence_length, now.sequences + sequences)
    for microbatches in {min(sizes), max(sizes)}:
        built("parallel.pipeline", pipeline.schedule, 1, microbatches)
    return now.step


def evaluate(run: Trainer, limit: int | None = None) -> EvalReport | None:
    """Return the losses on held-out text, all of it or `limit` sequences; None where there is none."""
    held_out = run.data.held_out
    if held_out is None:
        return None
    micro = run.experiment.train.micro_sequences
    executor = Executor(run.model, forward_only, micro, Parallel().weight_grads, lambda: None)
    nats: dict[str, float] = {}
    targets, size = 0, 0
    batches = held_out.batches(micro)
    for batch, n_bytes in batches if limit is None else islice(batches, math.ceil(limit / micro)):
        result = executor.run(batch, run.progress)
        for name, loss in result.losses.items():
            nats[name] = nats.get(name, 0.0) + loss * batch.n_targets
        targets, size = targets + batch.n_targets, size + n_bytes
    losses = {name: value / targets for name, value in nats.items() if name in run.model.objectives}
    bits = nats["next_token"] / math.log(2) / size if "next_token" in nats and size else None
    return EvalReport(run.progress, losses, bits, targets, size, complete=size == held_out.n_bytes)


@define(eq=False)
class _Session:
    """A run under way: the trainer, its observers, and the clock."""

    run: Trainer
    directory: Path
    observers: Mapping[str, object]
    hooks: pluggy.HookRelay
    liveness: Liveness = field(factory=Liveness)
    seconds: float = 0.0
    saved: int = -1

    def view(self) -> RunView:
        held_out = self.run.data.held_out
        return RunView(
            self.run.experiment,
            self.directory,
            self.run.progress,
            held_out.references if held_out else {},
            held_out.n_bytes if held_out else 0,
        )

    def stateful(self) -> Iterator[tuple[str, Stateful]]:
        watching = {f"observer-{name}": observer for name, observer in self.observers.items()}
        for name, part in {"guard": self.run.guard, **watching}.items():
            if isinstance(part, Stateful):
                yield name, part

    def steps(self, view: RunView) -> None:
        train, run = self.run.experiment.train, self.run
        while run.progress.tokens < train.tokens:
            began = time.perf_counter()
            run.progress = past_skipped(run.experiment, run.progress)
            batch = run.data.batch(run.progress, sequences_at(run.experiment, run.progress))
            weights = run.model.weights(run.progress)
            try:
                report = self._timed(train_step(run, batch), began)
            except NonFiniteError as error:
                raise NonFiniteError(f"step {run.progress.step + 1}: {error}") from None
            if report.verdict is Verdict.ROLLBACK:
                self._roll_back(view, report)
                continue
            self.liveness.observe(report, weights)
            self.hooks.tangram_step_ended(run=view, report=report)
            if train.evaluate_every and run.progress.step % train.evaluate_every == 0:
                self._evaluate(view, train.evaluate_sequences)
            if train.checkpoint_every and run.progress.step % train.checkpoint_every == 0:
                self.save(view)

    def _roll_back(self, view: RunView, report: StepReport) -> None:
        """Go back to the last checkpoint, and write into it that the batch of `report` is to be skipped.

        The guard and the observers hear of it before it is sealed. Cut off at any moment, the run is resumed either
        from before the bad step, and goes back once more, or from after the rollback.
        """
        run = self.run
        found = checkpoint.newest(self.directory / "checkpoints")
        if found is None:
            raise RunError("the guard asks for a rollback, but there is no checkpoint: its rolls_back must be True")
        self._load(found)
        run.progress = evolve(run.progress, skipped=(*report.now.skipped, report.now.sequences))
        self.hooks.tangram_step_ended(run=view, report=evolve(report, after=run.progress))
        self._write(view)

    def _timed(self, report: StepReport, began: float) -> StepReport:
        took = time.perf_counter() - began
        self.seconds += took
        biases = self.run.model.biases().values()
        routed = [layer for layer, part in enumerate(self.run.model.feedforwards()) if part.n_experts]
        return evolve(
            report,
            routed=tuple(routed),
            bias=max((float(bias.abs().max()) for bias in biases), default=0.0),
            seconds=self.seconds,
            tokens_per_second=(report.after.tokens - report.now.tokens) / took,
        )

    def _evaluate(self, view: RunView, limit: int | None) -> EvalReport | None:
        report = evaluate(self.run, limit)
        if report is not None:
            self.hooks.tangram_evaluated(run=view, report=report)
        return report

    def finish(self, view: RunView) -> Outcome:
        run, train = self.run, self.run.experiment.train
        self.save(view)
        report = self._evaluate(view, None)
        sample = ""
        if train.prompt and run.data.tokenizer is not None:
            from tangram.core.decoding import sample as continued

            sample = continued(run.model, run.data.tokenizer, train.prompt, 96, temperature=0.7, seed=train.seed)
        probe = run.data.batch(run.progress, train.micro_sequences)
        pieces = tuple(self.liveness.judge(run.model, probe, run.progress))
        self.note("verdict", {"pieces": [asdict(piece) for piece in pieces], "sample": sample, "peak_rss": peak_rss()})
        return Outcome(self.directory, report, view.references, pieces, sample, peak_rss())

    def about(self) -> dict[str, object]:
        view = self.view()
        return {
            "command": sys.argv,
            "versions": versions(),
            "data": self.run.data.fingerprint,
            "held_out": {"bytes": view.n_bytes, "references": dict(view.references)},
        }

    def note(self, name: str, content: Mapping[str, object]) -> None:
        """Write what the report reads and nothing else does."""
        (self.directory / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    def save(self, view: RunView) -> None:
        if self.saved != self.run.progress.step:
            self._write(view)

    def _write(self, view: RunView) -> None:
        run = self.run
        addresses = {parameter: address for address, parameter in run.model.named_parameters()}
        files: dict[str, State] = {
            "model": run.model.state_dict(),
            "optimizer": checkpoint.optimizer_state(run.optimizer, addresses),
        }
        files |= {name: part.state() for name, part in self.stateful()}
        state = {
            "progress": asdict(run.progress),
            "seconds": self.seconds,
            "experiment": digest(run.experiment),
            "data": run.data.fingerprint,
            "liveness": asdict(self.liveness),
            "versions": versions(),
        }
        path = checkpoint.save(self.directory / "checkpoints", run.progress.step, files, state)
        self.saved = run.progress.step
        self.note("load", self.liveness.load)
        self.hooks.tangram_checkpoint_saved(run=view, path=path)

    def resume(self) -> checkpoint.Found:
        found = checkpoint.newest(self.directory / "checkpoints")
        if found is None:
            raise RunError(f"{self.directory} has no checkpoint to resume from; leave out --resume to start anew")
        run, state = self.run, checkpoint.read_state(found.path)
        for name, have in (("experiment", digest(run.experiment)), ("data", run.data.fingerprint)):
            if state[name] != have:
                raise RunError(
                    f"{found.path} was written by another {name} ({state[name]}, here {have}); "
                    "resume with the same preset and data, or train into another --out"
                )
        self._load(found)
        self.seconds = float(str(state["seconds"]))
        return found

    def _load(self, found: checkpoint.Found) -> None:
        run, state = self.run, checkpoint.read_state(found.path)
        checkpoint.load_model(found.path, run.model)
        checkpoint.load_optimizer(found.path, run.optimizer, dict(run.model.named_parameters()))
        for name, part in self.stateful():
            part.load_state(checkpoint.read_file(found.path, name))
        progress, liveness = state["progress"], state["liveness"]
        assert isinstance(progress, dict) and isinstance(liveness, dict)
        run.progress = Progress(**progress | {"skipped": tuple(progress["skipped"])})
        self.liveness, self.saved = Liveness(**liveness), found.step


def directory_of(experiment: Experiment, out: str | Path | None) -> Path:
    """Return the run directory: `out`, or else runs/<name>-<hash>."""
    return Path(out) if out else Path("runs") / f"{experiment.name}-{digest(experiment)}"


def train(
    experiment: Experiment,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    origins: Mapping[str, Origin] = MappingProxyType({}),
) -> Outcome:
    """Train an experiment into a run directory, by default runs/<name>-<hash>.

    Args:
        experiment: The resolved preset.
        out: The run directory.
        resume: Go on from its newest checkpoint.
        origins: Where each leaf of the preset was written, for the report.

    Raises:
        RunError: The directory holds another run, or nothing to resume.
        BuildError: A component refuses its surroundings.
        NonFiniteError: The guard stopped the run.
    """
    directory = directory_of(experiment, out)
    if not resume and (directory / "experiment.yaml").exists():
        raise RunError(f"{directory} holds a run already; continue it with --resume or choose another --out")
    run = assemble(experiment)
    observers = {name: built(f"observers.{name}", config.build) for name, config in experiment.observers.items()}
    session = _Session(run, directory, observers, run_manager(observers).hook)
    if resume:
        checkpoint.settle(directory / "checkpoints")
        session.resume()
    else:
        session.liveness.begin(run.model)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "experiment.yaml").write_text(to_yaml(experiment), encoding="utf-8")
        session.note("about", session.about())
        session.note("origins", {path: str(origin) for path, origin in origins.items()})
    view = session.view()
    session.hooks.tangram_run_started(run=view)
    session.hooks.tangram_model_built(run=view, model=run.model)
    try:
        if run.guard.rolls_back:
            session.save(view)
        session.steps(view)
        outcome = session.finish(view)
    except BaseException as error:
        session.hooks.tangram_run_ended(run=view, error=error)
        raise
    session.hooks.tangram_run_ended(run=view, error=None)
    return outcome


def load_run(path: str | Path, *, averaged: bool = False) -> Trainer:
    """Return the trainer of a run as its newest checkpoint left it.

    Args:
        path: The run directory.
        averaged: Give the model the averaged weights that the observer `ema` kept, instead of the last ones.

    Raises:
        RunError: There is no run, no checkpoint, or no average.
    """
    from tangram.core.presets import load_preset

    directory = Path(path)
    if not (directory / "experiment.yaml").exists():
        raise RunError(f"{directory} is no run directory: it has no experiment.yaml")
    experiment = load_preset(str(directory / "experiment.yaml"))
    kept = [name for name, config in experiment.observers.items() if mark_of(type(config)) == Mark("observer", "ema")]
    if averaged and not kept:
        raise RunError(f"{directory} has no averaged weights: train with the observer ema (observers.ema={{}})")
    session = _Session(assemble(experiment), directory, {}, run_manager({}).hook)
    found = session.resume()
    if averaged:
        checkpoint.load_average(found.path, f"observer-{kept[0]}", session.run.model)
    return session.run


def versions() -> dict[str, str]:
    """Return what the numbers of a run depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def peak_rss() -> int:
    """Return the largest resident memory of this process so far, bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
