"""The cells of a study on this machine: one process a cell, the cores divided among those that run at once."""

import os
import signal
import subprocess
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from attrs import field, frozen
from attrs.validators import ge

from tangram.core.contracts import Job, Launcher
from tangram.core.registry import component


@component("launcher", use="local")
@frozen(kw_only=True)
class LocalConfig:
    """Run cells on this machine.

    Attributes:
        workers: Cells that run at once; 0 for one a core.
    """

    workers: int = field(default=0, validator=ge(0))

    def build(self) -> Launcher:
        """Build it."""
        return Local(self.workers)


class Local:
    """Processes of this machine. They share the terminal's group, so Ctrl-C reaches each of them too.

    Args:
        workers: Jobs that run at once; 0 for one a core.
    """

    def __init__(self, workers: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or cores
        self.threads = max(1, cores // self.workers)

    def run(self, jobs: Sequence[Job], folder: Path) -> Generator[tuple[Job, int], None, None]:
        """Yield each job as it ends; its output is in `folder`, in a file of its name."""
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        running: list[subprocess.Popen[bytes]] = []
        closing = threading.Lock()
        closed = False

        def one(job: Job) -> int:
            with (folder / f"{job.name}.log").open("ab") as log:
                with closing:  # none starts that nobody would stop
                    if closed:
                        return -signal.SIGTERM
                    process = subprocess.Popen(job.command, env=environment, stdout=log, stderr=subprocess.STDOUT)
                    running.append(process)
                return process.wait()

        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(one, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                with closing:
                    closed = True
                    for process in running:
                        process.terminate()
