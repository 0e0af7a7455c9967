"""Products of matrices in FP8 with a scale for each tile (arXiv:2412.19437, section 3.3.2).

Over the tiles t of 128 columns that a product sums over, with sa and sb the scales of a and b,

    y[m, n] = sum_t sa[m, t] sb[n, t] sum_(k in t) a[m, k] b[n, k]

The inner sum is a tensor core's, which keeps about 14 bits; the outer one is float32, so that errors do not grow
with K. The forward and the gradient at the input multiply an activation in tiles of 1 x 128 by a weight in blocks of
128 x 128, the gradient at the weight two matrices in tiles of 1 x 128 of what they are transposed.
"""

import torch
from torch import Tensor

from tangram.kernels.products import product_dtype
from tangram.kernels.quantize import PLAIN, Passes, Quantized, dequantize


def fp8_matmul(a: Quantized, b: Quantized, dtype: torch.dtype, passes: Passes = PLAIN) -> Tensor:
    """Return a [M, K] times b [N, K] transposed, [M, N] in `dtype`.

    On a CPU both are decoded to the dtype in which it multiplies `dtype`: where that is bfloat16, a scale that is no
    power of two costs a rounding of 2^-9, which the 2^-4 of E4M3 hides.

    Args:
        a: In tiles of 1 x 128: scales [M, ceil(K / 128)].
        b: In tiles of 1 x 128, or in blocks of 128 x 128: scales [ceil(N / 128), ceil(K / 128)].
        dtype: Of the result.
        passes: How codes are decoded.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check(a, b)
    wide = _product_dtype(dtype, a.codes)
    left = dequantize(*a, (1, 128), dtype=wide, passes=passes)
    right = dequantize(*b, _tile(b), dtype=wide, passes=passes)
    return (left @ right.t()).to(dtype)


def _tile(b: Quantized) -> tuple[int, int]:
    return (1 if len(b.scales) == len(b.codes) else 128), 128


def _product_dtype(dtype: torch.dtype, like: Tensor) -> torch.dtype:
    """Return in which dtype operands are multiplied whose product is wanted in `dtype`."""
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
