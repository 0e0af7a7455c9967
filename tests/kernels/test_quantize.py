"""Blockwise E4M3 against what the format can hold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.kernels import dequantize, quantize_blocks

EPS = torch.finfo(torch.float32).eps


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Return numbers whose size varies from one to the next, by six orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * 10 ** (6 * torch.rand(rows, columns, generator=g) - 4)


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.integers(1, 9),
    two=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_comes_back_is_within_the_rounding_of_e4m3(rows, columns, block, two, seed):
    w = matrix(rows, columns, seed)
    codes, scales = quantize_blocks(w, block, two)
    back = dequantize(codes, scales, (block, block))
    assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, w.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (math.ceil(rows / block), math.ceil(columns / block)))
    for i in range(rows):
        for j in range(columns):
            at = i // block * block, j // block * block
            largest = float(w[at[0] : at[0] + block, at[1] : at[1] + block].abs().max())
            scale = float(scales[i // block, j // block])
            least = max(largest, 1e-4) / 448
            # Half a unit of three bits of mantissa, or of the subnormal step 2^-9; and the float32 of w / s and of q s.
            bound = max(2**-4 * abs(float(w[i, j])), 2**-10 * scale) * (1 + 4 * EPS)
            assert abs(float(back[i, j]) - float(w[i, j])) <= bound
            if two:
                assert math.frexp(scale)[0] == 0.5
                assert least * (1 - EPS) <= scale < 2 * least * (1 + EPS)
            else:
                assert abs(scale - least) <= EPS * least


def test_the_largest_of_a_block_is_the_largest_code_and_comes_back():
    w = torch.zeros(4, 6)
    w[3, 5], w[0, 0] = -7.0, 1e-3
    codes, scales = quantize_blocks(w, 4)
    assert float(codes[3, 5]) == -448.0
    assert scales.tolist() == [[pytest.approx(1e-3 / 448), pytest.approx(7.0 / 448)]]
    assert dequantize(codes, scales, (4, 4))[3, 5] == pytest.approx(-7.0, rel=2 * EPS)


def test_a_code_is_the_nearest_number_and_of_two_the_even_one():
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    middles = ((every[1:] + every[:-1]) / 2).repeat_interleave(2).view(-1, 2)
    middles[:, 1] = 448.0  # the scale is one
    codes = quantize_blocks(middles, 1 << 10)[0].view(torch.uint8)[:, 0]
    assert codes.tolist() == [k + k % 2 for k in range(0x7E)]


def test_a_block_of_zeros_stays_zero_and_finite():
    codes, scales = quantize_blocks(torch.zeros(3, 3), 2)
    assert torch.equal(scales, torch.full((2, 2), 1e-4 / 448))
    assert torch.equal(dequantize(codes, scales, (2, 2)), torch.zeros(3, 3))


def test_powers_of_two_are_left_alone():
    exact = torch.full((1, 1), 448 * 2.0**-9)
    assert quantize_blocks(exact, 1, power_of_two=True)[1].item() == 2.0**-9
    assert quantize_blocks(exact * 1.001, 1, power_of_two=True)[1].item() == 2.0**-8


def test_tiles_need_not_be_square():
    codes = torch.ones(3, 5).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    wanted = torch.tensor([[1.0, 1, 2, 2, 3], [4, 4, 5, 5, 6], [7, 7, 8, 8, 9]])
    assert torch.equal(dequantize(codes, scales, (1, 2)), wanted)


def test_bfloat16_is_quantized_from_its_own_numbers():
    w = matrix(9, 7, 3).bfloat16()
    for one, other in zip(quantize_blocks(w, 4), quantize_blocks(w.float(), 4), strict=True):
        assert torch.equal(one.float(), other.float())


def test_scales_that_do_not_fit_are_refused():
    codes, scales = quantize_blocks(torch.ones(5, 5), 4)
    with pytest.raises(ValueError, match="scales"):
        dequantize(codes, scales[:1], (4, 4))
