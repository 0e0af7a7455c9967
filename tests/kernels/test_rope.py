"""Rotary embedding: what turning must and must not change, YaRN's published numbers, and its kernel and twin."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from twins import guarded, numbers, on_both, strided

from tangram import kernels
from tangram.kernels import Yarn, frequencies, rope, rotate, rotation
from tangram.testing import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
THETA = 10000.0
V3 = Yarn(factor=40.0, original_length=4096)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turned_by_matrices(x: Tensor, positions: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """The rotation as a dense matrix for each position, in float64: exp of the generator of the turn."""
    dim = x.shape[-1]
    generator = torch.zeros(dim, dim, dtype=torch.float64)
    for i, frequency in enumerate(table.double()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + dim // 2)
        generator[b, a], generator[a, b] = frequency, -frequency
    matrices = torch.matrix_exp(positions.double()[..., None, None] * generator)  # [B, S, R, R]
    return torch.einsum("bsij,bshj->bshi", matrices, x.double())


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 3)),
    pairs=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_each_pair_turns_by_position_times_frequency(dtype, interleaved, shape, pairs, seed):
    x = drawn(seed, *shape, 2 * pairs, dtype=dtype).requires_grad_()
    grad = drawn(seed + 1, *shape, 2 * pairs, dtype=dtype)
    positions = torch.randint(0, 50, shape[:2], generator=torch.Generator().manual_seed(seed))
    table = frequencies(2 * pairs, THETA)
    y = rope(x, positions, table, interleaved)
    (got,) = torch.autograd.grad(y, x, grad)
    assert (y.dtype, got.dtype) == (dtype, dtype)
    # One rounding to the dtype and, in the accumulator, two products, a sum and rounded tables. The matrix
    # exponential is good to 1e-12 here.
    size = 2 * torch.finfo(dtype).eps + 6 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + 1e-12
    want = turned_by_matrices(x.detach(), positions, table, interleaved)
    assert ((y - want).abs() <= size * x.detach().abs().amax()).all()
    back = turned_by_matrices(grad, -positions, table, interleaved)
    assert ((got - back).abs() <= size * grad.abs().amax()).all()


@pytest.mark.parametrize("interleaved", [True, False])
@given(seed=st.integers(0, 99), shift=st.integers(0, 200_000), distance=st.integers(0, 4096))
def test_a_product_depends_on_the_distance_alone(interleaved, seed, shift, distance):
    table = frequencies(16, THETA, V3)
    q, k = drawn(seed, 1, 1, 1, 16), drawn(seed + 1, 1, 1, 1, 16)

    def product(q_position: int, k_position: int) -> Tensor:
        at_q = rope(q, torch.tensor([[q_position]]), table, interleaved)
        return (at_q * rope(k, torch.tensor([[k_position]]), table, interleaved)).sum()

    # cos and sin of an angle near 2e5 in float64 are off by 2e5 eps.
    room = 4 * (shift + distance + 1) * torch.finfo(torch.float64).eps * 16 * float(q.abs().max() * k.abs().max())
    assert abs(product(shift + distance, shift) - product(distance, 0)) <= room


@pytest.mark.parametrize("interleaved", [True, False])
@given(seed=st.integers(0, 99), position=st.integers(0, 200_000))
def test_the_length_of_a_vector_stays(interleaved, seed, position):
    x = drawn(seed, 1, 3, 2, 8)
    positions = torch.tensor([[0, position, position + 1]])
    y = rope(x, positions, frequencies(8, THETA), interleaved)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-14)
    assert torch.equal(y[:, 0], x[:, 0])


def test_float32_angles_are_exact_far_into_a_long_context():
    table = frequencies(64, THETA)
    positions = torch.tensor([[163_839]])
    cos, _ = rotation(positions, table, torch.float32)
    want = [math.cos(163_839 * float(f)) for f in table]
    assert torch.allclose(cos[0, 0].double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-7)


def test_gradcheck_of_both_orders():
    x = drawn(0, 1, 3, 2, 4).requires_grad_()
    positions, table = torch.tensor([[0, 5, 2]]), frequencies(4, THETA)
    assert torch.autograd.gradcheck(lambda t: rope(t, positions, table, True), x)
    assert torch.autograd.gradcheck(lambda t: rope(t, positions, table, False), x)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("sizes", [(2, 3, 2), (1, 1, 1)])
def test_slices_of_wider_heads_empty_batches_and_expanded_gradients(interleaved, sizes):
    table = frequencies(4, THETA)
    positions = torch.arange(3)[: sizes[1]].expand(sizes[0], -1)
    heads = drawn(0, *sizes, 7, dtype=torch.float32)
    part = heads[..., 3:].requires_grad_()  # an odd offset and an odd stride
    y = rope(part, positions, table, interleaved)
    assert torch.equal(y, rope(part.detach().clone(), positions, table, interleaved))
    y.sum().backward()
    none = positions[:0]
    assert rope(torch.zeros(0, sizes[1], 2, 4), none, table, interleaved).shape == (0, sizes[1], 2, 4)
    assert rope(torch.zeros(2, 0, 2, 4), positions[:, :0], table, interleaved).shape == (2, 0, 2, 4)


def test_one_rotation_serves_many_tensors_in_float32_or_better():
    positions, table = torch.arange(4)[None], frequencies(8, THETA)
    turn = rotation(positions, table, torch.bfloat16)
    assert [part.dtype for part in turn] == [torch.float32] * 2
    q, k = drawn(0, 1, 4, 3, 8, dtype=torch.bfloat16), drawn(1, 1, 4, 1, 8, dtype=torch.bfloat16)
    assert torch.equal(rotate(q, *turn), rope(q, positions, table))
    assert torch.equal(rotate(k, *turn), rope(k, positions, table))


def test_plain_frequencies_fall_from_one_by_powers_of_theta():
    table = frequencies(64, THETA)
    assert table.dtype is torch.float32
    assert table[0] == 1
    assert math.isclose(float(table[16]), 1e-2, rel_tol=1e-7)
    assert torch.allclose(table[1:] / table[:-1], torch.tensor(THETA ** (-1 / 32)), rtol=1e-6)


def test_yarn_slows_the_pairs_that_the_paper_says():
    slowed = frequencies(64, THETA, V3) / frequencies(64, THETA)
    assert torch.equal(slowed[:11], torch.ones(11))
    assert math.isclose(float(slowed[11]), 0.925, rel_tol=1e-6)
    assert math.isclose(float(slowed[16]), 0.55, rel_tol=1e-6)
    assert torch.allclose(slowed[23:], torch.tensor(0.025), rtol=1e-6)
    assert (slowed[10:23] > slowed[11:24]).all()


def test_yarn_sharpens_the_softmax_as_published():
    assert math.isclose(math.sqrt(V3.softmax_correction), 1.3688879454, rel_tol=1e-10)
    assert math.isclose(192**-0.5 * V3.softmax_correction, 0.1352337789, rel_tol=1e-9)
    assert V3._replace(factor=1.0).softmax_correction == 1
    assert math.isclose(V3._replace(mscale=0.707).softmax_correction, 1.2608038**2, rel_tol=1e-6)


@given(
    pairs=st.integers(1, 64),
    factor=st.floats(1, 100),
    length=st.integers(16, 1 << 20),
    theta=st.floats(100, 1e7),
)
def test_yarn_never_slows_by_more_than_the_factor(pairs, factor, length, theta):
    plain = frequencies(2 * pairs, theta)
    slowed = frequencies(2 * pairs, theta, Yarn(factor, length)) / plain
    assert ((slowed >= 1 / factor * (1 - 1e-6)) & (slowed <= 1 + 1e-6)).all()
    assert (slowed.diff() <= 1e-6).all()


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="width is 7"):
        frequencies(7, THETA)


def on_device(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Tables for x [B, S, H, R], with NaN around them."""
    cos, sin = rotation(positions, frequencies(x.shape[-1], THETA), x.dtype)
    return guarded(cos), guarded(sin)


def with_gradient(x: Tensor, grad: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = rotate(x, cos, sin, interleaved)
    return y.detach(), *torch.autograd.grad(y, x, grad)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(2, 37, 3, 6), (1, 5, 1, 64), (3, 1, 20, 2), (0, 4, 2, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [guarded, strided])
def test_the_kernel_agrees_with_the_twin(interleaved, shape, dtype, held):
    x, grad = held(numbers(*shape, seed=1, dtype=dtype)), held(numbers(*shape, seed=2, dtype=dtype))
    turn = on_device(x, 7 * torch.arange(shape[0] * shape[1]).view(shape[:2]))
    for twin, kernel in zip(*on_both(lambda: with_gradient(x, grad, *turn, interleaved)), strict=True):
        assert (kernel.dtype, kernel.shape) == (twin.dtype, twin.shape)
        assert_close(kernel, twin, length=1 if dtype is torch.bfloat16 else 3)  # two products and their sum


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_kernel_takes_slices_of_heads_expanded_gradients_and_one_table_for_all_sequences(interleaved):
    heads, grad = guarded(numbers(9, 3, 4, 11, seed=1)), guarded(numbers(1, 1, 4, 8, seed=2)).expand(3, 9, 4, 8)
    part = heads.transpose(0, 1)[..., 3:]
    cos, sin = on_device(part, torch.arange(9)[None])
    for twin, kernel in zip(*on_both(lambda: with_gradient(part, grad, cos, sin, interleaved)), strict=True):
        assert_close(kernel, twin, length=3)


def test_the_kernel_refuses_tables_that_need_a_gradient():
    x = guarded(numbers(1, 2, 1, 4, seed=1))
    cos, sin = on_device(x, torch.arange(2)[None])
    with kernels.use("triton"), pytest.raises(ValueError, match="detach them"):
        rotate(x, cos.requires_grad_(), sin)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operation(path):
    x = numbers(2, 3, 2, 4, seed=1, dtype=torch.bfloat16)
    turn = rotation(torch.arange(6).view(2, 3), frequencies(4, THETA), x.dtype)
    with kernels.use(path):
        for interleaved in (True, False):
            torch.library.opcheck(torch.ops.tangram.rotate, (x.clone().requires_grad_(), *turn, interleaved))
        meta = torch.ops.tangram.rotate(x.to("meta"), *(table.to("meta") for table in turn), True)
    assert (meta.dtype, meta.shape, meta.stride()) == (x.dtype, x.shape, x.stride())
