"""A rollback: the run goes on as one that never saw the bad batch, also when it is cut off on the way."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny

from tangram.core import checkpoint, load_run
from tangram.core.assembly import assemble, past_skipped, sequences_at
from tangram.core.contracts import NonFiniteError
from tangram.core.experiment import Experiment
from tangram.core.records import Batch, Progress, StepReport
from tangram.core.run import train
from tangram.core.session import RunError
from tangram.core.step import Trainer, train_step

GROWING = "train.batch_sequences=[{until: 192, value: 4}, {value: 6}]"
"""Ten steps begin at the sequences 0, 4, 8, 12, 16, 22, 28, 34, 40 and 46; without that at 8, at 20 and 26 too."""

Step = Callable[[Trainer, Batch], StepReport]


def experiment() -> Experiment:
    tokens = 12 * (4 * 4 + 6 * 6)
    guard = "guard={use: rollback, limit: 2}"
    small = ("objectives.mtp=null", "model.blocks.1={repeat: 1}", "train.micro_sequences=2")
    return tiny(f"train.tokens={tokens}", GROWING, guard, "train.checkpoint_every=4", *small)


def poisoned(*cursors: int, seen: list[int]) -> Step:
    """Return a step that breaks a weight for good on the batches at `cursors`."""

    def step(run: Trainer, batch: Batch) -> StepReport:
        seen.append(run.progress.sequences)
        if run.progress.sequences in cursors:
            run.model.head.weight.data[0, 0] = math.nan
        return train_step(run, batch)

    return step


def rows(directory: Path) -> list[dict[str, object]]:
    timing = ("seconds", "tokens_per_second")
    written = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in timing} for row in written]


def numbers(run: Trainer) -> dict[str, torch.Tensor]:
    addresses = {parameter: address for address, parameter in run.model.named_parameters()}
    return {**run.model.state_dict(), **checkpoint.optimizer_state(run.optimizer, addresses)}


def same(actual: Trainer, expected: Trainer) -> None:
    have, want = numbers(actual), numbers(expected)
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(have[name], value), name


def without(asked: Experiment, bad: set[int]) -> Trainer:
    """Train on all batches but those at `bad`, by a loop that knows no guard and no checkpoint."""
    run, cursor = assemble(asked), 0
    while run.progress.tokens < asked.train.tokens:
        now = run.progress
        size = sequences_at(asked, now)
        if cursor not in bad:
            run.progress = Progress(now.step, now.tokens, cursor)
            train_step(run, run.data.batch(run.progress, size))
        cursor += size
    return run


@pytest.mark.parametrize("bad", [{8}, {22, 28}])
def test_the_run_goes_on_as_one_that_never_saw_the_bad_batch(
    bad: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("tangram.core.session.train_step", poisoned(*bad, seen=seen))
    train(experiment(), tmp_path / "run")
    assert all(seen.count(cursor) == 1 for cursor in bad)
    run, expected = load_run(tmp_path / "run"), without(experiment(), bad)
    same(run, expected)
    for name in ("seen", "mean", "variance"):
        assert run.guard.state()[name] == expected.guard.state()[name]
    assert run.guard.state()["rollbacks"] == len(bad)
    assert run.progress.tokens == expected.progress.tokens
    assert run.progress.skipped == tuple(sorted(bad))
    written = rows(tmp_path / "run")
    back = [row for row in written if row["verdict"] == "rollback"]
    assert [row["step"] for row in written if row["verdict"] == "accept"] == list(range(1, 11))
    assert [row["skipped"] for row in back] == sorted(bad)
    assert all(row["culprit"].endswith("is nan") and row["step"] % 4 == 0 for row in back)


class PowerCutError(Exception):
    pass


def after(count: int, function: Callable[..., object]) -> Callable[..., object]:
    """Return `function`, which fails instead of its call number `count` + 1."""
    calls: list[None] = []

    def cut(*arguments: object, **named: object) -> object:
        if len(calls) == count:
            raise PowerCutError
        calls.append(None)
        return function(*arguments, **named)

    return cut


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tangram.core.session.train_step", poisoned(8, 26, seen=[]))
        train(experiment(), directory)
    return directory


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("step", 2),  # before the first bad step
        ("step", 9),  # after the second
        ("load", 0),  # in the first rollback, when half is loaded
        ("save", 1),  # in the first rollback, before its checkpoint
        ("save", 3),  # in the second
        ("rename", 1),  # in the first, when the old checkpoint is gone and the new one not yet in its place
    ],
)
def test_cut_off_before_in_or_after_a_rollback_it_is_resumed_exactly(
    where: str, calls: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = poisoned(8, 26, seen=[])
    monkeypatch.setattr("tangram.core.session.train_step", after(calls, step) if where == "step" else step)
    owner, name = {
        "step": (None, ""),
        "load": (checkpoint, "load_optimizer"),
        "save": (checkpoint, "save"),
        "rename": (Path, "rename"),
    }[where]
    with monkeypatch.context() as patch:
        if owner is not None:
            patch.setattr(owner, name, after(calls, getattr(owner, name)))
        with pytest.raises(PowerCutError):
            train(experiment(), tmp_path / "run")
    monkeypatch.setattr("tangram.core.session.train_step", step)
    train(experiment(), tmp_path / "run", resume=True)
    same(load_run(tmp_path / "run"), load_run(uninterrupted))
    assert load_run(tmp_path / "run").progress == load_run(uninterrupted).progress
    assert load_run(tmp_path / "run").guard.state() == load_run(uninterrupted).guard.state()
    assert rows(tmp_path / "run") == rows(uninterrupted)


def test_a_batch_stays_skipped_after_a_crash_even_if_the_fault_does_not_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangram.core.session.train_step", after(4, poisoned(8, seen=[])))
    with pytest.raises(PowerCutError):
        train(experiment(), tmp_path / "run")
    seen: list[int] = []
    monkeypatch.setattr("tangram.core.session.train_step", poisoned(seen=seen))
    train(experiment(), tmp_path / "run", resume=True)
    assert 8 not in seen
    assert load_run(tmp_path / "run").progress.skipped == (8,)
    assert [row["skipped"] for row in rows(tmp_path / "run") if row["verdict"] == "rollback"] == [8]


def test_one_rollback_too_many_stops_the_run_and_says_at_which_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangram.core.session.train_step", poisoned(8, 20, 26, seen=[]))
    with pytest.raises(NonFiniteError, match=r"step 5: loss .* is nan; .* rolled back 2 times already"):
        train(experiment(), tmp_path / "run")


def test_a_guard_that_asks_for_a_rollback_unannounced_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangram.core.session.train_step", poisoned(8, seen=[]))
    monkeypatch.setattr("tangram.plugins.training.guards.Rollback.rolls_back", False)
    with pytest.raises(RunError, match="no checkpoint: its rolls_back must be True"):
        train(experiment(), tmp_path / "run")


def test_a_batch_that_is_passed_over_moves_the_cursor_and_nothing_else() -> None:
    now = Progress(step=5, tokens=264, sequences=22, skipped=(22, 28, 40))
    assert past_skipped(experiment(), now) == Progress(5, 264, 34, (22, 28, 40))
