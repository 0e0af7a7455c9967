"""metrics.jsonl, the truth of a run: one flat JSON object a step, one for each evaluation."""

import json
import math
from pathlib import Path
from typing import TextIO

from attrs import frozen

from tangram.core.files import write_whole
from tangram.core.hookspecs import HOOKIMPL
from tangram.core.records import EvalReport, Progress, StepReport, Verdict
from tangram.core.registry import component
from tangram.core.session import RunView


@component("observer", use="jsonl")
@frozen(kw_only=True)
class JsonlConfig:
    """Write metrics.jsonl into the run directory, a line at a time."""

    def build(self) -> object:
        """Build it."""
        return Jsonl()


class Jsonl:
    """Writes metrics.jsonl. Line-buffered: a crash loses no finished step."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._every = 0

    @HOOKIMPL
    def tangram_run_started(self, run: RunView) -> None:
        """Open the file; of a resumed run, drop what will be run again."""
        self._every = run.experiment.train.evaluate_every
        self._open(run.directory / "metrics.jsonl", run.progress)

    @HOOKIMPL
    def tangram_step_ended(self, report: StepReport) -> None:
        """Write the step; at a rollback, drop what will be run again."""
        if report.verdict is Verdict.ROLLBACK:
            assert self._file is not None
            self._file.close()
            self._open(Path(self._file.name), report.after)
        self._write(report.metrics())

    @HOOKIMPL
    def tangram_evaluated(self, report: EvalReport) -> None:
        """Write the evaluation."""
        self._write(report.metrics())

    @HOOKIMPL
    def tangram_run_ended(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _open(self, path: Path, now: Progress) -> None:
        if path.exists():
            _keep(path, now, self._every)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def _write(self, row: dict[str, float | int | str] | dict[str, float | int | bool]) -> None:
        assert self._file is not None
        finite = {name: None if _not_finite(value) else value for name, value in row.items()}
        self._file.write(json.dumps(finite) + "\n")


def _not_finite(value: float | str) -> bool:
    return isinstance(value, float) and not math.isfinite(value)  # which JSON cannot write


def _keep(path: Path, now: Progress, every: int) -> None:
    """Drop the rows of what comes after `now` or comes again, and of rollbacks that `now` does not know.

    A run that is cut off before the checkpoint of a rollback is sealed will be rolled back again. What comes again at
    `now` itself is the evaluation before the first step and that of the end, not the one after `every` steps.
    """
    rows, kept = [], 1 if every and now.step and now.step % every == 0 else 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the line that a crash cut off
            continue
        evaluation = row["step"] == now.step and "eval.complete" in row
        kept -= evaluation
        again = row["step"] > now.step or (evaluation and kept < 0)
        if not again and row.get("skipped", -1) in (-1, *now.skipped):
            rows.append(line + "\n")
    write_whole(path, "".join(rows))
