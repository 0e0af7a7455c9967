"""The passes of quantising in C++, compiled when they are first asked for: several times as fast on a CPU.

The source is kernels/native.cpp.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tangram.kernels.compiled import library
from tangram.kernels.quantize import PLAIN, Passes

_SOURCE = Path(__file__).with_name("native.cpp")
_FORMATS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_SHARE = 1 << 16
"""Least elements of a thread's share."""


@cache
def native_passes() -> Passes:
    """Return the compiled passes, or the plain ones where there is no C++ compiler.

    Raises:
        RuntimeError: The compiler refuses the source.
    """
    found = library(_SOURCE)
    return PLAIN if found is None else _Native(found)


def passes_for(x: Tensor) -> Passes:
    """Return the passes over matrices where `x` lies: compiled on a CPU, if they have code for its dtype."""
    known = x.dtype in _DTYPES or x.dtype in _FORMATS
    return native_passes() if known and x.device.type == "cpu" else PLAIN


class _Native:
    """Calls the library, with as many threads as torch has; what it has no code for runs plain."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def peaks(self, x: Tensor, tile: int) -> Tensor:
        """Return the largest magnitude of each tile."""
        if not _runs(x):
            return PLAIN.peaks(x, tile)
        out = torch.empty(len(x), -(-x.shape[1] // tile))
        self._by_rows(f"peaks_{_DTYPES[x.dtype]}", (x, out), x.shape[1], tile)
        return out

    def encode(self, x: Tensor, scales: Tensor, tile: int, format: torch.dtype) -> Tensor:
        """Return the codes."""
        if not _runs(x, scales):
            return PLAIN.encode(x, scales, tile, format)
        codes = torch.empty(x.shape, dtype=torch.uint8)
        self._by_rows(f"encode_{_FORMATS[format]}_{_DTYPES[x.dtype]}", (x, scales, codes), x.shape[1], tile)
        return codes.view(format)

    def decode(self, codes: Tensor, scales: Tensor, tile: int, dtype: torch.dtype) -> Tensor:
        """Return the numbers."""
        bytes_ = codes.view(torch.uint8)
        if dtype not in _DTYPES or not _lies(bytes_, scales):
            return PLAIN.decode(codes, scales, tile, dtype)
        out = torch.empty(codes.shape, dtype=dtype)
        name = f"decode_{_FORMATS[codes.dtype]}_{_DTYPES[dtype]}"
        self._by_rows(name, (bytes_, scales, out), codes.shape[1], tile)
        return out

    def column_peaks(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the largest magnitude of each column of each group."""
        if not _runs(x):
            return PLAIN.column_peaks(x, ends)
        out = torch.empty(len(ends), x.shape[1])
        self._by_groups(f"column_peaks_{_DTYPES[x.dtype]}", (x, out, ends), x)
        return out

    def round_columns(self, x: Tensor, scales: Tensor, ends: Tensor, format: torch.dtype) -> Tensor:
        """Return the rounded numbers."""
        if not _runs(x, scales):
            return PLAIN.round_columns(x, scales, ends, format)
        out = torch.empty_like(x)
        name = f"round_columns_{_FORMATS[format]}_{_DTYPES[x.dtype]}"
        self._by_groups(name, (x, scales, out, ends), x)
        return out

    def _by_rows(self, name: str, tensors: tuple[Tensor, ...], columns: int, tile: int) -> None:
        """Call a function of rows, each thread on its share of them."""
        call = getattr(self._library, name)

        def work(first: int, last: int) -> None:
            call(
                *(_at(tensor, first * tensor.shape[1]) for tensor in tensors),
                *map(ctypes.c_int64, (last - first, columns, tile)),
            )

        _share_out(work, len(tensors[0]), tensors[0].numel())

    def _by_groups(self, name: str, tensors: tuple[Tensor, ...], x: Tensor) -> None:
        """Call a function of groups of rows, each thread on its share of the groups."""
        call = getattr(self._library, name)

        def work(first: int, last: int) -> None:
            call(*(_at(tensor, 0) for tensor in tensors), *map(ctypes.c_int64, (first, last, x.shape[1])))

        _share_out(work, len(tensors[-1]), x.numel())


def _share_out(work: Callable[[int, int], None], length: int, elements: int) -> None:
    """Call `work` on ranges that make up `length`, on as many threads as torch has if that is worth while."""
    threads = min(torch.get_num_threads(), length, elements // _SHARE)
    if threads <= 1:
        work(0, length)
        return
    edges = [length * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:  # ctypes lets go of the interpreter's lock
        others = [pool.submit(work, *pair) for pair in pairwise(edges[1:])]
        work(0, edges[1])
    for other in others:
        other.result()


def _runs(x: Tensor, *others: Tensor) -> bool:
    return x.dtype in _DTYPES and _lies(x, *others)


def _lies(*tensors: Tensor) -> bool:
    """Return whether the tensors lie in a CPU's memory as they are counted."""
    return all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


def _at(tensor: Tensor, element: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + element * tensor.element_size())
