"""Real training processes, and what two runs must have in common."""

import json
import os
import subprocess
import sys
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


def training(preset: Path | str, out: Path, *arguments: str, ends: str = "", **options: object) -> subprocess.Popen:
    """Start `tangram train`; `ends` is its fate."""
    line = [sys.executable, "-m", "tangram.core.cli", "train", str(preset), "--out", str(out), *arguments]
    environment = os.environ | {"TANGRAM_FATE": ends, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*line, "--plugin", str(FATE)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for a process; return its exit code and all that it said."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out + err


def essence(run: Path, step: int) -> dict[str, object]:
    """Return what must be equal bit for bit: every file of the checkpoint of `step`, and the metrics but the clock."""
    checkpoint = run / "checkpoints" / f"step-{step}"
    kept: dict[str, object] = {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    clock = ("seconds", "tokens_per_second")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    kept["metrics"] = [{k: v for k, v in json.loads(row).items() if k not in clock} for row in rows]
    state = json.loads((checkpoint / "state.json").read_text())
    return kept | {"state": {key: value for key, value in state.items() if key != "seconds"}}
