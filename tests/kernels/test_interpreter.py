"""Triton's interpreter, as it is repaired, against torch: every cast to the last bit, and bfloat16 arithmetic."""

from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from twins import DEVICE, numbers, same_bits

from tangram.kernels import interpreter
from tangram.kernels.jit import INTERPRETED, tl, triton
from tangram.testing.tolerance import assert_close

if INTERPRETED:
    from triton.runtime import interpreter as replaced

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-6
"""The smallest normal number of E4M3."""


@triton.jit
def _cast(x, y, n, block: tl.constexpr):
    at = tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, mask=at < n).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def _dot(a, b, c, rows: tl.constexpr, inner: tl.constexpr, columns: tl.constexpr):
    m, k, n = tl.arange(0, rows), tl.arange(0, inner), tl.arange(0, columns)
    product = tl.dot(tl.load(a + m[:, None] * inner + k[None, :]), tl.load(b + k[:, None] * columns + n[None, :]))
    tl.store(c + m[:, None] * columns + n[None, :], product)


@triton.jit
def _arithmetic(a, b, sums, products, less, negative, block: tl.constexpr):
    at = tl.arange(0, block)
    one, other = tl.load(a + at), tl.load(b + at)
    tl.store(sums + at, one + other)
    tl.store(products + at, one * other)
    tl.store(less + at, (one < other).to(tl.int8))
    tl.store(negative + at, -one)


def between(low: float, high: float, seed: int, top: float | None = None) -> Tensor:
    """Return numbers of both signs, the logarithm of whose size is uniform."""
    g = torch.Generator().manual_seed(seed)
    size = 2.0 ** (low + (high - low) * torch.rand(100_000, generator=g, dtype=torch.float64))
    return (size.clamp_max(top or size.max()) * torch.randn(100_000, generator=g).sign()).float()


def up_to(size: float, seed: int) -> Tensor:
    """Return numbers of which none is larger."""
    return (2 * torch.rand(100_000, generator=torch.Generator().manual_seed(seed)) - 1) * size


def codes() -> Tensor:
    """Return every E4M3 number there is."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(E4M3)


def specials() -> Tensor:
    far = [float("inf"), 448.0, 464.0, 465.0, 480.0, 500.0, 0.0]
    return torch.tensor([*far, *(-x for x in far), float("nan")])


CASTS = {
    "e4m3 in its normal range": (lambda: between(-6, 8.9, 1, top=447.0), E4M3),
    "e4m3 below its normal numbers": (lambda: up_to(SMALLEST, 2), E4M3),
    "e4m3 of next to nothing": (lambda: up_to(2.0**-11, 3), E4M3),
    "e4m3 beyond its largest": (lambda: between(8.81, 13.3, 4), E4M3),
    "e4m3 of special numbers": (specials, E4M3),
    "e5m2": (lambda: between(-14, 17, 5), E5M2),
    "float32 to bfloat16": (lambda: between(-130, 127, 6), torch.bfloat16),
    "float32 to float16": (lambda: between(-26, 15.9, 7), torch.float16),
    "bfloat16 to e4m3, with many ties": (lambda: between(-10, 10, 8).bfloat16(), E4M3),
    "bfloat16 to float32": (lambda: between(-130, 127, 9).bfloat16(), torch.float32),
    "codes to float32": (codes, torch.float32),
    "codes to bfloat16": (codes, torch.bfloat16),
    "codes to float16": (codes, torch.float16),
}


def clamped(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return torch's cast; to FP8 it saturates, as the instruction of the GPU does."""
    if dtype.itemsize > 1:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return torch.where(x.isnan(), x.float(), x.float().clamp(-largest, largest)).to(dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(DEVICE)
    y = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    _cast[(1,)](x, y, len(x), block=triton.next_power_of_2(len(x)))
    return y.cpu()


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_has_the_bits_of_torchs(name):
    make, dtype = CASTS[name]
    x = make()
    got, expected = cast(x, dtype), clamped(x, dtype)
    missing = expected.float().isnan()
    assert torch.equal(got.float().isnan(), missing)
    assert same_bits(got[~missing], expected[~missing])
    assert missing.float().mean() < 0.1


def test_a_product_of_bfloat16_is_that_of_its_numbers_in_float32():
    a, b = numbers(64, 128, seed=1, dtype=torch.bfloat16), numbers(128, 32, seed=2, dtype=torch.bfloat16)
    c = torch.empty(64, 32, device=DEVICE)
    _dot[(1,)](a.to(DEVICE), b.to(DEVICE), c, rows=64, inner=128, columns=32)
    assert_close(c.cpu(), a.float() @ b.float(), length=128)


def test_a_product_of_codes_is_that_of_their_numbers():
    a, b = (numbers(32, 32, seed=seed).to(E4M3) for seed in (1, 2))
    c = torch.empty(32, 32, device=DEVICE)
    _dot[(1,)](a.to(DEVICE), b.to(DEVICE), c, rows=32, inner=32, columns=32)
    assert_close(c.cpu(), a.float() @ b.float(), length=32, dtype=None if INTERPRETED else torch.float16)


def test_arithmetic_in_bfloat16_is_torchs():
    a, b = (numbers(4096, seed=seed, dtype=torch.bfloat16, decades=4) for seed in (1, 2))
    b[:64] = a[:64]
    sums, products, less, negative = (torch.empty(4096, dtype=torch.bfloat16, device=DEVICE) for _ in range(4))
    less = less.to(torch.int8)
    _arithmetic[(1,)](a.to(DEVICE), b.to(DEVICE), sums, products, less, negative, block=4096)
    assert same_bits(sums.cpu(), a + b)
    assert same_bits(products.cpu(), a * b)
    assert same_bits(less.cpu(), (a < b).to(torch.int8))
    assert same_bits(negative.cpu(), -a)


@pytest.mark.skipif(not INTERPRETED, reason="kernels run natively here, and the interpreter is as it came")
class TestPrivateNames:
    """What is replaced has no promise to be there in the next Triton."""

    def stand_in(self, monkeypatch) -> SimpleNamespace:
        """Put a copy in the place of Triton's interpreter, with all that is replaced or used and nothing else."""
        builder = {name: getattr(replaced.InterpreterBuilder, name) for name in ("create_dot", "binary_op", "unary_op")}
        copy = SimpleNamespace(
            _convert_float=replaced._convert_float,
            InterpreterBuilder=type("InterpreterBuilder", (), builder),
            TensorHandle=replaced.TensorHandle,
            _ir=SimpleNamespace(ROUNDING_MODE=SimpleNamespace(RTZ=replaced._ir.ROUNDING_MODE.RTZ)),
        )
        monkeypatch.setattr(triton.runtime, "interpreter", copy)
        return copy

    @pytest.mark.parametrize(
        "name",
        [
            "_convert_float",
            "TensorHandle",
            "InterpreterBuilder",
            "InterpreterBuilder.create_dot",
            "InterpreterBuilder.binary_op",
            "InterpreterBuilder.unary_op",
            "_ir.ROUNDING_MODE.RTZ",
        ],
    )
    def test_one_that_is_gone_is_named_with_what_to_do(self, name, monkeypatch):
        copy = self.stand_in(monkeypatch)
        owner, _, attribute = name.rpartition(".")
        delattr(attrgetter(owner)(copy) if owner else copy, attribute)
        message = rf"Triton {triton.__version__} has no .*{name}.*: .* use Triton 3.6 to 3.9, or unset TRITON_INTERPRET"
        with pytest.raises(RuntimeError, match=message):
            interpreter.repair()

    def test_all_are_replaced_once(self, monkeypatch):
        copy = self.stand_in(monkeypatch)
        names = ("_convert_float", *(f"InterpreterBuilder.{name}" for name in ("create_dot", "binary_op", "unary_op")))
        before = [attrgetter(name)(copy) for name in names]
        interpreter.repair()
        repaired = [attrgetter(name)(copy) for name in names]
        assert not any(one is other for one, other in zip(before, repaired, strict=True))
        interpreter.repair()
        assert [attrgetter(name)(copy) for name in names] == repaired
