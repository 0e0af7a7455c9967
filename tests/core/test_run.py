import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny

from tangram.core import load_run
from tangram.core.assembly import (
    _ASKED,
    MOST_STEPS,
    _sample,
    assemble,
    laid_out,
    refuse_unfit,
    rehearse,
    sequences_at,
)
from tangram.core.context import BuildError, Parallel
from tangram.core.contracts import NonFiniteError
from tangram.core.evaluation import evaluate
from tangram.core.experiment import Experiment
from tangram.core.layout import Layout
from tangram.core.records import Loss, Progress
from tangram.core.run import train
from tangram.core.session import RunError
from tangram.core.step import Trainer, train_step


def _rows(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def _weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {**run.model.state_dict(), **{f"optimizer/{i}": s for i, s in enumerate(_moments(run))}}


def _moments(run: Trainer) -> list[torch.Tensor]:
    return [state[key] for state in run.optimizer.state.values() for key in sorted(state)]


def _steps(n: int) -> str:
    return f"train.tokens={n * 4 * 12}"


STEADY = (
    "train.lr=[{until_step: 5, from: 0.0, to: 0.01, shape: linear}, {value: 0.01}]",
    "train.checkpoint_every=4",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    directory = tmp_path_factory.mktemp("runs") / "whole"
    experiment = tiny(_steps(10), *STEADY)
    train(experiment, directory)
    return experiment, directory


def test_a_run_leaves_its_preset_its_metrics_and_a_checkpoint(uninterrupted: tuple[Experiment, Path]) -> None:
    experiment, directory = uninterrupted
    rows = _rows(directory)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["tokens"] for row in rows] == [48 * step for step in range(1, 11)]
    assert {
        "loss",
        "loss.next_token",
        "loss.mtp",
        "loss.sequence_balance",
        "lr",
        "grad_norm",
        "seconds",
    } < set(rows[0])
    assert rows[0]["loss.next_token"] == pytest.approx(math.log(48), rel=0.05)
    assert load_run(directory).experiment == experiment
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "step-10",
        "step-8",
    ]


@pytest.mark.parametrize("crash", [5, 8, 9])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    crash: int, uninterrupted: tuple[Experiment, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, whole = uninterrupted
    taken = []

    def dying(run: Trainer, batch: object) -> object:
        if len(taken) == crash:
            raise RuntimeError("power cut")
        taken.append(1)
        return train_step(run, batch)

    monkeypatch.setattr("tangram.core.session.train_step", dying)
    with pytest.raises(RuntimeError, match="power cut"):
        train(experiment, tmp_path / "run")
    monkeypatch.undo()
    train(experiment, tmp_path / "run", resume=True)
    resumed, expected = _weights(load_run(tmp_path / "run")), _weights(load_run(whole))
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name
    timing = ("seconds", "tokens_per_second")
    kept = [[{k: v for k, v in row.items() if k not in timing} for row in _rows(d)] for d in (tmp_path / "run", whole)]
    assert kept[0] == kept[1]


def test_a_directory_with_a_run_is_not_overwritten(uninterrupted: tuple[Experiment, Path], tmp_path: Path) -> None:
    experiment, directory = uninterrupted
    with pytest.raises(RunError, match="holds a run already; continue it with --resume"):
        train(experiment, directory)
    with pytest.raises(RunError, match="holds no run to resume"):
        train(experiment, tmp_path / "nothing", resume=True)
    with pytest.raises(RunError, match="is no run directory"):
        load_run(tmp_path)


def test_another_experiment_does_not_resume_a_run(uninterrupted: tuple[Experiment, Path]) -> None:
    _, directory = uninterrupted
    with pytest.raises(RunError, match="was written by another experiment"):
        train(tiny(_steps(20), *STEADY), directory, resume=True)


def test_observers_change_no_number(uninterrupted: tuple[Experiment, Path], tmp_path: Path) -> None:
    _, directory = uninterrupted
    train(tiny(_steps(10), *STEADY, "observers.jsonl=null"), tmp_path / "unwatched")
    watched, unwatched = _weights(load_run(directory)), _weights(load_run(tmp_path / "unwatched"))
    assert all(torch.equal(watched[name], unwatched[name]) for name in watched)
    assert not (tmp_path / "unwatched" / "metrics.jsonl").exists()


def test_the_batch_follows_its_curve_in_multiples_of_the_micro_batch() -> None:
    curve = "train.batch_sequences=[{until: 1200, from: 2, to: 10, shape: linear}, {value: 9}]"
    experiment = tiny(curve, "train.micro_sequences=2")
    sizes = [sequences_at(experiment, Progress(tokens=tokens)) for tokens in (0, 300, 600, 900, 1200)]
    assert sizes == [2, 4, 6, 8, 8]  # 9 rounds to the even multiple
    assert rehearse(experiment).steps > 0


def test_rehearsing_counts_the_steps_that_training_takes(uninterrupted: tuple[Experiment, Path]) -> None:
    assert rehearse(uninterrupted[0]).steps == 10


def _broken_weight(run: Trainer) -> str:
    """Break one expert: the losses of the tokens that it sees are not numbers."""
    run.model.blocks["1"].feedforward.down.weight.data[0, 0, 0] = math.nan
    return "loss mtp is nan"


def _broken_gradient(run: Trainer) -> str:
    """Add a term that is zero and whose gradient is not finite: a root at zero."""
    objective = run.model.objectives["next_token"]
    forward = objective.forward

    def with_root(*arguments: object) -> Loss:
        return Loss(forward(*arguments).value + 0 * (run.model.norm.weight - 1).abs().sqrt().sum())

    objective.forward = with_root
    run.model.norm.weight.data.fill_(1.0)
    return "the gradient of norm.weight"


@pytest.mark.parametrize("break_it", [_broken_weight, _broken_gradient])
def test_a_number_that_is_not_finite_changes_nothing_and_is_named(break_it: Callable[[Trainer], str]) -> None:
    run = assemble(tiny("guard={use: raise}"))
    batch = run.data.batch(run.progress, 4)
    train_step(run, batch)
    culprit = break_it(run)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=culprit):
        train_step(run, batch)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_a_skipped_step_consumes_its_batch_and_updates_nothing() -> None:
    run = assemble(tiny("guard={use: skip, limit: 3}"))
    run.model.head.weight.data[0, 0] = math.inf
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    for step in (1, 2):
        report = train_step(run, run.data.batch(run.progress, 4))
        assert report.verdict.value == "skip"
        assert run.progress.step == step
        assert all(p.grad is None for p in run.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    with pytest.raises(NonFiniteError, match="3 such steps in a row"):
        train_step(run, run.data.batch(run.progress, 4))


def test_held_out_text_is_evaluated_whole_or_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"document {i} says {'this and that ' * (1 + i % 7)}\n" * 3)
    text = f"data={{use: text, corpus: files, files: ['{tmp_path}/*.txt'], held_out_every: 4}}"
    run = assemble(tiny(text, "model.vocab_size=300"))
    whole, part = evaluate(run), evaluate(run, limit=1)
    assert whole.complete
    assert not part.complete
    assert part.n_bytes < whole.n_bytes == run.data.held_out.n_bytes
    nats = whole.losses["next_token"] * whole.n_targets
    assert whole.bits_per_byte == pytest.approx(nats / math.log(2) / whole.n_bytes)


def test_a_length_of_more_steps_than_anyone_takes_is_refused_at_once() -> None:
    with pytest.raises(BuildError, match="more than 1,000,000 steps"):
        rehearse(tiny("train.tokens=1.0e+15"))


@pytest.mark.parametrize(
    "curve",
    [
        "8",
        "[{until: 1000, from: 2, to: 9, shape: linear}, {value: 6}]",
        "[{until_step: 7, value: 4}, {until_step: 9, from: 4, to: 12, shape: cosine}, {value: 2}]",
        "[{until: 10000000, from: 2, to: 9, shape: linear}, {value: 6}]",
    ],
)
def test_the_steps_of_a_run_are_laid_out_as_they_are_taken(curve: str) -> None:
    experiment = tiny(f"train.batch_sequences={curve}", "train.micro_sequences=2", "train.tokens=5000")
    now, sizes = Progress(), list[int]()
    while now.tokens < 5000:
        sizes.append(sequences_at(experiment, now))
        now = Progress(now.step + 1, now.tokens + 12 * sizes[-1], now.sequences + sizes[-1])
    assert list(laid_out(experiment)) == sizes


def test_as_many_steps_as_may_be_are_laid_out_and_not_one_more() -> None:
    most = MOST_STEPS * 4 * 12
    assert sum(laid_out(tiny(f"train.tokens={most}"))) == MOST_STEPS * 4
    with pytest.raises(BuildError, match="more than 1,000,000 steps"):
        list(laid_out(tiny(f"train.tokens={most + 1}")))


def test_a_later_step_that_the_pipeline_cannot_order_is_told_beforehand() -> None:
    """Six micro-batches at first, and two in the second half: dualpipe on two ranks wants four."""
    asked = tiny(
        "parallel={pipeline: {use: dualpipe}, pipeline_ranks: 2}",
        "train.tokens=480",
        "train.batch_sequences=[{until: 240, value: 6}, {value: 2}]",
    )
    run = assemble(asked, trains=False)
    run.parallel = Parallel(layout=Layout(asked.parallel.pipeline.build().schedule(2, 6).place))
    with pytest.raises(BuildError, match="step 5 with 2 micro-batches on a data rank, are refused: dualpipe"):
        refuse_unfit(run)
    run.progress = Progress(step=4, tokens=288)
    with pytest.raises(BuildError, match="8 steps, the first of them step 5 "):
        refuse_unfit(run)


@pytest.mark.parametrize("most", [10, 400, 15_000, 99_999])
def test_of_many_numbers_of_micro_batches_some_are_asked_for_and_both_ends(most: int) -> None:
    counts = list(range(3, most + 1))
    sample = _sample(counts)
    assert sample[0] == 3
    assert sample[-1] == most
    assert set(sample) <= set(counts)
    assert len(sample) == len(counts) or sum(sample) <= 2 * _ASKED + most
