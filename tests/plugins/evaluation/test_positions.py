"""Losses by position are those of the run's own evaluation, told apart by where a target stands."""

from collections.abc import Iterable

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from scored import LENGTH, run

from tangram.core import load_run
from tangram.core.context import built
from tangram.core.contracts import HeldOut
from tangram.core.evaluation import evaluate
from tangram.core.records import IGNORE
from tangram.core.step import Trainer
from tangram.plugins.evaluation.positions import Range, by_position, stops_of
from tangram.plugins.evaluation.scoring import Scorer


def held_out(trainer: Trainer, length: int, *, isolate: bool = False) -> HeldOut:
    asked = trainer.experiment
    data, train = evolve(asked.data, isolate=isolate), evolve(asked.train, sequence_length=length)
    found = built("data", data.build, train, asked.model.vocab_size).held_out
    assert found is not None
    return found


def ranges(trainer: Trainer, length: int, *, isolate: bool = False) -> list[Range]:
    assert trainer.data.tokenizer is not None
    scorer = Scorer(trainer.model, trainer.data.tokenizer, LENGTH)
    return by_position(scorer, held_out(trainer, length, isolate=isolate), length)


def by_hand(trainer: Trainer, length: int, stops: Iterable[int], *, isolate: bool) -> dict[int, list[float]]:
    """Return the losses of single targets by the range they stand in, from a forward of each row as it is."""
    found: dict[int, list[float]] = {stop: [] for stop in stops}
    for batch, _ in held_out(trainer, length, isolate=isolate).batches(1):
        assert batch.targets is not None
        for segment in batch.segments.unique():
            here = batch.segments[0] == segment
            logits = trainer.model.logits(batch.tokens[:, here])[0].double().log_softmax(-1)
            for position, target in enumerate(batch.targets[0, here].tolist()):
                if target != IGNORE:
                    stop = next(stop for stop in found if position < stop)
                    found[stop].append(-float(logits[position, target]))
    return found


@given(st.integers(2, 1 << 20))
def test_ranges_end_at_doubled_positions_and_at_the_length(length: int) -> None:
    stops = stops_of(length)
    assert stops == sorted(set(stops))
    assert stops[-1] == length
    assert all(stop == 64 << i for i, stop in enumerate(stops[:-1]))
    assert len(stops) == 1 or length <= 2 * stops[-2]


@pytest.mark.parametrize("isolate", [False, True])
def test_each_range_has_the_targets_that_stand_in_it(isolate: bool) -> None:
    trainer = load_run(run())
    with torch.no_grad():
        found = ranges(trainer, 150, isolate=isolate)
        expected = by_hand(trainer, 150, stops_of(150), isolate=isolate)
    assert [each.stop for each in found] == [stop for stop, losses in expected.items() if losses]
    assert isolate == (len(found) < len(stops_of(150)))  # no document is as long as that
    for each in found:
        losses = expected[each.stop]
        assert each.targets == len(losses)
        assert each.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_together_they_are_the_runs_own_evaluation() -> None:
    trainer = load_run(run())
    (found,) = ranges(trainer, LENGTH)
    report = evaluate(trainer)
    assert report is not None
    assert found.targets == report.n_targets
    assert found.loss == pytest.approx(report.losses["next_token"], rel=1e-9)
