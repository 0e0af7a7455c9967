"""Numbers that are not finite, put into a step that is otherwise real: no weight ever moves by them."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny

from tangram.core import checkpoint, load_run
from tangram.core.assembly import assemble, past_skipped, sequences_at
from tangram.core.contracts import NonFiniteError
from tangram.core.experiment import Experiment
from tangram.core.records import Batch, Progress, StepReport, Verdict
from tangram.core.run import train
from tangram.core.step import Trainer, train_step

SMALL = ("objectives.mtp=null", "model.blocks.1={repeat: 1}", "train.micro_sequences=2")
STEPS = 6
SEQUENCES, LENGTH = 4, 12

EXAMPLES = 8 if settings().max_examples < 100 else 200

BAD = st.sampled_from((math.nan, math.inf, -math.inf))
PLACES = ("activation", "gradient of an activation", "gradient of a weight")


def experiment(guard: str, *overrides: str) -> Experiment:
    tokens = STEPS * SEQUENCES * LENGTH
    return tiny(f"train.tokens={tokens}", f"guard={guard}", "train.checkpoint_every=2", *SMALL, *overrides)


@contextmanager
def sabotage(run: Trainer, place: str, value: float, pick: int) -> Iterator[None]:
    """Put `value` into every forward or backward inside: into the loss, or into a gradient under a finite loss."""
    parameters = list(run.model.parameters())
    chosen, clip = parameters[pick % len(parameters)], run.sharding.clip

    def forward(_module: object, _inputs: object, out: torch.Tensor) -> torch.Tensor:
        if place == "activation":
            return out * value
        out.register_hook(lambda grad: grad * value)
        return out

    def clipped(limit: float) -> object:
        assert chosen.grad is not None
        chosen.grad.view(-1)[pick % chosen.grad.numel()] = value
        return clip(limit)

    handle = None
    if place == "gradient of a weight":
        run.sharding.clip = clipped
    else:
        handle = run.model.norm.register_forward_hook(forward)
    try:
        yield
    finally:
        run.sharding.clip = clip
        if handle is not None:
            handle.remove()


def numbers(run: Trainer) -> dict[str, torch.Tensor]:
    """Return a copy of all that a step may change: weights, expert biases and the optimizer's moments."""
    addresses = {parameter: address for address, parameter in run.model.named_parameters()}
    state = {**run.model.state_dict(), **checkpoint.optimizer_state(run.optimizer, addresses)}
    return {name: torch.as_tensor(value).clone() for name, value in state.items()}


def assert_same(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert have.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(have[name], value), name


@given(place=st.sampled_from(PLACES), value=BAD, at=st.integers(1, 3), pick=st.integers(0, 10**6))
@settings(max_examples=EXAMPLES)
def test_a_bad_step_moves_nothing_and_the_run_goes_on_as_if_it_had_not_been(
    place: str, value: float, at: int, pick: int
) -> None:
    run, spared = assemble(experiment("{use: skip}")), assemble(experiment("{use: skip}"))
    for step in range(at + 2):
        batch = run.data.batch(run.progress, SEQUENCES)
        if step != at:
            assert train_step(run, batch).verdict is train_step(spared, batch).verdict is Verdict.ACCEPT
            continue
        before = numbers(run)
        with sabotage(run, place, value, pick):
            report = train_step(run, batch)
        assert report.verdict is Verdict.SKIP
        assert math.isfinite(report.result.total) == (place != "activation")
        assert_same(numbers(run), before)
        assert all(parameter.grad is None for parameter in run.model.parameters())
        spared.progress = run.progress
    assert_same(numbers(run), numbers(spared))


@given(place=st.sampled_from(PLACES), value=BAD, pick=st.integers(0, 10**6))
@settings(max_examples=EXAMPLES)
def test_the_guard_raise_stops_before_the_update_and_names_the_culprit(place: str, value: float, pick: int) -> None:
    run = assemble(experiment("{use: raise}"))
    train_step(run, run.data.batch(run.progress, SEQUENCES))
    before = numbers(run)
    with sabotage(run, place, value, pick), pytest.raises(NonFiniteError, match=r"loss|gradient"):
        train_step(run, run.data.batch(run.progress, SEQUENCES))
    assert_same(numbers(run), before)


# --- whole runs -------------------------------------------------------------------------------------------


def sabotaged(cursors: set[int], place: str, value: float, pick: int) -> Callable[[Trainer, Batch], StepReport]:
    """Return a step that is sabotaged on the batches at `cursors`, whenever they come."""

    def step(run: Trainer, batch: Batch) -> StepReport:
        if run.progress.sequences not in cursors:
            return train_step(run, batch)
        if place == "weight":
            run.model.head.weight.data.view(-1)[pick % run.model.head.weight.numel()] = value
            return train_step(run, batch)
        with sabotage(run, place, value, pick):
            return train_step(run, batch)

    return step


def without(asked: Experiment, skipped: tuple[int, ...]) -> Trainer:
    """Train on all batches but those at `skipped`."""
    run = assemble(asked)
    run.progress = Progress(skipped=skipped)
    while run.progress.tokens < asked.train.tokens:
        run.progress = past_skipped(asked, run.progress)
        train_step(run, run.data.batch(run.progress, sequences_at(asked, run.progress)))
    return run


def rows(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@given(
    place=st.sampled_from((*PLACES, "weight")),
    value=BAD,
    bad=st.sets(st.integers(0, STEPS - 1).map(lambda step: step * SEQUENCES), min_size=1, max_size=2),
    pick=st.integers(0, 10**6),
)
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
def test_a_rollback_leaves_out_the_batches_and_writes_down_which(
    place: str, value: float, bad: set[int], pick: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    asked, out = experiment("{use: rollback}"), tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tangram.core.session.train_step", sabotaged(bad, place, value, pick))
        train(asked, out)
    run = load_run(out)
    assert run.progress.skipped == tuple(sorted(bad))
    assert_same(numbers(run), numbers(without(asked, run.progress.skipped)))
    back = [row for row in rows(out) if row["verdict"] == "rollback"]
    assert [row["skipped"] for row in back] == sorted(bad)
    assert all(
        "is nan" in row["culprit"] or "is inf" in row["culprit"] or "not finite" in row["culprit"] for row in back
    )
    assert [row["step"] for row in rows(out) if row["verdict"] == "accept"] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("guard", "said"),
    [("{use: skip, limit: 3}", "step 5: loss .*; 3 such steps in a row"), ("{use: raise}", "step 3: loss")],
)
def test_a_weight_that_is_not_finite_stops_a_run_that_cannot_go_back(
    guard: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tangram.core.session.train_step", sabotaged({2 * SEQUENCES}, "weight", math.nan, 0))
    with pytest.raises(NonFiniteError, match=said):
        train(experiment(guard), tmp_path / "run")


# --- spikes -----------------------------------------------------------------------------------------------

STRETCH = """
from attrs import evolve, field, frozen
import torch
from tangram.core.registry import component
from tangram.plugins.data.synthetic import SyntheticConfig

@component("data", use="mislabelled")
@frozen(kw_only=True)
class Config:
    '''Synthetic tokens, of which a stretch has one and the same target everywhere.

    Attributes:
        first: Its first sequence.
        last: Its last sequence.
    '''

    first: int
    last: int

    def build(self, train, vocab_size):
        data = SyntheticConfig().build(train, vocab_size)
        right = data.batch

        def batch(now, n):
            made = right(now, n)
            bad = self.first <= now.sequences <= self.last
            return evolve(made, targets=torch.full_like(made.targets, vocab_size - 1)) if bad else made

        data.batch = batch
        return data
"""


def clean_loss(folder: Path, guard: str, mislabelled: bool) -> float:
    """Train 40 steps, of which the data would have 12 at the end mislabelled; return the loss on clean tokens."""
    plugin, out = folder / "stretch.py", folder / f"{mislabelled}-{guard.split(',')[0][6:]}"
    plugin.write_text(STRETCH)
    first = 28 * SEQUENCES if mislabelled else 10**9
    data = f"data={{use: mislabelled, first: {first}, last: {first + 11 * SEQUENCES}}}"
    length = (f"train.tokens={40 * SEQUENCES * LENGTH}", "train.lr=0.05", "train.checkpoint_every=4", "train.clip=1.0")
    train(tiny(*SMALL, f"plugins=[{str(plugin)!r}]", data, f"guard={guard}", *length), out)
    run = load_run(out, plugins=[plugin])
    assert len(run.progress.skipped) == (12 if mislabelled and "rollback" in guard else 0)
    batches = [run.data.batch(Progress(sequences=2 * 10**9 + SEQUENCES * i), SEQUENCES) for i in range(16)]
    return sum(run.executor.run(batch, run.progress).losses["next_token"] for batch in batches) / len(batches)


def test_rolled_back_a_stretch_of_wrong_labels_does_no_harm_and_otherwise_it_does(tmp_path: Path) -> None:
    back = "{use: rollback, window: 20, spike: 4.0, limit: 12}"
    clean = clean_loss(tmp_path, back, mislabelled=False)
    harm = {guard: clean_loss(tmp_path, guard, mislabelled=True) - clean for guard in (back, "{use: skip}")}
    assert harm["{use: skip}"] > 1.0
    assert abs(harm[back]) < 0.1 * harm["{use: skip}"]
