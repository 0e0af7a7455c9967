"""A product whose sums are as short as a tensor core's (arXiv:2412.19437, section 3.3.2).

A Hopper tensor core brings 32 products to the exponent of the largest of them and of the sum so far, cuts what lies
below 13 bits of fraction, and adds. Without promotion to float32 the error grows with the length of the sum. This is
that adder in plain torch, to see what promotion is good for: many times slower than a product.
"""

import torch
from torch import Tensor

_AT_ONCE = 32
"""Products that are added in one instruction."""


def limited_product(a: Tensor, b: Tensor, bits: int = 14) -> Tensor:
    """Return a [M, K] times b [N, K] transposed with sums of `bits` significant bits, float32 [M, N]."""
    total = torch.zeros(len(a), len(b), device=a.device)
    for left, right in zip(a.float().split(_AT_ONCE, 1), b.float().split(_AT_ONCE, 1), strict=True):
        part = left @ right.t()
        exponent = torch.frexp(torch.maximum(total.abs(), part.abs()))[1]
        unit = torch.ldexp(torch.ones_like(total), exponent - bits)
        total = ((total / unit).trunc() + (part / unit).trunc()) * unit
    return total
