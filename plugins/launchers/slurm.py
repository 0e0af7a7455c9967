"""The cells of a study on a Slurm cluster, through submitit. Its folder must lie where all nodes see it."""

import os
import subprocess
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal

from attrs import define, field, frozen
from attrs.validators import ge, gt, in_

from tangram.core.contracts import Job, Launcher
from tangram.core.registry import component

_FAILED = 1


@component("launcher", use="slurm")
@frozen(kw_only=True)
class SlurmConfig:
    """Submit each cell as a job of a Slurm cluster.

    Attributes:
        partition: The partition; empty for the cluster's default.
        workers: Jobs that may run at once.
        cpus: Cores of a job.
        gpus: GPUs of a job.
        memory_gb: Memory of a job; 0 for the cluster's default.
        minutes: Time limit of a job; one that runs out goes on when the study is run again.
        cluster: `slurm`, or `local` to run submitit's jobs on this machine.
        poll_seconds: Seconds between looks at what has ended.
    """

    partition: str = ""
    workers: int = field(default=16, validator=gt(0))
    cpus: int = field(default=4, validator=gt(0))
    gpus: int = field(default=0, validator=ge(0))
    memory_gb: int = field(default=0, validator=ge(0))
    minutes: int = field(default=60, validator=gt(0))
    cluster: Literal["slurm", "local"] = field(default="slurm", validator=in_(("slurm", "local")))
    poll_seconds: float = field(default=10.0, validator=gt(0.0))

    def build(self) -> Launcher:
        """Build it."""
        return Slurm(self)


class Slurm:
    """Jobs of a cluster."""

    def __init__(self, config: SlurmConfig) -> None:
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ValueError("needs submitit: pip install 'tangram-lm[slurm]'") from None
        self.config = config
        self.workers, self.threads = config.workers, config.cpus

    def run(self, jobs: Sequence[Job], folder: Path) -> Generator[tuple[Job, int], None, None]:
        """Yield each job as it ends; submitit's files and the output of the jobs are in `folder`."""
        import submitit
        from submitit.helpers import as_completed

        executor = submitit.AutoExecutor(folder=folder, cluster=self.config.cluster)
        executor.update_parameters(**self.parameters())
        with executor.batch():
            submitted = [executor.submit(_Run(job.command, self.threads)) for job in jobs]
        names = {id(task): job for task, job in zip(submitted, jobs, strict=True)}
        try:
            for task in as_completed(submitted, poll_frequency=self.config.poll_seconds):
                yield names[id(task)], _FAILED if task.exception() else task.result()
        finally:
            left = [task for task in submitted if not task.done()]
            for task in left:
                task.cancel()
            for task in left:
                task.wait()

    def parameters(self) -> dict[str, object]:
        """Return what submitit is asked for, by its names."""
        asked: dict[str, object] = {
            "name": "tangram",
            "cpus_per_task": self.config.cpus,
            "gpus_per_node": self.config.gpus,
            "timeout_min": self.config.minutes,
        }
        if self.config.memory_gb:
            asked["mem_gb"] = self.config.memory_gb
        if self.config.cluster == "slurm":
            asked["slurm_array_parallelism"] = self.config.workers
            if self.config.partition:
                asked["slurm_partition"] = self.config.partition
        return asked


@define
class _Run:
    """What a job does. It is pickled, and carries nothing but words.

    Attributes:
        command: The command line.
        threads: Threads that it has for itself.
    """

    command: tuple[str, ...]
    threads: int
    process: "subprocess.Popen[bytes] | None" = None

    def __call__(self) -> int:
        """Run the command; return its exit code."""
        count = str(self.threads)
        self.process = subprocess.Popen(
            self.command, env=os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        )
        try:
            return self.process.wait()
        except KeyboardInterrupt:
            return self._stopped()

    def checkpoint(self) -> object:
        """Stop and save, and ask for another go: submitit calls this when the time runs out or others come first."""
        from submitit.helpers import DelayedSubmission

        self._stopped()
        return DelayedSubmission(_Run(self.command, self.threads))

    def _stopped(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait()
