"""The launcher for Slurm, with submitit's executor for this machine: real processes and submitit's real files."""

import sys
from pathlib import Path

import submitit

from tangram.core.contracts import Job
from tangram.plugins.launchers.slurm import Slurm, SlurmConfig


def test_a_job_runs_through_submitit_with_its_threads_and_exit_code(tmp_path: Path) -> None:
    """One job, for each has to load torch."""
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS']); sys.exit(3)"
    job = Job("one", (sys.executable, "-c", code, str(tmp_path / "one")))
    launcher = SlurmConfig(cluster="local", cpus=2, poll_seconds=0.05, minutes=5).build()
    assert list(launcher.run([job], tmp_path / "jobs")) == [(job, 3)]
    assert (tmp_path / "one").read_text() == "2"


def test_what_a_cluster_is_asked_for() -> None:
    asked = SlurmConfig(partition="cpu", workers=7, cpus=3, gpus=1, memory_gb=9, minutes=20)
    parameters = Slurm(asked).parameters()
    shared = {"name", "cpus_per_task", "gpus_per_node", "timeout_min", "mem_gb"}
    known = submitit.SlurmExecutor._valid_parameters() | shared
    assert {name.removeprefix("slurm_") for name in parameters} <= known
    assert (parameters["slurm_partition"], parameters["slurm_array_parallelism"]) == ("cpu", 7)
    assert (parameters["cpus_per_task"], parameters["gpus_per_node"], parameters["mem_gb"]) == (3, 1, 9)
    assert parameters["timeout_min"] == 20
    assert (Slurm(asked).workers, Slurm(asked).threads) == (7, 3)
