"""Where replicas of experts go: the published example, and what the algorithm promises of any load."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.plugins.parallel.eplb import once, place

PUBLISHED = torch.tensor(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
"""The load in the README of github.com/deepseek-ai/EPLB."""


def test_the_published_example():
    found = place(PUBLISHED, slots=16, groups=4, nodes=2, ranks=8)
    assert found.experts.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert found.replicas.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    assert found.rows(PUBLISHED)[0].tolist() == [121.5, 86.5, 125.0, 113.0, 147.5, 131.5, 156.0, 152.0]


def test_the_global_policy_on_it():
    found = place(PUBLISHED, slots=16, groups=1, nodes=1, ranks=8)
    assert found.rows(PUBLISHED).amax(1).tolist() == [138.5, 172.0]
    assert (found.imbalance(PUBLISHED) < once(2, 12, 4).imbalance(PUBLISHED)).all()


@st.composite
def wanted(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int, int]:
    """Draw a load and numbers that divide."""
    nodes = draw(st.integers(1, 3))
    groups, ranks = nodes * draw(st.integers(1, 3)), nodes * draw(st.integers(1, 3))
    n_experts = groups * draw(st.integers(1, 4))
    slots = ranks * draw(st.integers(-(-n_experts // ranks), 2 * n_experts // ranks + 1))
    seed, power = draw(st.integers(0, 999)), draw(st.sampled_from((0, 1, 4, 20)))
    drawn = torch.rand(2, n_experts, generator=torch.Generator().manual_seed(seed)) ** power
    return (1000 * drawn).long(), slots, groups, nodes, ranks


@given(wanted())
def test_every_expert_has_slots_and_every_slot_one_expert(case):
    load, slots, _, _, ranks = case
    found = place(*case)
    assert found.experts.shape == (2, slots)
    for layer in range(2):
        for expert in range(load.shape[1]):
            held = [slot for slot in found.slots[layer, expert].tolist() if slot >= 0]
            assert held
            assert held == (found.experts[layer] == expert).nonzero().flatten().tolist()
            assert len(held) == found.replicas[layer, expert]
    assert torch.allclose(found.rows(load).sum(1), load.sum(1).double())
    assert found.rows(load).shape == (2, ranks)


@given(wanted())
def test_a_group_stays_on_one_node_and_every_node_has_as_many(case):
    load, _, groups, nodes, _ = case
    found = place(*case)
    size = load.shape[1] // groups
    for layer in found.experts.unflatten(1, (nodes, -1)).tolist():
        held = [{expert // size for expert in node} for node in layer]
        assert sorted(group for node in held for group in node) == list(range(groups))
        assert {len(node) for node in held} == {groups // nodes}


@given(wanted())
def test_no_other_numbers_of_replicas_leave_the_busiest_slot_with_less(case):
    """To have less in every slot takes more slots than a node has."""
    load, slots, _, nodes, _ = case
    found = place(*case)
    for layer, replicas, held in zip(load.tolist(), found.replicas.tolist(), found.experts.tolist(), strict=True):
        for node in range(nodes):
            members = set(held[node * slots // nodes : (node + 1) * slots // nodes])
            busiest = max(layer[expert] / replicas[expert] for expert in members)
            if busiest:
                less = busiest * (1 - 1e-9)
                assert sum(max(1, math.ceil(layer[expert] / less)) for expert in members) > slots // nodes


@given(wanted())
def test_ranks_of_a_node_differ_by_no_more_than_its_busiest_slot(case):
    """Packing the heaviest first into the lightest leaves no two packs further apart, though both must be as full."""
    load, _, _, nodes, _ = case
    found = place(*case)
    rows = found.rows(load).unflatten(1, (nodes, -1))
    slots = (load.double() / found.replicas).gather(1, found.experts).unflatten(1, (nodes, -1))
    assert (rows.amax(2) - rows.amin(2) <= slots.amax(2) + 1e-9).all()


def test_what_does_not_divide_is_refused():
    load = torch.ones(1, 6)
    for numbers, words in (
        ((8, 4, 1, 2), "6 experts in 4 groups"),
        ((8, 3, 2, 2), "3 groups on 2 nodes"),
        ((8, 2, 2, 3), "3 ranks on 2 nodes"),
        ((8, 1, 1, 3), "8 slots on 3 ranks"),
        ((4, 1, 1, 2), "4 slots are fewer than 6 experts"),
    ):
        with pytest.raises(ValueError, match=words):
            place(load, *numbers)
    for broken in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a load is negative or not finite"):
            place(load * broken, 6, 1, 1, 2)
