import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.autograd import Recompute, WeightGrads, grouped_linear, head_loss, linear
from tangram.core.experiment import RECOMPUTE
from tangram.testing import assert_close, seeds


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds(), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_linear_is_the_product_and_its_gradients(seed: int, n: int, d_in: int, d_out: int) -> None:
    x, weight = _random(seed, 2, n, d_in).requires_grad_(), _random(seed + 1, d_out, d_in).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: linear(x, w, WeightGrads()), (x, weight))
    assert_close(linear(x, weight, WeightGrads()), x @ weight.t(), length=d_in)


def test_grouped_linear_has_the_right_gradients_with_an_empty_expert() -> None:
    counts = torch.tensor([3, 0, 2])
    rows, weight = _random(0, 5, 4).requires_grad_(), _random(1, 3, 6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear(r, w, counts, WeightGrads()), (rows, weight))


def test_head_loss_has_the_right_gradients() -> None:
    x, weight = _random(0, 7, 4).requires_grad_(), _random(1, 9, 4).requires_grad_()
    targets = torch.tensor([0, 8, -100, 3, 3, -100, 1])
    assert torch.autograd.gradcheck(lambda x, w: head_loss(x, w, targets, 0.25, WeightGrads()), (x, weight))


@pytest.mark.parametrize("op", ["linear", "grouped", "head"])
def test_deferred_weight_gradients_are_those_that_were_not(op: str) -> None:
    queue = WeightGrads()
    x, shape = _random(0, 5, 4), (3, 6, 4) if op == "grouped" else (6, 4)
    counts, targets = torch.tensor([3, 0, 2]), torch.tensor([0, 5, 1, 1, -100])

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        if op == "head":
            return head_loss(x, weight, targets, 0.5, queue)
        y = linear(x, weight, queue) if op == "linear" else grouped_linear(x, weight, counts, queue)
        return y.square().sum()

    weights = [_random(1, *shape).requires_grad_() for _ in range(2)]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    loss(inputs[0], weights[0]).backward()
    with queue.deferred() as pending:
        loss(inputs[1], weights[1]).backward()
    assert weights[1].grad is None
    assert torch.equal(inputs[1].grad, inputs[0].grad)
    for add in [*pending, *pending]:
        add()
    assert torch.equal(weights[1].grad, 2 * weights[0].grad)  # each call adds once


def test_deferring_inside_deferring_is_refused() -> None:
    queue = WeightGrads()
    with queue.deferred(), pytest.raises(RuntimeError, match="one backward runs at a time"), queue.deferred():
        pass
    with queue.deferred() as pending:  # and the queue is usable again
        assert pending == []


class Saved:
    """Counts the elements that a forward keeps for backward."""

    def __init__(self) -> None:
        self.elements = 0

    def pack(self, tensor: Tensor) -> Tensor:
        self.elements += tensor.numel()
        return tensor


def _network(recompute: Recompute, x: Tensor, weights: list[Tensor]) -> Tensor:
    """Chained recipes, a view of one (a transposed, strided slice), and an operation that saves both its operands."""
    a = recompute(lambda t: t.sigmoid() * 2, x)
    b = recompute(lambda t, w: t @ w, a, weights[0])
    left, right = b.t().chunk(2, 0)
    return ((left.t() * right.t()) @ weights[1]).tanh().sum() + (a * a).sum()


@given(seeds(), st.integers(1, 6), st.integers(1, 5))
def test_recomputed_gradients_are_bitwise_the_plain_ones(seed: int, n: int, d: int) -> None:
    gradients = []
    for policy in RECOMPUTE:
        leaves = [_random(seed, n, d), _random(seed + 1, d, 2 * d), _random(seed + 2, d, d)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        recompute = Recompute(policy)
        with recompute.scope():
            loss = recompute.whole(_network, recompute, leaves[0], leaves[1:])
        loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    for other in gradients[1:]:
        assert all(torch.equal(plain, again) for plain, again in zip(gradients[0], other, strict=True))


def test_what_is_recomputed_is_freed_and_made_once() -> None:
    made: list[int] = []
    freed: list[weakref.ref[Tensor]] = []

    def up(t: Tensor) -> Tensor:
        y = t * 3  # saves nothing of its own
        made.append(1)
        freed.append(weakref.ref(y))
        return y

    recompute = Recompute("selective")
    x = _random(0, 4, 4).requires_grad_()
    with recompute.scope():
        y = recompute(up, x)
        loss = (y * y.sin()).sum() + y.square().sum()
        del y
    gc.collect()
    assert [ref() for ref in freed] == [None]
    assert len(made) == 1
    loss.backward()
    assert len(made) == 2  # once more for all four uses


@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("selective", 1), ("full", 2)])
def test_a_whole_is_run_again_under_full_alone_and_what_it_was_made_of_is_freed(policy: str, runs: int) -> None:
    freed: list[weakref.ref[Tensor]] = []

    def chain(t: Tensor) -> Tensor:
        y = t.sin()
        freed.append(weakref.ref(y.untyped_storage()))
        return recompute.whole(torch.exp, y) * y  # one inside another is no more than its function

    recompute = Recompute(policy)
    x = _random(0, 4, 4).requires_grad_()
    with recompute.scope():
        loss = recompute.whole(chain, x).sum()
    gc.collect()
    assert (freed[0]() is None) == (policy == "full")
    loss.backward()
    assert len(freed) == runs
    y = x.detach().sin()
    assert x.grad is not None
    assert_close(x.grad, y.exp() * (y + 1) * x.detach().cos(), length=4)


def test_a_whole_is_run_again_for_each_backward_and_no_further_than_what_it_saved() -> None:
    runs: list[str] = []

    def chain(t: Tensor) -> Tensor:
        runs.append("sin")
        y = t.sin()
        runs.append("sum")
        return y.sum()

    recompute, x = Recompute("full"), _random(0, 4).requires_grad_()
    with recompute.scope():
        loss = recompute.whole(chain, x)
    assert runs == ["sin", "sum"]
    for _ in range(2):
        assert torch.equal(*torch.autograd.grad(loss, x, retain_graph=True), x.detach().cos())
    assert runs == ["sin", "sum", "sin", "sin"]


def test_a_whole_that_saves_something_else_the_second_time_is_an_error() -> None:
    recompute, x, lengths = Recompute("full"), _random(0, 4).requires_grad_(), [3, 4]
    with recompute.scope():
        loss = recompute.whole(lambda t: t[: lengths.pop()].sin().sum(), x)
    with pytest.raises(RuntimeError, match="save other tensors than at first"):
        loss.backward()


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_outside_a_scope_and_without_gradients_nothing_is_remembered(policy: str) -> None:
    recompute, runs = Recompute(policy), []
    x = _random(0, 3).requires_grad_()

    def exp(t: Tensor) -> Tensor:
        runs.append(None)
        return t.exp()

    recompute(exp, x).sin().sum().backward()
    recompute.whole(exp, x).sin().sum().backward()
    with torch.no_grad(), recompute.scope():
        assert torch.equal(recompute.whole(recompute, exp, x), x.exp())
    assert len(runs) == 3
    with recompute.scope():
        pass
    with recompute.scope(), pytest.raises(RuntimeError, match="a scope is one phase"), recompute.scope():
        pass
