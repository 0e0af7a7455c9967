"""DeepSeekMoE against the paper (arXiv:2412.19437, equation 12), and what it refuses."""

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


def test_no_two_experts_start_alike():
    module = evolve(SMALL_MOE, hidden=DIM).build(context(DIM))
    first, second = (module.get_parameter(name).flatten(1) for name in ("gate_up.weight", "down.weight"))
    assert len(torch.unique(torch.cat([first, second], 1)[:, [0, 1, 50, 51]])) == 16


def test_what_a_part_refuses_is_said_under_its_path():
    config = evolve(SMALL_MOE, router=TopKConfig(top_k=5))
    with pytest.raises(BuildError, match="router: top_k 5 is more than the 4 experts"):
        config.build(context(DIM))
