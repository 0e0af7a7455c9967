"""One operation at one shape: what it is given, what it must give, and what it is held against."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tangram.testing import assert_close, tolerance

Result = Tensor | tuple[Tensor, ...]
Function = Callable[..., Result]
Compile = Callable[[Function], Function]
Check = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]
"""Raises AssertionError where the first results are too far from the second."""


class Peer(NamedTuple):
    """Another way to do the same.

    Attributes:
        make: Imports what it needs and returns a function of the case's inputs.
        seen: Brings its result into the shape and order of ours, to be compared; it is not timed.
    """

    make: Callable[[], Function]
    seen: Callable[[Result], Result] = lambda result: result


@dataclass(frozen=True, eq=False)
class Case:
    """One operation at one shape.

    Attributes:
        operation: Its name, and which of its products or directions.
        shape: Its sizes, for a reader.
        inputs: What every side is given.
        ours: The operation.
        formula: The same in plain torch, as a user writes it: the peer `eager`.
        check: How near the results must be to the reference.
        reference: What is right, of the inputs themselves; the formula of inputs in float64 if left out.
        flops: Floating-point operations of its matrix products; 0 for what only goes through memory.
        peers: Other ways by name.
        compiled: What `torch.compile` is to make of the formula.
        fuses: There is more to the formula than products, for which a compiler calls the same library.
        arriving: Gradients at the results: then backward is measured, by autograd.
        wanted: Which inputs it is to give gradients for.
        in_place: The operation writes over its inputs, and they are its results.
    """

    operation: str
    shape: str
    inputs: tuple[Tensor, ...]
    ours: Function
    formula: Function
    check: Check
    reference: Function | None = None
    flops: float = 0.0
    peers: Mapping[str, Peer] = field(default_factory=dict)
    compiled: Callable[[Compile], Function] | None = None
    fuses: bool = True
    arriving: tuple[Tensor, ...] = ()
    wanted: tuple[int, ...] = ()
    in_place: bool = False

    def bound(self, side: Function) -> Callable[[], tuple[Tensor, ...]]:
        """Return a side as a function that can be called again and again on the inputs."""
        return self._bound(side, self.inputs, self.arriving)

    def expected(self) -> tuple[Tensor, ...]:
        """Return what is right."""
        if self.reference is not None:
            return self.bound(self.reference)()
        inputs, arriving = (tuple(_wide(t) for t in each) for each in (self.inputs, self.arriving))
        return self._bound(self.formula, inputs, arriving)()

    def _bound(
        self, side: Function, inputs: tuple[Tensor, ...], arriving: tuple[Tensor, ...]
    ) -> Callable[[], tuple[Tensor, ...]]:
        if self.in_place:
            inputs = tuple(t.clone() for t in inputs)
        if not arriving:
            return lambda: as_tuple(side(*inputs))
        leaves = [t.detach().requires_grad_(i in self.wanted) for i, t in enumerate(inputs)]
        wanted = [leaves[i] for i in self.wanted]
        results = as_tuple(side(*leaves))
        return lambda: torch.autograd.grad(results, wanted, arriving, retain_graph=True)


def as_tuple(result: Result) -> tuple[Tensor, ...]:
    """Return one tensor or several as several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def with_gradients(loss: Callable[..., Tensor]) -> Function:
    """Return a function that gives a loss and its gradients at all arguments."""

    def run(*inputs: Tensor) -> Result:
        leaves = [t.detach().requires_grad_() for t in inputs]
        value = loss(*leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def same_bits(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Assert that results are equal to the last bit."""
    for one, other in zip(got, wanted, strict=True):
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.element_size()]
        assert (one.dtype, one.shape) == (other.dtype, other.shape), f"{one.dtype} {list(one.shape)}"
        differ = int((one.contiguous().view(integers) != other.contiguous().view(integers)).sum())
        assert differ == 0, f"{differ:,} of {one.numel():,} differ"


def near(*terms: int, coarse: int = 1) -> Check:
    """Return a check that allows for sums of so many terms in each result; in bfloat16 for `coarse` roundings."""

    def check(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        for one, other, length in zip(got, wanted, terms, strict=True):
            assert_close(one, other, length=coarse if one.dtype is torch.bfloat16 else length)

    return check


def within(*limits: float) -> Check:
    """Return a check of the relative distance (Frobenius) of each result."""

    def check(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        for one, other, limit in zip(got, wanted, limits, strict=True):
            far = distance(one, other)
            assert far <= limit, f"relative distance {far:.2g}, limit {limit:.2g}"

    return check


def sums(terms: int, size: Callable[[], Tensor]) -> Check:
    """Return a check of sums of `terms` products, given the sums of the products' magnitudes."""

    def check(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        (one,), (other,) = got, wanted
        rounding = (terms + 2) * torch.finfo(torch.float32).eps + torch.finfo(one.dtype).eps
        excess = float(((one.double() - other).abs() / (rounding * size())).nan_to_num(nan=torch.inf).max())
        assert excess <= 1, f"{excess:.3g} times over the limit"

    return check


def distance(one: Tensor, other: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the other."""
    wide = other.double()
    return float((one.double() - wide).norm() / wide.norm().clamp_min(1e-300))


def room(dtype: torch.dtype, terms: int, device: str) -> float:
    """Return how far a product of sums of `terms` may be from the exact one of its operands.

    In bfloat16 both operands may be rounded again where they are decoded, and the result is; a tensor core keeps about
    14 bits of a sum.
    """
    if dtype is torch.bfloat16:
        return 2**-8
    return 1e-3 if device == "cuda" else tolerance(torch.float32, terms + 4)
