"""How fast an experiment trains here: a few steps of it, taken to know how long the whole will take."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from attrs import asdict, frozen

from tangram.core.assembly import assemble, sequences_at
from tangram.core.evaluation import evaluate
from tangram.core.experiment import Experiment
from tangram.core.files import write_whole
from tangram.core.measure import measure
from tangram.core.presets import digest
from tangram.core.step import train_step

FEWEST_STEPS, MOST_STEPS, ENOUGH = 4, 40, 6.0
"""Steps of a trial, and the seconds after which it has seen enough. The first step, which warms up, does not count."""

_BYTES = 16
"""Bytes of a parameter under training: weight, gradient, and two moments, in float32."""


@frozen
class Pace:
    """How fast an experiment is.

    Attributes:
        starting: Seconds until the first step: reading the data, making the weights.
        tokens_per_second: Tokens trained on in a second.
        evaluating: Seconds of the evaluation at the end, on all held-out text.
    """

    starting: float
    tokens_per_second: float
    evaluating: float

    def seconds(self, tokens: int) -> float:
        """Return the seconds of a run on so many tokens."""
        return self.starting + tokens / self.tokens_per_second + self.evaluating


def pace(experiment: Experiment, threads: int) -> Pace | None:
    """Try an experiment for a few steps; None where its weights would not fit into half of the memory.

    Raises:
        BuildError: It cannot be built.
        NonFiniteError: Its first steps are not finite.
    """
    parameters = measure(experiment).parameters
    if _BYTES * (parameters.total + parameters.mtp) > _memory() / 2:
        return None
    with _threads(threads):
        began = time.perf_counter()
        run = assemble(experiment)
        starting = time.perf_counter() - began
        size = sequences_at(experiment, run.progress)
        times: list[float] = []
        while len(times) <= FEWEST_STEPS or (len(times) <= MOST_STEPS and sum(times) < ENOUGH):
            began = time.perf_counter()
            train_step(run, run.data.batch(run.progress, size))
            times.append(time.perf_counter() - began)
        per_second = size * experiment.train.sequence_length / median(times[1:])
        began = time.perf_counter()
        part = evaluate(run, limit=2 * experiment.train.micro_sequences)
        took = time.perf_counter() - began
    whole = run.data.held_out.n_bytes / part.n_bytes if run.data.held_out and part and part.n_bytes else 0.0
    return Pace(starting, per_second, took * whole)


class Paces:
    """Trials, each taken once and kept in a file, so that a study that goes on is the study that began.

    Args:
        file: Where they are kept; None to keep none.
        threads: Threads of a trial.
    """

    def __init__(self, file: Path | None, threads: int) -> None:
        self._file, self._threads = file, threads
        self._known: dict[str, Pace] = {}
        if file is not None and file.is_file():
            self._known = {key: Pace(**entry) for key, entry in json.loads(file.read_text(encoding="utf-8")).items()}

    def of(self, experiment: Experiment) -> Pace | None:
        """Return the pace of an experiment; None where it is too large to try."""
        key = digest(experiment)
        if key not in self._known:
            found = pace(experiment, self._threads)
            if found is None:
                return None
            self._known[key] = found
            if self._file is not None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                entries = {key: asdict(entry) for key, entry in self._known.items()}
                write_whole(self._file, json.dumps(entries, indent=1))
        return self._known[key]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
