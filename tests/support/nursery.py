"""A plugin file for studies: a launcher whose workers are forks of this process, where torch is loaded, and doom.

TANGRAM_DOOM is empty, or `KIND:N:FILE`. All workers count their steps in FILE, and at the Nth
    all     every process of the group is killed, workers and the one that launched them
    one     the worker that took the step is killed
    ctrl-c  every process of the group gets SIGINT, as from a terminal
"""

import os
import signal
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from tangram.core import component
from tangram.core.cell_worker import main
from tangram.core.contracts import Job
from tangram.core.hookspecs import HOOKIMPL


@component("launcher", use="forking")
@frozen(kw_only=True)
class ForkingConfig:
    """Forks.

    Attributes:
        workers: Forks at once.
    """

    workers: int = 2

    def build(self) -> "Forking":
        return Forking(self.workers)


class Forking:
    threads = 1

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, jobs: Sequence[Job], folder: Path) -> Generator[tuple[Job, int], None, None]:
        folder.mkdir(parents=True, exist_ok=True)
        left, running = list(jobs), {}
        try:
            while left or running:
                while left and len(running) < self.workers:
                    job = left.pop(0)
                    running[_forked(job, folder / f"{job.name}.log")] = job
                pid = next(iter(running))
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                yield running.pop(pid), code
        finally:
            for pid in running:
                with suppress(ProcessLookupError):  # reaped just before the interrupt came
                    os.kill(pid, signal.SIGTERM)
            for pid in running:
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def _forked(job: Job, log: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(said, 1), os.dup2(said, 2)
            code = main(job.command[3:])
        finally:
            os._exit(code)
    return pid


@component("observer", use="doom")
@frozen(kw_only=True)
class DoomConfig:
    """Ends processes."""

    def build(self) -> "Doom":
        return Doom(os.environ.get("TANGRAM_DOOM", ""))


class Doom:
    def __init__(self, said: str) -> None:
        self.kind, _, rest = said.partition(":")
        when, _, self.file = rest.partition(":")
        self.when = int(when or 0)

    @HOOKIMPL
    def tangram_step_ended(self) -> None:
        if not self.kind:
            return
        with open(self.file, "ab") as counter:
            counter.write(b".")
            counter.flush()
            taken = counter.tell()
        if taken == self.when:
            group = os.getpgid(0)
            if self.kind == "all":
                os.killpg(group, signal.SIGKILL)
            elif self.kind == "one":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                os.killpg(group, signal.SIGINT)
