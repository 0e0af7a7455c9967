"""Short sums lose more the longer they are; sums that are promoted do not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import numbers

from tangram.kernels import fp8_matmul, limited_product, quantize_blocks, quantize_tiles


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((got.double() - exact).abs() / exact).max())


@given(terms=st.integers(1, 32), seed=st.integers(0, 99))
def test_what_is_added_at_once_is_cut_once(terms, seed):
    a, b = numbers(3, terms, seed=seed), numbers(4, terms, seed=seed + 1)
    exact = a.double() @ b.double().t()
    # Cutting 14 bits takes less than 2^-13 of the sum; the float32 product itself is off by far less.
    assert bool(((limited_product(a, b) - exact).abs() <= 2**-13 * exact.abs() + 1e-6).all())


def test_the_error_of_short_sums_grows_with_their_length_and_promotion_stops_it():
    lost, kept = [], []
    for terms in (1024, 4096):
        a, b = numbers(8, terms, seed=0).abs(), numbers(8, terms, seed=1).abs()
        qa, qb = quantize_tiles(a), quantize_blocks(b)
        exact = fp8_matmul(qa, qb, torch.float64)
        codes = qa.codes.float(), qb.codes.float()
        lost.append(error(limited_product(*codes), codes[0].double() @ codes[1].double().t()))
        kept.append(error(fp8_matmul(qa, qb, torch.float32), exact))
    assert lost[1] > 2 * lost[0]
    assert lost[1] > 100 * kept[1]


@pytest.mark.parametrize("bits", [8, 14, 20])
def test_more_bits_lose_less(bits):
    a, b = numbers(4, 512, seed=0).abs(), numbers(4, 512, seed=1).abs()
    exact = a.double() @ b.double().t()
    assert error(limited_product(a, b, bits), exact) < 512 / 32 * 2.0 ** (1 - bits)
