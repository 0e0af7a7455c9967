"""The Slurm script, with commands that only write down how they were called: it asks to stop, and comes again."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/slurm/train.sbatch"
COMMANDS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; fi',
    "scancel": 'kill -TERM "$(cat step)"',
    # The ranks: they begin a run, and end when asked to, or at once.
    "srun": (
        "mkdir -p run; touch run/experiment.yaml; echo $$ > step; "
        "trap 'sleep 0.2; echo saved >> calls; exit 1' TERM; echo begun; "
        'for _ in $(seq "$STEPS"); do sleep 0.05; done'
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    commands = tmp_path / "venv/bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f'PATH="{commands}:$PATH"\n')
    for name, does in COMMANDS.items():
        (commands / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> calls\n{does}\n')
        (commands / name).chmod(0o755)
    return tmp_path


def job(folder: Path, steps: int) -> subprocess.Popen[str]:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    env = os.environ | slurm | {"SLURM_CPUS_PER_TASK": "16", "VENV": str(folder / "venv"), "STEPS": str(steps)}
    command = ["bash", str(SCRIPT), "v3-tiny", "run", "train.seed=1"]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_shortly_before_the_limit_the_ranks_are_asked_to_stop_and_the_job_comes_again(folder: Path) -> None:
    stopped = job(folder, steps=2000)
    assert stopped.stdout is not None
    assert stopped.stdout.readline() == "begun\n"
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=30)
    assert stopped.returncode == 75, said
    assert calls(folder)[-3:] == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]
    again = job(folder, steps=0)
    said, _ = again.communicate(timeout=30)
    assert again.returncode == 0, said
    first, second = (line for line in calls(folder) if line.startswith("srun"))
    assert first.endswith("-m tangram.core.cli train v3-tiny train.seed=1 --out run")
    assert second == f"{first} --resume"
    assert calls(folder)[-1] == second, "a run that is done does not come again"


def test_a_run_that_fails_does_not_come_again(folder: Path) -> None:
    (folder / "venv/bin/srun").write_text("#!/usr/bin/env bash\necho srun >> calls\nexit 3\n")
    failed = job(folder, steps=0)
    said, _ = failed.communicate(timeout=30)
    assert failed.returncode == 3, said
    assert calls(folder)[-1] == "srun"
