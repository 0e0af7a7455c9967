"""One product per expert, against a dense one-hot product in float64, by every way it may be computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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
            got = torch.autograd.grad(y, (rows, weight), grad)
            rows64, weight64 = (t.detach().double().requires_grad_() for t in (rows, weight))
            want_y = dense(rows64, weight64, counts)
            want = torch.autograd.grad(want_y, (rows64, weight64), grad.double())
            size64 = [t.detach().abs().requires_grad_() for t in (rows64, weight64)]
            size_y = dense(*size64, counts)
            size = torch.autograd.grad(size_y, size64, grad.double().abs())
            assert {y.dtype, got[0].dtype, got[1].dtype} == {dtype}
            assert ((y - want_y).abs() <= bound(k, dtype) * size_y).all()
            assert ((got[0] - want[0]).abs() <= bound(n, dtype) * size[0]).all()
            assert ((got[1] - want[1]).abs() <= bound(max(sizes), dtype) * size[1]).all()

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
def test_mistakes_are_named(dtype):
    rows, weight = torch.ones(8, 8, dtype=dtype), torch.ones(2, 8, 8, dtype=dtype)
    with pytest.raises(ValueError, match="sum to 7, but there are 8 rows"):
        grouped_matmul(rows, weight, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="sum to 9"):
        grouped_matmul_weight_grad(rows, rows, torch.tensor([5, 4]))
    with pytest.raises(ValueError, match="3 experts, but the weight has 2"):
        grouped_matmul(rows, weight, torch.tensor([3, 4, 1]))
    with pytest.raises(ValueError, match="cast one"):
        grouped_matmul(rows, weight.half(), torch.tensor([3, 5]))


def test_widening_only_touches_bfloat16(monkeypatch):
    monkeypatch.setattr(products, "native_bfloat16", lambda: False)
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    widened = [products.product_dtype(torch.zeros(1, dtype=dtype)) for dtype in dtypes]
    assert widened == [torch.float32, *dtypes[1:]]
    assert products.product_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) is torch.bfloat16
    monkeypatch.setattr(products, "native_bfloat16", lambda: True)
    assert products.product_dtype(torch.zeros(1, dtype=torch.bfloat16)) is torch.bfloat16
