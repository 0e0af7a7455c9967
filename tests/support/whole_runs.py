"""Real training processes, and what two runs must have in common."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tiny import SMALL

FATE = Path(__file__).with_name("fate.py")


def write_preset(path: Path, *overrides: str) -> Path:
    """Write the small V3 with `overrides`, watched by `fate`, as a preset file."""
    from tangram.core.plugins import Plugins
    from tangram.core.presets import resolve, to_yaml

    settings = (*SMALL, "observers.fate={use: fate}", *overrides)
    path.write_text(to_yaml(resolve("v3-tiny", settings, Plugins.discover([FATE])).experiment))
    return path


_PARENT = """
import json, os, resource, signal, sys
import torch.fx.experimental.symbolic_shapes  # backward imports it
from tangram.core import cli, run
for line in sys.stdin:
    asked = json.loads(line)
    if (child := os.fork()) == 0:
        said = os.open(asked["said"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(said, 1), os.dup2(said, 2)
        os.environ["TANGRAM_FATE"] = asked["ends"]
        if asked["most_bytes"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["most_bytes"],) * 2)
        cli.main(asked["arguments"])
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(900)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(0), signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print(code, flush=True)
"""


@cache
def _parent() -> subprocess.Popen:
    """Start the process below which all trainings of this one run: torch is imported once and not by each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", _PARENT], env=environment, **pipes)


def trained(preset: Path | str, out: Path, *arguments: str, ends: str = "", most_bytes: int = 0) -> tuple[int, str]:
    """Run `tangram train` as a process of its own; return its exit code, negative for a signal, and all that it said.

    Args:
        preset: The preset.
        out: The run directory.
        arguments: What else is on the command line.
        ends: Its fate.
        most_bytes: What no file of it can grow past; 0 for no limit.
    """
    said = out.with_name(f"{out.name}.said")
    line = ["train", str(preset), "--out", str(out), *arguments, "--plugin", str(FATE)]
    asked = {"arguments": line, "said": str(said), "ends": ends, "most_bytes": most_bytes}
    parent = _parent()
    parent.stdin.write(json.dumps(asked) + "\n")
    parent.stdin.flush()
    return int(parent.stdout.readline()), said.read_text(errors="replace")


def essence(run: Path, step: int) -> dict[str, object]:
    """Return what must be equal bit for bit: every file of the checkpoint of `step`, and the metrics but the clock."""
    checkpoint = run / "checkpoints" / f"step-{step}"
    kept: dict[str, object] = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    clock = ("seconds", "tokens_per_second")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    kept["metrics"] = [{k: v for k, v in json.loads(row).items() if k not in clock} for row in rows]
    state = json.loads((checkpoint / "state.json").read_text())
    return kept | {"state": {key: value for key, value in state.items() if key != "seconds"}}
