"""Twelve bits a number: what comes back, and in how many bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import numbers, same_bits

from tangram.kernels import pack_e5m6, unpack_e5m6


@given(rows=st.integers(0, 9), columns=st.integers(1, 20), tile=st.integers(1, 9), seed=st.integers(0, 99))
def test_what_comes_back_is_within_six_bits_of_mantissa(rows, columns, tile, seed):
    x = numbers(rows, columns, seed=seed, decades=6)
    packed, scales = pack_e5m6(x, tile)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (rows, (columns + 1) // 2 * 3))
    back = unpack_e5m6(packed, scales, columns, torch.float32, tile)
    each = scales.repeat_interleave(tile, 1)[:, :columns]
    # Half a unit of six bits of mantissa, or of the step 2^-20 below the normal numbers.
    assert bool(((back - x).abs() <= torch.maximum(2**-7 * x.abs(), 2**-21 * each)).all())
    assert not bool(scales.frexp()[0].sub(0.5).any())


@given(seed=st.integers(0, 99))
def test_packing_what_came_back_changes_nothing(seed):
    packed, scales = pack_e5m6(numbers(3, 10, seed=seed, decades=6), 4)
    back = unpack_e5m6(packed, scales, 10, torch.float32, 4)
    again = pack_e5m6(back, 4)
    assert same_bits(unpack_e5m6(*again, 10, torch.float32, 4), back)


def test_of_two_numbers_as_near_the_even_one_is_taken():
    at = torch.tensor([[2.0**15, 1 + 1 / 128, 1 + 3 / 128]])  # the first makes the scale one
    packed, scales = pack_e5m6(at, 3)
    assert scales.item() == 1.0
    assert unpack_e5m6(packed, scales, 3, torch.float32, 3)[0, 1:].tolist() == [1.0, 1 + 4 / 128]


def test_zeros_stay_and_what_is_not_a_number_too():
    x = torch.tensor([[0.0, -0.0, 1.0], [float("nan"), 1.0, 2.0]])
    back = unpack_e5m6(*pack_e5m6(x, 3), 3, torch.float32, 3)
    assert back[0].tolist() == [0.0, 0.0, 1.0]
    assert back[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_dtype_that_is_asked_for(dtype):
    x = numbers(2, 5, seed=0)
    assert unpack_e5m6(*pack_e5m6(x), 5, dtype).dtype is dtype
