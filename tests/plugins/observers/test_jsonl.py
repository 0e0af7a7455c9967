"""metrics.jsonl: one flat row for each step and evaluation, and no gap or repetition after a crash."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny

from tangram.core.experiment import Experiment
from tangram.core.plugins import run_manager
from tangram.core.records import EvalReport, GradientNorm, Progress, Result, StepReport, Verdict
from tangram.core.session import RunView
from tangram.plugins.observers.jsonl import JsonlConfig


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return tiny("train.evaluate_every=2")


def view(experiment: Experiment, directory: Path, step: int = 0) -> RunView:
    return RunView(experiment, directory, Progress(step, 48 * step, 4 * step), {}, 0)


def step_report(step: int, loss: float = 2.0, verdict: Verdict = Verdict.ACCEPT) -> StepReport:
    before, after = (Progress(n, 48 * n, 4 * n) for n in (step - 1, step))
    outcome = Result({"next_token": loss, "mtp": 3.0}, loss + 0.9, torch.tensor([[0, 0], [3, 1]]), 1)
    return StepReport(before, after, 1e-3, outcome, GradientNorm(0.5), verdict, routed={1: 2}, biases={1: 0.25})


def evaluation(step: int, *, complete: bool = False) -> EvalReport:
    return EvalReport(Progress(step, 48 * step), {"next_token": 1.5}, 2.25, 100, 99, complete)


def rows(directory: Path) -> list[dict[str, float | int | str | bool]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def watched(
    experiment: Experiment, directory: Path, first: int, last: int, *, complete: bool = False, begins: bool = False
) -> None:
    """Run steps `first` to `last`, an evaluation after each even one, and end well.

    Args:
        experiment: The experiment.
        directory: The run directory.
        first: The first step.
        last: The last step.
        complete: Whether the evaluations under way are on all held-out text.
        begins: Whether there is an evaluation before the first step of all, and one on all text at the end.
    """
    hook, run = run_manager({"jsonl": JsonlConfig().build()}).hook, view(experiment, directory, first - 1)
    hook.tangram_run_started(run=run)
    if begins and first == 1:
        hook.tangram_evaluated(run=run, report=evaluation(0, complete=complete))
    for step in range(first, last + 1):
        hook.tangram_step_ended(run=run, report=step_report(step))
        if step % 2 == 0:
            hook.tangram_evaluated(run=run, report=evaluation(step, complete=complete))
    if begins:
        hook.tangram_evaluated(run=run, report=evaluation(last, complete=True))
    hook.tangram_run_ended(run=run, error=None)


def test_every_step_and_every_evaluation_is_one_flat_row(experiment, tmp_path):
    watched(experiment, tmp_path, 1, 4)
    written = rows(tmp_path)
    assert [(row["step"], "eval.targets" in row) for row in written] == [
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (4, False),
        (4, True),
    ]
    assert all(isinstance(value, int | float | str | bool) for row in written for value in row.values())
    first, evaluated = written[0], written[2]
    assert first | {"loss": 2.9, "loss.next_token": 2.0, "loss.mtp": 3.0, "lr": 1e-3, "grad_norm": 0.5} == first
    assert first | {"tokens": 48, "verdict": "accept", "violation": 0.5, "bias": 0.25} == first
    assert evaluated | {"eval.loss.next_token": 1.5, "eval.bits_per_byte": 2.25, "tokens": 96} == evaluated


def test_a_step_is_on_disk_before_the_next_one_begins(experiment, tmp_path):
    hook, run = run_manager({"jsonl": JsonlConfig().build()}).hook, view(experiment, tmp_path)
    hook.tangram_run_started(run=run)
    for step in (1, 2):
        hook.tangram_step_ended(run=run, report=step_report(step))
        assert [row["step"] for row in rows(tmp_path)] == list(range(1, step + 1))
    hook.tangram_run_ended(run=run, error=None)


@given(
    crash=st.integers(1, 8),
    checkpoint=st.integers(0, 8),
    torn=st.integers(0, 60),
    complete=st.booleans(),
    begins=st.booleans(),
)
def test_a_resumed_run_leaves_the_rows_of_one_that_never_stopped(
    experiment, tmp_path_factory, crash, checkpoint, torn, complete, begins
):
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    how = {"complete": complete, "begins": begins}
    watched(experiment, whole, 1, 8, **how)
    watched(experiment, cut, 1, crash, **how)
    path = cut / "metrics.jsonl"
    path.write_text(path.read_text() + (json.dumps(step_report(crash + 1).metrics()) + "\n")[:torn])
    watched(experiment, cut, min(checkpoint, crash) + 1, 8, **how)
    assert path.read_text() == (whole / "metrics.jsonl").read_text()
    assert [file.name for file in cut.iterdir()] == ["metrics.jsonl"]


def test_a_loss_that_is_not_a_number_is_a_row_too(experiment, tmp_path):
    hook, run = run_manager({"jsonl": JsonlConfig().build()}).hook, view(experiment, tmp_path)
    hook.tangram_run_started(run=run)
    hook.tangram_step_ended(run=run, report=step_report(1, math.nan, Verdict.SKIP))
    hook.tangram_run_ended(run=run, error=RuntimeError("stopped"))
    (row,) = rows(tmp_path)
    assert row["loss"] is None  # JSON has no NaN
    assert row["verdict"] == "skip"
