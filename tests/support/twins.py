"""An operation on both its paths, over memory in which reading or writing beside a tensor shows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tangram import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the kernels run: natively on a GPU, and otherwise in Triton's interpreter."""


def on_both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return what `run` gives by the twin, and by the Triton kernel."""
    with kernels.use("reference"):
        twin = run()
    with kernels.use("triton"):
        return twin, run()


def guarded(x: Tensor) -> Tensor:
    """Return a copy of `x` on the device between rows of NaN (of the largest number, for integers)."""
    wide = torch.empty(len(x) + 2, *x.shape[1:], dtype=x.dtype, device=DEVICE)
    wide.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)
    wide[1:-1] = x
    return wide[1:-1]


def strided(x: Tensor) -> Tensor:
    """Return a copy of `x` [..., K] on the device whose elements lie two apart, with NaN between them."""
    wide = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype, device=DEVICE)
    wide[..., 0] = x
    return wide[..., 0]


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32, decades: float = 0.0) -> Tensor:
    """Return fresh normal numbers whose size varies over as many decades from one to the next."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * 10 ** (decades * (torch.rand(*shape, generator=g) - 0.5))).to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal to the last bit, NaN included."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if one.dtype is not other.dtype or one.shape != other.shape:
        return False
    as_bits = integers[one.element_size()]
    return torch.equal(one.contiguous().view(as_bits), other.contiguous().view(as_bits))


def opcheck_of_codes(op: Any, args: tuple[Any, ...]) -> None:
    """Check an operation that is given FP8 as `torch.library.opcheck` does.

    Its check of the schema compares the arguments before and after with arithmetic that FP8 does not have; here their
    bits are.
    """
    tensors = [each for each in args if isinstance(each, Tensor)]
    before = [each.clone() for each in tensors]
    out = op(*args)
    assert all(same_bits(one, other) for one, other in zip(before, tensors, strict=True))
    assert out.untyped_storage().data_ptr() not in [each.untyped_storage().data_ptr() for each in tensors]
    utils = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(op, args, test_utils=utils)
