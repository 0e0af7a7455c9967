"""The window against a loop over tokens, and what every attention owes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tangram_sliding_window import SlidingWindowConfig, windowed_attention

from tangram.core.context import Context
from tangram.core.layers import FullPrecision
from tangram.testing import AttentionContract, assert_close


class TestSlidingWindow(AttentionContract):
    config = SlidingWindowConfig(n_heads=2, head_dim=4, window=3)


def by_loops(q, k, v, scale, segments, window):
    out = torch.zeros_like(v)
    batch, length, heads, _ = q.shape
    for b in range(batch):
        for i in range(length):
            seen = [j for j in range(max(0, i - window + 1), i + 1) if segments[b, j] == segments[b, i]]
            for h in range(heads):
                weights = [math.exp(scale * float(q[b, i, h] @ k[b, j, h])) for j in seen]
                for weight, j in zip(weights, seen, strict=True):
                    out[b, i, h] += weight / sum(weights) * v[b, j, h]
    return out


@given(
    length=st.integers(1, 9),
    window=st.integers(1, 11),
    cuts=st.lists(st.booleans(), min_size=18, max_size=18),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_loop_over_tokens(length: int, window: int, cuts: list[bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, length, 2, 4, generator=generator, dtype=torch.float64)
    segments = torch.tensor(cuts).view(2, 9)[:, :length].long().cumsum(1)
    expected = by_loops(q, k, v, 0.5, segments, window)
    assert_close(windowed_attention(q, k, v, 0.5, segments, window), expected, length=4 + length)


def test_a_token_beyond_the_window_changes_nothing_and_the_last_one_in_it_does() -> None:
    torch.manual_seed(0)
    ctx = Context(dim=8, precision=FullPrecision(torch.float64), init_std=0.5)
    module = SlidingWindowConfig(n_heads=2, head_dim=4, window=3).build(ctx)
    x, positions = torch.randn(1, 6, 8, dtype=torch.float64), torch.arange(6)[None]
    segments = torch.zeros_like(positions)
    before = module(x, positions, segments)
    x[:, 1] += 1.0
    changed = (module(x, positions, segments) - before).abs().amax((0, 2)) > 0
    assert changed.tolist() == [False, True, True, True, False, False]


def test_its_operations_stop_growing_at_the_window() -> None:
    module = SlidingWindowConfig(n_heads=2, head_dim=4, window=16).build(Context(dim=8))
    assert module.core_flops(8) == 4 * 8 * 8
    assert module.core_flops(4096) == module.core_flops(16) == 4 * 16 * 8


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be even, got 3"):
        SlidingWindowConfig(n_heads=1, head_dim=3, window=2)
