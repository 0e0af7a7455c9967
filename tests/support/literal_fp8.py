"""Products in FP8 by their formula in float64, and how far another way to compute them may be from it."""

import torch
from torch import Tensor
from twins import DEVICE

from tangram.kernels import Quantized
from tangram.testing import tolerance


def literal(a: Quantized, b: Quantized) -> Tensor:
    """The formula at the head of kernels/fp8_matmul.py: a product for each tile, times the scales of both."""
    sa, sb = a.scales.double(), b.scales.double()
    if len(sb) != len(b.codes):
        sb = sb.repeat_interleave(128, 0)[: len(b.codes)]
    total = torch.zeros(len(a.codes), len(b.codes), dtype=torch.float64, device=a.codes.device)
    for t in range(a.scales.shape[1]):
        left, right = (each.codes[:, 128 * t : 128 * (t + 1)].double() for each in (a, b))
        total += sa[:, t, None] * sb[None, :, t] * (left @ right.t())
    return total


def sizes(a: Quantized, b: Quantized) -> Tensor:
    """The sum of the magnitudes of an element's terms."""
    return literal(*(Quantized(each.codes.float().abs(), each.scales) for each in (a, b)))


def distance(one: Tensor, other: Tensor) -> float:
    """The Frobenius norm of the difference over that of the other, or the difference's where that is zero."""
    difference, size = (one.double() - other.double()).norm(), other.double().norm()
    return float(difference / size) if size else float(difference)


def room(dtype: torch.dtype, depth: int) -> float:
    """How far the kernel may be from the twin on the same codes.

    In float32 an operand, a tile's product and its scales are rounded, and K terms summed; a tensor core keeps about
    14 bits of a tile's sum. In bfloat16 either result is rounded, and on a CPU that multiplies bfloat16 both operands
    of the twin before: four independent roundings of 2^-9 at most.
    """
    if dtype is torch.bfloat16:
        return 2**-8
    return 1e-3 if DEVICE == "cuda" else tolerance(torch.float32, depth + 4)
