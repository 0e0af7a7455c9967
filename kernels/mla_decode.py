"""Absorbed latent attention of one new token over the cache (arXiv:2412.19437, section 2.1.1, equations 1 to 11).

The cache keeps for every token j an entry [c_j | k_j]: its latent c of C numbers and the rotary key of R numbers that
all heads share. A head's keys and values are W_k c and W_v c, so that its score is

    q . (W_k c_j) + r . k_j = [W_k^T q | r] . [c_j | k_j]

and its output W_v times a mean of latents. With W_k^T folded into the query, and W_v left to what comes after, no key
or value is ever made, and every head attends to the entries themselves:

    out = sum_j softmax_j(scale * query . entry_j) c_j

The kernel reads a tile of entries once for all heads of a program, up to 64, for scores and values. A sequence is
split between programs, which alone would leave most of a GPU idle; each split s gives its mean out_s and the logarithm
of its sum of exponentials l_s, and a second kernel puts them together: out = sum_s exp(l_s - l) out_s, with
l = log sum_s exp(l_s).
"""

import torch
from torch import Tensor

from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton, wide_type
from tangram.kernels.products import accumulator

_PROGRAMS = 264
"""Programs among which the entries are split: two for each core of a Hopper GPU."""

_LEAST = 4
"""Least tiles of a split, below which putting splits together costs more than they save."""

_COLUMNS = 32
"""Numbers of the result that one program puts together, from all splits at once."""


def mla_decode(q: Tensor, cache: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    """Return what every head takes from the cache, [B, H, C], in the dtype of `q`; not differentiable.

    Scores and sums are at least float32. A sequence without entries gives zeros.

    Args:
        q: Absorbed queries [B, H, C + R] of one token a sequence.
        cache: Entries [B, L, C + R] in the dtype of `q`; what lies beyond a sequence's length is not read.
        lengths: How many entries a sequence has, int64 [B], at most L.
        scale: Multiplies the scores.
        kv_rank: C, the width of the latent.

    Raises:
        ValueError: Widths or dtypes do not fit.
    """
    if q.dtype is not cache.dtype:
        raise ValueError(f"queries are {q.dtype} and the cache is {cache.dtype}; cast one to the other's dtype")
    if q.shape[-1] != cache.shape[-1] or not 0 < kv_rank <= q.shape[-1]:
        raise ValueError(
            f"queries of {q.shape[-1]} and entries of {cache.shape[-1]} numbers have one width, of which the latent "
            f"is the first {kv_rank}"
        )
    with torch.no_grad():
        if takes_kernel(q):
            return torch.ops.tangram.mla_decode(q, cache, lengths, scale, kv_rank)
        return _decode(q, cache, lengths, scale, kv_rank)


def _decode(q: Tensor, cache: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    out, wide = _output(q, kv_rank), accumulator(q.dtype)
    for row, length in enumerate(lengths.tolist()):
        entries = cache[row, :length].to(wide)
        shares = ((q[row].to(wide) * scale) @ entries.t()).softmax(-1)  # [H, length]
        out[row] = shares @ entries[:, :kv_rank]
    return out


def _output(q: Tensor, kv_rank: int) -> Tensor:
    return torch.empty(*q.shape[:2], kv_rank, dtype=q.dtype, device=q.device)


@triton.jit
def _attend(
    q,
    cache,
    lengths,
    means,
    logs,
    heads,
    positions,
    q_sequence,
    q_head,
    q_column,
    cache_sequence,
    cache_position,
    cache_column,
    scale: tl.constexpr,
    rank: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    TILE: tl.constexpr,
):
    split, splits = tl.program_id(0), tl.num_programs(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    sequence = tl.program_id(2).to(tl.int64)
    column, turned = tl.arange(0, RANK), rank + tl.arange(0, ROPE)
    length = tl.minimum(tl.load(lengths + sequence).to(tl.int64), positions).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE
    stop = tl.minimum((split + 1) * share, length)
    queries = q + sequence * q_sequence + head[:, None] * q_head
    mine = (head < heads)[:, None]
    q_latent = tl.load(queries + column[None, :] * q_column, mask=mine & (column < rank)[None, :], other=0.0)
    q_turned = tl.load(queries + turned[None, :] * q_column, mask=mine & (turned < width)[None, :], other=0.0)
    highest = tl.full((HEADS,), float("-inf"), wide)
    total = tl.zeros((HEADS,), wide)
    mean = tl.zeros((HEADS, RANK), wide)
    for first in range(split * share, stop, TILE):
        position = first + tl.arange(0, TILE)
        inside = (position < stop)[:, None]
        entries = cache + sequence * cache_sequence + position.to(tl.int64)[:, None] * cache_position
        latent = tl.load(entries + column[None, :] * cache_column, mask=inside & (column < rank)[None, :], other=0.0)
        key = tl.load(entries + turned[None, :] * cache_column, mask=inside & (turned < width)[None, :], other=0.0)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee", out_dtype=wide)
        scores = tl.dot(q_turned, tl.trans(key), scores, input_precision="ieee", out_dtype=wide) * scale
        scores = tl.where((position < stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shares = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(shares, 1)
        mean *= shrink[:, None]
        mean = tl.dot(shares.to(latent.dtype), latent, mean, input_precision="ieee", out_dtype=wide)
        highest = higher
    # A split without entries has a mean of zeros, and minus infinity for its logarithm: it counts for nothing.
    some = tl.where(total > 0, total, 1.0)
    at = (sequence * heads + head) * splits + split
    tl.store(logs + at, highest + tl.log(some), mask=head < heads)
    out = at[:, None] * rank + column[None, :]
    tl.store(means + out, mean / some[:, None], mask=mine & (column < rank)[None, :])


@triton.jit
def _combine(means, logs, out, splits, rank, wide: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    own = tl.load(logs + at * splits + split, mask=split < splits, other=float("-inf")).to(wide)
    highest = tl.max(own, 0)
    sums = tl.exp(own - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(sums, 0)
    inside = (split < splits)[:, None] & (column < rank)[None, :]
    each = tl.load(means + (at * splits + split)[:, None] * rank + column[None, :], mask=inside, other=0.0).to(wide)
    result = tl.sum(each * sums[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + at * rank + column, result.to(out.dtype.element_ty), mask=column < rank)


def _launch(q: Tensor, cache: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    out = _output(q, kv_rank)
    if not out.numel():
        return out
    (batch, heads, width), positions = q.shape, cache.shape[1]
    # What fits the memory of a core: the queries, and two tiles of entries, one of them on its way.
    tall, tile = (64, 64) if q.element_size() == 2 else (16, 16)
    tall = min(max(triton.next_power_of_2(heads), 16), tall)
    blocks = triton.cdiv(heads, tall)
    splits = max(min(_PROGRAMS // (batch * blocks), triton.cdiv(positions, _LEAST * tile)), 1)
    wide = accumulator(q.dtype)
    means = torch.empty(batch, heads, splits, kv_rank, dtype=wide, device=q.device)
    logs = torch.empty(batch, heads, splits, dtype=wide, device=q.device)
    _attend[(splits, blocks, batch)](
        q,
        cache,
        lengths.contiguous(),
        means,
        logs,
        heads,
        positions,
        *q.stride(),
        *cache.stride(),
        scale=scale,
        rank=kv_rank,
        width=width,
        wide=wide_type(q.dtype),
        HEADS=tall,
        RANK=max(triton.next_power_of_2(kv_rank), 16),
        ROPE=max(triton.next_power_of_2(width - kv_rank), 16),
        TILE=tile,
        num_warps=8,
        num_stages=2,
    )
    _combine[(batch * heads, triton.cdiv(kv_rank, _COLUMNS))](
        means,
        logs,
        out,
        splits,
        kv_rank,
        wide=wide_type(q.dtype),
        SPLITS=triton.next_power_of_2(splits),
        COLUMNS=_COLUMNS,
    )
    return out


@torch.library.custom_op("tangram::mla_decode", mutates_args=())
def _mla_decode(q: Tensor, cache: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    return (_launch if takes_kernel(q) else _decode)(q, cache, lengths, scale, kv_rank)


@_mla_decode.register_fake
def _(q: Tensor, cache: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    return _output(q, kv_rank)
