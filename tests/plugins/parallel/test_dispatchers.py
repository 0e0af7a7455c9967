"""Dispatchers among ranks: they keep the laws of their slot, and n ranks are one rank with the whole micro-batch."""

import math

import experts_at_work
import pytest
import torch
from experts_at_work import EXPERTS, TOP_GROUPS, Case
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tangram.core.context import Context
from tangram.kernels import dequantize, quantize_tiles
from tangram.plugins.moe.local import LocalConfig
from tangram.plugins.parallel.all_to_all import AllToAllConfig
from tangram.plugins.parallel.hierarchical import HierarchicalConfig
from tangram.plugins.precision.fp8 import FP8Config
from tangram.plugins.precision.full import FullConfig
from tangram.testing import DispatcherContract, assert_same_gradients, run_ranks, seeds
from tangram.testing.samples import normal

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


@settings(max_examples=2, phases=[Phase.generate])
@given(cases(2))
def test_two_ranks_are_one(drawn):
    assert_ranks_are_one(2, TWO, drawn)


@settings(max_examples=2, phases=[Phase.generate])
@given(cases(4))
def test_four_ranks_are_one(drawn):
    assert_ranks_are_one(4, FOUR, drawn)


def test_an_expert_multiplies_the_same_matrix_on_any_number_of_ranks():
    """The same rows in the same order are in the same tiles, so that not a bit differs in FP8 either."""
    case, dispatchers = Case((70, 0, 33, 28), 0.05, 3), [AllToAllConfig(wire="fp8"), HierarchicalConfig(wire="fp8")]
    given = dispatchers, [FullConfig(compute="float32"), FP8Config(compute="float32")], case
    alone = experts_at_work.routed(0, 1, *given)
    for expected, found in zip(alone, zip(*run_ranks(experts_at_work.routed, 4, 4, *given), strict=True), strict=True):
        together = experts_at_work.put_together(found)
        differ = [name for name, value in expected.items() if not torch.equal(together[name], value)]
        assert not differ


@given(seed=seeds(), scale=st.sampled_from((1e-8, 1e-3, 1.0, 1e3)))
def test_an_fp8_wire_takes_nothing_from_what_is_multiplied_in_fp8(seed, scale):
    x = scale * normal(3, 200, seed=seed, dtype=torch.bfloat16)
    rows = AllToAllConfig(wire="fp8").build(Context(dim=200), 1).dispatch(x, torch.zeros(3, 1, dtype=torch.int64)).rows
    sent, arrived = (quantize_tiles(each, power_of_two=True) for each in (x, rows))
    values = [dequantize(*each, (1, 128)) for each in (sent, arrived)]
    assert torch.equal(*values)


class Ops(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [AllToAllConfig(wire="fp8"), HierarchicalConfig(wire="fp8")])
def test_nothing_waits_for_the_device_but_the_reading_of_the_counts(config):
    dispatcher = config.build(Context(dim=6), 4)
    ids = torch.tensor([[0, 3], [2, 1], [3, 2]])
    with Ops() as ops:
        rows = dispatcher.dispatch(torch.ones(3, 6), ids)
        dispatcher.combine(rows, torch.ones(3, 2))
    waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "bincount", "aten.index.Tensor")
    assert not [name for name in ops.names if any(wait in name for wait in waits)]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("wire", ["compute", "bf16", "fp8"])
def test_what_is_not_finite_arrives_so(wire, broken):
    x = torch.ones(2, 6)
    x[1, 3] = broken
    rows = AllToAllConfig(wire=wire).build(Context(dim=6), 1).dispatch(x, torch.zeros(2, 1, dtype=torch.int64)).rows
    assert rows[0].isfinite().all()
    assert not rows[1, 3].isfinite()


def test_nodes_that_do_not_fit_are_refused():
    def build(node_ranks: int, ranks: int, n_experts: int) -> None:
        parallel = experts_at_work.parallel_of(0, ranks)
        HierarchicalConfig(node_ranks=node_ranks).build(Context(dim=6, parallel=parallel), n_experts)

    for node_ranks, ranks in ((8, 64), (8, 4), (8, 1), (1, 6), (3, 6)):
        build(node_ranks, ranks, 2 * ranks)
    with pytest.raises(ValueError, match="6 expert ranks and nodes of 4 ranks do not fit: set node_ranks"):
        build(4, 6, 12)
    with pytest.raises(ValueError, match="6 experts cannot be shared out evenly among 4 expert ranks"):
        build(4, 4, 6)
