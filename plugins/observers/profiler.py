"""A trace of chosen steps: where the time of a step goes."""

import os
from pathlib import Path

import torch
from attrs import Attribute, field, frozen
from torch.profiler import ProfilerActivity, profile

from tangram.core.hookspecs import HOOKIMPL
from tangram.core.records import StepReport
from tangram.core.registry import component
from tangram.core.session import RunView

_ROWS = 30


@component("observer", use="profiler")
@frozen(kw_only=True)
class ProfilerConfig:
    """Trace chosen steps into the run directory's profile/: a Chrome trace and the 30 most expensive operations.

    Attributes:
        steps: First and last step, counted from 1; an evaluation or a checkpoint that falls between them is traced too.
    """

    steps: tuple[int, int] = field(default=(10, 12))

    @steps.validator
    def _in_order(self, _: "Attribute[tuple[int, int]]", value: tuple[int, int]) -> None:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"steps {list(value)} must be the first, at least 1, and the last, not before it")

    def build(self) -> "Profiler":
        """Build it."""
        return Profiler(*self.steps)


class Profiler:
    """Traces the steps `first` to `last`, or those of them that the run comes to."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._trace: profile | None = None
        self._begun = self._ended = 0

    @HOOKIMPL
    def tangram_model_built(self, run: RunView) -> None:
        """Begin at once if the next step is a chosen one."""
        self._before(run.progress.step + 1)

    @HOOKIMPL
    def tangram_step_ended(self, run: RunView, report: StepReport) -> None:
        """Begin before the first chosen step; write after the last."""
        self._ended = report.after.step
        if self._ended >= self.last:
            self._write(run.directory)
        else:
            self._before(self._ended + 1)

    @HOOKIMPL
    def tangram_run_ended(self, run: RunView) -> None:
        """Write what there is of a run that ended between the two."""
        self._write(run.directory)

    def _before(self, step: int) -> None:
        if self._trace is None and self.first <= step <= self.last:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or its library writes into the progress bar
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._trace, self._begun = profile(activities=activities), step
            self._trace.start()

    def _write(self, directory: Path) -> None:
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        if self._ended < self._begun:  # the run ended before the step did
            return
        folder = directory / "profile"
        folder.mkdir(exist_ok=True)
        name = f"steps-{self._begun}-{self._ended}"
        trace.export_chrome_trace(str(folder / f"{name}.json.gz"))
        order = "self_device_time_total" if ProfilerActivity.CUDA in trace.activities else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=80)
        (folder / f"{name}.txt").write_text(table, encoding="utf-8")
