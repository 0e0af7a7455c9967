"""Products of matrices in FP8 with a scale for each tile (arXiv:2412.19437, section 3.3.2).

Over the tiles t of 128 columns that a product sums over, with sa and sb the scales of a and b,

    y[m, n] = sum_t sa[m, t] sb[n, t] sum_(k in t) a[m, k] b[n, k]

The inner sum is a tensor core's, which keeps about 14 bits; the outer one is float32, so that errors do not grow
with K. The forward and the gradient at the input multiply an activation in tiles of 1 x 128 by a weight in blocks of
128 x 128, the gradient at the weight two matrices in tiles of 1 x 128 of what they are transposed.
"""

import torch
from torch import Tensor

from tangram.kernels.backend import takes_kernel
from tangram.kernels.blocks import block_of
from tangram.kernels.jit import tl, triton
from tangram.kernels.products import product_dtype
from tangram.kernels.quantize import PLAIN, Passes, Quantized, dequantize


def fp8_matmul(a: Quantized, b: Quantized, dtype: torch.dtype, passes: Passes = PLAIN) -> Tensor:
    """Return a [M, K] times b [N, K] transposed, [M, N] in `dtype`.

    On a CPU both are decoded to the dtype in which it multiplies `dtype`: where that is bfloat16, a scale that is no
    power of two costs a rounding of 2^-9, which the 2^-4 of E4M3 hides. The Triton kernel sums in float32 whatever
    `dtype` is.

    Args:
        a: In tiles of 1 x 128: scales [M, ceil(K / 128)].
        b: In tiles of 1 x 128, or in blocks of 128 x 128: scales [ceil(N / 128), ceil(K / 128)].
        dtype: Of the result.
        passes: How codes are decoded.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(a, b)
    if takes_kernel(a.codes):
        return torch.ops.tangram.fp8_matmul(*a, *b, dtype)
    return _decoded_product(a, b, dtype, passes)


def _decoded_product(a: Quantized, b: Quantized, dtype: torch.dtype, passes: Passes) -> Tensor:
    wide = decoded_dtype(dtype, a.codes)
    left = dequantize(*a, (1, 128), dtype=wide, passes=passes)
    right = dequantize(*b, (128 if _in_blocks(b) else 1, 128), dtype=wide, passes=passes)
    return (left @ right.t()).to(dtype)


def _in_blocks(b: Quantized) -> bool:
    return len(b.scales) != len(b.codes)


def decoded_dtype(dtype: torch.dtype, like: Tensor) -> torch.dtype:
    """Return to which dtype codes are decoded whose product is wanted in `dtype`."""
    return product_dtype(torch.empty(0, dtype=dtype, device=like.device))


def _check(a: Quantized, b: Quantized) -> None:
    if a.codes.dim() != 2 or b.codes.dim() != 2 or a.codes.shape[1] != b.codes.shape[1]:
        raise ValueError(f"a product of {list(a.codes.shape)} and {list(b.codes.shape)}: both are [rows, K] of one K")
    across = -(-a.codes.shape[1] // 128)
    if a.scales.shape != (len(a.codes), across):
        raise ValueError(f"the left matrix has scales {list(a.scales.shape)}, not {[len(a.codes), across]}")
    rows = len(b.codes), -(-len(b.codes) // 128)
    if b.scales.shape[1] != across or len(b.scales) not in rows:
        raise ValueError(
            f"the right matrix has scales {list(b.scales.shape)}, not {[rows[0], across]} or {[rows[1], across]}"
        )


@triton.jit
def sum_of_tiles(
    a,
    a_scales,
    b,
    b_scales,
    first_row,
    end_row,
    first_column,
    end_column,
    depth,
    a_stride,
    a_step,
    a_scales_stride,
    a_scales_step,
    b_stride,
    b_step,
    b_scales_stride,
    b_scales_step,
    square: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return a block of the product of a and b transposed, float32 [ROWS, COLUMNS], zero beyond the ends.

    A step of the loop is a tile: its product begins anew and joins the total in float32, times its scales. Where b is
    in squares of 128 x 128 the block of the product lies in one of them, with one scale.
    """
    inner = tl.arange(0, 128)
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    column = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
    row_inside, column_inside = row < end_row, column < end_column
    a_at = a + row[:, None] * a_stride + inner[None, :] * a_step
    b_at = b + inner[:, None] * b_step + column[None, :] * b_stride
    a_scale_at = a_scales + row * a_scales_stride
    if square:
        b_scale_at = b_scales + first_column // 128 * b_scales_stride
    else:
        b_scale_at = b_scales + column * b_scales_stride
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(0, tl.cdiv(depth, 128)):
        inside = inner < depth - tile * 128
        left = tl.load(a_at, mask=row_inside[:, None] & inside[None, :], other=0.0)
        right = tl.load(b_at, mask=inside[:, None] & column_inside[None, :], other=0.0)
        a_scale = tl.load(a_scale_at, mask=row_inside, other=0.0).to(tl.float32)
        product = tl.dot(left, right)
        if square:
            total += product * (a_scale * tl.load(b_scale_at).to(tl.float32))[:, None]
        else:
            b_scale = tl.load(b_scale_at, mask=column_inside, other=0.0).to(tl.float32)
            total += product * a_scale[:, None] * b_scale[None, :]
        a_at += 128 * a_step
        b_at += 128 * b_step
        a_scale_at += a_scales_step
        b_scale_at += b_scales_step
    return total


@triton.jit
def _product(
    a,
    a_scales,
    b,
    b_scales,
    out,
    rows,
    columns,
    depth,
    a_stride,
    a_step,
    a_scales_stride,
    a_scales_step,
    b_stride,
    b_step,
    b_scales_stride,
    b_scales_step,
    square: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
):
    down, across = tl.cdiv(rows, SIDE), tl.cdiv(columns, SIDE)
    block_row, block_column = block_of(tl.program_id(0), down, across, GROUP)
    first_row, first_column = block_row * SIDE, block_column * SIDE
    total = sum_of_tiles(
        a,
        a_scales,
        b,
        b_scales,
        first_row,
        rows,
        first_column,
        columns,
        depth,
        a_stride,
        a_step,
        a_scales_stride,
        a_scales_step,
        b_stride,
        b_step,
        b_scales_stride,
        b_scales_step,
        square,
        SIDE,
        SIDE,
    )
    row = (first_row + tl.arange(0, SIDE)).to(tl.int64)
    column = first_column + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], total.to(out.dtype.element_ty), mask=inside)


def _launch(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    rows, depth = a.codes.shape
    columns = len(b.codes)
    out = a.codes.new_empty(rows, columns, dtype=dtype)
    if out.numel():
        _product[(-(-rows // 128) * -(-columns // 128),)](
            *a,
            *b,
            out,
            rows,
            columns,
            depth,
            *a.codes.stride(),
            *a.scales.stride(),
            *b.codes.stride(),
            *b.scales.stride(),
            square=_in_blocks(b),
            SIDE=128,
            GROUP=8,
            num_warps=8,
            num_stages=3,
        )
    return out


@torch.library.custom_op("tangram::fp8_matmul", mutates_args=())
def _fp8_matmul(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    left, right = Quantized(a, a_scales), Quantized(b, b_scales)
    return _launch(left, right, dtype) if takes_kernel(a) else _decoded_product(left, right, dtype, PLAIN)


@_fp8_matmul.register_fake
def _(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(len(a), len(b), dtype=dtype)
