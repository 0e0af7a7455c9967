"""The three packages of examples/, and one that `tangram new-plugin` writes, installed as a stranger would."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tiny import SMALL

from tangram.core.plugins import Plugins
from tangram.core.scaffold import write_package

EXAMPLES = Path(__file__).parents[2] / "examples"

NAMED = {
    "attention sliding_window": ["model.block.attention={use: sliding_window, n_heads: 2, head_dim: 6, window: 4}"],
    "router cosine": ["model.block.feedforward.router={use: cosine, top_k: 2, rank: 4}"],
    "objective device_balance": ["objectives.device_balance={n_devices: 4}"],
    "objective communication_balance": ["objectives.communication_balance={n_devices: 4, top_devices: 2}"],
    "guard acme_guard": ["guard={use: acme_guard, norm: 100.0}"],
}
"""Components by slot and name, each with what names it in v3-tiny."""

COMMANDS = """
import contextlib, io, json, sys
from tangram.core.cli import main
said = []
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(command)
        except SystemExit as exited:
            said.append([exited.code, out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""
"""Runs command lines in one process, for torch takes seconds to import; prints code, output and errors of each."""


def python(folder: Path, *arguments: object, path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_installed_they_are_known_named_trained_and_reported(tmp_path: Path) -> None:
    """One test, for one installation."""
    site = tmp_path / "site"
    sources = [tmp_path / "sources" / file.parent.name for file in sorted(EXAMPLES.glob("*/pyproject.toml"))]
    for source in sources:  # a build leaves files beside what it builds
        shutil.copytree(EXAMPLES / source.name, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    write_package("acme-guard", "guard", tmp_path / "sources/acme-guard", Plugins())
    sources.append(tmp_path / "sources/acme-guard")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site]
    python(tmp_path, *pip, *sources, path=site)

    small = [*SMALL, "train.tokens=144", "objectives.mtp=null", "observers.ema=null"]
    everything = [override for overrides in NAMED.values() for override in overrides]
    commands = [["list", "--json"], ["schema"]]
    commands += [["describe", *name.split(), "--json"] for name in NAMED]
    commands += [["show", "v3-tiny", *overrides] for overrides in ([], *NAMED.values())]
    commands += [["train", "v3-tiny", *small, *everything, "--out", "run"], ["report", "run"]]
    said = json.loads(python(tmp_path, "-c", COMMANDS, json.dumps(commands), path=site))
    for command, (code, _, err) in zip(commands, said, strict=True):
        assert code == 0, (command, err)
    outputs = [out for _, out, _ in said]

    listed = json.loads(outputs[0])
    origins = {f"{row['slot']} {row['use']}": row["origin"] for row in listed["components"]}
    assert {name: origins[name] for name in NAMED} == {
        "attention sliding_window": "tangram-sliding-window 0.1.0",
        "router cosine": "tangram-cosine-router 0.1.0",
        "objective device_balance": "tangram-device-balance 0.1.0",
        "objective communication_balance": "tangram-device-balance 0.1.0",
        "guard acme_guard": "acme-guard 0.1.0",
    }
    assert listed["broken"] == listed["remarks"] == []
    definitions = json.loads(outputs[1])["$defs"]
    for name, described in zip(NAMED, outputs[2:], strict=False):
        assert all(field["doc"] for field in json.loads(described)["fields"])
        assert name.replace(" ", ".") in definitions

    plain, *named = outputs[2 + len(NAMED) : -2]
    for name, shown in zip(NAMED, named, strict=True):
        assert f"use: {name.split()[1]}" in shown
        assert f"use: {name.split()[1]}" not in plain, "what is installed is used only where it is named"

    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss.device_balance", "loss.communication_balance"} < set(steps[0])
    assert len({step["loss.next_token"] for step in steps}) == len(steps) == 3
    page = (tmp_path / "run/report.html").read_text().replace("<wbr>", "")
    assert all(name.split()[1] in page for name in NAMED)
