"""A trace of the chosen steps, however the run comes to them, and the same numbers."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny

from tangram.core import load_run
from tangram.core.plugins import run_manager
from tangram.core.records import GradientNorm, Progress, Result, StepReport, Verdict
from tangram.core.run import train
from tangram.core.session import RunView
from tangram.plugins.observers.profiler import ProfilerConfig


def watched(directory: Path, first: int, last: int, steps: tuple[int, int], error: Exception | None = None) -> None:
    """Run steps `first` to `last`; step n multiplies matrices of n + 1 rows."""
    hook = run_manager({"profiler": ProfilerConfig(steps=steps).build()}).hook
    run = RunView(tiny(), directory, Progress(first - 1), {}, 0)
    hook.tangram_model_built(run=run, model=None)
    for step in range(first, last + 1):
        with torch.profiler.record_function(f"this is step {step}"):
            torch.ones(2, 2) @ torch.ones(2, 2)
        before, after = Progress(step - 1), Progress(step)
        result = Result({}, 1.0, torch.zeros(1, 1), 1)
        report = StepReport(before, after, 0.1, result, GradientNorm(1.0), Verdict.ACCEPT)
        hook.tangram_step_ended(run=run, report=report)
    hook.tangram_run_ended(run=run, error=error)


def traced(directory: Path) -> dict[str, list[int]]:
    """Return which steps each trace holds, by file."""
    found = {}
    for file in sorted((directory / "profile").glob("*.json.gz")):
        names = [event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
        steps = {int(name.split()[-1]) for name in names if name.startswith("this is step ")}
        found[file.name] = sorted(steps)
    return found


@pytest.mark.parametrize(
    ("first", "last", "steps", "name", "held"),
    [
        (1, 6, (3, 4), "steps-3-4.json.gz", [3, 4]),
        (1, 3, (1, 1), "steps-1-1.json.gz", [1]),
        (1, 3, (2, 9), "steps-2-3.json.gz", [2, 3]),  # the run ends before
        (4, 6, (2, 5), "steps-4-5.json.gz", [4, 5]),  # it was resumed in between
    ],
)
def test_the_chosen_steps_are_traced_and_no_other(tmp_path, first, last, steps, name, held):
    watched(tmp_path, first, last, steps)
    assert traced(tmp_path) == {name: held}
    table = (tmp_path / "profile" / name.replace(".json.gz", ".txt")).read_text()
    assert "aten::mm" in table


def test_steps_that_the_run_does_not_come_to_leave_nothing(tmp_path):
    watched(tmp_path, 1, 3, (4, 5))
    watched(tmp_path, 6, 7, (4, 5))
    assert not (tmp_path / "profile").exists()


def test_a_run_that_fails_leaves_its_trace(tmp_path):
    watched(tmp_path, 1, 2, (2, 9), RuntimeError("stopped"))
    assert traced(tmp_path) == {"steps-2-2.json.gz": [2]}


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (-1, -1)])
def test_steps_out_of_order_are_refused(steps):
    with pytest.raises(ValueError, match="must be the first"):
        ProfilerConfig(steps=steps)


def test_it_changes_no_number_of_the_run(tmp_path):
    train(tiny("train.tokens=96", "observers.profiler={steps: [2, 2]}"), tmp_path / "watched")
    train(tiny("train.tokens=96"), tmp_path / "unwatched")
    states = [load_run(tmp_path / name).model.state_dict() for name in ("watched", "unwatched")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    table = (tmp_path / "watched" / "profile" / "steps-2-2.txt").read_text()
    rows = [line for line in table.splitlines() if line and not line.startswith(("-", "Self")) and "Name" not in line]
    assert 5 < len(rows) <= 30
