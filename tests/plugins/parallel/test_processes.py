"""Pipelines on real processes: what n ranks leave is what one leaves."""

import pipeline_at_work
import pytest
import torch

from tangram.core.plan import sequential
from tangram.testing import assert_same_gradients, run_ranks


def assert_the_step_of_one(found: pipeline_at_work.Worked, layers: int, sequences: int) -> None:
    losses, load, gradients = pipeline_at_work.step(sequential(sequences), layers)
    assert found[0] == {name: pytest.approx(value, rel=1e-13) for name, value in losses.items()}
    assert torch.equal(found[1], load)
    assert gradients.keys() == found[2].keys()
    assert_same_gradients(found[2], gradients, length=sequences * 12 * 16)


def test_two_ranks_of_every_pipeline():
    names = sorted(pipeline_at_work.PIPELINES)
    found = run_ranks(pipeline_at_work.ranks, 2, names, 2, 4, 8)[0]
    assert sorted(found) == names
    for worked in found.values():
        assert_the_step_of_one(worked, 4, 8)


@pytest.mark.parametrize(
    ("name", "layers", "sequences"), [("dualpipe", 4, 8), ("dualpipev", 8, 8), ("zero_bubble", 4, 6)]
)
def test_four_ranks(name, layers, sequences):
    found = run_ranks(pipeline_at_work.ranks, 4, [name], 4, layers, sequences)[0]
    assert_the_step_of_one(found[name], layers, sequences)
