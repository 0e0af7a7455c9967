"""Root-mean-square normalisation against its definition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.kernels import rmsnorm

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
