"""A trainer that steps, saves, crashes, rots and resumes in any order is always where an undisturbed one was."""

import hashlib
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from attrs import frozen
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tiny import tiny
from whole_runs import essence

from tangram.core import checkpoint
from tangram.core.checkpoint import CheckpointError
from tangram.core.interruption import RunInterruptedError
from tangram.core.run import train
from tangram.core.session import Session
from tangram.core.step import train_step

STEPS, EVERY = 8, 2
SETTINGS = (f"train.tokens={STEPS * 48}", f"train.checkpoint_every={EVERY}", "train.keep_last=3")


class PowerCutError(Exception):
    """The end of a process, as far as one process can play it."""


@frozen
class Reference:
    """What an undisturbed run leaves.

    Attributes:
        end: See `runs.essence`.
        saved: Hashes of the files of every step's checkpoint.
    """

    end: dict[str, object]
    saved: dict[int, dict[str, str]]


def hashes(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("*.safetensors")}


def undisturbed() -> Reference:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "every"  # a stop at any step leaves a checkpoint there
        train(tiny(f"train.tokens={STEPS * 48}", "train.checkpoint_every=1", "train.keep_last=99"), out)
        saved = {int(path.name.removeprefix("step-")): hashes(path) for path in (out / "checkpoints").iterdir()}
        assert len(saved) == STEPS
        out = Path(folder) / "whole"
        train(tiny(*SETTINGS), out)
        return Reference(essence(out, STEPS), saved)


REFERENCE: list[Reference] = []


class TrainerMachine(RuleBasedStateMachine):
    """One run directory, and everything that may happen to it."""

    def __init__(self) -> None:
        super().__init__()
        if not REFERENCE:
            REFERENCE.append(undisturbed())
        self.reference = REFERENCE[0]
        self.folder = tempfile.TemporaryDirectory()
        self.run = Path(self.folder.name) / "run"
        self.done = False

    def teardown(self) -> None:
        self.folder.cleanup()

    def begin(self, taken: int | None, ending: str) -> None:
        """Start or resume; after `taken` steps of this process comes its ending."""
        calls: list[int] = []

        def step(run: object, batch: object) -> object:
            if len(calls) == taken and ending == "crash":
                raise PowerCutError
            calls.append(1)
            report = train_step(run, batch)
            if len(calls) == taken and ending == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            return report

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tangram.core.session.train_step", step)
            train(tiny(*SETTINGS), self.run, resume=(self.run / "experiment.yaml").exists())
        self.done = True

    @precondition(lambda self: not self.done)
    @rule(taken=st.integers(0, STEPS - 1))
    def crash(self, taken: int) -> None:
        """The process is gone after some steps."""
        with self.refused_only_if_nothing_is_whole(), suppress(PowerCutError):
            self.begin(taken, "crash")

    @precondition(lambda self: not self.done)
    @rule(taken=st.integers(1, STEPS - 1))
    def stop(self, taken: int) -> None:
        """It is asked to stop, and saves where it is."""
        before = int(self.whole()[-1].name.removeprefix("step-")) if self.whole() else 0
        with self.refused_only_if_nothing_is_whole():
            with pytest.raises(RunInterruptedError) if before + taken < STEPS else suppress(RunInterruptedError):
                self.begin(taken, "stop")
            assert f"step-{min(before + taken, STEPS)}" in {path.name for path in self.whole()}

    @precondition(lambda self: not self.done)
    @rule(taken=st.integers(0, STEPS - 1), file=st.sampled_from(["model.safetensors", "state.json", "MANIFEST.json"]))
    def crash_while_saving(self, taken: int, file: str) -> None:
        """The process is gone while it writes the next checkpoint."""

        def torn(self: Session, *_: object) -> None:
            scratch = self.directory / "checkpoints" / f".step-{self.run.progress.step}.writing"
            scratch.mkdir(parents=True, exist_ok=True)
            (scratch / file).write_bytes(b"{")
            raise PowerCutError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "_write", torn)
            self.crash(taken)

    @precondition(lambda self: bool(self.whole()))
    @rule(data=st.data())
    def rot(self, data: st.DataObject) -> None:
        """A bit of the newest checkpoint flips."""
        files = sorted(path for path in self.whole()[-1].iterdir() if path.is_file())
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        self.done = False

    @precondition(lambda self: not self.done)
    @rule()
    def finish(self) -> None:
        """Nothing more happens: the end is that of the undisturbed run."""
        with self.refused_only_if_nothing_is_whole():
            self.begin(None, "none")
            assert essence(self.run, STEPS) == self.reference.end

    @invariant()
    def every_whole_checkpoint_is_one_of_the_undisturbed_run(self) -> None:
        for path in self.whole():
            assert hashes(path) == self.reference.saved[int(path.name.removeprefix("step-"))]

    @contextmanager
    def refused_only_if_nothing_is_whole(self) -> Iterator[None]:
        """A run is refused where there are checkpoints and none is whole, and nowhere else."""
        try:
            yield
        except CheckpointError as error:
            if self.whole() or not self.checkpoints():
                raise AssertionError("there was something to go on from") from error

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return sorted((self.run / "checkpoints").glob("step-*"))

    def whole(self) -> list[Path]:
        """Return those that their manifests confirm."""
        found = []
        for path in self.checkpoints():
            with suppress(CheckpointError):
                checkpoint.verify(path)
                found.append(path)
        return found


TestTrainer = TrainerMachine.TestCase
TestTrainer.settings = settings(max_examples=4, stateful_step_count=6)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(2))
def test_the_trainer_for_long(part: int) -> None:
    """The same for minutes, every time and in every part from another seed."""
    long = settings(max_examples=10, stateful_step_count=20, derandomize=False)
    run_state_machine_as_test(TrainerMachine, settings=long)
