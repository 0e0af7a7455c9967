"""A run under way: steps, checkpoints, rollbacks, and what is told to its observers."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pluggy
from attrs import asdict, define, evolve, field, frozen

from tangram.core import checkpoint
from tangram.core.assembly import past_skipped, sequences_at
from tangram.core.contracts import Averaging, NonFiniteError, State, Stateful
from tangram.core.evaluation import evaluate, with_weights
from tangram.core.experiment import Experiment
from tangram.core.files import write_whole
from tangram.core.interruption import Interruption
from tangram.core.liveness import Liveness, Piece
from tangram.core.presets import digest
from tangram.core.process import peak_rss, versions
from tangram.core.records import EvalReport, Progress, StepReport, Verdict
from tangram.core.saver import Saver, Saving
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
        averaged: The same with the weights of each observer that averages them, by its name.
        references: Bits per byte of general compressors on the same text, by name.
        pieces: What became of each named piece.
        sample: The continued prompt; empty where there is none.
        saving: What the checkpoints cost.
        peak_rss: Largest resident memory of the process, bytes.
    """

    directory: Path
    evaluation: EvalReport | None
    averaged: Mapping[str, EvalReport]
    references: Mapping[str, float]
    pieces: tuple[Piece, ...]
    sample: str
    saving: Saving
    peak_rss: int

    @property
    def dead(self) -> tuple[Piece, ...]:
        """Pieces that are named and had no effect."""
        return tuple(piece for piece in self.pieces if piece.alive is False)


@define(eq=False)
class Session:
    """A run under way: the trainer, its observers, and the clock.

    Attributes:
        run: What a step works on.
        directory: The run directory.
        observers: The observers by name.
        hooks: What calls them.
        saver: Writes the checkpoints.
        interruption: Whether the run was asked to stop.
        liveness: What the verdict on the pieces rests on.
        seconds: Seconds of all steps.
        saved: The step of the newest checkpoint; -1 before the first.
    """

    run: Trainer
    directory: Path
    observers: Mapping[str, object]
    hooks: pluggy.HookRelay
    saver: Saver
    interruption: Interruption = field(factory=Interruption)
    liveness: Liveness = field(factory=Liveness)
    seconds: float = 0.0
    saved: int = -1

    def view(self) -> RunView:
        """Return what observers see of the run as it stands."""
        held_out = self.run.data.held_out
        return RunView(
            self.run.experiment,
            self.directory,
            self.run.progress,
            held_out.references if held_out else {},
            held_out.n_bytes if held_out else 0,
        )

    def steps(self, view: RunView) -> None:
        """Train to the end.

        Raises:
            NonFiniteError: The guard stopped the run.
            RunInterruptedError: It was asked to stop, and stands in a checkpoint.
            CheckpointError: A checkpoint could not be written.
        """
        train, run = self.run.experiment.train, self.run
        if run.guard.rolls_back:
            self.save(view)
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
            self._announce(view, self.saver.sealed())
            if self.interruption.caught:
                self.save(view)
                self._announce(view, self.saver.wait())
                raise self.interruption.as_error(run.progress.step)

    def finish(self, view: RunView) -> Outcome:
        """Save, evaluate, sample, and judge every piece; nothing is lost if it is interrupted."""
        run, train = self.run, self.run.experiment.train
        self.save(view)
        self._announce(view, self.saver.wait())
        with self.interruption.at_once(run.progress.step):
            report = self._evaluate(view, None)
            averaged = dict(self._averaged())
            sample = ""
            if train.prompt and run.data.tokenizer is not None:
                from tangram.core.decoding import sample as continued

                sample = continued(run.model, run.data.tokenizer, train.prompt, 96, temperature=0.7, seed=train.seed)
            probe = run.data.batch(run.progress, train.micro_sequences)
            pieces = tuple(self.liveness.judge(run.model, probe, run.progress))
        saving = self.saver.cost(self.seconds)
        content = {
            "pieces": [asdict(piece) for piece in pieces],
            "averaged": {name: evaluation.metrics() for name, evaluation in averaged.items()},
            "sample": sample,
            "saving": asdict(saving),
            "peak_rss": peak_rss(),
        }
        self.note("verdict", content)
        return Outcome(self.directory, report, averaged, view.references, pieces, sample, saving, peak_rss())

    def _averaged(self) -> Iterator[tuple[str, EvalReport]]:
        for name, observer in self.observers.items():
            if isinstance(observer, Averaging):
                with with_weights(self.run.model, observer.averaged()):
                    report = evaluate(self.run)
                if report is not None:
                    yield name, report

    def _timed(self, report: StepReport, began: float) -> StepReport:
        took = time.perf_counter() - began
        self.seconds += took
        parts = enumerate(self.run.model.feedforwards())
        return evolve(
            report,
            routed={layer: part.n_experts for layer, part in parts if part.n_experts},
            biases={layer: float(bias.abs().max()) for layer, bias in self.run.model.biases().items()},
            seconds=self.seconds,
            tokens_per_second=(report.after.tokens - report.now.tokens) / took,
        )

    def _roll_back(self, view: RunView, report: StepReport) -> None:
        """Go back to the last checkpoint, and write into it that the batch of `report` is to be skipped.

        The guard and the observers hear of it before it is sealed. Cut off at any moment, the run is resumed either
        from before the bad step, and goes back once more, or from after the rollback.
        """
        run = self.run
        self._announce(view, self.saver.wait())
        found = checkpoint.newest(self.directory / "checkpoints")
        if found is None:
            raise RunError("the guard asks for a rollback, but there is no checkpoint: its rolls_back must be True")
        self._load(found)
        run.progress = evolve(run.progress, skipped=(*report.now.skipped, report.now.sequences))
        self.hooks.tangram_step_ended(run=view, report=evolve(report, after=run.progress))
        self._write(view)
        self._announce(view, self.saver.wait())

    def _evaluate(self, view: RunView, limit: int | None) -> EvalReport | None:
        report = evaluate(self.run, limit)
        if report is not None:
            self.hooks.tangram_evaluated(run=view, report=report)
        return report

    def about(self) -> dict[str, object]:
        """Return what about.json says: how the run was started, and on what."""
        view = self.view()
        return {
            "command": sys.argv,
            "versions": versions(),
            "data": self.run.data.fingerprint,
            "held_out": {"bytes": view.n_bytes, "references": dict(view.references)},
        }

    def note(self, name: str, content: Mapping[str, object]) -> None:
        """Write what the report reads and nothing else does."""
        write_whole(self.directory / f"{name}.json", json.dumps(content, indent=1))

    def save(self, view: RunView) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.saved != self.run.progress.step:
            self._write(view)

    def _write(self, view: RunView) -> None:
        run = self.run
        addresses = {parameter: address for address, parameter in run.model.named_parameters()}
        files: dict[str, State] = {
            "model": run.model.state_dict(),
            "optimizer": checkpoint.optimizer_state(run.optimizer, addresses),
        }
        files |= {name: part.state() for name, part in self._stateful()}
        state = {
            "progress": asdict(run.progress),
            "seconds": self.seconds,
            "experiment": digest(run.experiment),
            "data": run.data.fingerprint,
            "liveness": asdict(self.liveness),
            "versions": versions(),
        }
        self._announce(view, self.saver.submit(run.progress.step, files, state))
        self.saved = run.progress.step
        self.note("load", self.liveness.load)

    def _announce(self, view: RunView, sealed: list[Path]) -> None:
        for path in sealed:
            self.hooks.tangram_checkpoint_saved(run=view, path=path)

    def resume(self, found: checkpoint.Found) -> None:
        """Go on from a checkpoint.

        Raises:
            RunError: It is of another experiment or other data.
            CheckpointError: It does not fit the model.
        """
        run, state = self.run, checkpoint.read_state(found.path)
        for name, have in (("experiment", digest(run.experiment)), ("data", run.data.fingerprint)):
            if state[name] != have:
                raise RunError(
                    f"{found.path} was written by another {name} ({state[name]}, here {have}); "
                    "resume with the same preset and data, or train into another --out"
                )
        self._load(found)
        self.seconds = float(str(state["seconds"]))

    def _load(self, found: checkpoint.Found) -> None:
        run, state = self.run, checkpoint.read_state(found.path)
        checkpoint.load_model(found.path, run.model)
        checkpoint.load_optimizer(found.path, run.optimizer, dict(run.model.named_parameters()))
        for name, part in self._stateful():
            part.load_state(checkpoint.read_file(found.path, name))
        progress, liveness = state["progress"], state["liveness"]
        assert isinstance(progress, dict) and isinstance(liveness, dict)
        run.progress = Progress(**progress | {"skipped": tuple(progress["skipped"])})
        self.liveness, self.saved = Liveness(**liveness), found.step

    def _stateful(self) -> Iterator[tuple[str, Stateful]]:
        watching = {f"observer-{name}": observer for name, observer in self.observers.items()}
        for name, part in {"guard": self.run.guard, **watching}.items():
            if isinstance(part, Stateful):
                yield name, part
