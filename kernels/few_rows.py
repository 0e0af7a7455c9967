"""Operations on the few rows of decoding in C++: on a CPU a call of plain torch there takes longer than its work.

A model that makes a token goes through a thousand small operations, each of microseconds. Where nothing is to be
differentiated, in inference mode and in float32, those of this file take one call each. The source is
kernels/few_rows.cpp; without a C++ compiler the operations run in plain torch.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tangram.kernels.compiled import library
from tangram.kernels.replay import call, records

MOST = 64
"""Rows from which plain torch is taken: then its products are the faster ones."""

_SOURCE = Path(__file__).with_name("few_rows.cpp")
_PLACE, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "rmsnorm": [_PLACE] * 3 + [_COUNT] * 2 + [_NUMBER],
    "swiglu": [_PLACE] * 2 + [_COUNT] * 2,
    "rotate": [_PLACE] * 4 + [_COUNT] * 5,
    "rotation": [_PLACE] * 4 + [_COUNT] * 2,
    "absorb": [_PLACE] * 3 + [_COUNT] * 6,
    "expand": [_PLACE] * 3 + [_COUNT] * 5,
    "append_entries": [_PLACE] * 4 + [_COUNT] * 5,
    "mla_decode": [_PLACE] * 5 + [_COUNT] * 7 + [_NUMBER],
    "product_transposed": [_PLACE] * 3 + [_COUNT] * 3,
    "grouped_matmul": [_PLACE] * 4 + [_COUNT] * 4,
    "order_by_expert": [_PLACE] * 5 + [_COUNT] * 3,
    "choose": [_PLACE] * 2 + [_COUNT] * 5,
    "weigh": [_PLACE] * 6 + [_COUNT] * 5 + [_NUMBER],
    "unpermute": [_PLACE] * 4 + [_COUNT] * 3,
}


@cache
def _library() -> ctypes.CDLL | None:
    found = library(_SOURCE)
    if found is not None:
        for name, arguments in _ARGUMENTS.items():
            getattr(found, name).argtypes = arguments
            getattr(found, name).restype = _COUNT if name == "grouped_matmul" else None
    return found


def takes(x: Tensor, rows: int, *others: Tensor) -> bool:
    """Return whether operations on `rows` rows of `x` are these; what they read besides is in float32 too."""
    return (
        rows <= MOST and x.dtype is torch.float32 and all(each.dtype is torch.float32 for each in others) and _runs(x)
    )


def orders(ids: Tensor) -> bool:
    """Return whether these ids are ordered here."""
    return ids.numel() <= MOST and ids.dtype is torch.int64 and _runs(ids)


def _runs(x: Tensor) -> bool:
    return records(x) and _library() is not None


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `kernels.rmsnorm` does."""
    x, weight = x.contiguous(), weight.contiguous()
    y, columns = torch.empty_like(x), x.shape[-1]
    _call("rmsnorm", x, weight, y, x.numel() // max(columns, 1), columns, eps)
    return y


def swiglu(gate_up: Tensor) -> Tensor:
    """Return what `kernels.swiglu` does."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], width)
    _call("swiglu", gate_up, y, y.numel() // max(width, 1), width)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `kernels.rotate` does of interleaved pairs."""
    batch, length, heads, width = x.shape
    if x.stride(3) != 1 or (batch > 1 and x.stride(0) != length * x.stride(1)):
        x = x.contiguous()
    y = torch.empty(x.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    _call("rotate", x, cos, sin, y, batch * length, heads, width // 2, x.stride(1), x.stride(2))
    return y


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `kernels.rotation` does, in float32."""
    positions, frequencies = positions.long().contiguous(), frequencies.contiguous()
    cos, sin = torch.empty(*positions.shape, len(frequencies)), torch.empty(*positions.shape, len(frequencies))
    _call("rotation", positions, frequencies, cos, sin, positions.numel(), len(frequencies))
    return cos, sin


def absorb(q: Tensor, weight: Tensor) -> Tensor:
    """Return what `kernels.absorb` does; the matrices lie one behind the other, each contiguous."""
    q = q.contiguous()
    batch, length, heads, width = q.shape
    nope, rank = weight.shape[1:]
    out = torch.empty(batch, length, heads, rank + width - nope)
    _call("absorb", q, weight, out, batch * length, heads, nope, width - nope, rank, weight.stride(0))
    return out


def expand(means: Tensor, weight: Tensor) -> Tensor:
    """Return what `kernels.expand` does; the matrices lie one behind the other, each contiguous."""
    means = means.contiguous()
    batch, length, heads, rank = means.shape
    out = torch.empty(batch, length, heads, weight.shape[1])
    _call("expand", means, weight, out, batch * length, heads, weight.shape[1], rank, weight.stride(0))
    return out


def append_entries(values: Tensor, blocks: Tensor, table: Tensor, lengths: Tensor) -> None:
    """Do what `kernels.append_entries` does."""
    values, table = values.contiguous(), table.int().contiguous()
    _call("append_entries", values, blocks, table, lengths, *values.shape, blocks.shape[1], table.shape[1])


def mla_decode(q: Tensor, blocks: Tensor, table: Tensor, lengths: Tensor, scale: float, kv_rank: int) -> Tensor:
    """Return what `kernels.mla_decode` does."""
    q, table, lengths = q.contiguous(), table.int().contiguous(), lengths.long().contiguous()
    out = torch.empty(*q.shape[:3], kv_rank)
    _call("mla_decode", q, blocks, table, lengths, out, *q.shape, kv_rank, blocks.shape[1], table.shape[1], scale)
    return out


def product_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `kernels.product_transposed` does."""
    x, weight = x.contiguous(), weight.contiguous()
    outer, inner = weight.shape
    out = torch.empty(*x.shape[:-1], outer)
    _call("product_transposed", x, weight, out, x.numel() // max(inner, 1), inner, outer)
    return out


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return what `kernels.grouped_matmul_forward` does.

    Raises:
        ValueError: The counts do not sum to the rows.
    """
    rows, weight, counts = rows.contiguous(), weight.contiguous(), counts.long().contiguous()
    experts, outer, inner = weight.shape
    out = torch.empty(len(rows), outer)
    if not _call("grouped_matmul", rows, weight, counts, out, experts, inner, outer, len(rows)):
        raise ValueError(f"counts sum to {int(counts.sum())}, but there are {len(rows)} rows")
    return out


def order_by_expert(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return index, inverse, counts and slots of `kernels.order_by_expert`, of ids without gaps."""
    ids = ids.contiguous()
    index, slots, inverse = ids.new_empty(ids.numel()), ids.new_empty(ids.numel()), torch.empty_like(ids)
    sizes = ids.new_empty(n_experts)
    _call("order_by_expert", ids, index, inverse, sizes, slots, ids.numel(), max(ids.shape[1], 1), n_experts)
    return index, inverse, sizes, slots


def choose(biased: Tensor, top_k: int, n_groups: int, top_groups: int) -> Tensor:
    """Return what `kernels.choose` does; of equal ones the first."""
    biased = biased.contiguous()
    batch, length, experts = biased.shape
    ids = torch.empty(batch, length, top_k, dtype=torch.int64)
    _call("choose", biased, ids, batch * length, experts, n_groups, top_groups, top_k)
    return ids


def weigh(affinity: Tensor, ids: Tensor, scale: float, normalise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `kernels.weigh` does."""
    affinity, ids = affinity.contiguous(), ids.contiguous()
    batch, length, experts = affinity.shape
    gates, mean = torch.empty(ids.shape), torch.empty(batch, experts)
    load, top = ids.new_empty(batch, experts), ids.new_empty(batch, experts)
    sizes = batch, length, experts, ids.shape[2], int(normalise)
    _call("weigh", affinity, ids, gates, load, top, mean, *sizes, scale)
    return gates, load, top, mean


def unpermute(rows: Tensor, gates: Tensor, inverse: Tensor) -> Tensor:
    """Return what `kernels.unpermute` does, without gaps."""
    rows, gates, inverse = rows.contiguous(), gates.float().contiguous(), inverse.contiguous()
    out = torch.empty(len(inverse), rows.shape[1])
    _call("unpermute", rows, gates, inverse, out, *inverse.shape, rows.shape[1])
    return out


def _call(name: str, *arguments: Tensor | float) -> object:
    found = _library()
    assert found is not None
    return call(getattr(found, name), *arguments)
