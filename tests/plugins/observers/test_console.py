"""The live view: plain lines where there is no terminal, whatever the numbers and the names, and else a whole bar."""

import math
import re
from pathlib import Path

import pytest
import torch
from attrs import evolve
from tiny import tiny

from tangram.core.experiment import Experiment
from tangram.core.plugins import run_manager
from tangram.core.records import EvalReport, GradientNorm, Progress, Result, StepReport, Verdict
from tangram.core.session import RunView
from tangram.plugins.observers.console import ConsoleConfig


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return tiny()


def report(step: int, loss: float = 2.0, verdict: Verdict = Verdict.ACCEPT) -> StepReport:
    outcome = Result({"next_token": loss}, loss, torch.tensor([[3, 1]]), 1)
    before, after = Progress(step - 1), Progress(step, 48 * step)
    return StepReport(before, after, 1e-3, outcome, GradientNorm(loss), verdict, {0: 2}, tokens_per_second=123456.7)


def shown(experiment: Experiment, directory: Path, reports: list[StepReport | EvalReport], every: float = 1e-9) -> None:
    hook = run_manager({"console": ConsoleConfig(every=every).build()}).hook
    run = RunView(experiment, directory, Progress(), {}, 0)
    hook.tangram_run_started(run=run)
    for each in reports:
        if isinstance(each, StepReport):
            hook.tangram_step_ended(run=run, report=each)
        else:
            hook.tangram_evaluated(run=run, report=each)
    hook.tangram_run_ended(run=run, error=None)


def evaluated(bits: float | None) -> EvalReport:
    return EvalReport(Progress(2), {}, bits, 10, 10, complete=True)


def test_each_event_is_one_plain_line_however_long(experiment, capsys):
    directory = Path("runs") / ("long-" * 30)
    shown(experiment, directory, [report(1), report(2), evaluated(2.3456), report(3)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "\x1b" not in "".join(lines)
    assert lines[0] == f"{experiment.name}: 4,800 tokens into {directory}"
    assert lines[1] == "step 1  loss 2.000  next 2.000  violation 0.50  123,457 tok/s"
    assert lines[3] == "step 2: 2.346 bits/byte on all held-out text"
    assert "2.346 bits/byte" in lines[4]


def test_names_are_shown_as_they_are_written(experiment, capsys):
    shown(evolve(experiment, name="[bold]a[/b]"), Path("runs/[red]:smile:[/x]"), [])
    assert capsys.readouterr().out.splitlines() == ["[bold]a[/b]: 4,800 tokens into runs/[red]:smile:[/x]"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_shown(experiment, capsys, loss):
    shown(
        experiment,
        Path("runs/x"),
        [report(1, loss), evolve(report(2), tokens_per_second=loss), evaluated(loss)],
    )
    assert f"loss {loss}" in capsys.readouterr().out


def test_a_step_without_an_update_is_shown_at_once(experiment, capsys):
    bad = report(2, math.nan, Verdict.SKIP)
    shown(experiment, Path("runs/x"), [report(1), bad, report(3)], every=3600.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("step 2 ")
    assert re.search(r"skip, no update: loss \w+ is nan$", lines[2])


def test_between_two_lines_pass_the_seconds_asked_for(experiment, capsys):
    shown(experiment, Path("runs/x"), [report(step) for step in range(1, 9)], every=3600.0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["1"]


def test_an_evaluation_without_bytes_and_a_step_without_a_router_say_less(experiment, capsys):
    shown(experiment, Path("runs/x"), [evaluated(None), evolve(report(1), routed={})])
    assert capsys.readouterr().out.splitlines()[1:] == ["step 1  loss 2.000  next 2.000  123,457 tok/s"]


def test_a_resumed_run_says_from_where(experiment, capsys):
    hook = run_manager({"console": ConsoleConfig().build()}).hook
    run = RunView(experiment, Path("runs/x"), Progress(7, 336, 28), {}, 0)
    hook.tangram_run_started(run=run)
    hook.tangram_run_ended(run=run, error=RuntimeError("power cut"))
    assert capsys.readouterr().out.rstrip().endswith("resumed at step 7")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_terminal_shows_every_number_and_the_time_left_at_any_width(experiment, capsys, monkeypatch, columns):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    shown(experiment, Path("runs/x"), [report(1, 10.79), evaluated(2.3456), report(50, 10.79)])
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    last = " ".join(out[out.rindex("step 50") :].split())
    assert last.startswith("step 50 loss 10.790 next 10.790 2.346 bits/byte violation 0.50 123,457 tok/s ")
    assert re.search(r" 50% \d:\d\d:\d\d [\d-]:[\d-][\d-]:[\d-][\d-] left$", last)
    assert "…" not in out
