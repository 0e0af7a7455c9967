"""In which dtype a matrix product runs.

A bfloat16 product is accumulated in float32 and rounded once, so computing it on widened operands changes
nothing but the order of the sum. On a CPU without bfloat16 instructions the widened product is 4 to 60 times
faster.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tangram.kernels import few_rows


@cache
def native_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices in hardware."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def runs_on_cpu(x: Tensor) -> bool:
    """Return whether operations on `x` run on a CPU; without memory, it stands for a tensor where this machine has it.

    That is a GPU if there is one.
    """
    return x.device.type == "cpu" or (x.is_meta and not torch.cuda.is_available())


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to which the operands of a product of `x` are cast: its own, or float32 for bfloat16.

    The caller rounds the result back to `x.dtype`.
    """
    if x.dtype is torch.bfloat16 and runs_on_cpu(x) and not native_bfloat16():
        return torch.float32
    return x.dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over `dtype` are taken: at least float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def product_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., I] times weight [O, I] transposed, in the dtype of `x`."""
    dtype = product_dtype(x)
    if few_rows.takes(x, x.shape[:-1].numel(), weight):
        return few_rows.product_transposed(x, weight)
    if x.dtype is dtype is weight.dtype:
        return F.linear(x, weight)
    return F.linear(x.to(dtype), weight.to(x.dtype).to(dtype)).to(x.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, both of one dtype, in it."""
    dtype = product_dtype(a)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)
