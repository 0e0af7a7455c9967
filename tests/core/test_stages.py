"""The real model in stages, worked in any pipeline's order: losses, loads and gradients are those of one stage."""

import pytest
import torch
from attrs import evolve
from tiny import exact

from tangram.core.context import Parallel
from tangram.core.executor import Executor
from tangram.core.model import Model, build_model
from tangram.core.plan import Plan, sequential
from tangram.core.records import Result
from tangram.core.simulator import simulate
from tangram.core.step import Progress
from tangram.plugins.parallel.dualpipe import DualPipe, DualPipeV
from tangram.plugins.parallel.gpipe import GPipe
from tangram.plugins.parallel.interleaved import Interleaved
from tangram.plugins.parallel.one_f_one_b import OneFOneB
from tangram.plugins.parallel.zero_bubble import ZeroBubble
from tangram.testing import assert_same_gradients

SEQUENCES = 8
EXPERIMENT = exact("model.blocks.1.repeat=3", "objectives.mtp.depth=2")
PLANS = {
    "gpipe": GPipe().schedule(2, SEQUENCES),
    "1F1B": OneFOneB().schedule(4, SEQUENCES),
    "ZB1P": ZeroBubble().schedule(2, SEQUENCES),
    "interleaved": Interleaved(2).schedule(2, SEQUENCES),
    "dualpipe": DualPipe().schedule(4, SEQUENCES),
    "dualpipev": DualPipeV().schedule(2, SEQUENCES),
}


def alone(plan: Plan) -> Plan:
    """Return the plan with the work of all ranks on one, in the order in which it would end."""
    spans = sorted((span for rank in simulate(plan).spans for span in rank), key=lambda span: span.end)
    return evolve(plan, place=dict.fromkeys(plan.place, 0), actions=(tuple(span.action for span in spans),))


def worked(plan: Plan, *, experiment=EXPERIMENT) -> tuple[Model, Result]:
    parallel = Parallel()
    model = build_model(experiment, 3, parallel=parallel, n_stages=plan.stages)
    data = experiment.data.build(experiment.train, experiment.model.vocab_size)
    executor = Executor(model, lambda _: plan, 1, parallel.weight_grads, lambda: None)
    return model, executor.run(data.batch(Progress(), SEQUENCES), Progress())


@pytest.fixture(scope="module")
def whole() -> tuple[Model, Result]:
    return worked(sequential(SEQUENCES))


@pytest.mark.parametrize("name", PLANS)
def test_in_any_order_the_step_is_that_of_one_stage(name, whole):
    model, result = worked(alone(PLANS[name]))
    assert result.losses.keys() == whole[1].losses.keys() == {"next_token", "mtp", "sequence_balance"}
    for loss, value in whole[1].losses.items():
        assert result.losses[loss] == pytest.approx(value, rel=1e-13)
    assert torch.equal(result.load, whole[1].load)
    gradients = [{address: p.grad for address, p in each.named_parameters()} for each in (model, whole[0])]
    assert all(grad is not None for grad in gradients[1].values())
    assert_same_gradients(*gradients, length=SEQUENCES * 12 * 16)


def test_the_weights_do_not_depend_on_the_stages(whole):
    other = build_model(EXPERIMENT, 3, n_stages=3)
    for (address, one), (same, two) in zip(
        build_model(EXPERIMENT, 3).named_parameters(), other.named_parameters(), strict=True
    ):
        assert address == same
        assert torch.equal(one, two)


def test_logits_do_not_depend_on_the_stages():
    tokens = torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(0))
    one, four = (build_model(EXPERIMENT, 3, n_stages=stages).logits(tokens) for stages in (1, 4))
    assert torch.equal(one, four)


def test_each_block_is_in_one_stage_and_the_ends_have_the_rest():
    model = build_model(EXPERIMENT, device="meta", n_stages=3)
    batch = EXPERIMENT.data.build(EXPERIMENT.train, 48).batch(Progress(), 1)
    names = [[phase.name for phase in model.phases(stage, batch, Progress())] for stage in range(3)]
    assert [stage.count("attend") for stage in names] == [2, 1, 1 + 2]  # two of them are of multi-token prediction
    assert [stage.count("embed") for stage in names] == [1, 0, 0]
    assert [stage.count("trunk") for stage in names] == [0, 0, 1]
    assert all(stage[-1] == "routing" for stage in names)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="4 layers do not make 5 stages"):
        build_model(EXPERIMENT, device="meta", n_stages=5)
