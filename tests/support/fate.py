"""An observer that ends its own process, as a plugin file: which way is said in the environment.

TANGRAM_FATE is empty, or one of
    step:N      SIGKILL after step N
    once:N      the same, but not again where torchrun starts the process once more
    agent:N     Ctrl-C after step N to the process that started this one, which makes of it a SIGTERM to all
    sync:N      SIGKILL at the Nth time that a file is put on disk
    rename:N    SIGKILL before the Nth checkpoint is put into its place
    timer:S     killed S seconds after the run began, wherever it is
    term:N      SIGTERM to itself after step N
    int:N       Ctrl-C once after step N
    twice:N     Ctrl-C twice after step N
    late        SIGTERM to itself while the last evaluation is told
"""

import os
import pathlib
import signal
from collections.abc import Callable

from attrs import frozen

from tangram.core import cli, component
from tangram.core.hookspecs import HOOKIMPL
from tangram.core.records import EvalReport, StepReport


@component("observer", use="fate")
@frozen(kw_only=True)
class FateConfig:
    """Ends the process."""

    def build(self) -> object:
        """Build it."""
        if "TANGRAM_FATE" in os.environ:  # a process of its own, whose pictures nobody looks at
            cli._draw = lambda directory, files: None
        kind, _, when = os.environ.get("TANGRAM_FATE", "").partition(":")
        return Fate(kind, float(when or 0))


class Fate:
    """Ends the process."""

    def __init__(self, kind: str, when: float) -> None:
        self.kind, self.when = kind, when

    @HOOKIMPL
    def tangram_run_started(self) -> None:
        if self.kind == "timer":
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process as abruptly as SIGKILL
            signal.setitimer(signal.ITIMER_REAL, self.when)
        if self.kind == "sync":
            os.fsync = _dying(os.fsync, int(self.when))
        if self.kind == "rename":
            pathlib.Path.rename = _dying(pathlib.Path.rename, int(self.when))

    @HOOKIMPL
    def tangram_step_ended(self, report: StepReport) -> None:
        if report.after.step != self.when:
            return
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        signals = {
            "step": [signal.SIGKILL],
            "once": [] if again else [signal.SIGKILL],
            "term": [signal.SIGTERM],
            "int": [signal.SIGINT],
            "twice": [signal.SIGINT, signal.SIGINT],
        }
        if self.kind == "agent":
            os.kill(os.getppid(), signal.SIGINT)
        for number in signals.get(self.kind, []):
            os.kill(os.getpid(), number)

    @HOOKIMPL
    def tangram_evaluated(self, report: EvalReport) -> None:
        if self.kind == "late" and report.complete:
            os.kill(os.getpid(), signal.SIGTERM)


def _dying(call: Callable[..., object], last: int) -> Callable[..., object]:
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    return counted
