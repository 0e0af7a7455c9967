"""Twelve bits a number: a sign, five bits of exponent and six of mantissa, with a scale for each tile.

DeepSeek-V3 keeps the input of the attention's output projection so, because the backward of the attention itself is
sensitive to it (arXiv:2412.19437, section 3.3.3). Two numbers take three bytes. Scales are powers of two, so that a
number that is quantised again, in tiles across, is rounded as if it had no scale.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tangram.kernels.quantize import PLAIN, Passes, powers_of_two

LARGEST = (2 - 2.0**-6) * 2.0**15

_SHIFT = 23 - 6
_OFFSET = (127 - 15) << 6
_MAGIC = 2.0**3  # its unit in the last place is the step 2^-20 of the numbers below the normal ones


def pack(x: Tensor, tile: int = 128, passes: Passes = PLAIN) -> tuple[Tensor, Tensor]:
    """Return a finite matrix in E5M6.

    Args:
        x: The matrix [M, K].
        tile: Columns that share a scale.
        passes: How the largest magnitudes are found.

    Returns:
        Bytes [M, 3 * ceil(K / 2)], and scales float32 [M, ceil(K / tile)].
    """
    scales = powers_of_two(passes.peaks(x.contiguous(), tile).clamp_min(1e-30) / LARGEST)
    values = x.float() / scales.repeat_interleave(tile, 1)[:, : x.shape[1]]
    sizes = values.abs()
    bits = sizes.view(torch.int32)
    normal = ((bits + (1 << (_SHIFT - 1)) - 1 + ((bits >> _SHIFT) & 1)) >> _SHIFT) - _OFFSET
    small = (sizes + _MAGIC).view(torch.int32) - torch.tensor(_MAGIC).view(torch.int32)
    codes = torch.where(sizes < 2.0**-14, small, normal)
    codes = torch.where(sizes.isnan(), 0x7FF, codes) | (values.signbit().int() << 11)
    pairs = F.pad(codes, (0, x.shape[1] % 2)).unflatten(1, (-1, 2))
    whole = pairs[..., 0] | (pairs[..., 1] << 12)
    parts = [whole & 0xFF, (whole >> 8) & 0xFF, whole >> 16]
    return torch.stack(parts, -1).to(torch.uint8).flatten(1), scales


def unpack(packed: Tensor, scales: Tensor, columns: int, dtype: torch.dtype, tile: int = 128) -> Tensor:
    """Return the numbers [M, K] that `pack` was given, rounded to E5M6 and then to `dtype`."""
    parts = packed.int().unflatten(1, (-1, 3))
    whole = parts[..., 0] | (parts[..., 1] << 8) | (parts[..., 2] << 16)
    codes = torch.stack([whole & 0xFFF, whole >> 12], -1).flatten(1)[:, :columns]
    sizes = codes & 0x7FF
    normal = ((sizes + _OFFSET) << _SHIFT).view(torch.float32)
    values = torch.where(sizes < 1 << 6, sizes * 2.0**-20, normal).masked_fill(sizes == 0x7FF, torch.nan)
    values = torch.where(codes >> 11 == 1, -values, values)
    return (values * scales.repeat_interleave(tile, 1)[:, :columns]).to(dtype)
