"""Checkpoints written beside the training that goes on."""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from tangram.core import checkpoint
from tangram.core.checkpoint import Team
from tangram.core.contracts import State


@frozen
class Saving:
    """What the checkpoints of a run cost, since it was started or resumed.

    Attributes:
        checkpoints: Checkpoints written.
        held_up: Seconds that training waited: for the snapshot, and for the checkpoint before it where that was
            not written yet.
        writing: Seconds of writing, beside the training.
        share: `held_up` over the seconds of all steps.
    """

    checkpoints: int
    held_up: float
    writing: float
    share: float


class Saver:
    """Copies a state to memory, and writes it in a thread of its own; one checkpoint at a time.

    Args:
        root: The run's folder of checkpoints.
        keep_last: Newest checkpoints to keep.
        keep_every: Checkpoints at multiples of so many steps are kept too; 0 for none.
        team: The ranks that write together; the first of them deletes what is old.
    """

    def __init__(self, root: Path, keep_last: int, keep_every: int, team: Team | None = None) -> None:
        self._root, self._keep_last, self._keep_every = root, keep_last, keep_every
        self._team = team or Team()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[tuple[Path, float]] | None = None
        self._count, self._held_up, self._writing = 0, 0.0, 0.0

    def submit(self, step: int, files: Mapping[str, State], state: Mapping[str, object]) -> list[Path]:
        """Copy the state and have it written as `root/step-N`; return what was sealed meanwhile.

        Raises:
            CheckpointError: The checkpoint before this one could not be written.
        """
        sealed, began = self.wait(), time.perf_counter()
        snapshot = {name: _copied(content) for name, content in files.items()}
        self._pending = self._worker.submit(self._write, step, snapshot, state)
        self._held_up += time.perf_counter() - began
        return sealed

    def sealed(self) -> list[Path]:
        """Return the checkpoint that was sealed since the last call, if any; do not wait.

        Raises:
            CheckpointError: It could not be written.
        """
        return self.wait() if self._pending is not None and self._pending.done() else []

    def wait(self) -> list[Path]:
        """Wait for the checkpoint under way, if any, and return it.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._pending is None:
            return []
        began, pending = time.perf_counter(), self._pending
        self._pending = None
        path, took = pending.result()
        self._held_up += time.perf_counter() - began
        self._count, self._writing = self._count + 1, self._writing + took
        return [path]

    def close(self) -> None:
        """Let the checkpoint under way be written, and end the thread."""
        self._worker.shutdown()

    def cost(self, seconds: float) -> Saving:
        """Return what saving cost beside `seconds` of steps."""
        share = self._held_up / seconds if seconds else 0.0
        return Saving(self._count, self._held_up, self._writing, share)

    def _write(self, step: int, files: Mapping[str, State], state: Mapping[str, object]) -> tuple[Path, float]:
        began = time.perf_counter()
        path = checkpoint.save(self._root, step, files, state, team=self._team)
        if self._team.rank == 0:
            checkpoint.prune(self._root, step, self._keep_last, self._keep_every)
        return path, time.perf_counter() - began


def _copied(content: State) -> State:
    with torch.no_grad():
        return {k: v.to("cpu", copy=True) if isinstance(v, Tensor) else v for k, v in content.items()}
