"""Both routers against the paper's equations (arXiv:2412.19437, 12 to 16), and what any router owes."""

from typing import cast

import pytest
import torch
from attrs import evolve
from builders import assert_same_function, route
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.contracts import Router, RouterConfig
from tangram.core.records import Routing
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.moe.top_k import TopKConfig
from tangram.testing import assert_close, seeds
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


def routers() -> st.SearchStrategy[tuple[RouterConfig, int]]:
    return cast(st.SearchStrategy[tuple[RouterConfig, int]], grouped() | plain())


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
    assert_same_function(dense(routing, len(bias)), gates, wrt, length=LENGTH, seed=seed)
    assert_same_function(routing.stats.affinity, means, wrt, length=LENGTH, seed=seed + 1)


# --- against the paper -----------------------------------------------------------------------------


@given(drawn=grouped(), level=st.sampled_from((0.0, -3.0, -100.0, 100.0)), seed=seeds())
def test_node_limited_routing_is_the_papers(drawn, level, seed):
    config, n_experts = drawn
    compare(built(config, n_experts, seed), config, biases(n_experts, level, seed + 2), seed)


@given(drawn=plain(), level=st.sampled_from((0.0, -3.0)), seed=seeds())
def test_plain_routing_is_the_papers_with_one_group(drawn, level, seed):
    config, n_experts = drawn
    same = GroupLimitedConfig(top_k=config.top_k, score=config.score, normalise=config.normalise)
    compare(built(config, n_experts, seed), same, biases(n_experts, level, seed + 2), seed)


# --- laws ------------------------------------------------------------------------------------------


@given(drawn=routers(), level=st.sampled_from((0.0, -50.0)), seed=seeds())
def test_experts_are_distinct_and_every_choice_is_counted(drawn, level, seed):
    config, n_experts = drawn
    router = built(config, n_experts)
    routing = router(normal(2, 5, DIM, seed=seed), biases(n_experts, level, seed + 1))
    ids, stats = routing.ids, routing.stats
    assert ids.shape == routing.gates.shape == (10, router.top_k)
    assert all(len(set(row)) == router.top_k for row in ids.tolist())
    assert int(ids.min()) >= 0
    assert int(ids.max()) < n_experts
    assert torch.equal(stats.ids.flatten(0, 1), ids)
    assert stats.load.dtype == stats.top.dtype == torch.int64
    for row in range(2):
        counts = torch.bincount(stats.ids[row].flatten(), minlength=n_experts)
        assert torch.equal(stats.load[row], counts)
        assert int(counts.sum()) == int(stats.top[row].sum()) == 5 * router.top_k


@given(drawn=routers(), seed=seeds())
def test_the_bias_moves_who_is_chosen_and_never_how_much(drawn, seed):
    config, n_experts = drawn
    config = evolve(config, normalise=False)
    everyone = evolve(config, top_k=n_experts)
    if isinstance(everyone, GroupLimitedConfig):
        everyone = evolve(everyone, top_groups=everyone.n_groups)
    x, bias = normal(1, 6, DIM, seed=seed), biases(n_experts, -1.0, seed + 1)
    affinity = dense(built(everyone, n_experts)(x, torch.zeros(n_experts)), n_experts)
    biased = built(config, n_experts)(x, bias)
    assert torch.equal(biased.gates, affinity.gather(1, biased.ids))


@given(drawn=routers(), seed=seeds())
def test_normalised_gates_sum_to_the_scale(drawn, seed):
    config, n_experts = drawn
    config = evolve(config, normalise=True)
    scale = config.gate_scale if isinstance(config, GroupLimitedConfig) else 1.0
    gates = built(config, n_experts)(normal(1, 6, DIM, seed=seed), biases(n_experts, 0.0, seed)).gates
    assert_close(gates.sum(1), torch.full((6,), scale, dtype=torch.float64), length=n_experts + 2)
    assert bool((gates > 0).all())


@given(drawn=grouped(), level=st.sampled_from((0.0, -2.0, -100.0)), seed=seeds())
def test_an_excluded_group_is_never_chosen_even_when_every_score_is_negative(drawn, level, seed):
    config, n_experts = drawn
    routing = built(config, n_experts)(normal(2, 4, DIM, seed=seed), biases(n_experts, level, seed + 1))
    groups = routing.ids // (n_experts // config.n_groups)
    assert all(len(set(row)) <= config.top_groups for row in groups.tolist())


@given(drawn=routers(), seed=seeds())
def test_a_favoured_expert_is_always_chosen_and_a_shunned_one_only_for_want_of_others(drawn, seed):
    config, n_experts = drawn
    router, x = built(config, n_experts), normal(1, 6, DIM, seed=seed)
    bias = torch.zeros(n_experts)
    expert = seed % n_experts
    bias[expert] = 1e3
    assert bool((router(x, bias).ids == expert).any(1).all())
    bias[expert] = -1e3
    grouped_away = isinstance(config, GroupLimitedConfig) and config.n_groups > 1
    if router.top_k < n_experts and not grouped_away:
        assert not bool((router(x, bias).ids == expert).any())


@given(drawn=routers(), seed=seeds())
def test_a_bias_equal_for_all_changes_nothing(drawn, seed):
    config, n_experts = drawn
    router, x = built(config, n_experts), normal(1, 6, DIM, seed=seed)
    one, other = (dense(router(x, torch.full((n_experts,), level)), n_experts) for level in (0.0, -8.0))
    assert torch.equal(one, other)


@given(drawn=routers(), seed=seeds())
def test_what_the_unbiased_affinities_would_choose_ignores_bias_and_groups(drawn, seed):
    config, n_experts = drawn
    router, x = built(config, n_experts), normal(2, 5, DIM, seed=seed)
    one, other = (router(x, biases(n_experts, 0.0, seed + i)).stats.top for i in (1, 2))
    assert torch.equal(one, other)
    unlimited = built(TopKConfig(top_k=router.top_k, score="sigmoid"), n_experts)
    wanted = unlimited(x, torch.zeros(n_experts)).stats.load  # both scores grow with the product
    assert torch.equal(one, wanted)


@given(drawn=routers(), seed=seeds())
def test_mean_affinities_are_a_distribution(drawn, seed):
    config, n_experts = drawn
    affinity = built(config, n_experts)(normal(2, 5, DIM, seed=seed), torch.zeros(n_experts)).stats.affinity
    assert affinity.shape == (2, n_experts)
    assert_close(affinity.sum(1), torch.ones(2, dtype=torch.float64), length=n_experts + 5)


@given(drawn=routers(), seed=seeds())
def test_a_token_is_routed_by_itself(drawn, seed):
    config, n_experts = drawn
    router, x, bias = built(config, n_experts), normal(2, 4, DIM, seed=seed), biases(n_experts, 0.0, seed)
    whole = dense(router(x, bias), n_experts)
    apart = [dense(router(token.view(1, 1, DIM), bias), n_experts) for token in x.flatten(0, 1)]
    assert_close(whole, torch.cat(apart), length=LENGTH)


@pytest.mark.parametrize("config", [GroupLimitedConfig(top_k=2), TopKConfig(top_k=2)])
def test_affinities_are_float32_at_least_whatever_the_model_computes_in(config):
    router = config.build(context(DIM, compute=torch.bfloat16), 4)
    x = normal(1, 3, DIM, seed=0, dtype=torch.bfloat16)
    routing = router(x, torch.zeros(4))
    assert routing.gates.dtype == routing.stats.affinity.dtype == torch.float32
    wide = config.build(context(DIM, compute=torch.float32), 4)
    wide.load_state_dict(router.state_dict())
    assert torch.equal(routing.gates, wide(x.float(), torch.zeros(4)).gates)


@pytest.mark.parametrize("config", [GroupLimitedConfig(top_k=1), TopKConfig(top_k=1)])
def test_the_same_seed_gives_the_same_centroids(config):
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(config.build(context(DIM), 4).get_parameter("centroids.weight"))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


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
