"""DeepSeekMoE against the paper (arXiv:2412.19437, equation 12), and what any feed-forward owes."""

import paper
import pytest
import torch
from attrs import evolve
from builders import SMALL_MOE, assert_same_function, moe_weights, route
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.context import BuildError
from tangram.plugins.moe.balancers import AuxFree, NoneConfig
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.moe.moe import MoE, MoEConfig
from tangram.plugins.moe.swiglu import SwiGLUConfig
from tangram.plugins.moe.top_k import TopKConfig
from tangram.testing import assert_close, seeds
from tangram.testing.samples import context, filled, normal

DIM = 5
LENGTH = 120
"""Terms of the longest chain: reductions over 5, 6, 3 and the K experts, there and back."""


@st.composite
def configs(draw: st.DrawFn) -> MoEConfig:
    """Draw a mixture; with few tokens and many experts some stay empty."""
    size, groups = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    router = GroupLimitedConfig(
        top_k=draw(st.integers(1, size)),
        n_groups=groups,
        score=draw(st.sampled_from(("sigmoid", "softmax"))),
        normalise=draw(st.booleans()),
        gate_scale=2.5,
    )
    n_shared, hidden = draw(st.integers(0, 2)), draw(st.integers(1, 4))
    return evolve(SMALL_MOE, n_experts=size * groups, n_shared=n_shared, hidden=hidden, router=router)


def built(config: MoEConfig, seed: int = 0) -> MoE:
    module = config.build(context(DIM))
    assert isinstance(module, MoE)
    return filled(module, seed)


def biased(module: MoE, bias: Tensor) -> MoE:
    assert isinstance(module.balancer, AuxFree)
    module.balancer.biases.copy_(bias)
    return module


def compare(module: MoE, config: MoEConfig, x: Tensor, seed: int) -> None:
    router = config.router
    assert isinstance(router, GroupLimitedConfig)
    weights = moe_weights(module)
    rows = []
    for u in x:
        routes, _ = route(u, weights["centroids"], module.balancer.bias(), router)
        rows.append(paper.moe(u, weights, routes))
    wrt = {"x": x, **dict(module.named_parameters())}
    assert_same_function(module(x).hidden, torch.stack(rows), wrt, length=LENGTH, seed=seed)


@given(config=configs(), batch=st.integers(1, 2), length=st.integers(1, 4), seed=seeds())
def test_values_and_gradients_are_the_papers(config, batch, length, seed):
    bias = normal(config.n_experts, seed=seed + 1, dtype=torch.float32)
    module = biased(built(config, seed), bias)
    compare(module, config, normal(batch, length, DIM, seed=seed + 2).requires_grad_(), seed)


@given(favoured=st.sets(st.integers(0, 5), min_size=2, max_size=2), seed=seeds())
def test_no_token_is_lost_when_all_go_to_the_same_experts(favoured, seed):
    config = evolve(SMALL_MOE, n_experts=6, router=GroupLimitedConfig(top_k=2))
    bias = torch.zeros(6)
    bias[list(favoured)] = 10.0
    module = biased(built(config, seed), bias)
    x = normal(2, 7, DIM, seed=seed).requires_grad_()
    load = module(x).stats.load
    assert load.sum(0)[list(favoured)].tolist() == [14, 14]
    assert int(load.sum()) == 28
    compare(module, config, x, seed)


def test_every_parameter_gets_a_gradient_and_an_expert_without_tokens_a_zero_one():
    config = evolve(SMALL_MOE, n_experts=6, router=GroupLimitedConfig(top_k=2))
    module = biased(built(config), torch.tensor([9.0, 9.0, 0, 0, 0, 0]))
    module(normal(1, 5, DIM, seed=1)).hidden.sin().sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(grad is not None and bool(grad.any()) for grad in grads.values())
    for name in ("gate_up.weight", "down.weight"):
        assert grads[name][:2].flatten(1).any(1).all()
        assert not grads[name][2:].any()


@given(config=configs(), seed=seeds())
def test_the_phases_in_order_are_the_forward(config, seed):
    module, x = built(config), normal(2, 3, DIM, seed=seed)
    out = module(x)
    sent = module.dispatch(module.route(x))
    assert sent.rows is not None
    assert int(sent.rows.counts.sum()) == len(sent.rows.rows) == 6 * module.router.top_k
    hidden, stats = module.combine(module.compute(sent))
    assert torch.equal(hidden, out.hidden)
    assert torch.equal(stats.load, out.stats.load)


@given(config=configs(), order=st.permutations(range(6)), seed=seeds())
def test_the_order_of_tokens_does_not_matter(config, order, seed):
    module, x = built(config), normal(1, 6, DIM, seed=seed)
    assert_close(module(x[:, list(order)]).hidden, module(x).hidden[:, list(order)], length=LENGTH)
    apart = [module(x[:, i : i + 1]).hidden for i in range(6)]
    assert_close(module(x).hidden, torch.cat(apart, 1), length=LENGTH)


@given(top_k=st.integers(1, 5), order=st.permutations(range(5)), seed=seeds())
def test_renumbering_experts_with_their_centroids_and_biases_changes_nothing(top_k, order, seed):
    config = evolve(SMALL_MOE, n_experts=5, router=GroupLimitedConfig(top_k=top_k))
    one, other = built(config), built(config)
    permutation = torch.tensor(order)
    with torch.no_grad():
        for name in ("router.centroids.weight", "gate_up.weight", "down.weight"):
            other.get_parameter(name).copy_(one.get_parameter(name)[permutation])
        bias = normal(5, seed=seed, dtype=torch.float32)
        biased(one, bias), biased(other, bias[permutation])
    x = normal(2, 4, DIM, seed=seed + 1)
    before, after = one(x), other(x)
    assert_close(after.hidden, before.hidden, length=LENGTH)
    assert torch.equal(after.stats.load, before.stats.load[:, permutation])


def test_shared_experts_see_every_token_beside_the_routed_ones():
    module, x = built(SMALL_MOE), normal(1, 4, DIM, seed=1)
    without = built(evolve(SMALL_MOE, n_shared=0))
    own = {name: value for name, value in module.state_dict().items() if not name.startswith("shared.")}
    without.load_state_dict(own)
    assert module.shared is not None
    assert_close(module(x).hidden - without(x).hidden, module.shared(x).hidden, length=LENGTH)


@pytest.mark.parametrize(("n_shared", "hidden"), [(0, 3), (1, 3), (2, 4)])
def test_a_token_passes_through_k_experts_the_shared_ones_the_router_and_its_bias(n_shared, hidden):
    module = built(evolve(SMALL_MOE, n_shared=n_shared, hidden=hidden))
    expert = 3 * DIM * hidden
    total = sum(parameter.numel() for parameter in module.parameters())
    assert total == (4 + n_shared) * expert + 4 * DIM
    assert module.active_parameters() == (2 + n_shared) * expert + 4 * DIM + 4


def test_a_bias_that_is_always_zero_is_not_counted():
    module = built(evolve(SMALL_MOE, balancer=NoneConfig()))
    assert module.active_parameters() == built(SMALL_MOE).active_parameters() - 4


def test_rebalancing_moves_the_choice_of_the_next_forward():
    module, x = built(evolve(SMALL_MOE, router=TopKConfig(top_k=1))), normal(1, 8, DIM, seed=1)
    before = module(x).stats.load.sum(0)
    biased(module, torch.where(before == before.max(), -10.0, 0.0))
    assert int(module(x).stats.load.sum(0)[before.argmax()]) == 0


def test_the_same_seed_gives_the_same_output_and_no_two_experts_start_alike():
    outs, x = [], normal(1, 4, DIM, seed=0)
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        module = evolve(SMALL_MOE, hidden=DIM).build(context(DIM))
        outs.append(module(x).hidden)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    first, second = (module.get_parameter(name).flatten(1) for name in ("gate_up.weight", "down.weight"))
    assert len(torch.unique(torch.cat([first, second], 1)[:, [0, 1, 50, 51]])) == 16


def test_it_builds_without_memory_and_keeps_its_addresses():
    with torch.device("meta"):
        bare = SMALL_MOE.build(context(DIM))
    assert all(tensor.is_meta for tensor in bare.state_dict().values())
    real, x = built(SMALL_MOE), normal(1, 3, DIM, seed=1)
    bare.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(bare(x).hidden, real(x).hidden)


def test_what_a_part_refuses_is_said_under_its_path():
    config = evolve(SMALL_MOE, router=TopKConfig(top_k=5))
    with pytest.raises(BuildError, match="router: top_k 5 is more than the 4 experts"):
        config.build(context(DIM))


@pytest.mark.parametrize("config", [SMALL_MOE, SwiGLUConfig(hidden=3)], ids=["moe", "swiglu"])
def test_gradients_are_the_derivatives(config):
    module = filled(config.build(context(DIM)), 0)
    x = normal(1, 2, DIM, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda value: module(value).hidden, [x])
