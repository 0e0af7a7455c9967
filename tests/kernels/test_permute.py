"""Sorting tokens by expert and bringing them back: nothing lost, nothing doubled, sums in float64 agree.

And the kernels agree with their twins.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from twins import guarded, numbers, on_both, same_bits, strided

from tangram import kernels
from tangram.kernels import Order, order_by_expert, permute, unpermute
from tangram.testing import assert_close

SHAPES = st.tuples(st.integers(0, 12), st.integers(1, 4), st.integers(4, 9), st.integers(1, 6))  # N, K, E, D
SKEWS = st.sampled_from([0.0, 1.0, 50.0])
GAPS = st.sampled_from([0.0, 0.5, 1.0])


def routing(seed: int, n: int, k: int, e: int, skew: float) -> Tensor:
    """Distinct experts for each token; a large skew sends all tokens to the same ones."""
    g = torch.Generator().manual_seed(seed)
    preference = torch.rand(n, e, generator=g) + skew * torch.rand(e, generator=g)
    return preference.topk(k, dim=1).indices


def with_gaps(ids: Tensor, seed: int, share: float) -> Tensor:
    """Some slots, a share of them, have no expert."""
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < share, -1, ids)


def ordered(ids: Tensor, n_experts: int) -> Order:
    """The order of ids of which some may be gaps."""
    rows = int((ids >= 0).sum())
    return order_by_expert(ids, n_experts, None if rows == ids.numel() else rows)


@given(shape=SHAPES, skew=SKEWS, gaps=GAPS, seed=st.integers(0, 99))
def test_rows_are_sorted_by_expert_then_token_and_every_slot_but_a_gap_has_one(shape, skew, gaps, seed):
    n, k, e, _ = shape
    ids = with_gaps(routing(seed, n, k, e, skew), seed, gaps)
    order = ordered(ids, e)
    slots = [(int(ids[t, s]), t, t * k + s) for t in range(n) for s in range(k) if ids[t, s] >= 0]
    assert order.index.tolist() == [token for _, token, _ in sorted(slots)]
    assert order.slots.tolist() == [slot for _, _, slot in sorted(slots)]
    assert order.inverse.flatten()[order.slots].tolist() == list(range(len(slots)))
    assert (order.inverse[ids < 0] == -1).all()
    assert order.inverse.shape == (n, k)
    assert order.counts.tolist() == [sum(expert == wanted for expert, _, _ in slots) for wanted in range(e)]


@given(shape=SHAPES, skew=SKEWS, seed=st.integers(0, 99))
def test_there_and_back_with_gates_that_sum_to_one_changes_nothing(shape, skew, seed):
    n, k, e, d = shape
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = order_by_expert(routing(seed, n, k, e, skew), e)
    gates = torch.full((n, k), 1.0).softmax(-1)
    assert torch.allclose(unpermute(permute(x, order), gates, order), x, rtol=4 * torch.finfo(gates.dtype).eps)


@given(
    shape=SHAPES,
    skew=SKEWS,
    gaps=GAPS,
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_experts_that_scale_their_rows_equal_a_dense_mixture_with_gradients(shape, skew, gaps, seed, dtype):
    n, k, e, d = shape
    g = torch.Generator().manual_seed(seed)
    ids = with_gaps(routing(seed, n, k, e, skew), seed, gaps)
    order = ordered(ids, e)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    gates = torch.rand(n, k, generator=g, dtype=torch.float64).to(wide).requires_grad_()
    grad = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    factors = 2.0 ** (torch.arange(e, dtype=torch.float64) - e // 2)  # exact in every dtype
    rows = permute(x, order) * factors.to(dtype).repeat_interleave(order.counts)[:, None]
    y = unpermute(rows, gates, order)
    got = torch.autograd.grad(y, (x, gates), grad)
    assert (rows.dtype, y.dtype, got[0].dtype, got[1].dtype) == (dtype, dtype, dtype, wide)

    x64, gates64 = x.detach().double().requires_grad_(), gates.detach().double().requires_grad_()
    dense = torch.where(ids < 0, 0.0, factors[ids])  # [N, K]
    want_y = (dense * gates64).sum(1, keepdim=True) * x64
    want = torch.autograd.grad(want_y, (x64, gates64), grad.double())
    outer, inner = torch.finfo(dtype).eps, torch.finfo(wide).eps
    sums = (dense * gates64.detach()).sum(1, keepdim=True)
    assert ((y - want_y).abs() <= (outer + 2 * k * inner) * want_y.abs() + 1e-37).all()
    # The gradient of a row is rounded before it is scaled and summed, and the sum is rounded again.
    assert ((got[0] - want[0]).abs() <= (2 * outer + 4 * k * inner) * sums * grad.double().abs()).all()
    products = dense * (x64.detach() * grad.double()).abs().sum(1, keepdim=True)
    assert ((got[1] - want[1]).abs() <= (d + 2) * inner * products + 1e-37).all()


@pytest.mark.parametrize("gaps", [0.0, 0.5])
def test_gradcheck(gaps):
    order = ordered(with_gaps(routing(0, 5, 2, 4, 1.0), 0, gaps), 4)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(order.index), 3, generator=g, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(5, 2, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: permute(t, order), x)
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, w, order), (rows, gates))


def test_small_rows_are_not_lost_beside_a_large_one_in_bfloat16():
    # 256 + 16 * 0.5 in bfloat16 steps of 2 stays 256; in float32 it is 264.
    ids = torch.arange(17)[None]
    order = order_by_expert(ids, 17)
    rows = torch.full((17, 1), 0.5, dtype=torch.bfloat16)
    rows[0] = 256
    assert unpermute(rows, torch.ones(1, 17), order).item() == 264
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    permute(x, order).backward(rows)
    assert x.grad is not None
    assert x.grad.item() == 264


def test_expanded_gradients_and_strided_tokens():
    ids = routing(0, 6, 2, 4, 0.0)
    order = order_by_expert(ids, 4)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
    gates = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)).t().requires_grad_()
    unpermute(permute(x, order), gates, order).sum().backward()
    assert x.grad is not None
    assert gates.grad is not None
    assert torch.allclose(x.grad, gates.detach().sum(1, keepdim=True).expand(6, 3))
    assert torch.allclose(gates.grad, x.detach().sum(1, keepdim=True).expand(6, 2))


class Ops(TorchDispatchMode):
    """Records the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_direction_scatters_into_activations():
    order = order_by_expert(routing(0, 6, 2, 4, 0.0), 4)
    x = torch.ones(6, 3, requires_grad=True)
    gates = torch.ones(6, 2, requires_grad=True)
    with Ops() as ops:
        unpermute(permute(x, order), gates, order).sum().backward()
    assert "index_select" in ops.names
    assert not {name for name in ops.names if "scatter" in name or name.startswith(("index_add", "index_put"))}


def fenced(order: Order) -> Order:
    """The order with numbers of no row around its parts."""
    return Order(*(guarded(each) for each in (order.index, order.inverse, order.counts, order.slots)), order.gaps)


def on_device(n: int, k: int, gaps: float = 0.0) -> Order:
    """A fenced order of n tokens by 8 experts."""
    return fenced(ordered(with_gaps(routing(0, n, k, 8, 1.0), 0, gaps), 8))


@pytest.mark.parametrize(
    ("n", "k", "d", "gaps"),
    [
        (70, 3, 100, 0.0),
        (70, 3, 100, 0.5),
        (5, 8, 2050, 0.0),
        (1, 1, 1, 0.0),
        (0, 2, 4, 0.0),
        (3, 2, 0, 0.0),
        (3, 0, 4, 0.0),
        (3, 2, 4, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [guarded, strided])
def test_the_kernels_agree_with_the_twins(n, k, d, gaps, dtype, held):
    order = on_device(n, k, gaps)
    wide = torch.promote_types(dtype, torch.float32)
    x, y_grad = (held(numbers(n, d, seed=seed, dtype=dtype)) for seed in (1, 2))
    rows, rows_grad = (held(numbers(len(order.index), d, seed=seed, dtype=dtype)) for seed in (3, 4))
    gates = held(numbers(n, k, seed=5, dtype=wide))

    def run() -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in (x, rows, gates)]
        out, back = permute(leaves[0], order), unpermute(leaves[1], leaves[2], order)
        grads = torch.autograd.grad(out, leaves[0], rows_grad) + torch.autograd.grad(back, leaves[1:], y_grad)
        return [out.detach(), back.detach(), *grads]

    twins, both = on_both(run)
    assert same_bits(twins[0], both[0])
    # A gate times a row is summed over the slots, and so is the gradient of x; a gate's gradient is summed over D.
    for kernel, twin, terms in zip(both[1:], twins[1:], (k + 1, k, 1, d), strict=True):
        assert (kernel.dtype, kernel.shape) == (twin.dtype, twin.shape)
        assert_close(kernel, twin, length=1 if kernel.dtype is torch.bfloat16 else max(terms, 1))


def test_the_kernel_sums_in_float32():
    order = fenced(order_by_expert(torch.arange(17)[None], 17))
    rows = guarded(torch.full((17, 1), 0.5, dtype=torch.bfloat16))
    rows[0] = 256
    with kernels.use("triton"):
        assert unpermute(rows, guarded(torch.ones(1, 17)), order).item() == 264


def test_the_kernels_take_expanded_gradients_strided_tokens_and_gates_in_bfloat16():
    order = on_device(6, 2)
    x, gates = guarded(numbers(3, 6, seed=1)).t(), guarded(numbers(2, 6, seed=2, dtype=torch.bfloat16)).t()

    def run() -> tuple[Tensor, ...]:
        leaves = x.detach().requires_grad_(), gates.detach().requires_grad_()
        return torch.autograd.grad(unpermute(permute(leaves[0], order), leaves[1], order).sum(), leaves)

    for twin, kernel in zip(*on_both(run), strict=True):
        assert_close(kernel, twin, length=3)


def results(op: Callable[..., Any], args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = op(*args)
    return (out,) if isinstance(out, Tensor) else out


@pytest.mark.parametrize(("path", "gaps"), [("reference", 0.0), ("triton", 0.0), ("triton", 0.5)])
def test_torch_knows_the_operations(path, gaps):
    order = ordered(with_gaps(routing(0, 4, 2, 3, 1.0), 0, gaps), 3)
    x, grad = numbers(4, 5, seed=1, dtype=torch.bfloat16), numbers(4, 5, seed=2, dtype=torch.bfloat16)
    rows, gates = numbers(len(order.index), 5, seed=3, dtype=torch.bfloat16), numbers(4, 2, seed=4)
    places = order.index, order.inverse, order.slots
    calls = {
        "permute": (x, order.index, order.inverse),
        "permute_backward": (rows, order.inverse),
        "unpermute": (rows, gates, *places),
        "unpermute_backward": (grad, rows, gates, *places),
    }
    with kernels.use(path):
        for name, args in calls.items():
            op = partial(getattr(torch.ops.tangram, name), gaps=order.gaps)
            for real, empty in zip(results(op, args), results(op, [each.to("meta") for each in args]), strict=True):
                assert (real.dtype, real.shape, real.stride()) == (empty.dtype, empty.shape, empty.stride())
            differentiable = not name.endswith("backward")
            leaves = [each.clone().requires_grad_(differentiable and each.is_floating_point()) for each in args]
            torch.library.opcheck(op.func, leaves, op.keywords)
