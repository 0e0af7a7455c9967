"""Root-mean-square normalisation against its definition in float64, and its kernel against its twin."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from twins import guarded, numbers, on_both, same_bits, strided

from tangram import kernels
from tangram.kernels import rmsnorm
from tangram.testing import assert_close

EPS = 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm by way of the vector's length, in float64."""
    x, weight = x.double(), weight.double()
    length = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps).sqrt()
    return x / length * weight


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 9), dim=st.integers(1, 65), seed=st.integers(0, 99), size=st.floats(1e-2, 1e3))
def test_output_and_gradients_are_those_of_the_definition(dtype, rows, dim, seed, size):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 2, dim, generator=g, dtype=torch.float64) * size).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(dim, generator=g, dtype=torch.float64).to(wide).requires_grad_()
    grad = torch.randn(rows, 2, dim, generator=g, dtype=torch.float64).to(dtype)
    y = rmsnorm(x, weight, EPS)
    x_grad, weight_grad = torch.autograd.grad(y, (x, weight), grad)
    assert (y.dtype, x_grad.dtype, weight_grad.dtype) == (dtype, dtype, wide)

    x64, weight64, grad64 = (t.detach().double().requires_grad_() for t in (x, weight, grad))
    want_y = definition(x64, weight64, EPS)
    want_x_grad, want_weight_grad = torch.autograd.grad(want_y, (x64, weight64), grad64)
    # One rounding to the dtype, and in the accumulator a sum over `dim` (or the rows) and a few products.
    outer, inner = torch.finfo(dtype).eps, torch.finfo(wide).eps
    normed = definition(x64, torch.ones(dim), EPS).detach().abs()
    scale = normed / x64.detach().abs()
    arriving = (grad64 * weight64).detach().abs()
    terms = scale * (arriving + normed * (arriving * normed).mean(-1, keepdim=True))
    assert ((y - want_y).abs() <= (outer + (dim + 8) * inner) * want_y.abs()).all()
    assert ((x_grad - want_x_grad).abs() <= outer * want_x_grad.abs() + (dim + 16) * inner * terms).all()
    sums = (grad64.abs() * normed).sum((0, 1))
    assert ((weight_grad - want_weight_grad).abs() <= (dim + 2 * rows + 8) * inner * sums).all()


def test_gradcheck():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rmsnorm(a, b, EPS), (x, weight))


def test_a_vector_of_zeros_stays_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    rmsnorm(x, torch.ones(4), EPS).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.full((2, 4), EPS**-0.5))


def test_bfloat16_is_rounded_once_after_the_weight():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.linspace(0.5, 2, 32)
    assert torch.equal(rmsnorm(x, weight, EPS), rmsnorm(x.float(), weight, EPS).bfloat16())


def test_no_tokens_and_strided_tokens():
    weight = torch.linspace(1, 2, 4)
    empty = torch.zeros(0, 4, requires_grad=True)
    assert rmsnorm(empty, weight, EPS).shape == (0, 4)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
    strided = rmsnorm(x, weight, EPS)
    assert torch.equal(strided, rmsnorm(x.detach().contiguous(), weight, EPS))
    strided.sum().backward()


def test_backward_keeps_one_number_a_row_beside_the_arguments():
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    x = torch.ones(10, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rmsnorm(x, weight, EPS)
    assert sum(kept) == 10 * 32 * 2 + 32 * 4 + 10 * 4


def with_gradients(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = rmsnorm(x, weight, EPS)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad)


@pytest.mark.parametrize("shape", [(70, 300), (3, 5, 64), (1, 3), (2, 8193), (0, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [guarded, strided])
def test_the_kernel_agrees_with_the_twin(shape, dtype, held):
    dim = shape[-1]
    x, grad = held(numbers(*shape, seed=1, dtype=dtype)), held(numbers(*shape, seed=2, dtype=dtype))
    weight = guarded(numbers(dim, seed=3, dtype=torch.promote_types(dtype, torch.float32)))
    twin, kernel = on_both(lambda: with_gradients(x, weight, grad))
    # Sums in the accumulator, over a row and then perhaps over the rows; in bfloat16 the one rounding hides them.
    for one, other, terms in zip(kernel, twin, (dim, 2 * dim, dim + x.numel() // dim), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert_close(one, other, length=1 if one.dtype is torch.bfloat16 else terms)


def test_programs_that_take_many_rows_agree_with_the_twin(monkeypatch):
    module = sys.modules["tangram.kernels.rmsnorm"]
    monkeypatch.setattr(module, "_TILE", 256)
    monkeypatch.setattr(module, "_PROGRAMS", 3)
    x, grad, weight = (guarded(numbers(*shape, seed=len(shape))) for shape in [(2, 19, 40), (2, 19, 40), (40,)])
    twin, kernel = on_both(lambda: with_gradients(x, weight, grad))
    for one, other, terms in zip(kernel, twin, (40, 80, 78), strict=True):
        assert_close(one, other, length=terms)
    with kernels.use("triton"):
        for one, other in zip(kernel, with_gradients(x, weight, grad), strict=True):
            assert same_bits(one, other)


def test_the_kernel_takes_an_expanded_gradient_and_a_weight_in_bfloat16():
    x, weight = numbers(4, 3, 20, seed=1), numbers(20, seed=2, dtype=torch.bfloat16)
    x, weight, grad = guarded(x.transpose(0, 1)), strided(weight), guarded(numbers(1, 1, 20, seed=3)).expand(3, 4, 20)
    for one, other in zip(*on_both(lambda: with_gradients(x, weight, grad)), strict=True):
        assert_close(one, other, length=32)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operations(path):
    x, weight = numbers(3, 2, 5, seed=1, dtype=torch.bfloat16), numbers(5, seed=2)
    op, back = torch.ops.tangram.rmsnorm, torch.ops.tangram.rmsnorm_backward
    with kernels.use(path):
        torch.library.opcheck(op, (x.clone().requires_grad_(), weight.clone().requires_grad_(), EPS))
        y, scale = op(x, weight, EPS)
        torch.library.opcheck(back, (y, x, weight, scale))
        for real, meta in zip(
            (y, scale, *back(y, x, weight, scale)),
            (*op(x.to("meta"), weight.to("meta"), EPS), *back(*(t.to("meta") for t in (y, x, weight, scale)))),
            strict=True,
        ):
            assert (real.dtype, real.shape, real.stride()) == (meta.dtype, meta.shape, meta.stride())
