"""The gated activation against its definition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.kernels import swiglu


def definition(gate_up: Tensor) -> Tensor:
    """The gated product by way of exp, in float64."""
    gate, up = gate_up.double().tensor_split(2, dim=-1)
    return gate * up / (1 + torch.exp(-gate))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(rows=st.integers(1, 9), width=st.integers(1, 33), seed=st.integers(0, 99), size=st.floats(1e-3, 30))
def test_output_and_gradient_are_those_of_the_definition(dtype, rows, width, seed, size):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, 2 * width, generator=g, dtype=torch.float64) * size).to(dtype).requires_grad_()
    grad = torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)
    y = swiglu(x)
    (got,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    want_y = definition(wide)
    (want,) = torch.autograd.grad(want_y, wide, grad.double())
    assert (y.dtype, got.dtype) == (dtype, dtype)
    gate, up = wide.detach().chunk(2, -1)
    # One rounding of the result; before it a few in the accumulator, where exp errs with its argument and a
    # sigmoid below the smallest normal number may be flushed.
    wide_info, outer = torch.finfo(torch.promote_types(dtype, torch.float32)), torch.finfo(dtype).eps
    inner = wide_info.eps * (8 + 2 * gate.abs())
    flushed = wide_info.tiny * (1 + gate.abs())
    assert ((y.double() - want_y).abs() <= (outer + inner) * want_y.abs() + flushed * (1 + up.abs())).all()
    arriving = grad.double().abs()
    gate_room = (inner + flushed) * (arriving * up.abs()) * (1 + gate.abs())
    up_room = (inner + flushed) * arriving * gate.abs()
    room = torch.cat([gate_room, up_room], -1) + outer * want.abs() + wide_info.tiny
    assert ((got.double() - want).abs() <= room).all()


def test_gradcheck():
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, x)


def test_bfloat16_is_rounded_once():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(swiglu(x), swiglu(x.float()).bfloat16())


def test_gates_far_from_zero_give_the_product_or_nothing():
    x = torch.tensor([[1e4, 3.0], [-1e4, 3.0]], requires_grad=True)
    y = swiglu(x)
    y.sum().backward()
    assert y.tolist() == [[3e4], [0.0]]
    assert x.grad is not None
    assert x.grad.tolist() == [[3.0, 1e4], [0.0, 0.0]]


def test_no_tokens_strided_tokens_and_an_expanded_gradient():
    assert swiglu(torch.zeros(0, 3, 4)).shape == (0, 3, 2)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(swiglu(x), swiglu(x.contiguous()))
    leaf = x.detach().requires_grad_()
    swiglu(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == x.shape


def test_backward_keeps_the_input_alone():
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.ones(10, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="last dimension is 5"):
        swiglu(torch.zeros(2, 5))
