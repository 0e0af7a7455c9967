"""The gated activation against its definition in float64, and its kernels against its twin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from twins import guarded, numbers, on_both, same_bits, strided

from tangram import kernels
from tangram.kernels import dequantize, quantize_tiles, swiglu, swiglu_quantized
from tangram.testing import assert_close

STEPS = 10
"""Roundings on the longest way from an input to an output."""


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


def test_an_odd_width_is_refused_quantised():
    with pytest.raises(ValueError, match="last dimension is 5"):
        swiglu_quantized(torch.zeros(2, 5))


def with_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = swiglu(x)
    return y.detach(), *torch.autograd.grad(y, x, grad)


@pytest.mark.parametrize("shape", [(70, 300), (3, 5, 64), (1, 1), (9, 2050), (0, 16), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [guarded, strided])
def test_the_kernel_agrees_with_the_twin(shape, dtype, held):
    *rows, width = shape
    x, grad = held(numbers(*rows, 2 * width, seed=1, dtype=dtype)), held(numbers(*shape, seed=2, dtype=dtype))
    for twin, kernel in zip(*on_both(lambda: with_gradient(x, grad)), strict=True):
        assert (kernel.dtype, kernel.shape) == (twin.dtype, twin.shape)
        assert_close(kernel, twin, length=1 if dtype is torch.bfloat16 else STEPS)


def test_the_kernel_takes_an_expanded_gradient_and_transposed_tokens():
    x, grad = guarded(numbers(40, 3, seed=1)).t(), guarded(numbers(1, 20, seed=2)).expand(3, 20)
    for twin, kernel in zip(*on_both(lambda: with_gradient(x, grad)), strict=True):
        assert_close(kernel, twin, length=STEPS)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's, for what a GPU calls infinite
def test_the_kernel_survives_gates_far_from_zero():
    x, grad = guarded(torch.tensor([[1e4, 3.0], [-1e4, 3.0]])), guarded(torch.ones(2, 1))
    for twin, kernel in zip(*on_both(lambda: with_gradient(x, grad)), strict=True):
        assert torch.equal(twin, kernel)


@pytest.mark.parametrize("shape", [(70, 300), (1, 128), (33, 1), (0, 16), (5, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [guarded, strided])
@pytest.mark.parametrize("two", [False, True])
def test_quantised_in_one_pass_has_the_bits_of_two(shape, dtype, held, two):
    x = held(numbers(shape[0], 2 * shape[1], seed=1, dtype=dtype, decades=2))
    for path in ("reference", "triton"):
        with kernels.use(path):
            fused, apart = swiglu_quantized(x, two), quantize_tiles(swiglu(x), power_of_two=two)
            assert same_bits(fused.codes, apart.codes) and same_bits(fused.scales, apart.scales)


def test_the_quantising_kernel_is_within_a_code_of_the_twin():
    twin, kernel = on_both(lambda: swiglu_quantized(guarded(numbers(40, 400, seed=1))))
    assert_close(kernel.scales, twin.scales, length=STEPS)
    one, other = dequantize(*twin), dequantize(*kernel)
    step = torch.maximum(2**-3 * one.abs(), 2**-9 * twin.scales.repeat_interleave(128, 1)[:, :200])
    assert ((one - other).abs() <= (1 + 1e-5) * step).all()
    # Where y / s lies within its few roundings of the middle between two codes: one in 100,000.
    assert (twin.codes.view(torch.uint8) == kernel.codes.view(torch.uint8)).float().mean() > 0.99


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operations(path):
    x = numbers(3, 2, 10, seed=1, dtype=torch.bfloat16)
    ops = torch.ops.tangram
    with kernels.use(path):
        torch.library.opcheck(ops.swiglu, (x.clone().requires_grad_(),))
        torch.library.opcheck(ops.swiglu_backward, (ops.swiglu(x), x))
        torch.library.opcheck(ops.swiglu_quantized, (x[0], True))
        meta = x.to("meta")
        pairs = (
            (ops.swiglu(x), ops.swiglu(meta)),
            (ops.swiglu_backward(ops.swiglu(x), x), ops.swiglu_backward(ops.swiglu(meta), meta)),
            *zip(ops.swiglu_quantized(x[0], False), ops.swiglu_quantized(meta[0], False), strict=True),
        )
        for real, empty in pairs:
            assert (real.dtype, real.shape, real.stride()) == (empty.dtype, empty.shape, empty.stride())
