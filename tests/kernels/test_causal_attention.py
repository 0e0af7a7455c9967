"""Causal attention: two products and one sum written out, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tangram.kernels import causal_attention, masked_attention
from tangram.testing import assert_close, seeds, tolerance

LENGTHS = (1, 2, 3, 5, 127)
BOTH = pytest.mark.parametrize("blocked", [True, False], ids=["blocked", "library"])


@contextmanager
def product(blocked: bool) -> Iterator[None]:
    """Move the limit, so that every length takes the product in blocks, or none does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("tangram.kernels.causal_attention"), "BLOCKED", 10**9 if blocked else 0)
        yield


def drawn(length: int, widths: tuple[int, int, int, int], seed: int, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, key, value = widths
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, width) for width in (key, key, value)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Tensor) -> Tensor:
    """The definition, query by query in float64."""
    rows = []
    for b in range(len(q)):
        for i in range(q.shape[1]):
            seen = [j for j in range(i + 1) if segments[b, j] == segments[b, i]]
            scores = scale * torch.einsum("hd,jhd->jh", q[b, i].double(), k[b, seen].double())
            rows.append(torch.einsum("jh,jhd->hd", scores.softmax(0), v[b, seen].double()))
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])


def compare(length: int, widths: tuple[int, int, int, int], segments: Tensor, seed: int, dtype: torch.dtype) -> None:
    inputs = drawn(length, widths, seed, dtype)
    scale = widths[2] ** -0.5
    out, expected = (fn(*inputs, scale, segments) for fn in (causal_attention, written_out))
    assert out.dtype == dtype
    # The scores' rounding goes through the softmax: a chain of their width, then of the keys, and back.
    terms = 4 * (max(widths[2:]) + length)
    assert_close(out, expected, length=terms, dtype=dtype)
    direction = drawn(length, (*widths[:2], widths[3], widths[3]), seed + 1, dtype)[2].detach()
    grads, wanted = (torch.autograd.grad(y, inputs, direction.to(y.dtype)) for y in (out, expected))
    # Of a first token nothing is left to differ: its gradients have the scale of the others.
    bound = tolerance(dtype, terms) * float(torch.cat([grad.flatten() for grad in wanted]).abs().max())
    for name, one, other in zip("qkv", grads, wanted, strict=True):
        assert one.dtype == dtype
        assert (one - other).abs().max() <= bound, name


@BOTH
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("widths", [(2, 2, 3, 5), (1, 3, 6, 4), (1, 1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_sum_written_out(blocked, length, widths, dtype):
    with product(blocked):
        compare(length, widths, torch.zeros(widths[0], length, dtype=torch.int64), length, dtype)


@BOTH
@given(
    length=st.integers(1, 12),
    widths=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
    seed=seeds(),
)
def test_documents_are_sums_of_their_own(blocked, length, widths, data, seed):
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    segments = torch.stack([torch.tensor(data.draw(flags)).cumsum(0) for _ in range(widths[0])])
    with product(blocked):
        compare(length, widths, segments, seed, torch.float64)


@BOTH
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_its_backward_is_the_derivative_of_its_forward(blocked, length):
    inputs = drawn(length, (1, 2, 3, 2), 0, torch.float64)
    segments = torch.zeros(1, length, dtype=torch.int64)
    with product(blocked):
        assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.7, segments), inputs)


@BOTH
def test_large_scores_do_not_overflow(blocked):
    q, k, v = drawn(5, (1, 1, 4, 4), 0, torch.float32)
    with product(blocked):
        out = causal_attention(1e4 * q, 1e4 * k, v, 1.0, torch.zeros(1, 5, dtype=torch.int64))
    assert out.isfinite().all()
    assert out.abs().max() <= v.abs().max()


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(0, 4)),
    widths=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)),
    seed=seeds(),
)
def test_a_mask_of_the_past_makes_the_causal_product(shape, widths, seed):
    batch, queries, before = shape
    length = before + queries
    q, k, v = drawn(length, (batch, *widths), seed, torch.float64)
    places = torch.arange(length)
    seen = (places <= places[before:, None]).expand(batch, -1, -1)
    out = masked_attention(q[:, before:], k, v, 0.7, seen)
    whole = causal_attention(q, k, v, 0.7, torch.zeros(batch, length, dtype=torch.int64))
    assert_close(out, whole[:, before:], length=4 * (max(widths[1:]) + length))


def test_a_masked_key_counts_for_nothing_whatever_its_size():
    q, k, v = drawn(3, (1, 1, 2, 2), 0, torch.float32)
    seen = torch.tensor([[[True, False, True]] * 3])
    loud = [torch.where(torch.tensor([0, 1, 0]).view(1, 3, 1, 1) == 1, 1e30, t) for t in (k, v)]
    assert torch.equal(masked_attention(q, *loud, 0.5, seen), masked_attention(q, k, v, 0.5, seen))
