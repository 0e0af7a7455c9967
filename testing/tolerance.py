"""How near two tensors must be: a bound from the dtype and the length of the reductions, never a guess."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_CONFIDENCE = 4.0
"""Lambda of the bound in `tolerance`."""


def tolerance(dtype: torch.dtype, length: int) -> float:
    """Return the error, relative to the largest magnitude, that rounding may leave after `length` operations.

    A sum of n terms rounds n times, each time by at most the unit roundoff u (half of eps). As long as these
    errors are independent with mean zero, they sum to less than lambda * sqrt(n) * u with probability
    1 - 2 exp(-lambda**2 / 2), well below the worst case n * u (Higham and Mary, doi:10.1137/18M1226312).
    Lambda is 4: one element in 1,500 would fail if every rounding were as bad as it can be, and real ones
    are a fraction of that.

    The bound is relative to the sum of the terms' magnitudes. Using the largest element of the result in its
    place is safe for terms of either sign, whose partial sums, and so whose errors, grow with sqrt(n) too.

    Args:
        dtype: The coarsest dtype in which a result was rounded.
        length: Terms of the longest chain of reductions from the inputs to one element: a matrix product over
            D counts D, two in a row 2 * D.

    Raises:
        ValueError: `dtype` is not a floating one, or `length` is not positive.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"{dtype} does not round; compare it exactly with torch.equal")
    if length < 1:
        raise ValueError(f"a reduction has at least one term, got length={length}")
    return _CONFIDENCE * math.sqrt(length) * torch.finfo(dtype).eps / 2


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Return the dtype with the larger unit roundoff."""
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


def _excess(actual: Tensor, expected: Tensor, length: int, dtype: torch.dtype | None) -> tuple[float, str]:
    """Return the largest error over its limit, above 1 where they differ too much, and where that is."""
    if actual.shape != expected.shape:
        return math.inf, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    if not (actual.is_floating_point() and expected.is_floating_point()):
        if actual.dtype == expected.dtype and torch.equal(actual, expected):
            return 0.0, "equal"
        return math.inf, f"{actual.dtype} and {expected.dtype} compare exactly, and differ"
    if actual.numel() == 0:
        return 0.0, "empty"
    bound = tolerance(dtype or _coarser(actual.dtype, expected.dtype), length)
    a, e = actual.detach().double().flatten(), expected.detach().double().flatten()
    scale = e[e.isfinite()].abs().max().item() if bool(e.isfinite().any()) else 0.0
    same = (a == e) | (a.isnan() & e.isnan())
    errors = torch.where(same, 0.0, (a - e).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(errors.argmax())
    error, limit = errors[worst].item(), bound * scale
    place = [int(i) for i in np.unravel_index(worst, actual.shape)]  # torch's imports a compiler
    values = f"{a[worst].item():.9g}, expected {e[worst].item():.9g}"
    text = f"at {place}: {values}; error {error:.3g}, limit {limit:.3g}"
    if error == 0.0:
        return 0.0, text
    return (error / limit if limit > 0 else math.inf), text


def assert_close(
    actual: Tensor, expected: Tensor, *, length: int = 1, dtype: torch.dtype | None = None, msg: str = ""
) -> None:
    """Assert that no element differs by more than `tolerance` times the largest finite |expected|.

    One scale for the whole tensor: an element that cancels to nearly nothing is as uncertain as its
    neighbours. Where `expected` is zero everywhere `actual` must be too. Infinities and NaN must stand in the
    same places; integers and booleans must be equal.

    Args:
        actual: What is tested, any shape.
        expected: What it should be, the same shape, often in a finer dtype.
        length: Terms of the longest chain of reductions to one element.
        dtype: The dtype in which results were rounded; by default the coarser of the two tensors'. Give it
            where the computation was coarser than what it returned.
        msg: What is compared.

    Raises:
        AssertionError: With the worst element, and how many times over the limit it is.
    """
    __tracebackhide__ = True
    excess, text = _excess(actual, expected, length, dtype)
    if excess > 1.0:
        raise AssertionError(f"{msg or 'tensors'}: {excess:.3g} times over the limit, {text}")


def assert_same_gradients(
    actual: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    *,
    length: int = 1,
    dtype: torch.dtype | None = None,
    msg: str = "",
) -> None:
    """Assert that two models have the same gradients, by address; each is compared as `assert_close` does.

    No gradient equals only no gradient: an optimizer steps a parameter whose gradient is zero, and leaves one
    that has none.

    Args:
        actual: Gradients by address.
        expected: Gradients by address.
        length: Terms of the longest chain of reductions to one element.
        dtype: The dtype in which results were rounded; by default the coarser of each pair's.
        msg: What is compared.

    Raises:
        AssertionError: With the addresses that only one has, or how many gradients differ, and the worst.
    """
    __tracebackhide__ = True
    title = msg or "gradients"
    if actual.keys() != expected.keys():
        extra, missing = sorted(actual.keys() - expected.keys()), sorted(expected.keys() - actual.keys())
        raise AssertionError(f"{title}: addresses differ; unexpected {extra}, missing {missing}")
    failures = []
    for address, one in actual.items():
        other = expected[address]
        if one is None and other is None:
            continue
        if one is None or other is None:
            has = "expected none" if other is None else "has none"
            failures.append((math.inf, address, has))
            continue
        excess, text = _excess(one, other, length, dtype)
        if excess > 1.0:
            failures.append((excess, address, text))
    if failures:
        excess, address, text = max(failures, key=lambda failure: failure[0])
        raise AssertionError(
            f"{title}: {len(failures)} of {len(actual)} differ, worst {address}: "
            f"{excess:.3g} times over the limit, {text}"
        )
