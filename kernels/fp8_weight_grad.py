"""The gradient at a weight in FP8 (arXiv:2412.19437, section 3.3.2).

It sums over rows, so both operands are quantised in tiles of 128 x 1, along the rows:

    dW[n, k] = sum_m dy[m, n] x[m, k]        dW_e over the rows of expert e alone, whose tiles are its own
"""

import torch
from torch import Tensor

from tangram.kernels.fp8_grouped_matmul import fp8_grouped_weight_grad, pad_groups
from tangram.kernels.fp8_matmul import fp8_matmul
from tangram.kernels.grouped_matmul import grouped_matmul_weight_grad
from tangram.kernels.products import product
from tangram.kernels.quantize import PLAIN, TILES, Passes, Scaling, quantize_tiles, scales_of, shared_peaks

TILE = 128


def fp8_weight_grad(
    grad: Tensor,
    x: Tensor,
    counts: Tensor | None,
    dtype: torch.dtype,
    *,
    grad_scaling: Scaling = TILES,
    x_scaling: Scaling = TILES,
    passes: Passes = PLAIN,
) -> Tensor:
    """Return the gradient at the weight in `dtype`, [N, K], or [E, N, K] of experts.

    On a GPU both operands become codes; on a CPU they are rounded where they lie, which saves two transpositions.

    Args:
        grad: Gradient at the outputs [M, N].
        x: Inputs [M, K], in the dtype of `grad`.
        counts: Rows of each expert, int64 [E], by which the rows are sorted; None for one weight.
        dtype: Of the result.
        grad_scaling: How `grad` is quantised.
        x_scaling: How `x` is quantised.
        passes: How the passes over the matrices run on a CPU.
    """
    if not grad.is_cuda:
        ends = tile_ends(len(grad), counts)
        left, right = round_tiles(grad, ends, grad_scaling, passes), round_tiles(x, ends, x_scaling, passes)
        if counts is None:
            return product(left.t(), right).to(dtype)
        return grouped_matmul_weight_grad(left, right, counts).to(dtype)
    padded = counts
    if counts is not None:
        grad, padded = pad_groups(grad, counts)
        x, _ = pad_groups(x, counts)
    one, other = (
        quantize_tiles(each, TILE, scaling.power_of_two, True, format=scaling.format, shared=scaling.shared)
        for each, scaling in ((grad, grad_scaling), (x, x_scaling))
    )
    if padded is None:
        return fp8_matmul(one, other, dtype)
    return fp8_grouped_weight_grad(one, other, padded, dtype)


def tile_ends(rows: int, counts: Tensor | None) -> Tensor:
    """Return the row after the last of each tile: 128 rows, or what is left of an expert's; int64, on the CPU."""
    ends, start = [], 0
    for size in [rows] if counts is None else counts.tolist():
        ends += [*range(start + TILE, start + size, TILE), *([start + size] if size else [])]
        start += size
    return torch.tensor(ends, dtype=torch.int64)


def round_tiles(x: Tensor, ends: Tensor, scaling: Scaling, passes: Passes = PLAIN) -> Tensor:
    """Return x [M, K] as its codes in tiles of rows x 1 give it back, in its dtype.

    Args:
        x: The matrix.
        ends: The row after the last of each tile.
        scaling: Its scales are shared by a tile of rows x 1, by a tile of rows x 128 (block), by a column (row), or
            by all.
        passes: How the passes run.
    """
    if not x.numel():
        return x
    x = x.contiguous()
    # A row of the transposed matrix is a column here.
    peaks = shared_peaks(passes.column_peaks(x, ends).t(), scaling.shared, TILE).t()  # [tiles, K]
    scales = scales_of(peaks, scaling.power_of_two, scaling.format).contiguous()
    return passes.round_columns(x, scales, ends, scaling.format)
