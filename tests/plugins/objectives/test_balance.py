"""The balance losses against the paper's equations (arXiv:2412.19437, 17 to 20, and section 4.5.3)."""

import paper
import pytest
import torch
from attrs import evolve
from builders import SMALL_BLOCK, assert_same_function, route
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.contracts import RoutingObjective
from tangram.core.records import Batch, Progress, RouterStats
from tangram.plugins.moe.group_limited import GroupLimitedConfig
from tangram.plugins.objectives.balance import BatchBalanceConfig, SequenceBalanceConfig
from tangram.testing import curves, seeds
from tangram.testing.samples import context, filled, normal

DIM = 5
LENGTH = 60
"""Terms of the longest chain: reductions over 5, at most 8 experts and 10 tokens, there and back."""

BOTH = pytest.mark.parametrize("config", [SequenceBalanceConfig(), BatchBalanceConfig()], ids=["sequence", "batch"])
COUNTS = st.sampled_from(("unbiased", "routed"))
ROUTERS = st.sampled_from(
    [
        (GroupLimitedConfig(top_k=2, n_groups=2), 8),
        (GroupLimitedConfig(top_k=3, score="softmax"), 5),
        (GroupLimitedConfig(top_k=1, n_groups=3, top_groups=2), 6),
    ]
)


def built(config: SequenceBalanceConfig | BatchBalanceConfig) -> RoutingObjective:
    objective = config.build(context(DIM), SMALL_BLOCK)
    assert not isinstance(objective, torch.nn.Module)
    return objective


def batch_of(x: Tensor, n_sequences: int | None = None) -> Batch:
    tokens = torch.zeros(x.shape[:2], dtype=torch.int64)
    return Batch(tokens, tokens, tokens, tokens, tokens.numel(), n_sequences or len(x))


class Routed:
    """Sequences that a router with a bias has routed, and the paper's view of the same."""

    def __init__(self, config: GroupLimitedConfig, n_experts: int, batch: int, length: int, seed: int) -> None:
        self.config, self.n_experts = config, n_experts
        self.router = filled(config.build(context(DIM), n_experts), seed, std=1.0)
        self.x = normal(batch, length, DIM, seed=seed + 1).requires_grad_()
        self.bias = normal(n_experts, seed=seed + 2, dtype=torch.float32)

    @property
    def stats(self) -> RouterStats:
        return self.router(self.x, self.bias).stats

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, "centroids": self.router.get_parameter("centroids.weight")}

    def papers(self) -> list[tuple[Tensor, list[list[int]]]]:
        centroids = self.router.get_parameter("centroids.weight")
        rows = [route(u, centroids, self.bias, self.config) for u in self.x]
        return [(affinities, [list(chosen) for chosen in routes]) for routes, affinities in rows]


SIZES = {"routing": ROUTERS, "batch": st.integers(1, 3), "length": st.integers(1, 5), "seed": seeds()}


@given(**SIZES, count=COUNTS)
def test_sequence_balance_is_the_papers(routing, batch, length, seed, count):
    routed = Routed(*routing, batch, length, seed)
    actual = built(SequenceBalanceConfig(count=count))(routed.stats, batch_of(routed.x))
    each = [
        paper.sequence_balance(affinities, routed.config.top_k, chosen if count == "routed" else None)
        for affinities, chosen in routed.papers()
    ]
    assert_same_function(actual, torch.stack(each).mean(), routed.leaves, length=LENGTH)


@given(**SIZES, count=COUNTS)
def test_batch_balance_is_the_papers(routing, batch, length, seed, count):
    routed = Routed(*routing, batch, length, seed)
    actual = built(BatchBalanceConfig(count=count))(routed.stats, batch_of(routed.x))
    affinities = [row for row, _ in routed.papers()]
    if count == "unbiased":
        expected = paper.batch_balance(affinities, routed.config.top_k)
    else:
        chosen = [ids for _, row in routed.papers() for ids in row]
        expected = paper.sequence_balance(torch.cat(affinities), routed.config.top_k, chosen)
    assert_same_function(actual, expected, routed.leaves, length=LENGTH)


@given(**SIZES)
def test_batch_balance_of_micro_batches_of_one_sequence_is_sequence_balance(routing, batch, length, seed):
    routed, objective = Routed(*routing, batch, length, seed), built(BatchBalanceConfig())
    parts = [routed.router(routed.x[i : i + 1], routed.bias).stats for i in range(batch)]
    cut = [objective(stats, batch_of(routed.x[:1], batch)) for stats in parts]
    whole = built(SequenceBalanceConfig())(routed.stats, batch_of(routed.x))
    assert_same_function(torch.stack(cut).sum(), whole, routed.leaves, length=LENGTH)


def stats_of(load: list[list[int]], affinity: list[list[float]], top_k: int) -> RouterStats:
    counts = torch.tensor(load)
    ids = torch.zeros(len(load), int(counts[0].sum()) // top_k, top_k, dtype=torch.int64)
    return RouterStats(ids, counts, counts, torch.tensor(affinity, dtype=torch.float64))


@BOTH
@given(load=st.permutations([6, 4, 2, 0]))
def test_it_is_one_where_affinities_are_uniform_whatever_was_chosen(config, load):
    stats = stats_of([load, load], [[0.25] * 4] * 2, top_k=2)
    assert float(built(config)(stats, batch_of(torch.zeros(2, 6, 1)))) == pytest.approx(1.0, abs=1e-15)


@BOTH
def test_it_is_e_over_k_where_all_tokens_go_to_the_same_experts(config):
    stats = stats_of([[6, 6, 0, 0]] * 2, [[0.5, 0.5, 0.0, 0.0]] * 2, top_k=2)
    assert float(built(config)(stats, batch_of(torch.zeros(2, 6, 1)))) == pytest.approx(4 / 2, abs=1e-15)


def test_over_the_batch_opposite_sequences_balance_and_over_each_they_do_not():
    stats = stats_of([[6, 0], [0, 6]], [[1.0, 0.0], [0.0, 1.0]], top_k=1)
    batch = batch_of(torch.zeros(2, 6, 1))
    assert float(built(SequenceBalanceConfig())(stats, batch)) == 2.0
    assert float(built(BatchBalanceConfig())(stats, batch)) == 1.0


@BOTH
def test_a_step_against_its_gradient_evens_the_affinities(config):
    routed = Routed(GroupLimitedConfig(top_k=2), 6, 2, 8, seed=0)
    batch, objective = batch_of(routed.x), built(config)
    before = objective(routed.stats, batch)
    (grad,) = torch.autograd.grad(before, routed.leaves["centroids"])
    with torch.no_grad():
        routed.leaves["centroids"] -= 0.01 * grad / grad.norm()
        assert float(objective(routed.stats, batch)) < float(before)


@BOTH
def test_the_bias_reaches_the_routed_count_alone(config):
    routed = Routed(GroupLimitedConfig(top_k=1), 4, 1, 6, seed=0)
    biased = torch.tensor([9.0, 0.0, 0.0, 0.0])
    losses = {}
    for count in ("unbiased", "routed"):
        objective = built(evolve(config, count=count))
        stats = [routed.router(routed.x, bias).stats for bias in (torch.zeros(4), biased)]
        losses[count] = [objective(each, batch_of(routed.x)).item() for each in stats]
    assert losses["unbiased"][0] == losses["unbiased"][1] == losses["routed"][0]
    assert losses["routed"][0] != losses["routed"][1]


@BOTH
@given(curve=curves())
def test_the_weight_follows_its_curve(config, curve):
    objective = built(evolve(config, weight=curve))
    for now in (Progress(), Progress(step=500, tokens=10**9), Progress(step=10**5, tokens=20 * 10**12)):
        assert objective.weight(now) == curve(now)


@pytest.mark.parametrize("config", [SequenceBalanceConfig, BatchBalanceConfig])
def test_a_count_that_is_not_known_is_refused_by_name(config):
    with pytest.raises(ValueError, match=r"count.*biased"):
        config(count="biased")
