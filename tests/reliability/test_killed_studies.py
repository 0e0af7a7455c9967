"""A study that is killed and run again ends as one that never was, and no finished cell is trained twice."""

import json
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from toy_study import NURSERY, STEPS, write

from tangram.core.cli import main

CLOCK = ("seconds", "peak_rss", "command")


def ablate(study: Path, out: Path, doom: str = "") -> tuple[int, str]:
    """Run `tangram ablate` as the leader of a process group; return its exit code and all that it said."""
    line = [sys.executable, "-m", "tangram.core.cli", "ablate", str(study), "--out", str(out), "--plugin", str(NURSERY)]
    environment = os.environ | {"TANGRAM_DOOM": doom, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        line,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell lets what it starts in the background ignore Ctrl-C, these tests perhaps too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def complete(study: Path, out: Path) -> None:
    """Run a study to its end, here: its workers are forks of this process, where torch is loaded already."""
    with pytest.raises(SystemExit) as exited:
        main(["ablate", str(study), "--out", str(out), "--plugin", str(NURSERY)])
    assert exited.value.code == 0


def without_clock(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if key not in CLOCK}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


def numbers(out: Path) -> object:
    return without_clock(json.loads((out / "results.json").read_text()))


def tables(out: Path) -> list[str]:
    """The report for people, less the table with times and the command."""
    sections = (out / "report.md").read_text().split("\n## ")
    return [text for text in sections if not text.startswith(("What was held equal", "How it was run"))]


def finished(out: Path) -> dict[str, int]:
    """When the finished cells were last written to."""
    cells = [path for path in out.glob("cells/*/cell.json") if json.loads(path.read_text())["state"] == "done"]
    return {path.parent.name: (path.parent / "metrics.jsonl").stat().st_mtime_ns for path in cells}


EXITS = {"all": -signal.SIGKILL, "one": 1, "ctrl-c": 75}


def survives(study: Path, whole: Path, out: Path, ends: list[tuple[str, int]]) -> None:
    for i, (kind, step) in enumerate(ends):
        before = finished(out)
        code, said = ablate(study, out, f"{kind}:{step}:{out}-{i}.steps")
        assert code == EXITS[kind], f"{kind} at step {step}: {said}"
        after = finished(out)
        assert before.items() <= after.items(), f"{kind} at step {step} trained a finished cell again"
    before = finished(out)
    complete(study, out)
    assert before.items() <= finished(out).items()
    assert numbers(out) == numbers(whole)
    assert tables(out) == tables(whole)


def whole(folder: Path, seeds: int) -> tuple[Path, Path]:
    study = write(folder, {"seeds: 3": f"seeds: {seeds}"})
    complete(study, folder / "whole")
    return study, folder / "whole"


def test_killed_and_interrupted_a_study_ends_as_if_nothing_was(tmp_path: Path) -> None:
    """Two cells of six steps run side by side; the second end comes after the first, so steps are left for it."""
    draw = random.Random(0)
    study, undisturbed = whole(tmp_path, seeds=1)
    survives(study, undisturbed, tmp_path / "killed", [("all", draw.randint(1, 5)), ("ctrl-c", 1)])


@pytest.mark.soak
def test_killed_at_ten_random_times(tmp_path: Path) -> None:
    draw = random.Random(1)
    study, undisturbed = whole(tmp_path, seeds=3)
    for i in range(10):
        kind = draw.choice(list(EXITS))
        survives(study, undisturbed, tmp_path / f"killed-{i}", [(kind, draw.randint(1, 6 * STEPS))])
