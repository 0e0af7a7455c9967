"""One product per expert, against a dense one-hot product in float64, by every way it may be computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from twins import DEVICE, guarded, numbers, on_both, same_bits, strided

from tangram import kernels
from tangram.kernels import (
    grouped_matmul,
    grouped_matmul_forward,
    grouped_matmul_input_grad,
    grouped_matmul_loop,
    grouped_matmul_weight_grad,
    products,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
WIDTHS = st.sampled_from([1, 3, 4, 8, 12, 16, 32])  # some are whole 16 bytes, some not
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@pytest.fixture(params=[True, False], ids=["native", "widened"])
def _bfloat16(request, monkeypatch):
    """Both sides of the choice that the CPU makes for bfloat16."""
    monkeypatch.setattr(products, "native_bfloat16", lambda: request.param)


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def dense(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Every row against every expert, of which one counts, in float64."""
    chosen = torch.eye(len(counts), dtype=torch.float64).repeat_interleave(counts, 0)  # [M, E]
    return torch.einsum("me,mk,enk->mn", chosen, rows.double(), weight.double())


def bound(terms: int, dtype: torch.dtype) -> float:
    """Relative to the product of absolute values: a sum of `terms` products, then a rounding to the dtype."""
    return (terms + 2) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps + torch.finfo(dtype).eps


def assert_dense(got: tuple[Tensor, ...], rows: Tensor, weight: Tensor, grad: Tensor, counts: Tensor) -> None:
    """Assert that output, input gradient and weight gradient are those of the dense product, to the rounding."""
    rows64, weight64 = (t.detach().double().requires_grad_() for t in (rows, weight))
    want_y = dense(rows64, weight64, counts)
    want = want_y, *torch.autograd.grad(want_y, (rows64, weight64), grad.double())
    size64 = [t.detach().abs().requires_grad_() for t in (rows64, weight64)]
    size_y = dense(*size64, counts)
    size = size_y, *torch.autograd.grad(size_y, size64, grad.double().abs())
    terms = rows.shape[1], grad.shape[1], int(counts.max())
    for one, other, room, length in zip(got, want, size, terms, strict=True):
        assert one.dtype is rows.dtype
        assert ((one - other).abs() <= bound(length, rows.dtype) * room).all()


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
class TestProducts:
    # The fixture changes nothing between examples: a class lets Hypothesis see one choice at a time.
    def test_output_and_both_gradients_are_those_of_the_dense_product(self, dtype):
        @given(sizes=COUNTS, k=WIDTHS, n=WIDTHS, seed=st.integers(0, 99))
        def law(sizes, k, n, seed):
            counts = torch.tensor(sizes)
            rows = drawn(seed, sum(sizes), k, dtype=dtype).requires_grad_()
            weight = drawn(seed + 1, len(sizes), n, k, dtype=dtype).requires_grad_()
            grad = drawn(seed + 2, sum(sizes), n, dtype=dtype)
            y = grouped_matmul(rows, weight, counts)
            assert_dense((y, *torch.autograd.grad(y, (rows, weight), grad)), rows, weight, grad, counts)

        law()

    def test_the_pieces_are_what_the_whole_does(self, dtype):
        counts = torch.tensor([3, 0, 5])
        rows = drawn(0, 8, 16, dtype=dtype).requires_grad_()
        weight, grad = drawn(1, 3, 8, 16, dtype=dtype).requires_grad_(), drawn(2, 8, 8, dtype=dtype)
        y = grouped_matmul(rows, weight, counts)
        rows_grad, weight_grad = torch.autograd.grad(y, (rows, weight), grad)
        with torch.no_grad():
            assert torch.equal(grouped_matmul_forward(rows, weight, counts), y)
            assert torch.equal(grouped_matmul_input_grad(grad, weight, counts), rows_grad)
            assert torch.equal(grouped_matmul_weight_grad(grad, rows, counts), weight_grad)

    def test_experts_without_rows_get_a_gradient_of_zero(self, dtype):
        for counts in (torch.tensor([0, 4, 0]), torch.tensor([0, 0, 0])):
            rows = drawn(0, int(counts.sum()), 8, dtype=dtype).requires_grad_()
            weight = drawn(1, 3, 8, 8, dtype=dtype).requires_grad_()
            y = grouped_matmul(rows, weight, counts)
            y.backward(torch.ones_like(y))
            assert y.shape == (int(counts.sum()), 8)
            assert weight.grad is not None
            assert torch.equal(weight.grad.flatten(1).any(1), counts > 0)

    def test_an_expanded_gradient_and_strided_operands_are_taken(self, dtype):
        counts = torch.tensor([3, 0, 5])
        plain = [drawn(0, 8, 16, dtype=dtype), drawn(1, 3, 8, 16, dtype=dtype)]
        columns_first = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in plain]
        part_of_wider = [torch.cat([t, t[..., :1]], -1)[..., :-1] for t in plain]
        grads = []
        for operands in (plain, columns_first, part_of_wider):
            leaves = [t.requires_grad_() for t in operands]
            grouped_matmul(leaves[0], leaves[1], counts).sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for plain_grad, *others in zip(*grads, strict=True):
            assert all(torch.equal(plain_grad, other) for other in others)

    def test_a_gradient_that_nobody_wants_is_not_made(self, dtype):
        counts = torch.tensor([3, 5])
        rows, weight = drawn(0, 8, 8, dtype=dtype), drawn(1, 2, 8, 8, dtype=dtype)
        for wanted in (rows, weight):
            wanted.requires_grad_()
            grouped_matmul(rows, weight, counts).sum().backward()
            assert wanted.grad is not None
            wanted.requires_grad_(False)


@given(sizes=COUNTS, k=WIDTHS, n=WIDTHS, seed=st.integers(0, 99))
def test_the_loop_is_the_dense_product(sizes, k, n, seed):
    counts = torch.tensor(sizes)
    rows = drawn(seed, sum(sizes), k, dtype=torch.float64)
    weight = drawn(seed + 1, len(sizes), n, k, dtype=torch.float64)
    want = dense(rows, weight, counts)
    room = bound(k, torch.float64) * dense(rows.abs(), weight.abs(), counts)
    assert ((grouped_matmul_loop(rows, weight, counts) - want).abs() <= room).all()


def test_gradcheck():
    counts = torch.tensor([2, 0, 3])
    rows = drawn(0, 5, 3, dtype=torch.float64).requires_grad_()
    weight = drawn(1, 3, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: grouped_matmul(r, w, counts), (rows, weight))
    assert torch.autograd.gradcheck(lambda r, w: grouped_matmul_loop(r, w, counts), (rows, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_mistakes_are_named(path, dtype):
    with kernels.use(path):
        refuses_mistakes(dtype)


def refuses_mistakes(dtype):
    rows, weight = torch.ones(8, 8, dtype=dtype), torch.ones(2, 8, 8, dtype=dtype)
    with pytest.raises(ValueError, match="sum to 7, but there are 8 rows"):
        grouped_matmul(rows, weight, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="sum to 9"):
        grouped_matmul_weight_grad(rows, rows, torch.tensor([5, 4]))
    with pytest.raises(ValueError, match="3 experts, but the weight has 2"):
        grouped_matmul(rows, weight, torch.tensor([3, 4, 1]))
    with pytest.raises(ValueError, match="cast one"):
        grouped_matmul(rows, weight.half(), torch.tensor([3, 5]))
    with pytest.raises(ValueError, match="rows of width 7 and matrices for a width of 8"):
        grouped_matmul(rows[:, :7], weight, torch.tensor([3, 5]))
    with pytest.raises(ValueError, match="a gradient at 8 rows, but there are 7"):
        grouped_matmul_weight_grad(rows, rows[:7], torch.tensor([3, 5]))


def test_few_rows_of_a_wider_matrix_are_taken():
    wide, weight = drawn(0, 4, 13, dtype=torch.float32), drawn(1, 2, 8, 12, dtype=torch.float32)
    row, counts = wide[:1, :12], torch.tensor([0, 1])  # contiguous, with a stride that is no 16 bytes
    want = row @ weight[1].t()
    assert torch.allclose(grouped_matmul(row, weight, counts), want)
    assert grouped_matmul_weight_grad(want, row, counts)[1].any()
    none = wide[:0, ::2][:, :4]  # contiguous too, with any strides
    assert grouped_matmul(none, weight[..., :4], counts * 0).shape == (0, 8)
    assert not grouped_matmul_weight_grad(none, none, counts * 0).any()


def test_widening_only_touches_bfloat16(monkeypatch):
    monkeypatch.setattr(products, "native_bfloat16", lambda: False)
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    widened = [products.product_dtype(torch.zeros(1, dtype=dtype)) for dtype in dtypes]
    assert widened == [torch.float32, *dtypes[1:]]
    without_memory = torch.zeros(1, dtype=torch.bfloat16, device="meta")  # stands for one on this machine's device
    for gpu, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert products.product_dtype(without_memory) is dtype
    monkeypatch.setattr(products, "native_bfloat16", lambda: True)
    assert products.product_dtype(torch.zeros(1, dtype=torch.bfloat16)) is torch.bfloat16


def on_the_kernel(dtype, sizes, held):
    """Operands that take two blocks or steps each way, and every product of them by both paths."""
    inputs, outputs = (40, 70) if dtype is torch.float32 else (70, 130)
    counts = torch.tensor(sizes, device=DEVICE)
    rows = held(numbers(sum(sizes), inputs, seed=1, dtype=dtype)).requires_grad_()
    weight = held(numbers(len(sizes), outputs, inputs, seed=2, dtype=dtype)).requires_grad_()
    grad = held(numbers(sum(sizes), outputs, seed=3, dtype=dtype))

    def run():
        y = grouped_matmul(rows, weight, counts)
        return y.detach(), *torch.autograd.grad(y, (rows, weight), grad)

    return *on_both(run), rows, weight, grad, counts


@pytest.mark.parametrize("sizes", [[30, 0, 130, 7], [5], [0, 0], [0, 70, 0], [1] * 4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_give_the_products_of_the_twins(sizes, dtype):
    twin, kernel, *operands = on_the_kernel(dtype, sizes, guarded)
    assert_dense(twin, *operands)
    assert_dense(kernel, *operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pieces_are_what_the_whole_does_on_the_kernels_with_strided_operands(dtype):
    _, kernel, rows, weight, grad, counts = on_the_kernel(dtype, [5, 0, 66], strided)
    assert_dense(kernel, rows, weight, grad, counts)
    with kernels.use("triton"), torch.no_grad():
        assert same_bits(grouped_matmul_forward(rows, weight, counts), kernel[0])
        assert same_bits(grouped_matmul_input_grad(grad, weight, counts), kernel[1])
        assert same_bits(grouped_matmul_weight_grad(grad, rows, counts), kernel[2])


def test_the_kernels_take_half_precision_and_widths_of_zero():
    counts = torch.tensor([3, 0, 5], device=DEVICE)
    for inputs, outputs in ((20, 30), (0, 3)):
        rows, weight = numbers(8, inputs, seed=1).half(), numbers(3, outputs, inputs, seed=2).half()
        rows, weight, grad = (guarded(t) for t in (rows, weight, numbers(8, outputs, seed=3).half()))
        with kernels.use("triton"):
            got = (
                grouped_matmul_forward(rows, weight, counts),
                grouped_matmul_input_grad(grad, weight, counts),
                grouped_matmul_weight_grad(grad, rows, counts),
            )
        assert_dense(got, rows, weight, grad, counts)


def test_programs_in_groups_compute_every_block():
    counts = torch.tensor([300, 1, 290], device=DEVICE)  # 11 blocks of 64 rows, times 2
    rows, weight = guarded(numbers(591, 3, seed=1)), guarded(numbers(3, 70, 3, seed=2))
    twin, kernel = on_both(lambda: grouped_matmul_forward(rows, weight, counts))
    assert ((kernel - twin).abs() <= bound(3, torch.float32) * dense(rows.abs(), weight.abs(), counts)).all()
    grad, rows = guarded(numbers(5, 591, seed=3)), guarded(numbers(5, 70, seed=4))
    twin, kernel = on_both(lambda: grouped_matmul_weight_grad(grad, rows, torch.tensor([2, 3], device=DEVICE)))
    size = torch.stack([grad[:2].abs().t() @ rows[:2].abs(), grad[2:].abs().t() @ rows[2:].abs()])
    assert ((kernel - twin).abs() <= bound(3, torch.float32) * size).all()


def test_an_expert_without_rows_may_hold_anything():
    counts = torch.tensor([0, 5, 0, 3, 0], device=DEVICE)
    rows, weight = numbers(8, 16, seed=1), numbers(5, 24, 16, seed=2)
    weight[counts.cpu() == 0] = float("nan")
    for y in on_both(lambda: grouped_matmul_forward(guarded(rows), guarded(weight), counts)):
        assert y.isfinite().all()


def test_the_kernels_refuse_what_they_cannot_sum():
    rows, weight, counts = torch.ones(8, 8).double(), torch.ones(2, 8, 8).double(), torch.tensor([3, 5])
    with kernels.use("triton"), pytest.raises(ValueError, match=r"does not multiply torch\.float64"):
        grouped_matmul(*(t.to(DEVICE) for t in (rows, weight, counts)))


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operations(path):
    counts = torch.tensor([3, 0, 5], device=DEVICE)
    rows = numbers(8, 12, seed=1).to(DEVICE).requires_grad_()
    weight, grad = numbers(3, 20, 12, seed=2).to(DEVICE).requires_grad_(), numbers(8, 20, seed=3).to(DEVICE)
    ops = torch.ops.tangram
    with kernels.use(path):
        torch.library.opcheck(ops.grouped_matmul, (rows, weight, counts))
        torch.library.opcheck(ops.grouped_matmul_input_grad, (grad, weight.detach(), counts))
        torch.library.opcheck(ops.grouped_matmul_weight_grad, (grad, rows.detach(), counts))
        rows, weight, grad, counts = (t.detach().bfloat16().to("meta") for t in (rows, weight, grad, counts))
        for made, like in (
            (ops.grouped_matmul(rows, weight, counts), grad),
            (ops.grouped_matmul_input_grad(grad, weight, counts), rows),
            (ops.grouped_matmul_weight_grad(grad, rows, counts), weight),
        ):
            assert (made.device.type, made.dtype, made.shape) == ("meta", torch.bfloat16, like.shape)
