"""The live view: a progress bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Iterable

from attrs import field, frozen
from attrs.validators import gt
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from tangram.core.hookspecs import HOOKIMPL
from tangram.core.records import EvalReport, StepReport, Verdict
from tangram.core.registry import component
from tangram.core.session import RunView


@component("observer", use="console")
@frozen(kw_only=True)
class ConsoleConfig:
    """Show the run live: a progress bar on a terminal, plain lines elsewhere.

    Attributes:
        every: Seconds between plain lines.
    """

    every: float = field(default=10.0, validator=gt(0.0))

    def build(self) -> object:
        """Build it."""
        return ConsoleView(self.every)


class _Bar(Progress):
    """A bar below the line of the last step: side by side, 80 columns do not hold them."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return what is drawn anew a few times a second."""
        yield Text(self.line, no_wrap=False, overflow="fold")
        yield from super().get_renderables()


class ConsoleView:
    """Shows the run."""

    def __init__(self, every: float) -> None:
        # Names and paths are no markup, and a line in a log stays one line.
        plain = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.every, self.console = every, plain
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._shown = -math.inf
        self._bits = ""

    @HOOKIMPL
    def tangram_run_started(self, run: RunView) -> None:
        """Say what runs and where; begin the bar."""
        total, begun = run.experiment.train.tokens, run.progress.tokens
        resumed = f", resumed at step {run.progress.step}" if run.progress.step else ""
        self.console.print(f"{run.experiment.name}: {total:,} tokens into {run.directory}{resumed}")
        if not self.console.is_terminal:
            return
        times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left"))
        self._bar = _Bar(BarColumn(None), TextColumn("{task.percentage:>3.0f}%"), *times, console=self.console)
        self._task = self._bar.add_task("", total=total, completed=begun)
        self._bar.start()

    @HOOKIMPL
    def tangram_step_ended(self, report: StepReport) -> None:
        """Show the step."""
        line = self._line(report)
        if report.verdict is not Verdict.ACCEPT:
            self.console.print(f"{line}: {report.verdict.value}, no update: {report.culprit}")
        elif self._bar is not None:
            self._bar.line = line
            self._bar.update(self._task, completed=report.after.tokens)
        elif time.monotonic() - self._shown >= self.every:
            self._shown = time.monotonic()
            self.console.print(line)

    @HOOKIMPL
    def tangram_evaluated(self, report: EvalReport) -> None:
        """Show the bits per byte."""
        if report.bits_per_byte is None:
            return
        self._bits = f"{report.bits_per_byte:.3f} bits/byte"
        part = "all held-out text" if report.complete else "part of the held-out text"
        self.console.print(f"step {report.now.step}: {self._bits} on {part}")

    @HOOKIMPL
    def tangram_run_ended(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _line(self, report: StepReport) -> str:
        parts = [f"step {report.after.step}", f"loss {report.result.total:.3f}"]
        if "next_token" in report.result.losses:
            parts.append(f"next {report.result.losses['next_token']:.3f}")
        if self._bits:
            parts.append(self._bits)
        if report.routed:
            parts.append(f"violation {report.violation:.2f}")
        return "  ".join([*parts, f"{report.tokens_per_second:,.0f} tok/s"])
