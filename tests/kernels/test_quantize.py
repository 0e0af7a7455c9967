"""Blockwise E4M3 against what the format can hold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import guarded, numbers, on_both, same_bits, strided

from tangram import kernels
from tangram.kernels import dequantize, quantize_blocks, quantize_tiles

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


def test_scales_that_leave_the_tiles_open_are_refused():
    codes = torch.ones(1, 300).to(torch.float8_e4m3fn)
    assert torch.equal(dequantize(codes, torch.tensor([[1.0, 2.0, 3.0]]))[0, ::128], torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="pass `tile`"):
        dequantize(codes, torch.ones(1, 2))


@given(rows=st.integers(0, 9), columns=st.integers(0, 20), tile=st.integers(1, 9), seed=st.integers(0, 99))
def test_tiles_are_blocks_of_one_row(rows, columns, tile, seed):
    x = matrix(rows, columns, seed)
    codes, scales = quantize_tiles(x, tile)
    assert scales.shape == (rows, math.ceil(columns / tile))
    for i in range(rows):
        one, scale = quantize_blocks(x[i : i + 1], tile)
        assert same_bits(one[0], codes[i]) and same_bits(scale[0], scales[i])


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), tile=st.integers(1, 9), seed=st.integers(0, 99))
def test_transposed_is_of_the_transposed(rows, columns, tile, seed):
    x = matrix(rows, columns, seed)
    for one, other in zip(quantize_tiles(x, tile, transposed=True), quantize_tiles(x.t(), tile), strict=True):
        assert same_bits(one, other)


@given(seed=st.integers(0, 99), power=st.integers(-8, 8))
def test_codes_do_not_change_with_the_unit(seed, power):
    x = matrix(6, 11, seed).clamp_min(1e-2)  # so that no tile is below the smallest peak
    one, other = quantize_tiles(x, 4), quantize_tiles(x * 2.0**power, 4)
    if power > -6:
        assert same_bits(one.codes, other.codes)
        assert same_bits(one.scales * 2.0**power, other.scales)


def test_an_outlier_changes_its_own_tile_alone():
    x = matrix(4, 12, 0)
    far = x.clone()
    far[1, 5] = 1e6
    one, other = quantize_tiles(x, 4), quantize_tiles(far, 4)
    same = one.codes.view(torch.uint8) == other.codes.view(torch.uint8)
    assert same[[0, 2, 3]].all() and same[1, :4].all() and same[1, 8:].all()
    assert (one.scales != other.scales).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize(("shared", "first"), [("tile", 3.0), ("block", 5.0), ("row", 7.0), ("tensor", 9.0)])
def test_what_shares_a_scale_is_scaled_by_its_largest(shared, first):
    x = torch.ones(4, 4)
    x[0, 0], x[1, 1], x[0, 3], x[3, 3] = 3.0, 5.0, 7.0, 9.0
    codes, scales = quantize_tiles(x, 2, shared=shared)
    assert scales.shape == (4, 2)
    assert scales[0, 0] == torch.tensor(first) / 448
    assert (dequantize(codes, scales, (1, 2)) - x).abs().max() <= 2**-4 * 9


def test_e5m2_reaches_further_and_is_coarser():
    x = torch.tensor([[1.0, 1e-6]])
    fine, wide = (dequantize(*quantize_tiles(x, format=f)) for f in (torch.float8_e4m3fn, torch.float8_e5m2))
    assert fine[0, 1] == 0.0
    assert wide[0, 1] == pytest.approx(1e-6, rel=2**-3)


SHAPES = [(70, 300), (1, 128), (0, 128), (5, 0), (128, 1), (130, 257)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [guarded, strided])
@pytest.mark.parametrize("two", [False, True])
def test_the_kernel_gives_the_bits_of_the_twin(shape, dtype, held, two):
    x = held(numbers(*shape, seed=1, dtype=dtype, decades=6))
    for run in (
        lambda: quantize_tiles(x, power_of_two=two),
        lambda: quantize_tiles(x, power_of_two=two, transposed=True),
        lambda: quantize_blocks(x, power_of_two=two),
    ):
        twin, kernel = on_both(run)
        assert same_bits(twin.codes, kernel.codes) and same_bits(twin.scales, kernel.scales)


def test_the_kernel_takes_several_matrices_and_other_tiles():
    w = numbers(3, 9, 14, seed=3, decades=6)
    for one, other in zip(*on_both(lambda: quantize_blocks(guarded(w), 5)), strict=True):
        assert same_bits(one, other)
    for one, other in zip(*on_both(lambda: quantize_tiles(guarded(w[0]), 3, transposed=True)), strict=True):
        assert same_bits(one, other)
    each = [quantize_blocks(matrix, 5) for matrix in w]
    assert same_bits(torch.stack([scales for _, scales in each]), quantize_blocks(w, 5).scales)


def test_zeros_and_what_is_beyond_the_largest_code():
    x = torch.zeros(2, 256)
    x[1, 7], x[1, 200] = 3e38, -3e38
    for path in on_both(lambda: quantize_tiles(guarded(x))):
        assert not path.codes[0].float().any()
        assert path.codes.float().abs().max() == 448
        assert path.scales.isfinite().all()


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operations(path):
    x = numbers(70, 140, seed=1)
    with kernels.use(path):
        torch.library.opcheck(torch.ops.tangram.quantize_tiles, (x, 128, False, True))
        torch.library.opcheck(torch.ops.tangram.quantize_blocks, (x[None], 128, True))
