"""Whatever becomes of wandb, a run has the same numbers and ends; offline it asks nothing of the network."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import assault
import offline
import pytest
from forks import answers
from tiny import SMALL

pytest.importorskip("wandb")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the attacks need /proc and prlimit")

STEPS = 12
RUN = ("train", "v3-tiny", *SMALL, f"train.tokens={STEPS * 48}", "objectives.mtp=null", "model.blocks.1={repeat: 1}")
KINDS = ("killed", "blocked", "full")
LONGEST = 60.0
"""Seconds that a run of a few steps may take on a busy machine; a run that waits for wandb takes for ever."""


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a user who has no account."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return bare | {"HOME": str(home), "NETRC": str(home / "none"), "OMP_NUM_THREADS": "1"}


def numbers(directory: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


@pytest.fixture
def attacked(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for file in tmp_path.glob("*.victims"):
        for pid in map(int, file.read_text().split()):
            if "wandb" in Path(f"/proc/{pid}/comm").read_text() if Path(f"/proc/{pid}").exists() else False:
                os.kill(pid, signal.SIGKILL)


def test_killed_blocked_or_full_it_changes_no_number_and_the_run_ends(attacked: Path) -> None:
    watched = (*RUN, "observers.wandb={}", "--plugin", assault.__file__)
    commands = {"alone": [*RUN, "--out", "alone"]} | {
        kind: [*watched, f"observers.assault={{use: assault, how: {kind}}}", "--out", kind] for kind in KINDS
    }
    began = time.monotonic()
    for name, (code, said) in answers(commands, attacked, environment(attacked)).items():
        assert code == 0, (name, said)
        assert numbers(attacked / name) == numbers(attacked / "alone")
        assert len(numbers(attacked / name)) == STEPS
        assert name == "alone" or (attacked / f"{name}.victims").read_text()
        assert name != "blocked" or "wandb: off for the rest of this run (its process does not answer)" in said
    assert time.monotonic() - began < LONGEST * len(commands)


def test_offline_no_process_of_the_run_connects_to_anything_but_its_own_machine(tmp_path: Path) -> None:
    """Seen from the calls where there is strace; else the run must do with an empty network, or without a socket."""
    traced = ["strace", "-f", "-qq", "-e", "trace=connect,sendto", "-o", "calls"]
    ways = (traced, ["unshare", "-rn"], [sys.executable, offline.__file__])
    way = next(way for way in ways if works([*way, "true"], tmp_path))
    command = [*way, sys.executable, "-m", "tangram.core.cli", *RUN, "observers.wandb={}", "--out", "run"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=4 * LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "wandb: offline (no API key)" in done.stdout
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    if way is traced:
        outward = re.compile(r"sa_family=AF_INET6?, (?!.*(\"127\.|\"::1\"))")
        assert not [line for line in (tmp_path / "calls").read_text().splitlines() if outward.search(line)]


@pytest.mark.parametrize("way", [["unshare", "-rn"], [sys.executable, offline.__file__]])
def test_where_there_is_no_network_none_is_reached(way: list[str], tmp_path: Path) -> None:
    """Else the test above would be content with anything, where there is no strace."""
    if not works([*way, "true"], tmp_path):
        pytest.skip(f"{way} is not allowed here")
    reach = "import socket; socket.create_connection(('127.0.0.1', {}), timeout=5)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", reach.format(server.getsockname()[1])]
        assert works(command, tmp_path)
        assert not works([*way, *command], tmp_path)


def works(command: list[str], folder: Path) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
