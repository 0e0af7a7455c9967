"""Weights in FP8 with a scale for each block (arXiv:2412.19437, section 3.3.2, and the released checkpoint).

A block of 128 x 128 weights w is kept as E4M3 codes q and one float32 scale s, its largest magnitude over 448:

    s = max(|w|, 1e-4) / 448        q = round(w / s)        w ~ q s

A ragged block at the right or lower edge counts as padded with zeros. E4M3 has three bits of mantissa and its
smallest normal number is 2^-6, so |w - q s| is at most 2^-4 |w|, or 2^-10 s where that is more.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 448.0
"""The largest E4M3 number."""

SMALLEST_PEAK = 1e-4
"""What the largest magnitude of a block is taken to be at least: a block of zeros has a scale too."""


def quantize_blocks(w: Tensor, block: int = 128, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales of a finite matrix, its blocks `block` rows by `block` columns.

    Args:
        w: The matrix [N, K].
        block: Side of a block.
        power_of_two: Round every scale up to a power of two.

    Returns:
        Codes float8_e4m3fn [N, K], and scales float32 [ceil(N / block), ceil(K / block)] that multiply them.
    """
    wide = w.float()
    rows, columns = wide.shape
    padded = F.pad(wide, (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))  # [rows, block, columns, block]
    scales = blocks.abs().amax((1, 3)).clamp_min(SMALLEST_PEAK) / LARGEST
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)  # mantissa in [1/2, 1): exactly 1/2 is a power of two already
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    codes = (wide / _spread(scales, rows, columns, (block, block))).clamp_(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scales


def dequantize(codes: Tensor, scales: Tensor, tile: tuple[int, int] = (128, 128)) -> Tensor:
    """Return the numbers that codes and scales stand for, float32 [N, K].

    Args:
        codes: [N, K].
        scales: One for each tile, [ceil(N / tile[0]), ceil(K / tile[1])].
        tile: Rows and columns that share a scale.

    Raises:
        ValueError: The scales do not fit the codes.
    """
    rows, columns = codes.shape
    wanted = (-(-rows // tile[0]), -(-columns // tile[1]))
    if scales.shape != wanted:
        raise ValueError(f"codes {list(codes.shape)} in tiles of {tile} have scales {wanted}, not {list(scales.shape)}")
    return codes.float().mul_(_spread(scales.float(), rows, columns, tile))


def _spread(scales: Tensor, rows: int, columns: int, tile: tuple[int, int]) -> Tensor:
    """Return every element's scale, [rows, columns]."""
    return scales.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns]
