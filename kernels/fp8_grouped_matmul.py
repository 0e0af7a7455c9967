"""One product per expert of matrices in FP8, over rows that are sorted by expert: `grouped_matmul` in FP8.

The gradient at the weights sums over rows, in tiles of 128 of them that must not mix two experts: `pad_groups` gives
every expert whole tiles.
"""

import torch
from torch import Tensor

from tangram.kernels.grouped_matmul import grouped_matmul_forward, grouped_matmul_weight_grad
from tangram.kernels.products import product_dtype
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
        ValueError: The counts or the scales do not fit.
    """
    wide = product_dtype(torch.empty(0, dtype=dtype, device=rows.codes.device))
    left = dequantize(*rows, (1, 128), dtype=wide, passes=passes)
    right = dequantize(*weight, (128, 128), dtype=wide, passes=passes)
    return grouped_matmul_forward(left, right, counts).to(dtype)


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
        ValueError: The counts or the scales do not fit.
    """
    wide = product_dtype(torch.empty(0, dtype=dtype, device=grad.codes.device))
    left, right = (dequantize(*each, (1, 128), dtype=wide, passes=passes).t() for each in (grad, rows))
    return grouped_matmul_weight_grad(left, right, counts).to(dtype)
