"""One product per expert of matrices in FP8, over rows that are sorted by expert: `grouped_matmul` in FP8.

With the sums of `fp8_matmul`, tiles of 128 with a scale each, and for each expert its rows R_e, its matrix W_e and
the gradient G_e at its outputs,

    rows           Y_e = R_e W_e^T        also the gradient at the rows, of G_e and W_e transposed
    weight grad    dW_e = G_e^T R_e       zero for an expert without rows

The gradient at the weights sums over rows, in tiles of 128 of them that must not mix two experts: `pad_groups` gives
every expert whole tiles.
"""

import torch
from torch import Tensor

from tangram.kernels.backend import takes_kernel
from tangram.kernels.blocks import block_of, expert_of, most_blocks, rows_of
from tangram.kernels.fp8_matmul import decoded_dtype, sum_of_tiles
from tangram.kernels.grouped_matmul import check_counts, columns_product, grouped_matmul_forward
from tangram.kernels.jit import tl, triton
from tangram.kernels.quantize import PLAIN, Passes, Quantized, dequantize


def pad_groups(rows: Tensor, counts: Tensor, multiple: int = 128) -> tuple[Tensor, Tensor]:
    """Return the rows with every expert's padded by zeros to a multiple, and the counts with the padding.

    Args:
        rows: Rows sorted by expert, [M, K].
        counts: Rows of each expert, summing to M, int64 [E].
        multiple: Of what an expert then has.

    Returns:
        Rows [M', K], and counts int64 [E]. M' is their sum on a CPU; on a GPU, where to read it would be to wait, the
        most that it can be, and the rows beyond the sum are zeros too.
    """
    padded = (counts + multiple - 1) // multiple * multiple
    if rows.is_cuda:
        total = len(rows) // multiple * multiple + len(counts) * multiple
    else:
        total = int(padded.sum())
    moved = (padded - counts).cumsum(0) - (padded - counts)  # by how far each expert's rows move
    target = torch.arange(len(rows), device=rows.device) + moved.repeat_interleave(counts, output_size=len(rows))
    return rows.new_zeros(total, rows.shape[1]).index_copy_(0, target, rows), padded


def fp8_grouped_matmul(
    rows: Quantized, weight: Quantized, counts: Tensor, dtype: torch.dtype, passes: Passes = PLAIN
) -> Tensor:
    """Return every expert's rows times its transposed matrix, [M, N] in `dtype`.

    Args:
        rows: Rows [M, K] sorted by expert in tiles of 1 x 128.
        weight: One matrix for each expert, [E, N, K], in blocks of 128 x 128: scales [E, ceil(N/128), ceil(K/128)].
        counts: Rows of each expert, summing to M, int64 [E].
        dtype: Of the result.
        passes: How codes are decoded.

    Raises:
        ValueError: The counts, the shapes or the scales do not fit.
    """
    _check(rows, weight, counts)
    if takes_kernel(rows.codes):
        return torch.ops.tangram.fp8_grouped_matmul(*rows, *weight, counts, dtype)
    return _rows_product(rows, weight, counts, dtype, passes)


def fp8_grouped_weight_grad(
    grad: Quantized, rows: Quantized, counts: Tensor, dtype: torch.dtype, passes: Passes = PLAIN
) -> Tensor:
    """Return the gradient at the weights [E, N, K] in `dtype`, zero for an expert without rows.

    Args:
        grad: The gradient at the outputs, transposed, [N, M'], in tiles of 1 x 128.
        rows: The rows, transposed, [K, M'], in tiles of 1 x 128.
        counts: Columns of each expert, whole tiles: what `pad_groups` returned, int64 [E].
        dtype: Of the result.
        passes: How codes are decoded.

    Raises:
        ValueError: The counts, the shapes or the scales do not fit.
    """
    _check_columns(grad, rows, counts)
    if takes_kernel(grad.codes):
        return torch.ops.tangram.fp8_grouped_weight_grad(*grad, *rows, counts, dtype)
    return _weight_product(grad, rows, counts, dtype, passes)


def _rows_product(rows: Quantized, weight: Quantized, counts: Tensor, dtype: torch.dtype, passes: Passes) -> Tensor:
    wide = decoded_dtype(dtype, rows.codes)
    left = dequantize(*rows, (1, 128), dtype=wide, passes=passes)
    right = dequantize(*weight, (128, 128), dtype=wide, passes=passes)
    return grouped_matmul_forward(left, right, counts).to(dtype)


def _weight_product(grad: Quantized, rows: Quantized, counts: Tensor, dtype: torch.dtype, passes: Passes) -> Tensor:
    wide = decoded_dtype(dtype, grad.codes)
    left, right = (dequantize(*each, (1, 128), dtype=wide, passes=passes) for each in (grad, rows))
    return columns_product(left, right.t(), counts).to(dtype)


def _check(rows: Quantized, weight: Quantized, counts: Tensor) -> None:
    (length, depth), matrices = rows.codes.shape, weight.codes.shape
    if len(matrices) != 3 or matrices[2] != depth:
        raise ValueError(f"rows {[length, depth]} and a weight {list(matrices)}: it is [experts, outputs, {depth}]")
    if len(counts) != len(weight.codes):
        raise ValueError(f"counts are for {len(counts)} experts, but the weight has {len(weight.codes)}")
    check_counts(counts, length)
    across = -(-depth // 128)
    _check_scales("rows", rows, (length, across))
    _check_scales("weight", weight, (matrices[0], -(-matrices[1] // 128), across))


def _check_columns(grad: Quantized, rows: Quantized, counts: Tensor) -> None:
    length = grad.codes.shape[1]
    if rows.codes.shape[1] != length:
        raise ValueError(f"a gradient at {length} rows, but there are {rows.codes.shape[1]}")
    check_counts(counts, length)
    if counts.device.type == "cpu" and bool((counts % 128).any()):
        raise ValueError(f"experts of {counts.tolist()} rows do not have whole tiles of 128: pad_groups gives them")
    for name, each in (("gradient", grad), ("rows", rows)):
        _check_scales(name, each, (len(each.codes), -(-length // 128)))


def _check_scales(name: str, given: Quantized, wanted: tuple[int, ...]) -> None:
    if given.scales.shape != wanted:
        raise ValueError(f"the scales of the {name} are {list(given.scales.shape)}, not {list(wanted)}")


@triton.jit
def _rows_kernel(
    rows,
    rows_scales,
    weight,
    weight_scales,
    out,
    counts,
    experts,
    down,
    outputs,
    inputs,
    rows_stride,
    rows_step,
    rows_scales_stride,
    rows_scales_step,
    weight_expert,
    weight_stride,
    weight_step,
    weight_scales_expert,
    weight_scales_stride,
    weight_scales_step,
    EXPERTS: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One program computes SIDE rows of one expert, in as many columns.
    block_row, block_column = block_of(tl.program_id(0), down, tl.cdiv(outputs, SIDE), GROUP)
    expert, first, end = expert_of(block_row, counts, experts, SIDE, EXPERTS)
    if expert >= experts:
        return
    total = sum_of_tiles(
        rows,
        rows_scales,
        weight + expert.to(tl.int64) * weight_expert,
        weight_scales + expert.to(tl.int64) * weight_scales_expert,
        first,
        end,
        block_column * SIDE,
        outputs,
        inputs,
        rows_stride,
        rows_step,
        rows_scales_stride,
        rows_scales_step,
        weight_stride,
        weight_step,
        weight_scales_stride,
        weight_scales_step,
        True,
        SIDE,
        SIDE,
    )
    row = (first + tl.arange(0, SIDE)).to(tl.int64)
    column = block_column * SIDE + tl.arange(0, SIDE)
    inside = (row < end)[:, None] & (column < outputs)[None, :]
    tl.store(out + row[:, None] * outputs + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_kernel(
    grad,
    grad_scales,
    rows,
    rows_scales,
    out,
    counts,
    experts,
    outputs,
    inputs,
    grad_stride,
    grad_step,
    grad_scales_stride,
    grad_scales_step,
    rows_stride,
    rows_step,
    rows_scales_stride,
    rows_scales_step,
    EXPERTS: tl.constexpr,
    SIDE: tl.constexpr,
    GROUP: tl.constexpr,
):
    # One program computes a block of one expert's gradient, summing over the expert's tiles. Counting in tiles tells
    # the compiler that the columns of an expert begin at a multiple of 128, so that it loads 16 bytes at a time.
    expert = tl.program_id(1)
    start, size = rows_of(expert, counts, experts, EXPERTS)
    down, across = tl.cdiv(outputs, SIDE), tl.cdiv(inputs, SIDE)
    block_row, block_column = block_of(tl.program_id(0), down, across, GROUP)
    tile, tiles = (start // 128).to(tl.int64), size // 128
    total = sum_of_tiles(
        grad + tile * 128 * grad_step,
        grad_scales + tile * grad_scales_step,
        rows + tile * 128 * rows_step,
        rows_scales + tile * rows_scales_step,
        block_row * SIDE,
        outputs,
        block_column * SIDE,
        inputs,
        tiles * 128,
        grad_stride,
        grad_step,
        grad_scales_stride,
        grad_scales_step,
        rows_stride,
        rows_step,
        rows_scales_stride,
        rows_scales_step,
        False,
        SIDE,
        SIDE,
    )
    row = block_row * SIDE + tl.arange(0, SIDE)
    column = block_column * SIDE + tl.arange(0, SIDE)
    at = out + expert.to(tl.int64) * outputs * inputs + row[:, None].to(tl.int64) * inputs + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < outputs)[:, None] & (column < inputs)[None, :])


def _launch_rows(rows: Quantized, weight: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
    experts, outputs, inputs = weight.codes.shape
    down = most_blocks(len(rows.codes), experts, 128)
    out = rows.codes.new_empty(len(rows.codes), outputs, dtype=dtype)
    if out.numel():
        _rows_kernel[(down * -(-outputs // 128),)](
            *rows,
            *weight,
            out,
            counts.contiguous(),
            experts,
            down,
            outputs,
            inputs,
            *rows.codes.stride(),
            *rows.scales.stride(),
            *weight.codes.stride(),
            *weight.scales.stride(),
            EXPERTS=triton.next_power_of_2(experts),
            SIDE=128,
            GROUP=8,
            num_warps=8,
            num_stages=3,
        )
    return out


def _launch_weight(grad: Quantized, rows: Quantized, counts: Tensor, dtype: torch.dtype) -> Tensor:
    experts, outputs, inputs = len(counts), len(grad.codes), len(rows.codes)
    out = grad.codes.new_empty(experts, outputs, inputs, dtype=dtype)
    if out.numel():
        _weight_kernel[(-(-outputs // 128) * -(-inputs // 128), experts)](
            *grad,
            *rows,
            out,
            counts.contiguous(),
            experts,
            outputs,
            inputs,
            *grad.codes.stride(),
            *grad.scales.stride(),
            *rows.codes.stride(),
            *rows.scales.stride(),
            EXPERTS=triton.next_power_of_2(experts),
            SIDE=128,
            GROUP=8,
            num_warps=8,
            num_stages=3,
        )
    return out


@torch.library.custom_op("tangram::fp8_grouped_matmul", mutates_args=())
def _fp8_grouped_matmul(
    rows: Tensor, rows_scales: Tensor, weight: Tensor, weight_scales: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    left, right = Quantized(rows, rows_scales), Quantized(weight, weight_scales)
    if takes_kernel(rows):
        return _launch_rows(left, right, counts, dtype)
    return _rows_product(left, right, counts, dtype, PLAIN)


@_fp8_grouped_matmul.register_fake
def _(
    rows: Tensor, rows_scales: Tensor, weight: Tensor, weight_scales: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    return rows.new_empty(len(rows), weight.shape[1], dtype=dtype)


@torch.library.custom_op("tangram::fp8_grouped_weight_grad", mutates_args=())
def _fp8_grouped_weight_grad(
    grad: Tensor, grad_scales: Tensor, rows: Tensor, rows_scales: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    left, right = Quantized(grad, grad_scales), Quantized(rows, rows_scales)
    if takes_kernel(grad):
        return _launch_weight(left, right, counts, dtype)
    return _weight_product(left, right, counts, dtype, PLAIN)


@_fp8_grouped_weight_grad.register_fake
def _(
    grad: Tensor, grad_scales: Tensor, rows: Tensor, rows_scales: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(len(counts), len(grad), len(rows), dtype=dtype)
