"""An observer that does to wandb's own processes, in the middle of a run, what happens to processes."""

import os
import resource
import signal
from pathlib import Path

from attrs import frozen

from tangram.core import cli
from tangram.core.hookspecs import HOOKIMPL
from tangram.core.records import StepReport
from tangram.core.registry import component
from tangram.plugins.observers import wandb


@component("observer", use="assault")
@frozen(kw_only=True)
class AssaultConfig:
    """Kill, stop or fill.

    Attributes:
        how: `killed`, `blocked` (it stops reading, with no error), or `full` (no file may grow).
        after: The step after which it happens.
        patience: Seconds that the end of the run may wait for wandb.
    """

    how: str
    after: int = 3
    patience: float = 3.0

    def build(self) -> "Assault":
        cli._draw = lambda directory, files: None  # nobody looks at the pictures of these runs
        return Assault(self)


class Assault:
    """Finds the processes below this one that are wandb's, and writes down which."""

    def __init__(self, config: AssaultConfig) -> None:
        self.config = config
        wandb._FINISH_TIMEOUT = config.patience

    @HOOKIMPL
    def tangram_step_ended(self, report: StepReport) -> None:
        if report.after.step != self.config.after:
            return
        found = services()
        Path(f"{self.config.how}.victims").write_text(" ".join(map(str, found)))
        for pid in found:
            if self.config.how == "full":
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
            else:
                os.kill(pid, {"killed": signal.SIGKILL, "blocked": signal.SIGSTOP}[self.config.how])


def services() -> list[int]:
    parents, names = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = file.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        pid = int(file.parent.name)
        parents[pid], names[pid] = int(tail.split()[1]), head.partition("(")[2]
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(pid for pid in below if "wandb" in names[pid])
