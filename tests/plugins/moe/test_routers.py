"""Both routers against the paper's equations (arXiv:2412.19437, 12 to 16), and what they refuse."""

import math

import pytest
import torch
from builders import CONDITION, assert_same_function, route
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.contracts import Router, RouterConfig
from tangram.core.records import Routing
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.moe.top_k import TopKConfig
from tangram.testing import seeds
from tangram.testing.samples import context, filled, normal

DIM = 5
LENGTH = 60
"""Terms of the longest chain: reductions over 5 and over at most 12 experts, there and back."""

SCORES = st.sampled_from(("sigmoid", "softmax"))


@st.composite
def grouped(draw: st.DrawFn) -> tuple[GroupLimitedConfig, int]:
    """Draw a node-limited router and its number of experts."""
    n_groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    top_groups = draw(st.integers(1, n_groups))
    config = GroupLimitedConfig(
        top_k=draw(st.integers(1, size * top_groups)),
        score=draw(SCORES),
        n_groups=n_groups,
        top_groups=top_groups,
        normalise=draw(st.booleans()),
        gate_scale=draw(st.sampled_from((1.0, 2.5))),
    )
    return config, n_groups * size


@st.composite
def plain(draw: st.DrawFn) -> tuple[TopKConfig, int]:
    """Draw a plain router and its number of experts."""
    n_experts = draw(st.integers(1, 8))
    config = TopKConfig(top_k=draw(st.integers(1, n_experts)), score=draw(SCORES), normalise=draw(st.booleans()))
    return config, n_experts


def built(config: RouterConfig, n_experts: int, seed: int = 0) -> Router:
    return filled(config.build(context(DIM), n_experts), seed, std=1.0)


def biases(n_experts: int, level: float, seed: int) -> Tensor:
    return level + normal(n_experts, seed=seed, dtype=torch.float32)


def dense(routing: Routing, n_experts: int) -> Tensor:
    """Return the gates by expert, [N, E]; zero where an expert was not chosen."""
    zeros = torch.zeros(len(routing.ids), n_experts, dtype=routing.gates.dtype)
    return zeros.scatter(1, routing.ids, routing.gates)


def papers(x: Tensor, centroids: Tensor, bias: Tensor, config: GroupLimitedConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the paper's ids, sorted, [N, K]; its gates by expert [N, E]; its mean affinities [B, E]."""
    zero, means, gates, ids = torch.zeros((), dtype=torch.float64), [], [], []
    for u in x:
        routes, affinities = route(u, centroids, bias, config)
        means.append(affinities.mean(0))
        ids += [sorted(chosen) for chosen in routes]
        gates += [torch.stack([chosen.get(i, zero) for i in range(len(bias))]) for chosen in routes]
    return torch.tensor(ids), torch.stack(gates), torch.stack(means)


def compare(router: Router, config: GroupLimitedConfig, bias: Tensor, seed: int) -> None:
    x = normal(2, 3, DIM, seed=seed).requires_grad_()
    centroids = router.get_parameter("centroids.weight")
    wrt = {"x": x, "centroids": centroids}
    routing = router(x, bias)
    ids, gates, means = papers(x, centroids, bias, config)
    assert torch.equal(routing.ids.sort(1).values, ids)
    # Behind the division by their sum, gates of a token that chose little affinity keep less of their digits.
    least = float(router.get_submodule("centroids")(x).flatten(0, 1).gather(1, routing.ids).sum(1).detach().min())
    length = math.ceil(LENGTH * max(1.0, 1 / (CONDITION * least)) ** 2)
    assert_same_function(dense(routing, len(bias)), gates, wrt, length=length, seed=seed)
    assert_same_function(routing.stats.affinity, means, wrt, length=LENGTH, seed=seed + 1)


@given(drawn=grouped(), level=st.sampled_from((0.0, -3.0, -100.0, 100.0)), seed=seeds())
def test_node_limited_routing_is_the_papers(drawn, level, seed):
    config, n_experts = drawn
    compare(built(config, n_experts, seed), config, biases(n_experts, level, seed + 2), seed)


@given(drawn=plain(), level=st.sampled_from((0.0, -3.0)), seed=seeds())
def test_plain_routing_is_the_papers_with_one_group(drawn, level, seed):
    config, n_experts = drawn
    same = GroupLimitedConfig(top_k=config.top_k, score=config.score, normalise=config.normalise)
    compare(built(config, n_experts, seed), same, biases(n_experts, level, seed + 2), seed)


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "n_experts", "message"),
    [
        (GroupLimitedConfig(top_k=2, n_groups=3), 8, "n_groups 3 does not divide the 8 experts"),
        (
            GroupLimitedConfig(top_k=5, n_groups=4, top_groups=2),
            8,
            "top_k 5 is more than the 4 experts in 2 of 4",
        ),
        (TopKConfig(top_k=5), 4, "top_k 5 is more than the 4 experts"),
    ],
)
def test_experts_that_cannot_be_chosen_so_are_refused_with_both_numbers(config, n_experts, message):
    with pytest.raises(ValueError, match=message):
        config.build(context(DIM), n_experts)


def test_more_groups_than_there_are_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="top_groups 3 is more than n_groups 2"):
        GroupLimitedConfig(top_k=1, n_groups=2, top_groups=3)
