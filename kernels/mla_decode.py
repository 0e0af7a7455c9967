"""Absorbed latent attention of the last tokens over the cache (arXiv:2412.19437, section 2.1.1, equations 1 to 11).

The cache keeps for every token j an entry [c_j | k_j]: its latent c of C numbers and the rotary key of R numbers that
all heads share. A head's keys and values are W_k c and W_v c, so that its score is

    q . (W_k c_j) + r . k_j = [W_k^T q | r] . [c_j | k_j]

and its output W_v times a mean of latents. With W_k^T folded into the query, and W_v left to what comes after, no key
or value is ever made, and every head attends to the entries themselves:

    out = sum_j softmax_j(scale * query . entry_j) c_j

Entries lie in blocks, and a table says which blocks hold a sequence. Of several new tokens, as when drafts are
verified, each sees the entries up to its own. The kernel reads a tile of entries once for all queries of a program, up
to 64, for scores and values. A sequence is split between programs, which alone would leave most of a GPU idle; each
split s gives its mean out_s and the logarithm of its sum of exponentials l_s, and a second kernel puts them together:
out = sum_s exp(l_s - l) out_s, with l = log sum_s exp(l_s).
"""

import torch
from torch import Tensor

from tangram.kernels import few_rows
from tangram.kernels.backend import takes_kernel
from tangram.kernels.jit import tl, triton, wide_type
from tangram.kernels.products import accumulator

_PROGRAMS = 264
"""Programs among which the entries are split: two for each core of a Hopper GPU."""

_LEAST = 4
"""Least tiles of a split, below which putting splits together costs more than they save."""

_COLUMNS = 32
"""Numbers of the result that one program puts together, from all splits at once."""


def mla_decode(q: Tensor, blocks: Tensor, table: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    """Return what every head takes from the cache, [B, S, H, C], in the dtype of `q`; not differentiable.

    Scores and sums are at least float32. A token that sees no entry gives zeros.

    Args:
        q: Absorbed queries [B, S, H, C + R] of the last S tokens of each sequence, whose entries are in the cache.
        blocks: Entries [blocks, T, C + R] in the dtype of `q`; T is a power of two, at least 16. What lies beyond a
            sequence's length is not read.
        table: The blocks of each sequence in order, int32 [B, N].
        lengths: How many entries a sequence has, int64 [B], at most N T.
        scale: Multiplies the scores.
        kv_rank: C, the width of the latent.

    Raises:
        ValueError: Widths, dtypes or the size of the blocks do not fit.
    """
    if q.dtype is not blocks.dtype:
        raise ValueError(f"queries are {q.dtype} and the cache is {blocks.dtype}; cast one to the other's dtype")
    if q.shape[-1] != blocks.shape[-1] or not 0 < kv_rank <= q.shape[-1]:
        raise ValueError(
            f"queries of {q.shape[-1]} and entries of {blocks.shape[-1]} numbers have one width, of which the latent "
            f"is the first {kv_rank}"
        )
    size = blocks.shape[1]
    if size < 16 or size & (size - 1):
        raise ValueError(f"blocks of {size} entries; a block has a power of two of them, at least 16")
    with torch.no_grad():
        if takes_kernel(q):
            return torch.ops.tangram.mla_decode(q, blocks, table, lengths, scale, kv_rank)
        if blocks.is_contiguous() and few_rows.takes(q, q.shape[0] * q.shape[1]):
            return few_rows.mla_decode(q, blocks, table, lengths, scale, kv_rank)
        return _decode(q, blocks, table, lengths, scale, kv_rank)


def append_entries(values: Tensor, blocks: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Write the entries of new tokens behind those that each sequence has, and count them.

    Args:
        values: Entries [B, S, W].
        blocks: Contiguous [blocks, T, W], in the dtype of `values`.
        table: The blocks of each sequence in order, with room for what comes, int32 [B, N].
        lengths: How many entries a sequence has, contiguous int64 [B]; S more afterwards.
    """
    if few_rows.takes(values, values.shape[0] * values.shape[1], blocks):
        few_rows.append_entries(values, blocks, table, lengths)
        return
    size = blocks.shape[1]
    places = lengths[:, None] + torch.arange(values.shape[1], device=values.device)
    rows = table.gather(1, places // size) * size + places % size
    blocks.flatten(0, 1).index_copy_(0, rows.flatten(), values.flatten(0, 1))
    lengths.add_(values.shape[1])


def absorb(q: Tensor, weight: Tensor) -> Tensor:
    """Return queries that attend to latents, [B, S, H, C + R]: with W_k multiplied into their part without position.

    Args:
        q: Queries [B, S, H, N + R].
        weight: W_k of every head, [H, N, C].
    """
    nope = weight.shape[1]
    if weight.stride()[1:] == (weight.shape[2], 1) and few_rows.takes(q, q.shape[0] * q.shape[1], weight):
        return few_rows.absorb(q, weight)
    still, turned = q.split([nope, q.shape[-1] - nope], -1)
    return torch.cat([(still.transpose(1, 2) @ weight).transpose(1, 2), turned], -1)


def expand(means: Tensor, weight: Tensor) -> Tensor:
    """Return what the heads give, [B, S, H, V]: W_v times what they took from the latents.

    Args:
        means: What `mla_decode` returned, [B, S, H, C].
        weight: W_v of every head, [H, V, C].
    """
    if weight.stride()[1:] == (weight.shape[2], 1) and few_rows.takes(means, means.shape[0] * means.shape[1], weight):
        return few_rows.expand(means, weight)
    return (means.transpose(1, 2) @ weight.mT).transpose(1, 2)


def _decode(q: Tensor, blocks: Tensor, table: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    out, wide = _output(q, kv_rank), accumulator(q.dtype)
    tokens, heads = q.shape[1:3]
    queries = q.to(wide).flatten(1, 2) * scale  # [B, S * H, C + R]
    for row, (length, own) in enumerate(zip(lengths.tolist(), table.tolist(), strict=True)):
        entries = _entries(blocks, own, length).to(wide)
        scores = queries[row] @ entries.t()  # [S * H, length]
        if tokens > 1:
            later = torch.ones(tokens, length, dtype=torch.bool, device=q.device).triu_(length - tokens + 1)
            scores.masked_fill_(later.repeat_interleave(heads, 0), -torch.inf)
        shares = scores.softmax(-1)
        if length < tokens:
            shares.nan_to_num_(0.0)  # the first tokens see nothing
        out[row] = (shares @ entries[:, :kv_rank]).view(tokens, heads, kv_rank)
    return out


def _entries(blocks: Tensor, own: list[int], length: int) -> Tensor:
    """Return the entries [length, C + R] of a sequence: where they are, if they lie side by side."""
    size = blocks.shape[1]
    own = own[: -(-length // size)]
    if own and own == list(range(own[0], own[0] + len(own))):
        return blocks.flatten(0, 1)[own[0] * size : own[0] * size + length]
    return blocks[own].flatten(0, 1)[:length]


def _output(q: Tensor, kv_rank: int) -> Tensor:
    return torch.empty(*q.shape[:3], kv_rank, dtype=q.dtype, device=q.device)


@triton.jit
def _attend(
    q,
    blocks,
    table,
    lengths,
    means,
    logs,
    tokens,
    heads,
    room,
    q_sequence,
    q_token,
    q_head,
    q_column,
    block_stride,
    entry_stride,
    column_stride,
    table_sequence,
    table_column,
    scale: tl.constexpr,
    rank: tl.constexpr,
    width: tl.constexpr,
    wide: tl.constexpr,
    QUERIES: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split, splits = tl.program_id(0), tl.num_programs(0)
    query = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)  # token-major: the heads of a token side by side
    token, head = query // heads, query % heads
    sequence = tl.program_id(2).to(tl.int64)
    column, turned = tl.arange(0, RANK), rank + tl.arange(0, ROPE)
    length = tl.minimum(tl.load(lengths + sequence).to(tl.int64), room).to(tl.int32)
    last = (length - tokens + token)[:, None]  # the entry of the query's own token
    share = tl.cdiv(tl.cdiv(length, TILE), splits) * TILE
    stop = tl.minimum((split + 1) * share, length)
    queries = q + sequence * q_sequence + token[:, None] * q_token + head[:, None] * q_head
    mine = (query < tokens * heads)[:, None]
    q_latent = tl.load(queries + column[None, :] * q_column, mask=mine & (column < rank)[None, :], other=0.0)
    q_turned = tl.load(queries + turned[None, :] * q_column, mask=mine & (turned < width)[None, :], other=0.0)
    highest = tl.full((QUERIES,), float("-inf"), wide)
    total = tl.zeros((QUERIES,), wide)
    mean = tl.zeros((QUERIES, RANK), wide)
    for first in range(split * share, stop, TILE):
        position = first + tl.arange(0, TILE)
        inside = (position < stop)[:, None]
        block = tl.load(table + sequence * table_sequence + first // BLOCK * table_column).to(tl.int64)
        entries = blocks + block * block_stride + (position % BLOCK)[:, None] * entry_stride
        latent = tl.load(entries + column[None, :] * column_stride, mask=inside & (column < rank)[None, :], other=0.0)
        key = tl.load(entries + turned[None, :] * column_stride, mask=inside & (turned < width)[None, :], other=0.0)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee", out_dtype=wide)
        scores = tl.dot(q_turned, tl.trans(key), scores, input_precision="ieee", out_dtype=wide) * scale
        seen = (position < stop)[None, :] & (position[None, :] <= last)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # of a token that has seen nothing yet
        shares = tl.exp(scores - level[:, None])
        shrink = tl.exp(highest - level)
        total = total * shrink + tl.sum(shares, 1)
        mean *= shrink[:, None]
        mean = tl.dot(shares.to(latent.dtype), latent, mean, input_precision="ieee", out_dtype=wide)
        highest = higher
    # A split without entries has a mean of zeros, and minus infinity for its logarithm: it counts for nothing.
    some = tl.where(total > 0, total, 1.0)
    at = (sequence * tokens * heads + query) * splits + split
    tl.store(logs + at, highest + tl.log(some), mask=query < tokens * heads)
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


def _launch(q: Tensor, blocks: Tensor, table: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    out = _output(q, kv_rank)
    if not out.numel():
        return out
    (batch, tokens, heads, width), size = q.shape, blocks.shape[1]
    room = table.shape[1] * size
    # What fits the memory of a core, from Ampere to Blackwell: the queries, and two tiles of entries, one on its way.
    tall, tile = (64, min(32, size)) if q.element_size() == 2 else (16, 16)
    tall = min(max(triton.next_power_of_2(tokens * heads), 16), tall)
    programs = triton.cdiv(tokens * heads, tall)
    splits = max(min(_PROGRAMS // (batch * programs), triton.cdiv(room, _LEAST * tile)), 1)
    wide = accumulator(q.dtype)
    means = torch.empty(batch, tokens, heads, splits, kv_rank, dtype=wide, device=q.device)
    logs = torch.empty(batch, tokens, heads, splits, dtype=wide, device=q.device)
    _attend[(splits, programs, batch)](
        q,
        blocks,
        table,
        lengths.contiguous(),
        means,
        logs,
        tokens,
        heads,
        room,
        *q.stride(),
        *blocks.stride(),
        *table.stride(),
        scale=scale,
        rank=kv_rank,
        width=width,
        wide=wide_type(q.dtype),
        QUERIES=tall,
        RANK=max(triton.next_power_of_2(kv_rank), 16),
        ROPE=max(triton.next_power_of_2(width - kv_rank), 16),
        TILE=tile,
        BLOCK=size,
        num_warps=8,
        num_stages=2,
    )
    _combine[(batch * tokens * heads, triton.cdiv(kv_rank, _COLUMNS))](
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
def _mla_decode(q: Tensor, blocks: Tensor, table: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    return (_launch if takes_kernel(q) else _decode)(q, blocks, table, lengths, scale, kv_rank)


@_mla_decode.register_fake
def _(q: Tensor, blocks: Tensor, table: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    return _output(q, kv_rank)
