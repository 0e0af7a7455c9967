"""Multi-head latent attention against the paper's equations (arXiv:2412.19437, 1 to 11)."""

from unittest import mock

import paper
import pytest
import torch
from attrs import evolve
from builders import EXACT_THETA, SMALL_MLA, assert_same_function, mla_shape, mla_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.context import Context
from tangram.core.layers import FullPrecision
from tangram.plugins.attention.mla import MLA, MLAConfig, YarnConfig
from tangram.testing import seeds
from tangram.testing.samples import context, documents, filled, normal

DIM = 6
LENGTH = 200
"""Terms of the longest chain: some ten reductions over 6 to 20, there and back."""

STRETCHED = YarnConfig(factor=4.0, original_length=2000, beta_fast=20.0, beta_slow=2.0, mscale=0.7)
"""Of width 8, pairs 0 and 1 stay, 2 is half slowed, 3 wholly: exact in the tables' float32."""


def built(config: MLAConfig, seed: int = 0) -> MLA:
    module = config.build(context(DIM))
    assert isinstance(module, MLA)
    return filled(module, seed)


def equations(module: MLA, x: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    weights, shape = mla_weights(module), mla_shape(module.config)
    rows = zip(x, positions, segments, strict=True)
    return torch.stack([paper.mla(h, weights, shape, where, which) for h, where, which in rows])


def compare(config: MLAConfig, positions: Tensor, segments: Tensor, seed: int = 0) -> None:
    module, x = built(config, seed), normal(*positions.shape, DIM, seed=seed + 1).requires_grad_()
    wrt = {"x": x, **dict(module.named_parameters())}
    actual = module(x, positions, segments)
    assert_same_function(actual, equations(module, x, positions, segments), wrt, length=LENGTH, seed=seed)


@given(
    widths=st.tuples(*[st.integers(1, 4)] * 3),
    pairs=st.integers(1, 4),
    q_rank=st.none() | st.integers(1, 6),
    kv_rank=st.integers(1, 6),
    cuts=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=2),
    seed=seeds(),
)
def test_values_and_gradients_are_the_papers(widths, pairs, q_rank, kv_rank, cuts, seed):
    n_heads, nope, value = widths
    config = MLAConfig(
        n_heads=n_heads,
        q_rank=q_rank,
        kv_rank=kv_rank,
        nope_dim=nope,
        rope_dim=2 * pairs,
        value_dim=value,
        theta=EXACT_THETA,
    )
    segments = [torch.tensor([0, *row]).cumsum(0).tolist() for row in cuts]
    compare(config, *documents(segments), seed=seed)


@pytest.mark.parametrize("q_rank", [None, 5])
@pytest.mark.parametrize("start", [0, 1900])
def test_values_and_gradients_with_yarn_are_the_papers(q_rank, start):
    positions, segments = documents([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    compare(evolve(SMALL_MLA, q_rank=q_rank, rope_dim=8, yarn=STRETCHED), positions + start, segments)


def test_the_papers_base_is_met_as_nearly_as_float32_frequencies_allow():
    config = evolve(SMALL_MLA, rope_dim=8, theta=10000.0)
    module, x = built(config), normal(1, 5, DIM, seed=1)
    positions, segments = documents([[0] * 5])
    error = module(x, positions + 100, segments) - equations(module, x, positions + 100, segments)
    # An angle is off by half an ulp of its frequency times the distance of two tokens, at most 4.
    largest = equations(module, x, positions, segments).abs().max()
    assert 0 < error.abs().max() < 4 * torch.finfo(torch.float32).eps / 2 * largest


def test_the_output_depends_on_distances_not_on_positions():
    module, x = built(SMALL_MLA), normal(1, 4, DIM, seed=1)
    positions, segments = documents([[0] * 4])
    here, far = (module(x, positions + start, segments) for start in (0, 4096))
    torch.testing.assert_close(here, far, rtol=0, atol=1e-11)
    assert not torch.allclose(here, module(x, positions.flip(1), segments), atol=1e-3)


def test_yarn_sharpens_every_score_even_where_no_frequency_moves():
    plain = evolve(SMALL_MLA, yarn=YarnConfig(factor=40.0, original_length=10**9, beta_slow=1e-3))
    positions, segments = documents([[0] * 4])
    x = normal(1, 4, DIM, seed=1)
    with_yarn, without = built(plain), built(SMALL_MLA)
    assert with_yarn.scale == pytest.approx(without.scale * 1.3688879454**2, rel=1e-10)
    assert not torch.allclose(with_yarn(x, positions, segments), without(x, positions, segments), atol=1e-4)


def test_an_odd_rotary_width_is_refused_by_name():
    with pytest.raises(ValueError, match="rope_dim must be even, got 5"):
        evolve(SMALL_MLA, rope_dim=5)


@pytest.mark.parametrize(
    ("q_rank", "expected"),
    [
        (1536, 187_107_328),
        (None, 7168 * 128 * 192 + 187_107_328 - 7168 * 1536 - 1536 - 1536 * 128 * 192),
    ],
)
def test_the_released_widths_give_the_published_parameter_count(q_rank, expected):
    config = MLAConfig(n_heads=128, q_rank=q_rank, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    with torch.device("meta"):
        module = config.build(context(7168, compute=torch.bfloat16))
    assert sum(parameter.numel() for parameter in module.parameters()) == expected
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_core_flops_count_scores_and_values():
    assert built(SMALL_MLA).core_flops(10) == 2 * 10 * 2 * ((3 + 4) + 5)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_absorbed_and_expanded_agree_to_a_millionth_in_float32(sizes, rows, seed):
    context = Context(dim=32, init_std=0.2, precision=FullPrecision(torch.float32))
    torch.manual_seed(seed)
    module = MLAConfig(n_heads=4, q_rank=16, kv_rank=16, nope_dim=16, rope_dim=8, value_dim=16).build(context)
    assert isinstance(module, MLA)
    x = torch.randn(rows, sum(sizes), 32)
    found = []
    for absorbs in (True, False):
        with mock.patch.object(MLA, "_absorbs", lambda *_, said=absorbs: said):
            cache, out, start = module.new_cache(rows, sum(sizes)), [], 0
            for piece in x.split(sizes, 1):
                positions = torch.arange(start, start + piece.shape[1]).expand(rows, -1)
                out.append(module(piece, positions, torch.zeros_like(positions), cache))
                start += piece.shape[1]
        found.append(torch.cat(out, 1))
    absorbed, expanded = found
    assert (absorbed - expanded).abs().max() <= 1e-6 * expanded.abs().max().clamp_min(1.0)
