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
SIZE = 16
"""Entries of a block."""


def drawn(
    b: int, s: int, h: int, positions: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return queries [B, S, H, width] and entries [B, L, width], with scores of the size of a few units."""
    q = numbers(b, s, h, width, seed=seed) * 2 / width**0.5
    return q.to(dtype), numbers(b, positions, width, seed=seed + 1).to(dtype)


def in_blocks(entries: Tensor, lengths: Tensor, seed: int | None = 0, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Return entries [B, L, width] in blocks of NaN beyond each length, shuffled with a seed, and their table."""
    batch, positions, width = entries.shape
    each = max(-(-positions // size), 1)
    order = torch.arange(batch * each)
    if seed is not None:
        order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(seed))
    table = order.view(batch, each).to(torch.int32)
    blocks = torch.full((batch * each, size, width), float("nan"), dtype=entries.dtype)
    for row, length in enumerate(lengths.tolist()):
        for at in range(length):
            blocks[table[row, at // size], at % size] = entries[row, at]
    return blocks, table


def expected(q: Tensor, entries: Tensor, lengths: Tensor, scale: float, rank: int) -> Tensor:
    """Return the result by a loop over sequences, tokens and heads."""
    out = torch.zeros(*q.shape[:3], rank, dtype=q.dtype)
    for row, length in enumerate(lengths.tolist()):
        for token in range(q.shape[1]):
            seen = entries[row, : max(length - q.shape[1] + token + 1, 0)]
            for head in range(q.shape[2]):
                out[row, token, head] = (scale * seen @ q[row, token, head]).softmax(0) @ seen[:, :rank]
    return out


@given(
    b=st.integers(1, 3),
    s=st.integers(1, 3),
    h=st.integers(1, 4),
    positions=st.integers(3, 40),
    rank=st.integers(1, 7),
    rope=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_it_is_attention_with_expanded_keys_and_values(b, s, h, positions, rank, rope, seed):
    nope, value = 3, 5
    q, turned, w_k, w_v = (
        numbers(*shape, seed=seed + i).double()
        for i, shape in enumerate([(b, s, h, nope), (b, s, h, rope), (h, nope, rank), (h, value, rank)])
    )
    entries = numbers(b, positions, rank + rope, seed=seed + 9).double()
    lengths = torch.randint(s, positions + 1, (b,), generator=torch.Generator().manual_seed(seed))
    absorbed = torch.cat([torch.einsum("bshn,hnc->bshc", q, w_k), turned], -1)
    blocks, table = in_blocks(entries, lengths, seed)
    got = torch.einsum("bshc,hvc->bshv", mla_decode(absorbed, blocks, table, lengths, 0.3, rank), w_v)
    for row in range(b):
        for token in range(s):
            latent, shared = entries[row, : lengths[row] - s + token + 1].split([rank, rope], -1)
            for head in range(h):
                keys = torch.cat([latent @ w_k[head].t(), shared], -1)
                query = torch.cat([q[row, token, head], turned[row, token, head]])
                shares = (0.3 * keys @ query).softmax(0)
                right = shares @ (latent @ w_v[head].t())
                # Of a share the error is that of its score, whose terms are no larger than these; then comes a sum.
                sizes = torch.cat([latent.abs() @ w_k[head].abs().t(), shared.abs()], -1) @ query.abs()
                room = shares @ (latent.abs() @ w_v[head].abs().t()) * (1 + sizes.max())
                length = positions + 2 * rank + rope + nope
                assert ((got[row, token, head] - right).abs() <= tolerance(torch.float64, length) * room).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("s", "h", "positions", "rank", "rope", "lengths", "programs"),
    [
        (1, 5, 101, 20, 6, [101, 0, 65], 1000),  # more splits than some sequences have tiles
        (3, 5, 101, 20, 6, [101, 2, 65], 1000),  # a token that sees nothing, in a split that sees nothing
        (1, 5, 301, 20, 6, [301, 0, 130], 6),
        (4, 18, 70, 16, 16, [70, 33], 4),  # the tokens of a sequence in two programs
        (1, 70, 40, 16, 16, [40], 1),
        (2, 1, 9, 33, 0, [9], 1),
        (1, 2, 130, 512, 64, [130], 2),
    ],
)
def test_the_kernel_agrees_with_the_twin(s, h, positions, rank, rope, lengths, programs, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["tangram.kernels.mla_decode"], "_PROGRAMS", programs)
    monkeypatch.setattr(sys.modules["tangram.kernels.mla_decode"], "_LEAST", 1)
    counts = torch.tensor(lengths)
    q, entries = drawn(len(lengths), s, h, positions, rank + rope, dtype, seed=h)
    blocks, table = in_blocks(entries, counts, seed=h)
    q, blocks, table, counts = guarded(q), guarded(blocks), guarded(table), guarded(counts)
    twin, kernel = on_both(lambda: mla_decode(q, blocks, table, counts, 0.7, rank))
    assert kernel.dtype is dtype
    # In bfloat16 the shares are rounded before the second product, and the result after it.
    length = 2 if dtype is torch.bfloat16 else rank + rope + positions
    assert_close(kernel, twin, length=length)
    if dtype is not torch.bfloat16:
        assert_close(twin.cpu(), expected(q.cpu(), entries, counts.cpu(), 0.7, rank), length=length)
    for row, n in enumerate(lengths):
        assert not kernel[row, : max(s - n, 0)].any()


@pytest.mark.parametrize("size", [16, 64])
def test_any_strides_and_any_order_of_blocks_are_taken(size):
    q, entries = drawn(2, 2, 3, 50, 24, torch.float32)
    lengths = torch.tensor([50, 31])
    right = expected(q, entries, lengths, 0.5, 20)
    q = q.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3).to(DEVICE)
    for seed in (None, 1):
        blocks, table = in_blocks(entries, lengths, seed, size)
        blocks = blocks.permute(2, 0, 1).contiguous().permute(1, 2, 0).to(DEVICE)
        counts = torch.stack([lengths, lengths], 1).to(DEVICE)[:, 0]
        table = torch.stack([table, table], 2).to(DEVICE)[..., 0]
        for got in on_both(lambda blocks=blocks, table=table, n=counts: mla_decode(q, blocks, table, n, 0.5, 20)):
            assert_close(got.cpu(), right, length=74)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_scores_of_thousands_choose_one_entry(path):
    blocks = torch.zeros(2, 16, 20)
    blocks.view(32, 20)[:20] = torch.eye(20)
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    q = torch.full((1, 1, 1, 20), 1e4, device=DEVICE) * torch.arange(20, device=DEVICE)
    with kernels.use(path):
        out = mla_decode(q, blocks.to(DEVICE), table, torch.tensor([18], device=DEVICE), 1.0, 19)
    assert torch.equal(out[0, 0, 0].cpu(), torch.eye(19)[17])


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_heads_tokens_and_sequences_do_not_see_each_other(path):
    q, entries = drawn(3, 2, 4, 30, 12, torch.float32)
    lengths = torch.tensor([30, 12, 7])
    blocks, table = (t.to(DEVICE) for t in in_blocks(entries, lengths))
    moved = q.clone().to(DEVICE), blocks.clone()
    moved[0][1, 0, 2] += 1
    moved[1][table[2, 0], 6] += 1  # the last entry of a sequence, which only its last token sees
    q, lengths = q.to(DEVICE), lengths.to(DEVICE)
    with kernels.use(path):
        before = mla_decode(q, blocks, table, lengths, 0.5, 8)
        after = mla_decode(*moved, table, lengths, 0.5, 8)
    changed = (before != after).any(-1)
    right = torch.zeros(3, 2, 4, dtype=torch.bool)
    right[1, 0, 2] = right[2, 1] = True
    assert torch.equal(changed.cpu(), right)
    with kernels.use(path):
        assert same_bits(before, mla_decode(q, blocks, table, lengths, 0.5, 8))


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize(("b", "h", "positions"), [(0, 2, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_is_taken_from_nothing(b, h, positions, path):
    q, entries = drawn(b, 1, h, positions, 6, torch.float32)
    lengths = torch.zeros(b, dtype=torch.int64, device=DEVICE)
    blocks, table = (t.to(DEVICE) for t in in_blocks(entries, lengths.cpu()))
    with kernels.use(path):
        out = mla_decode(q.to(DEVICE), blocks, table, lengths, 1.0, 4)
    assert torch.equal(out.cpu(), torch.zeros(b, 1, h, 4))


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_torch_knows_the_operation(path):
    q, entries = drawn(2, 2, 3, 5, 6, torch.bfloat16)
    lengths = torch.tensor([5, 2])
    blocks, table = in_blocks(entries, lengths)
    op = torch.ops.tangram.mla_decode
    with kernels.use(path):
        torch.library.opcheck(op, (q, blocks, table, lengths, 0.5, 4))
        out = op(q, blocks, table, lengths, 0.5, 4)
    meta = op(*(t.to("meta") for t in (q, blocks, table, lengths)), 0.5, 4)
    assert (meta.dtype, meta.shape, meta.stride()) == (out.dtype, out.shape, out.stride())


def test_mistakes_are_named():
    q, entries = drawn(1, 1, 1, 3, 6, torch.float32)
    lengths = torch.tensor([3])
    blocks, table = in_blocks(entries, lengths)
    with pytest.raises(ValueError, match="cast one"):
        mla_decode(q, blocks.double(), table, lengths, 1.0, 4)
    with pytest.raises(ValueError, match="queries of 6 and entries of 5"):
        mla_decode(q, blocks[..., :5], table, lengths, 1.0, 4)
    with pytest.raises(ValueError, match="first 7"):
        mla_decode(q, blocks, table, lengths, 1.0, 7)
    for size in (8, 12):
        with pytest.raises(ValueError, match=f"blocks of {size} entries"):
            mla_decode(q, blocks[:, :size], table, lengths, 1.0, 4)
