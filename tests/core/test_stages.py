"""The real model in stages, worked in any pipeline's order: losses, loads and gradients are those of one stage."""

import pytest
import torch
from pipeline_at_work import PIPELINES, SEQUENCES, Worked, experiment, on_one, step

from tangram.core.lanes import Lanes
from tangram.core.model import build_model
from tangram.core.plan import sequential
from tangram.core.records import Progress
from tangram.testing import assert_same_gradients
from tangram.testing.contracts.pipeline import on_one_rank

LAYERS = 4
EXPERIMENT = experiment(LAYERS, SEQUENCES)
MODEL = build_model(EXPERIMENT, device="meta")
RANKS = {name: 4 if name in ("dualpipe", "one_f_one_b") else 2 for name in PIPELINES}
PLANS = {name: pipeline.schedule(RANKS[name], SEQUENCES) for name, pipeline in PIPELINES.items()}


@pytest.fixture(scope="module")
def whole() -> Worked:
    return step(sequential(SEQUENCES), LAYERS)


@pytest.mark.parametrize("name", PLANS)
def test_in_any_order_the_step_is_that_of_one_stage(name, whole):
    losses, load, gradients = step(on_one_rank(PLANS[name]), LAYERS)
    assert losses.keys() == whole[0].keys() == {"next_token", "mtp", "sequence_balance"}
    for loss, value in whole[0].items():
        assert losses[loss] == pytest.approx(value, rel=1e-13)
    assert torch.equal(load, whole[1])
    assert gradients.keys() == whole[2].keys() == {address for address, _ in MODEL.named_parameters()}
    assert_same_gradients(gradients, whole[2], length=SEQUENCES * 12 * 16)


def test_the_weights_do_not_depend_on_the_stages():
    other = build_model(EXPERIMENT, 3, parallel=on_one(3))
    for (address, one), (same, two) in zip(
        build_model(EXPERIMENT, 3).named_parameters(), other.named_parameters(), strict=True
    ):
        assert address == same
        assert torch.equal(one, two)


def test_logits_do_not_depend_on_the_stages():
    tokens = torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(0))
    one, four = (build_model(EXPERIMENT, 3, parallel=on_one(stages)).logits(tokens) for stages in (1, 4))
    assert torch.equal(one, four)


def test_each_block_is_in_one_stage_and_the_ends_have_the_rest():
    model = build_model(EXPERIMENT, device="meta", parallel=on_one(3))
    batch = EXPERIMENT.data.build(EXPERIMENT.train, 48).batch(Progress(), 1)
    names = [[phase.name for phase in model.phases(stage, batch, Progress())] for stage in range(3)]
    assert [stage.count("attend") for stage in names] == [2, 1, 1 + 2]  # two of them are of multi-token prediction
    assert [stage.count("embed") for stage in names] == [1, 0, 0]
    assert [stage.count("trunk") for stage in names] == [0, 0, 1]
    assert all(stage[-1] == "routing" for stage in names)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="4 layers do not make 5 stages"):
        build_model(EXPERIMENT, device="meta", parallel=on_one(5))


def test_a_pair_side_by_side_is_one_after_the_other_bit_for_bit(monkeypatch):
    plan = on_one_rank(PLANS["dualpipe"])
    pairs = step(plan, LAYERS)
    monkeypatch.setattr(Lanes, "side_by_side", lambda _, *works: [list(work) for work in works])
    in_turn = step(plan, LAYERS)
    assert pairs[0] == in_turn[0]
    assert torch.equal(pairs[1], in_turn[1])
    assert all(torch.equal(gradient, in_turn[2][address]) for address, gradient in pairs[2].items())


def test_the_phases_of_a_pair_take_turns_and_what_computes_is_issued_first():
    done = []

    def work(name, lanes):
        for number, lane in enumerate(lanes):
            yield lane
            done.append(f"{name}{number}")

    lanes = Lanes(torch.device("cpu"))
    lanes.side_by_side(work("f", ["compute", "comm", "compute"]), work("b", ["comm", "compute", "comm", "comm"]))
    assert done == ["f0", "b0", "b1", "f1", "f2", "b2", "b3"]
