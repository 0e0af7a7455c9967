"""Absorbed latent attention against attention with expanded keys and values, and the kernel against its twin."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from twins import DEVICE, guarded, numbers, on_both, same_bits

from tangram import kernels
from tangram.kernels import mla_decode
from tangram.testing import assert_close
from tangram.testing.tolerance import tolerance

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def drawn(b: int, h: int, positions: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return queries and a cache, with scores of the size of a few units."""
    q = numbers(b, h, width, seed=seed) * 2 / width**0.5
    return q.to(dtype), numbers(b, positions, width, seed=seed + 1).to(dtype)


def beyond(cache: Tensor, lengths: Tensor) -> Tensor:
    """Return the cache with NaN in every entry beyond its sequence's length, between other entries of NaN."""
    there = torch.arange(cache.shape[1]) < lengths[:, None]
    wide = torch.full((cache.shape[0], cache.shape[1] + 3, cache.shape[2]), float("nan"), dtype=cache.dtype)
    wide[:, 1:-2] = cache.masked_fill(~there[..., None], float("nan"))
    return guarded(wide)[:, 1:-2]


@given(
    b=st.integers(1, 3),
    h=st.integers(1, 4),
    positions=st.integers(1, 12),
    rank=st.integers(1, 7),
    rope=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_it_is_attention_with_expanded_keys_and_values(b, h, positions, rank, rope, seed):
    nope, value = 3, 5
    q, turned, w_k, w_v = (
        numbers(*shape, seed=seed + i).double()
        for i, shape in enumerate([(b, h, nope), (b, h, rope), (h, nope, rank), (h, value, rank)])
    )
    cache = numbers(b, positions, rank + rope, seed=seed + 9).double()
    lengths = torch.randint(1, positions + 1, (b,), generator=torch.Generator().manual_seed(seed))
    absorbed = torch.cat([torch.einsum("bhn,hnc->bhc", q, w_k), turned], -1)
    got = torch.einsum("bhc,hvc->bhv", mla_decode(absorbed, cache, lengths, 0.3, rank), w_v)
    for row in range(b):
        latent, shared = cache[row, : lengths[row]].split([rank, rope], -1)
        for head in range(h):
            keys = torch.cat([latent @ w_k[head].t(), shared], -1)
            query = torch.cat([q[row, head], turned[row, head]])
            shares = (0.3 * keys @ query).softmax(0)
            expected = shares @ (latent @ w_v[head].t())
            # Of a share the error is that of its score, whose terms are no larger than these; then comes a sum.
            sizes = torch.cat([latent.abs() @ w_k[head].abs().t(), shared.abs()], -1) @ query.abs()
            room = shares @ (latent.abs() @ w_v[head].abs().t()) * (1 + sizes.max())
            length = positions + 2 * rank + rope + nope
            assert ((got[row, head] - expected).abs() <= tolerance(torch.float64, length) * room).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("h", "positions", "rank", "rope", "lengths", "programs"),
    [
        (5, 101, 20, 6, [101, 0, 65], 1000),  # more splits than some sequences have tiles
        (5, 301, 20, 6, [301, 0, 130], 6),
        (70, 40, 16, 16, [40], 1),
        (1, 9, 33, 0, [9], 1),
        (2, 130, 512, 64, [130], 2),
    ],
)
def test_the_kernel_agrees_with_the_twin(h, positions, rank, rope, lengths, programs, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["tangram.kernels.mla_decode"], "_PROGRAMS", programs)
    monkeypatch.setattr(sys.modules["tangram.kernels.mla_decode"], "_LEAST", 1)
    counts = torch.tensor(lengths)
    q, cache = drawn(len(lengths), h, positions, rank + rope, dtype, seed=h)
    q, cache, counts = guarded(q), beyond(cache, counts), guarded(counts)
    twin, kernel = on_both(lambda: mla_decode(q, cache, counts, 0.7, rank))
    assert kernel.dtype is dtype
    # In bfloat16 the shares are rounded before the second product, and the result after it.
    assert_close(kernel, twin, length=2 if dtype is torch.bfloat16 else rank + rope + positions)
    for row, length in enumerate(lengths):
        assert length or not kernel[row].any()


def test_any_strides_are_taken():
    q, cache = drawn(2, 3, 50, 24, torch.float32)
    lengths = torch.tensor([50, 31])
    expected = mla_decode(q, cache, lengths, 0.5, 20)
    q = q.transpose(0, 1).contiguous().transpose(0, 1).to(DEVICE)
    cache = cache.permute(2, 0, 1).contiguous().permute(1, 2, 0).to(DEVICE)
    counts = torch.stack([lengths, lengths], 1).to(DEVICE)[:, 0]
    for got in on_both(lambda: mla_decode(q, cache, counts, 0.5, 20)):
        assert_close(got.cpu(), expected, length=74)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_scores_of_thousands_choose_one_entry(path):
    cache = torch.eye(20)[None].to(DEVICE)
    q = torch.full((1, 1, 20), 1e4, device=DEVICE) * torch.arange(20, device=DEVICE)
    with kernels.use(path):
        assert torch.equal(
            mla_decode(q, cache, torch.tensor([18], device=DEVICE), 1.0, 19)[0, 0].cpu(), torch.eye(19)[17]
        )


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_heads_and_sequences_do_not_see_each_other(path):
    q, cache = (t.to(DEVICE) for t in drawn(3, 4, 30, 12, torch.float32))
    lengths = torch.tensor([30, 12, 7], device=DEVICE)
    moved = q.clone(), cache.clone()
    moved[0][1, 2] += 1
    moved[1][2, 3] += 1
    with kernels.use(path):
        before, after = mla_decode(q, cache, lengths, 0.5, 8), mla_decode(*moved, lengths, 0.5, 8)
    changed = (before != after).any(-1)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1, 2] = expected[2] = True
    assert torch.equal(changed.cpu(), expected)
    with kernels.use(path):
        assert same_bits(before, mla_decode(q, cache, lengths, 0.5, 8))


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize(("b", "h", "positions"), [(0, 2, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_is_taken_from_nothing(b, h, positions, path):
    q, cache = (t.to(DEVICE) for t in drawn(b, h, positions, 6, torch.float32))
    with kernels.use(path):
        out = mla_decode(q, cache, torch.zeros(b, dtype=torch.int64, device=DEVICE), 1.0, 4)
    assert torch.equal(out.cpu(), torch.zeros(b, h, 4))


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operation(path):
    q, cache = drawn(2, 3, 5, 6, torch.bfloat16)
    arguments = torch.tensor([5, 2]), 0.5, 4
    op = torch.ops.tangram.mla_decode
    with kernels.use(path):
        torch.library.opcheck(op, (q, cache, *arguments))
        out = op(q, cache, *arguments)
    meta = op(q.to("meta"), cache.to("meta"), arguments[0].to("meta"), *arguments[1:])
    assert (meta.dtype, meta.shape, meta.stride()) == (out.dtype, out.shape, out.stride())


def test_mistakes_are_named():
    q, cache = drawn(1, 1, 3, 6, torch.float32)
    lengths = torch.tensor([3])
    with pytest.raises(ValueError, match="cast one"):
        mla_decode(q, cache.double(), lengths, 1.0, 4)
    with pytest.raises(ValueError, match="queries of 6 and entries of 5"):
        mla_decode(q, cache[..., :5], lengths, 1.0, 4)
    with pytest.raises(ValueError, match="first 7"):
        mla_decode(q, cache, lengths, 1.0, 7)
