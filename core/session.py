"""A run under way: steps, checkpoints, rollbacks, and what is told to its observers."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar, cast

import pluggy
import torch
from attrs import asdict, define, evolve, field, frozen

from tangram.core import checkpoint
from tangram.core.assembly import past_skipped, sequences_at
from tangram.core.contracts import Averaging, Drafter, NonFiniteError, State, Stateful
from tangram.core.evaluation import evaluate, with_weights
from tangram.core.experiment import Experiment
from tangram.core.files import write_whole
from tangram.core.interruption import Interruption
from tangram.core.liveness import Liveness, Piece
from tangram.core.model import Model, build_model
from tangram.core.presets import digest_anywhere
from tangram.core.process import peak_rss, versions
from tangram.core.records import EvalReport, Progress, StepReport, Verdict
from tangram.core.saver import Saver, Saving
from tangram.core.step import Trainer, train_step
from tangram.core.tokenizer_files import tokenizer_digest

_T = TypeVar("_T")

_WHOLE = 1 << 32
"""Bytes of the weights of a model that one rank of several can hold besides its own part."""

_WARMTH = 0.7
"""Temperature of the texts that a run ends with."""

_PROMPTS, _CONTINUED = 8, 64
"""Held-out texts with which speculation is tried, and the tokens by which each is continued."""


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
        speculation: Share of the drafts that were kept at each depth (`depth 1`, ...), and tokens a round; empty where
            nothing drafts or nothing was held out.
        saving: What the checkpoints cost.
        peak_rss: Largest resident memory of the process, bytes.
    """

    directory: Path
    evaluation: EvalReport | None
    averaged: Mapping[str, EvalReport]
    references: Mapping[str, float]
    pieces: tuple[Piece, ...]
    sample: str
    speculation: Mapping[str, float]
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
        tokenizer: Digest of the run's tokenizer, which every checkpoint has; None where there is none.

    Of several ranks the first speaks: it alone writes notes and has observers, but for those that average weights.
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
    tokenizer: str | None = field(init=False)

    @tokenizer.default
    def _digested(self) -> str | None:
        return tokenizer_digest(self.run.data.tokenizer)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that speaks."""
        return self.run.parallel.layout.rank == 0

    def agreed(self, decide: Callable[[], _T]) -> _T:
        """Return what the first rank decides; if it cannot, its error is that of all ranks."""
        parallel = self.run.parallel
        told: list[tuple[_T | None, Exception | None]] = []
        if self.leads:
            try:
                told = [(decide(), None)]
            except Exception as error:
                told = [(None, error)]
        decided, trouble = parallel.groups.gather(told, range(parallel.layout.ranks))[0]
        if trouble is not None:
            raise trouble
        return cast(_T, decided)

    def begin(self) -> None:
        """Remember what the run starts with, wherever it is held."""
        parallel, model = self.run.parallel, self.run.model
        here = [(layer, bias.tolist()) for layer, bias in model.biases().items()]
        trained = self.run.experiment.train.init_from is not None
        biases = dict(parallel.groups.gather(here, range(parallel.layout.ranks)))
        self.liveness.begin(model.experts, biases, trained=trained)

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
            if train.init_from and train.evaluate_every and not run.progress.step:  # what it starts from
                self._evaluate(view, train.evaluate_sequences)
            began = time.perf_counter()
            data_ranks = run.parallel.layout.data_ranks
            run.progress = past_skipped(run.experiment, run.progress, data_ranks)
            batch = run.data.batch(run.progress, sequences_at(run.experiment, run.progress, data_ranks))
            weights = run.model.weights(run.progress)
            try:
                report, stopping = self._told(train_step(run, batch), began)
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
            if stopping or (run.parallel.layout.ranks == 1 and self.interruption.caught):
                self.save(view)
                self._announce(view, self.saver.wait())
                raise self.interruption.as_error(run.progress.step)

    def finish(self, view: RunView) -> Outcome:
        """Save, evaluate, sample, and judge every piece; nothing is lost if it is interrupted."""
        run = self.run
        self.save(view)
        self._announce(view, self.saver.wait())
        with self.interruption.at_once(run.progress.step):
            report = self._evaluate(view, None)
            averaged = dict(self._averaged())
            whole = self._whole()
            sample, pieces = self._tried(whole)
            speculation = {} if whole is None else self._speculated(whole)
        saving = self.saver.cost(self.seconds)
        content = {
            "pieces": [asdict(piece) for piece in pieces],
            "averaged": {name: evaluation.metrics() for name, evaluation in averaged.items()},
            "sample": sample,
            "speculation": speculation,
            "saving": asdict(saving),
            "peak_rss": peak_rss(),
        }
        self.note("verdict", content)
        return Outcome(
            self.directory, report, averaged, view.references, pieces, sample, speculation, saving, peak_rss()
        )

    def _whole(self) -> Model | None:
        """Return the whole model on the first rank, as it was just saved; None elsewhere, and where it is too large."""
        run = self.run
        if run.parallel.layout.ranks == run.model.n_stages == 1:
            return run.model
        if not self.leads or sum(p.nbytes for p in build_model(run.experiment, device="meta").parameters()) > _WHOLE:
            return None
        model = build_model(run.experiment, device=run.parallel.device)
        found = checkpoint.newest(self.directory / "checkpoints")
        assert found is not None
        checkpoint.load_model(found.path, model)
        return model

    def _tried(self, model: Model | None) -> tuple[str, tuple[Piece, ...]]:
        """Return what the model makes of the prompt, and what became of each piece."""
        run, train = self.run, self.run.experiment.train
        if model is None:
            why = "the model is too large for one rank, or this is not the first"
            return "", tuple(self.liveness.unjudged(run.model, run.progress, why))
        sample = ""
        if train.prompt and run.data.tokenizer is not None:
            from tangram.core.decoding import sample as continued
            from tangram.core.sampling import Sampling

            drawn = Sampling(temperature=_WARMTH, seed=train.seed)
            sample = continued(model, run.data.tokenizer, train.prompt, 96, sampling=drawn)
        probe = run.data.batch(run.progress, train.micro_sequences).to(next(model.parameters()).device)
        return sample, tuple(self.liveness.judge(model, probe, run.progress))

    def _speculated(self, model: Model) -> dict[str, float]:
        """Return what speculation does on continuations of held-out text, drawn as the sample is."""
        run, train = self.run, self.run.experiment.train
        drafts = any(isinstance(objective, Drafter) for _, objective in model.token_objectives())
        if not drafts or run.data.held_out is None:
            return {}
        from tangram.core.decoding import speculated
        from tangram.core.sampling import Sampling

        batch, _ = next(iter(run.data.held_out.batches(_PROMPTS)))
        prompts = batch.tokens[:, : max(train.sequence_length // 8, 1)].tolist()
        count = min(_CONTINUED, train.sequence_length - len(prompts[0]))
        tally = speculated(model, prompts, count, Sampling(temperature=_WARMTH, seed=train.seed))
        kept = {f"depth {depth}": share for depth, share in enumerate(tally.acceptance, start=1)}
        return kept | {"tokens a round": tally.tokens_per_round}

    def _averaged(self) -> Iterator[tuple[str, EvalReport]]:
        for name, observer in self.observers.items():
            if isinstance(observer, Averaging):
                with with_weights(self.run.model, observer.averaged()):
                    report = evaluate(self.run)
                if report is not None:
                    yield name, report

    def _told(self, report: StepReport, began: float) -> tuple[StepReport, bool]:
        """Return the report with what only the loop knows, and whether any rank was asked to stop."""
        run = self.run
        took = time.perf_counter() - began
        self.seconds += took
        routed = {layer: n_experts for layer, n_experts in enumerate(run.model.experts) if n_experts}
        # One message for the biases, each known where its layer is, and for whether to go on.
        values = torch.full((len(run.model.experts) + 1,), -1.0, dtype=torch.float64, device=run.parallel.device)
        values[-1] = bool(self.interruption.caught)
        for layer, bias in run.model.biases().items():
            values[layer] = bias.abs().max()
        *biases, stopping = run.parallel.groups.largest(values, range(run.parallel.layout.ranks)).tolist()
        if stopping and not self.interruption.caught:
            self.interruption.caught = "a signal to another rank"
        tokens = report.after.tokens - report.now.tokens
        return evolve(
            report,
            routed=routed,
            biases={layer: bias for layer, bias in enumerate(biases) if bias >= 0},
            seconds=self.seconds,
            tokens_per_second=tokens / took,
        ), bool(stopping)

    def _roll_back(self, view: RunView, report: StepReport) -> None:
        """Go back to the last checkpoint, and write into it that the batch of `report` is to be skipped.

        The guard and the observers hear of it before it is sealed. Cut off at any moment, the run is resumed either
        from before the bad step, and goes back once more, or from after the rollback.
        """
        run = self.run
        self._announce(view, self.saver.wait())
        found = self.agreed(lambda: checkpoint.newest(self.directory / "checkpoints"))
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
        if self.leads:
            write_whole(self.directory / f"{name}.json", json.dumps(content, indent=1))

    def save(self, view: RunView) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.saved != self.run.progress.step:
            self._write(view)

    def _write(self, view: RunView) -> None:
        run, owned, shares = self.run, self._owned(), self.run.sharding.rows()
        addresses = {p: address for address, p in run.model.named_parameters() if address in owned}
        files: dict[str, State] = {
            "model": checkpoint.in_shares(run.model.state_dict(), owned, shares),
            "optimizer": checkpoint.optimizer_state(run.optimizer, addresses, shares),
        }
        for name, part in self._stateful():
            if self._by_address(part):
                files[name] = checkpoint.in_shares(part.state(), owned, shares)
            elif self.leads:
                files[name] = part.state()
        state = {
            "progress": asdict(run.progress),
            "seconds": self.seconds,
            "experiment": digest_anywhere(run.experiment),
            "data": run.data.fingerprint,
            "tokenizer": self.tokenizer,
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
        for name, have in (("experiment", digest_anywhere(run.experiment)), ("data", run.data.fingerprint)):
            if state[name] != have:
                raise RunError(
                    f"{found.path} was written by another {name} ({state[name]}, here {have}); "
                    "resume with the same preset and data, or train into another --out"
                )
        self._load(found)
        self.seconds = float(str(state["seconds"]))

    def _load(self, found: checkpoint.Found) -> None:
        run, state, shares = self.run, checkpoint.read_state(found.path), self.run.sharding.rows()
        held = dict(run.model.named_parameters())
        whole = run.parallel.layout.pipeline_ranks == 1
        checkpoint.load_model(found.path, run.model, shares, whole=whole)
        checkpoint.load_optimizer(found.path, run.optimizer, held, shares, whole=whole)
        for name, part in self._stateful():
            only = held if self._by_address(part) else None
            part.load_state(checkpoint.read_file(found.path, name, only, shares))
        progress, liveness = state["progress"], state["liveness"]
        assert isinstance(progress, dict) and isinstance(liveness, dict)
        run.progress = Progress(**progress | {"skipped": tuple(progress["skipped"])})
        self.liveness, self.saved = Liveness(**liveness), found.step

    def _owned(self) -> set[str]:
        """Return what this rank writes: of buffers, which are alike on all their holders, the first one does."""
        run = self.run
        held = {name for name, _ in run.model.named_buffers()}
        layout = run.parallel.layout
        first = {name for name in held if layout.holders(run.model.stages_of(name), False)[0] == layout.rank}
        return first | set(run.sharding.owned())

    def _by_address(self, part: Stateful) -> bool:
        """Return whether ranks have a part's state each for what it holds."""
        return self.run.parallel.layout.ranks > 1 and isinstance(part, Averaging)

    def _stateful(self) -> Iterator[tuple[str, Stateful]]:
        watching = {f"observer-{name}": observer for name, observer in self.observers.items()}
        for name, part in {"guard": self.run.guard, **watching}.items():
            if isinstance(part, Stateful):
                yield name, part
