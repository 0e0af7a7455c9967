import pytest
import torch
from tiny import exact, tiny, trainer
from torch import nn

from tangram.core import build_model
from tangram.core.context import BuildError, Parallel
from tangram.core.layout import Layout
from tangram.core.model import initialize
from tangram.core.records import Carry, Progress
from tangram.testing import assert_close


def test_addresses_are_those_of_the_whole_model() -> None:
    model = build_model(tiny())
    addresses = dict(model.named_parameters())
    assert "blocks.1.attention.kv_down.weight" in addresses
    assert "blocks.2.feedforward.gate_up.weight" in addresses
    assert "objectives.mtp.depths.0.projection.weight" in addresses
    assert "blocks.2.feedforward.balancer.biases" in model.state_dict()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    one, same, other = (build_model(tiny(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if name.endswith("weight") and "norm" not in name]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


def test_initial_values_belong_to_addresses_and_not_to_the_order_of_building() -> None:
    whole = build_model(tiny(), seed=3)
    fewer = build_model(tiny("objectives.mtp=null", "model.blocks.1.repeat=1"), seed=3)
    values = whole.state_dict()
    for name, value in fewer.state_dict().items():
        assert torch.equal(value, values[name]), name


def test_initial_weights_have_the_std_asked_for_and_experts_differ() -> None:
    model = build_model(tiny("model.init_std=0.02", "model.dim=64"))
    weight = model.blocks["1"].feedforward.gate_up.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(weight[0], weight[1])


def test_initialising_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_model(tiny())
    assert torch.equal(before, torch.get_rng_state())


def test_a_module_with_weights_and_no_way_to_initialise_them_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    with pytest.raises(TypeError, match=r"inner: Bare has weights and no reset_parameters"):
        initialize(nn.ModuleDict({"inner": Bare()}), 0)


def test_logits_see_only_the_past() -> None:
    model = build_model(exact())
    tokens = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model.logits(tokens)
    assert logits.shape == (2, 9, 48)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 48
    again = model.logits(changed)
    assert_close(again[:, :5], logits[:, :5], length=100)
    assert not torch.allclose(again[:, 5:], logits[:, 5:])


def test_the_mtp_block_is_a_layer_of_its_own_and_its_experts_are_balanced_too() -> None:
    run = trainer(exact())
    result = run.executor.run(run.data.batch(run.progress, 4), run.progress)
    assert result.load.shape == (4, 8)
    assert result.load[3].sum() == 4 * 12 * 2
    before = {layer: bias.clone() for layer, bias in run.model.biases().items()}
    run.model.rebalance(result.load, run.progress)
    assert sorted(before) == [1, 2, 3]
    for layer, bias in run.model.biases().items():
        counts = result.load[layer].double()
        expected = before[layer] + 1e-3 * torch.sign(counts.mean() - counts).float()
        assert torch.equal(bias, expected)


def test_multi_token_prediction_learns_the_trunks_own_embedding_and_head() -> None:
    run = trainer(exact())
    model, batch = run.model, run.data.batch(run.progress, 2)
    trunk = model(batch, run.progress).trunk
    assert trunk is not None
    dict(model.token_objectives())["mtp"](trunk.detach(), batch, model.shared).value.backward()
    for borrowed in (model.embedding.weight, model.head.weight):
        assert borrowed.grad is not None
        assert borrowed.grad.any()
    vocabulary = run.experiment.model.vocab_size
    assert not [name for name, p in model.objectives.named_parameters() if vocabulary in p.shape], "it has its own"


def test_an_objective_of_weight_zero_runs_no_phase() -> None:
    weightless = build_model(exact("objectives.mtp.weight=0.0", "objectives.sequence_balance.weight=0.0"))
    batch = trainer(exact()).data.batch(Progress(), 4)
    assert [name for name, _ in weightless(batch, Progress()).losses] == ["next_token"]
    phases = [phase.name for phase in weightless.phases(0, batch, Progress())]
    assert "join" not in phases
    assert "routing" not in phases


def test_the_last_stage_needs_an_embedding_only_where_an_objective_reads_it() -> None:
    last = Parallel(layout=Layout({(0, 0): 0, (0, 1): 1}, rank=1))
    experiment = tiny("objectives.mtp=null")
    model = build_model(experiment, parallel=last)
    batch = experiment.data.build(experiment.train, 48).batch(Progress(), 1)
    carry = Carry(hidden=torch.randn(1, 12, 16))
    for phase in model.phases(1, batch, Progress()):
        carry = phase.fn(carry)
    assert "next_token" in dict(carry.losses)
    with pytest.raises(RuntimeError, match="embeds = True"):
        model.shared.embedding(batch.tokens)
    assert build_model(tiny(), parallel=last).shared.embedding(batch.tokens).shape == (1, 12, 16)


def test_what_cannot_be_built_is_named_by_its_path() -> None:
    with pytest.raises(BuildError) as caught:
        build_model(tiny("model.block.feedforward.router.top_k=5"), device="meta")
    assert caught.value.path == "model.blocks.1.feedforward.router"
    assert "top_k 5 is more than the 4 experts in 2 of 4 groups" in str(caught.value)
