"""Grouped-query attention, with MHA and MQA as settings, against equations worked head by head."""

import paper
import pytest
import torch
from builders import EXACT_THETA, assert_same_function, gqa_weights
from hypothesis import given
from hypothesis import strategies as st

from tangram.plugins.attention.gqa import GQA, GQAConfig
from tangram.testing import assert_close, seeds
from tangram.testing.samples import context, documents, filled, normal

DIM = 6
LENGTH = 120
"""Terms of the longest chain: some eight reductions over 5 to 16, there and back."""


def built(config: GQAConfig, seed: int = 0) -> GQA:
    module = config.build(context(DIM))
    assert isinstance(module, GQA)
    return filled(module, seed)


@given(
    kv_heads=st.integers(1, 3),
    sharing=st.integers(1, 3),
    pairs=st.integers(1, 4),
    cuts=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=2),
    seed=seeds(),
)
def test_values_and_gradients_are_the_equations(kv_heads, sharing, pairs, cuts, seed):
    config = GQAConfig(n_heads=kv_heads * sharing, n_kv_heads=kv_heads, head_dim=2 * pairs, theta=EXACT_THETA)
    positions, segments = documents([torch.tensor([0, *row]).cumsum(0).tolist() for row in cuts])
    module, x = built(config, seed), normal(*positions.shape, DIM, seed=seed + 1).requires_grad_()
    shape = paper.GQAShape(n_heads=config.n_heads, n_kv_heads=kv_heads, head_dim=config.head_dim, theta=EXACT_THETA)
    rows = [paper.gqa(h, gqa_weights(module), shape, *w) for h, *w in zip(x, positions, segments, strict=True)]
    wrt = {"x": x, **dict(module.named_parameters())}
    assert_same_function(module(x, positions, segments), torch.stack(rows), wrt, length=LENGTH, seed=seed)


def test_no_kv_heads_means_one_for_each_query_head():
    left_out, said = (
        built(GQAConfig(n_heads=3, head_dim=4)),
        built(GQAConfig(n_heads=3, n_kv_heads=3, head_dim=4)),
    )
    positions, segments = documents([[0, 0, 0, 1]])
    x = normal(1, 4, DIM, seed=1)
    assert torch.equal(left_out(x, positions, segments), said(x, positions, segments))


def test_shared_heads_equal_heads_with_equal_weights():
    shared = built(GQAConfig(n_heads=4, n_kv_heads=2, head_dim=4))
    whole = built(GQAConfig(n_heads=4, head_dim=4))
    with torch.no_grad():
        whole.get_parameter("q.weight").copy_(shared.get_parameter("q.weight"))
        whole.get_parameter("out.weight").copy_(shared.get_parameter("out.weight"))
        heads = shared.get_parameter("kv.weight").unflatten(0, (2, 2, 4)).repeat_interleave(2, 1)
        whole.get_parameter("kv.weight").copy_(heads.flatten(0, 2))
    positions, segments = documents([[0, 0, 1, 1, 1]])
    x = normal(1, 5, DIM, seed=1)
    assert_close(shared(x, positions, segments), whole(x, positions, segments), length=LENGTH)


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim", "message"),
    [
        (4, 3, 4, "n_heads 4 must be a multiple of n_kv_heads 3"),
        (2, 4, 4, "n_heads 2 must be a multiple of n_kv_heads 4"),
        (4, 2, 3, "head_dim must be even, got 3"),
    ],
)
def test_widths_that_do_not_fit_are_named(n_heads, n_kv_heads, head_dim, message):
    with pytest.raises(ValueError, match=message):
        GQAConfig(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim)


def test_core_flops_count_every_query_head():
    assert built(GQAConfig(n_heads=4, n_kv_heads=1, head_dim=6)).core_flops(10) == 2 * 10 * 4 * (6 + 6)
