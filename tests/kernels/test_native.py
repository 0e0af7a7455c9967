"""The compiled passes give the bits of the plain ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import numbers, same_bits

from tangram.kernels.compiled import compiler
from tangram.kernels.native import native_passes, passes_for
from tangram.kernels.quantize import PLAIN, scales_of

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [torch.float32, torch.bfloat16]

needs_a_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler: the plain passes run")


def every_float(step: int) -> torch.Tensor:
    """Return finite floats of all sizes, every `step`-th bit pattern, [n, 64]."""
    bits = torch.arange(0, 0x7F800000, step, dtype=torch.int32)
    values = bits[: len(bits) // 64 * 64].view(torch.float32).view(-1, 64)
    return torch.cat([values, -values])


@needs_a_compiler
@pytest.mark.parametrize("format", FORMATS)
def test_every_size_of_number_has_the_plain_code(format):
    x = every_float(6007)
    one = torch.ones(len(x), 1)
    native, plain = (passes.encode(x, one, 64, format) for passes in (native_passes(), PLAIN))
    assert same_bits(native, plain)


@needs_a_compiler
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_middles_and_all_codes(format, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[codes.view(format).float().isfinite()]
    values = finite.view(format).float().sort().values
    middles = torch.cat([values, (values[1:] + values[:-1]) / 2])[None].to(dtype)
    one = torch.ones(1, 1)
    native, plain = (passes.encode(middles, one, 1024, format) for passes in (native_passes(), PLAIN))
    assert same_bits(native, plain)
    scale = torch.full((1, 1), 0.3)
    native, plain = (
        passes.decode(finite[None].view(format), scale, 1024, dtype) for passes in (native_passes(), PLAIN)
    )
    assert same_bits(native, plain)


@needs_a_compiler
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 40),
    tile=st.integers(1, 12),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_each_pass_is_the_plain_one(rows, columns, tile, format, dtype, seed):
    x = numbers(rows, columns, seed=seed, dtype=dtype, decades=6)
    native = native_passes()
    peaks = PLAIN.peaks(x, tile)
    assert same_bits(native.peaks(x, tile), peaks)
    scales = scales_of(peaks, False, format)
    codes = PLAIN.encode(x, scales, tile, format)
    assert same_bits(native.encode(x, scales, tile, format), codes)
    for wanted in (*DTYPES, torch.float64):
        assert same_bits(native.decode(codes, scales, tile, wanted), PLAIN.decode(codes, scales, tile, wanted))
    ends = torch.tensor([*range(tile, rows, tile), rows]) if rows else torch.empty(0, dtype=torch.int64)
    if rows:
        peaks = PLAIN.column_peaks(x, ends)
        assert same_bits(native.column_peaks(x, ends), peaks)
        scales = scales_of(peaks, True, format)
        rounded = PLAIN.round_columns(x, scales, ends, format)
        assert same_bits(native.round_columns(x, scales, ends, format), rounded)


@needs_a_compiler
def test_threads_share_the_rows():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        x, native = numbers(1001, 300, seed=0), native_passes()
        peaks = native.peaks(x, 128)
        ends = torch.tensor([*range(128, 1001, 128), 1001])
        columns = native.column_peaks(x, ends)
    finally:
        torch.set_num_threads(before)
    assert same_bits(peaks, PLAIN.peaks(x, 128))
    assert same_bits(columns, PLAIN.column_peaks(x, ends))


@needs_a_compiler
def test_what_is_not_a_number_is_not_made_one():
    x = torch.tensor([[1.0, float("nan"), 2.0, 3.0], [float("inf"), 1.0, 2.0, 3.0]])
    for passes in (native_passes(), PLAIN):
        scales = scales_of(passes.peaks(x, 4), False, torch.float8_e4m3fn)
        assert (
            passes.decode(passes.encode(x, scales, 4, torch.float8_e4m3fn), scales, 4, torch.float32)[0].isnan().all()
        )
        assert passes.encode(x, scales, 4, torch.float8_e4m3fn).float()[1, 0].isnan()


@needs_a_compiler
def test_what_they_have_no_code_for_runs_plain():
    x = torch.ones(1, 4)
    assert all(passes_for(x.to(dtype)) is native_passes() for dtype in (*DTYPES, *FORMATS))
    assert passes_for(x.double()) is PLAIN
    assert passes_for(x.to("meta")) is PLAIN
