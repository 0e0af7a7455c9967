"""The head and its cross entropy in one, against the dense definition in float64."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from twins import DEVICE, guarded, same_bits, strided

from tangram import kernels
from tangram.kernels import linear_cross_entropy, products
from tangram.kernels.cross_entropy import CrossEntropy

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=[True, False], ids=["native", "widened"])
def _bfloat16(request, monkeypatch):
    """Both sides of the choice that the CPU makes for bfloat16."""
    monkeypatch.setattr(products, "native_bfloat16", lambda: request.param)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def some_targets(seed: int, n: int, v: int, ignored: float) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, v, (n,), generator=g)
    return targets.masked_fill(torch.rand(n, generator=g) < ignored, -100)


def definition(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients by autograd through the probabilities themselves, kept rows only, in float64."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    kept = targets != -100
    p = (x[kept] @ weight.t()).softmax(-1)
    chosen = p[torch.arange(len(p)), targets[kept]]
    loss = -scale * chosen.log().sum()
    x_grad, weight_grad = torch.autograd.grad(loss, (x, weight))
    return loss.detach(), x_grad, weight_grad


def rooms(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """What rounding may do to the loss and the gradients, to first order and half as much again.

    A logit is rounded to the dtype after a sum of D products; softmax, logarithm and loss are sums
    in the accumulator; the gradient at the logits and the product after it are rounded to the dtype.
    """
    outer, inner = (torch.finfo(t).eps for t in (x.dtype, torch.promote_types(x.dtype, torch.float32)))
    (n, d), v = x.shape, len(weight)
    x, weight, kept = x.double(), weight.double(), (targets != -100).unsqueeze(1)
    z, size = x @ weight.t(), x.abs() @ weight.abs().t()
    p = z.softmax(-1)
    dz = kept * scale * (p - torch.nn.functional.one_hot(targets.clamp_min(0), v))
    z_room = outer * z.abs() + (d + 2) * inner * size
    mean_room = (p * z_room).sum(-1, keepdim=True) + (v + 8) * inner * (1 + z.abs().amax(-1, keepdim=True))
    log_p = z.log_softmax(-1).abs()
    loss_room = scale * (kept * (z_room + mean_room + (n + 2) * inner * log_p)).amax(-1).sum()
    dz_room = kept * scale * p * (z_room + mean_room) + (outer + 4 * inner) * dz.abs()
    x_size, weight_size = dz.abs() @ weight.abs(), dz.abs().t() @ x.abs()
    x_room = dz_room @ weight.abs() + (outer + (v + 2) * inner) * x_size
    weight_room = dz_room.t() @ x.abs() + (outer + (2 * n + 2) * inner) * weight_size
    return 1.5 * loss_room, 1.5 * x_room, 1.5 * weight_room


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_are_those_of_the_definition(dtype):
    wide = torch.promote_types(dtype, torch.float32)

    @given(
        n=st.integers(1, 20),
        d=st.integers(1, 12),
        v=st.integers(1, 30),
        chunk=st.integers(1, 25),
        ignored=st.sampled_from([0.0, 0.4, 1.0]),
        seed=st.integers(0, 99),
    )
    def law(n, d, v, chunk, ignored, seed):
        x, weight = drawn(seed, n, d, dtype=dtype), drawn(seed + 1, v, d, dtype=dtype)
        targets, scale = some_targets(seed, n, v, ignored), 1 / 7
        got = linear_cross_entropy(x, weight, targets, scale, chunk=chunk, gradients=True)
        assert [t.dtype for t in got if t is not None] == [wide, dtype, wide]
        want = definition(x, weight, targets, scale)
        for one, other, room in zip(got, want, rooms(x, weight, targets, scale), strict=True):
            assert ((one - other).abs() <= room).all()

    law()


@given(chunk=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_chunk_changes_nothing_beyond_rounding(chunk, seed):
    x, weight, targets = drawn(seed, 33, 5), drawn(seed + 1, 17, 5), some_targets(seed, 33, 17, 0.3)
    whole = linear_cross_entropy(x, weight, targets, 0.5, chunk=1000, gradients=True)
    parts = linear_cross_entropy(x, weight, targets, 0.5, chunk=chunk, gradients=True)
    for one, other in zip(whole, parts, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=0, atol=33 * 17 * torch.finfo(torch.float64).eps * 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_contribute_exactly_nothing(dtype):
    x, weight, targets = (
        drawn(0, 12, 4, dtype=dtype),
        drawn(1, 7, 4, dtype=dtype),
        some_targets(0, 12, 7, 0.5),
    )
    kept = targets != -100
    assert kept.any()
    assert not kept.all()
    loss, x_grad, weight_grad = linear_cross_entropy(x, weight, targets, 0.5, gradients=True)
    moved = torch.where(kept[:, None], x, 9 * x)
    again = linear_cross_entropy(moved, weight, targets, 0.5, gradients=True)
    assert torch.equal(again.loss, loss)
    assert torch.equal(again.x_grad, x_grad)
    assert torch.equal(again.weight_grad, weight_grad)
    assert torch.equal(x_grad.any(-1), kept)


def test_the_target_to_ignore_can_be_any():
    x, weight, targets = drawn(0, 12, 4), drawn(1, 7, 4), some_targets(0, 12, 7, 0.5)
    usual = linear_cross_entropy(x, weight, targets, 0.5, gradients=False)
    padding = linear_cross_entropy(x, weight, targets.masked_fill(targets < 0, 7), 0.5, ignore=7, gradients=False)
    assert torch.equal(usual.loss, padding.loss)


@pytest.mark.parametrize("n", [0, 6])
def test_nothing_to_predict_is_a_loss_of_zero(n):
    x, weight = drawn(0, n, 4, dtype=torch.float32), drawn(1, 7, 4, dtype=torch.float32)
    loss, x_grad, weight_grad = linear_cross_entropy(x, weight, torch.full((n,), -100), 0.5, gradients=True)
    assert loss.item() == 0
    assert torch.equal(x_grad, torch.zeros(n, 4))
    assert torch.equal(weight_grad, torch.zeros(7, 4))


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_cost_the_logarithm_of_the_vocabulary_in_float32_or_better(dtype):
    x, weight, targets = torch.zeros(3, 4, dtype=dtype), drawn(0, 50, 4, dtype=dtype), torch.tensor([0, 1, 2])
    loss, x_grad, weight_grad = linear_cross_entropy(x, weight, targets, 1 / 3, gradients=False)
    assert math.isclose(float(loss), math.log(50), rel_tol=1e-6)
    assert x_grad is None
    assert weight_grad is None


def test_logits_of_thousands_stay_finite():
    x = torch.full((2, 1), 1e4)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    loss, x_grad, weight_grad = linear_cross_entropy(x, weight, torch.tensor([0, 1]), 1.0, gradients=True)
    assert float(loss) == 2e4
    assert x_grad is not None
    assert x_grad.flatten().tolist() == [0.0, 2.0]
    assert weight_grad is not None
    assert weight_grad.isfinite().all()


def test_nothing_is_recorded_for_autograd():
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    out = linear_cross_entropy(x, weight, torch.tensor([0, 1]), 1.0, gradients=True)
    assert not any(t.requires_grad for t in out if t is not None)


def test_strided_operands_are_taken():
    x, weight, targets = drawn(0, 4, 9).t(), drawn(1, 4, 7).t(), some_targets(0, 9, 7, 0.3)
    strided = linear_cross_entropy(x, weight, targets, 0.5, chunk=4, gradients=True)
    plain = linear_cross_entropy(x.contiguous(), weight.contiguous(), targets, 0.5, chunk=4, gradients=True)
    for one, other in zip(strided, plain, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-12)


class Largest(TorchDispatchMode):
    """Records the most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        self.numel = max(self.numel, *(t.numel() for t in made if isinstance(t, Tensor)), 0)
        return out


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_logits_of_all_tokens_never_exist(dtype):
    n, d, v, chunk = 256, 8, 64, 16
    x, weight, targets = drawn(0, n, d, dtype=dtype), drawn(1, v, d, dtype=dtype), some_targets(0, n, v, 0.2)
    with Largest() as seen:
        linear_cross_entropy(x, weight, targets, 1 / n, chunk=chunk, gradients=True)
    assert seen.numel == max(n * d, v * d, chunk * v)


KERNEL = sys.modules["tangram.kernels.cross_entropy"]


def by_kernel(x: Tensor, weight: Tensor, targets: Tensor, scale: float, **settings) -> CrossEntropy:
    """Return what the Triton kernel gives, on the CPU."""
    with kernels.use("triton"):
        out = linear_cross_entropy(x.to(DEVICE), weight.to(DEVICE), targets.to(DEVICE), scale, **settings)
    return CrossEntropy(*(None if t is None else t.cpu() for t in out))


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [guarded, strided])
@pytest.mark.parametrize(
    ("n", "d", "v", "chunk", "ignored"),
    [(9, 5, 100, 4, 0.3), (5, 12, 64, 9, 0.0), (4, 3, 33, 2, 1.0), (3, 2, 1, 3, 0.0), (0, 2, 5, 3, 0.0)],
)
def test_the_kernel_gives_the_loss_and_gradients_of_the_definition(n, d, v, chunk, ignored, held, dtype, monkeypatch):
    monkeypatch.setattr(KERNEL, "_BLOCK", 32)
    x, weight = held(4 * drawn(n, n, d, dtype=dtype)), held(drawn(n + 1, v, d, dtype=dtype))
    targets, scale = guarded(some_targets(n, n, v, ignored)), 1 / 7
    got = by_kernel(x, weight, targets, scale, chunk=chunk, gradients=True)
    twin = linear_cross_entropy(x.cpu(), weight.cpu(), targets.cpu(), scale, chunk=chunk, gradients=True)
    want = definition(x.cpu(), weight.cpu(), targets.cpu(), scale)
    for one, by_twin, other, room in zip(
        got, twin, want, rooms(x.cpu(), weight.cpu(), targets.cpu(), scale), strict=True
    ):
        assert (one.dtype, one.shape) == (by_twin.dtype, by_twin.shape)
        assert ((one - other).abs() <= room).all()
    kept = targets.cpu() != -100
    assert not got.x_grad[~kept].any()


def test_the_kernel_takes_another_ignored_target_and_no_gradients():
    x, weight, targets = drawn(0, 12, 4), drawn(1, 7, 4), some_targets(0, 12, 7, 0.5)
    usual = by_kernel(x, weight, targets, 0.5, gradients=True)
    padding = by_kernel(x, weight, targets.masked_fill(targets < 0, 7), 0.5, ignore=7, gradients=False)
    assert same_bits(usual.loss, padding.loss)
    assert padding.x_grad is None
    assert padding.weight_grad is None


def test_the_kernel_keeps_logits_of_thousands_finite(monkeypatch):
    monkeypatch.setattr(KERNEL, "_BLOCK", 2)
    x, weight = torch.full((2, 1), 1e4), torch.tensor([[-1.0], [0.5], [1.0], [-2.0], [0.0]])
    loss, x_grad, weight_grad = by_kernel(x, weight, torch.tensor([2, 0]), 1.0, gradients=True)
    assert float(loss) == 2e4
    assert x_grad.flatten().tolist() == [0.0, 2.0]
    assert weight_grad.flatten().tolist() == [-1e4, 0.0, 1e4, 0.0, 0.0]


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_knows_the_operation(path, dtype):
    logits, targets = drawn(0, 5, 7, dtype=dtype), some_targets(0, 5, 7, 0.3)
    op = torch.ops.tangram.cross_entropy_rows
    with kernels.use(path):
        for gradients in (True, False):
            torch.library.opcheck(op, (logits.clone(), targets, 0.5, -100, gradients))
        losses = op(logits.clone(), targets, 0.5, -100, True)
    meta = op(logits.to("meta"), targets.to("meta"), 0.5, -100, True)
    assert (meta.dtype, meta.shape) == (losses.dtype, losses.shape) == (torch.float32, (5,))


def test_mistakes_are_named():
    x, weight, targets = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="cast one"):
        linear_cross_entropy(x, weight.double(), targets, 1.0, gradients=False)
    with pytest.raises(ValueError, match="chunk is 0"):
        linear_cross_entropy(x, weight, targets, 1.0, chunk=0, gradients=False)
