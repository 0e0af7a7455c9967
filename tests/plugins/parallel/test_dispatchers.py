"""Dispatchers among ranks: they keep the laws of their slot, and n ranks are one rank with the whole micro-batch."""

import experts_at_work
import torch
from experts_at_work import EXPERTS, TOP_GROUPS, Case
from hypothesis import given, settings
from hypothesis import strategies as st

from tangram.plugins.moe.local import LocalConfig
from tangram.plugins.parallel.all_to_all import AllToAllConfig
from tangram.plugins.parallel.hierarchical import HierarchicalConfig
from tangram.testing import DispatcherContract, assert_same_gradients, run_ranks, seeds

TWO = [AllToAllConfig(), HierarchicalConfig(node_ranks=1), HierarchicalConfig(node_ranks=2)]
FOUR = [AllToAllConfig(), HierarchicalConfig(node_ranks=1), HierarchicalConfig(node_ranks=2)]


class TestAllToAll(DispatcherContract):
    config = AllToAllConfig()


class TestHierarchical(DispatcherContract):
    config = HierarchicalConfig(node_ranks=2)
    ranks = 4


def cases(ranks: int) -> st.SearchStrategy[list[Case]]:
    """Several cases, as the processes take a while to start."""
    sequences = st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks)
    case = st.builds(Case, sequences, st.sampled_from((0.0, 0.1, 100.0, -100.0)), seeds())
    return st.lists(case, min_size=8, max_size=8)


def assert_ranks_are_one(ranks: int, dispatchers: list, drawn: list[Case]) -> None:
    alone = experts_at_work.parallel_of(0, 1)
    found = run_ranks(experts_at_work.all_gradients, ranks, ranks, dispatchers, drawn)
    for number, case in enumerate(drawn):
        expected, ids, _ = experts_at_work.gradients(alone, LocalConfig(), case)
        for which, dispatcher in enumerate(dispatchers):
            here = [rank[number][which] for rank in found]
            together = experts_at_work.put_together([each for each, _, _ in here])
            assert torch.equal(torch.cat([chosen for _, chosen, _ in here]), ids)
            # Two products in a row and the sum over tokens; SwiGLU between them may double what is off.
            assert_same_gradients(together, expected, length=2 * (6 + 6) * 32, msg=f"{dispatcher}")
            if isinstance(dispatcher, HierarchicalConfig):
                for rank, (_, chosen, crossed) in enumerate(here):
                    assert_as_many_crossed(rank, ranks, dispatcher.node_ranks, chosen, crossed)


def assert_as_many_crossed(rank: int, ranks: int, node_ranks: int, ids: torch.Tensor, crossed: int) -> None:
    """Each token crosses once to every other node of its experts; there are no more of these than it may reach."""
    nodes = [{expert * ranks // EXPERTS // node_ranks for expert in token} for token in ids.tolist()]
    assert crossed == sum(len(reached - {rank // node_ranks}) for reached in nodes)
    assert crossed <= TOP_GROUPS * len(ids)


@settings(max_examples=2)
@given(cases(2))
def test_two_ranks_are_one(drawn):
    assert_ranks_are_one(2, TWO, drawn)


@settings(max_examples=2)
@given(cases(4))
def test_four_ranks_are_one(drawn):
    assert_ranks_are_one(4, FOUR, drawn)
