"""What was recorded does the same again on whatever lies there now, and what cannot be recorded says so."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from twins import numbers

from tangram import kernels
from tangram.kernels import record, records
from tangram.testing import assert_close


@pytest.fixture(autouse=True)
def _as_by_default():
    """Choose as a user does who says nothing: other tests of this folder ask for kernels."""
    with kernels.use("auto"):
        yield


def layer(x: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views, allocations, writes in place, results of several tensors, and the package's own compiled operations."""
    normed = kernels.rmsnorm(x, weight[0], 1e-6)
    product = kernels.product_transposed(normed, weight)
    left, right = product.chunk(2, -1)
    both = torch.cat([left.sigmoid(), right.double().float()], -1)
    kept.add_(both.sum((0, 1)))
    values, places = both.topk(2, -1)
    both = both.mT.contiguous().mT.reshape(both.shape)
    filled = torch.zeros_like(both).scatter_(-1, places, values)
    return filled.transpose(0, 1).reshape(-1, both.shape[-1]), places.flatten(), kept.clone(), both.argmax(-1)


@given(batch=st.integers(1, 3), length=st.integers(1, 4), width=st.integers(2, 9), seed=st.integers(0, 99))
def test_it_does_the_same_on_other_numbers(batch: int, length: int, width: int, seed: int) -> None:
    width *= 2
    x, other = (numbers(batch, length, width, seed=seed + n) for n in range(2))
    weight = numbers(width, width, seed=seed + 2)
    with torch.inference_mode():
        kept = torch.zeros(width)
        out, recording = record(lambda: layer(x, weight, kept))
        first = layer(x.clone(), weight, torch.zeros(width))
        assert all(torch.equal(one, two) for one, two in zip(out, first, strict=True))
        assert recording.refused is None
        before = kept.clone()
        x.copy_(other)
        wanted = layer(other, weight, before)
        recording.replay()
        assert all(torch.equal(one, two) for one, two in zip(out, wanted, strict=True))


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: bool(x.sum() > 0),
        lambda x: int(x.sum()),
        lambda x: float(x.sum()),
        lambda x: 0 if x.sum() > 0 else 1,
        lambda x: range(4)[x.long().abs().max().clamp(max=1)],
        lambda x: 1.0 in x,
        lambda x: x.data_ptr(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.rand_like(x),
        lambda x: x.bernoulli(0.5) if x.min() >= 0 else x,
    ],
)
@torch.inference_mode()
def test_what_depends_on_more_than_its_operations_is_refused(look) -> None:
    x = torch.full((3,), 0.25)
    out, recording = record(lambda: look(x))
    assert recording.refused
    assert out is not None, "it was done all the same"


@torch.inference_mode()
def test_memory_that_nobody_else_holds_is_kept() -> None:
    x, weight = torch.ones(1, 64), torch.full((64,), 2.0)

    def forward() -> torch.Tensor:
        between = [x + number for number in range(50)]
        normed = x
        for _ in range(20):
            normed = kernels.rmsnorm(normed, weight, 0.0)
        return torch.stack(between).sum(0) + normed

    out, recording = record(forward)
    others = [torch.full((1, 64), 7.0) for _ in range(100)]
    x.fill_(3.0)
    recording.replay()
    assert_close(out, torch.full((1, 64), 50 * 3.0 + sum(range(50)) + 2.0), length=64)
    assert all((other == 7.0).all() for other in others)


def test_only_what_needs_no_gradient_is_recorded_and_nothing_where_plain_torch_is_asked_for() -> None:
    x = torch.ones(2)
    assert not records(x)
    with torch.inference_mode():
        assert records(x)
        assert not records(x.to("meta"))
        with kernels.use("reference"):
            assert not records(x)
