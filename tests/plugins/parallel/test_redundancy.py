"""Redundant experts: what comes out is the same, the load of ranks is more even, and nothing is trained."""

from collections.abc import Sequence

import pytest
import servers
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.context import Context, Parallel
from tangram.plugins.parallel.all_to_all import AllToAllConfig
from tangram.plugins.parallel.eplb import place
from tangram.plugins.parallel.redundancy import Redundancy, Redundant
from tangram.testing import assert_close, run_ranks, seeds
from tangram.testing.samples import normal


def redundant(load: torch.Tensor, spare: int, first: int = 0) -> tuple[Redundant, torch.Tensor]:
    """A dispatcher of one rank with replicas, and the expert of each slot."""
    slots = len(load) + spare
    placed = place(load[None], slots, 1, 1, 1)
    dispatcher = AllToAllConfig().build(Context(dim=3), slots)
    return Redundant(dispatcher, placed.slots[0], placed.replicas[0], first), placed.experts[0]


@given(seed=seeds(), spare=st.integers(0, 6), first=st.integers(0, 3), skew=st.sampled_from((0.0, 0.3, 100.0)))
def test_the_tokens_of_an_expert_are_spread_evenly_over_its_slots(seed, spare, first, skew):
    ids = (normal(20, 5, seed=seed) - skew * torch.arange(5)).topk(2).indices
    load = torch.bincount(ids.flatten(), minlength=5)
    dispatcher, experts = redundant(load, spare, first)
    x, gates = normal(20, 3, seed=seed + 1), normal(20, 2, seed=seed + 2).abs()
    with torch.no_grad():
        rows = dispatcher.dispatch(x, ids)
        home = dispatcher.combine(rows, gates)
    for expert in range(5):
        counts = rows.counts[experts == expert]
        assert counts.sum() == load[expert]
        assert counts.max() - counts.min() <= 1
        parts = [
            part for part, held in zip(rows.rows.split(rows.counts.tolist()), experts, strict=True) if held == expert
        ]
        given_to, wanted = torch.cat(parts), x[(ids == expert).any(1)]
        assert torch.equal(given_to[given_to[:, 0].argsort()], wanted[wanted[:, 0].argsort()])
    assert_close(home, x * gates.sum(1, keepdim=True), length=4)


def test_replicas_are_not_trained():
    dispatcher, _ = redundant(torch.tensor([5, 1]), 1)
    with pytest.raises(RuntimeError, match=r"replicas of experts serve and are not trained: run .* torch.no_grad"):
        dispatcher.dispatch(torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.int64))


def test_a_dispatcher_that_knows_no_slots_is_refused():
    with pytest.raises(ValueError, match="layer 1 holds every expert once: name a dispatcher such as all_to_all"):
        Redundancy(servers.built(Parallel(), "{use: local}"), Parallel(), spare=1, every=1)


def test_spare_slots_that_ranks_cannot_share_out_are_refused_at_once():
    model = servers.built(parallel := Parallel(), "{use: all_to_all}")
    with pytest.raises(ValueError, match="8 experts in 3 groups"):
        Redundancy(model, parallel, spare=1, groups=3, every=1)


def test_ranks_that_serve_with_redundant_experts_give_the_same_and_share_the_rows_more_evenly():
    cases = {"{use: all_to_all}": 1, "{use: hierarchical, node_ranks: 1}": 2}
    for found in zip(*run_ranks(servers.several, 2, 2, cases), strict=True):
        assert_same_and_more_even(found)


def assert_same_and_more_even(found: Sequence[tuple[servers.Served, servers.Served]]) -> None:
    for plain, redundant in found:
        assert redundant.kept
        assert redundant.losses == [{k: pytest.approx(v, rel=1e-12) for k, v in each.items()} for each in plain.losses]
        assert [list(each) for each in redundant.balances] == [[], [1, 2, 3], [], [1, 2, 3], []]
        assert all(torch.equal(*each) for each in zip(plain.loads, redundant.loads, strict=True))
    balances = found[0][1].balances
    assert all(each[1].balances == balances for each in found)
    for layer, said in balances[1].items():
        assert said.after < said.before
        rows = torch.tensor([[rank[i].rows[layer] for rank in found] for i in range(2)])  # [plain or not, ranks, times]
        sums = rows.unflatten(2, (servers.BATCHES, -1)).sum(3)  # of a batch's micro-batches
        assert torch.equal(sums[0, :, :2], sums[1, :, :2])
        imbalance = sums.amax(1) / sums.double().mean(1)
        before, after = imbalance[0, :2].mean(), imbalance[1, 2:].mean()
        assert before == pytest.approx(said.before, rel=0.05)
        assert after < before
