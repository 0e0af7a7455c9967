"""Safetensors files, written and read a few rows at a time, so that nothing whole is held.

A tensor is a matrix here: all dimensions but the last are flattened into rows, and a vector is one row. Files are read
with system calls and not mapped into memory, since the pages of a mapped file count as resident until they are taken
away.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from attrs import frozen
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The dtypes that weights may have, by their names in the file."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFileError(Exception):
    """A file of tensors cannot be read; the message names it and what is wrong."""


@frozen
class Spec:
    """What a tensor is, without its values.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows of the flattened tensor."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes a file whose tensors are known beforehand, in any order. Leaving it without an error makes it durable.

    Args:
        path: The file; one that is there is replaced.
        specs: All tensors by name.
        metadata: Goes into the header.

    Raises:
        ValueError: On leaving: some rows were written twice, or never.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self.path, self._specs = path, specs
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in specs}
        self._begins: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        # Wide elements first, so that every tensor lies at a multiple of its element's size.
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            self._begins[name], end = end, end + spec.nbytes
            offsets = [self._begins[name], end]
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.flush()

    def write(self, name: str, rows: Tensor, start: int = 0) -> None:
        """Write `rows` [..., columns], in the dtype of the tensor, at row `start` of the tensor `name`."""
        spec = self._specs[name]
        if rows.dtype != spec.dtype or rows.numel() % max(spec.columns, 1):
            raise ValueError(f"{name} is {spec}; {rows.dtype} {list(rows.shape)} are no rows of it")
        count = rows.numel() // max(spec.columns, 1)
        if start + count > spec.rows:
            raise ValueError(f"{name} has {spec.rows} rows, none at {start + count - 1}")
        self._written[name].append((start, start + count))
        data = rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        place = self._data + self._begins[name] + start * spec.columns * spec.dtype.itemsize
        while data:
            done = os.pwrite(self._file.fileno(), data, place)
            data, place = data[done:], place + done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            if kind is None:
                self._check()
                os.fsync(file.fileno())

    def _check(self) -> None:
        for name, pieces in self._written.items():
            end = 0
            for start, stop in [*sorted(pieces), (self._specs[name].rows,) * 2]:
                if start != end and self._specs[name].nbytes:
                    often = "twice" if start < end else "never"
                    raise ValueError(
                        f"{self.path}: rows {min(start, end)} to {max(start, end)} of {name}: {often} written"
                    )
                end = stop


class TensorReader:
    """Reads rows of the tensors of a file.

    Args:
        path: The file.

    Attributes:
        specs: All tensors by name.

    Raises:
        TensorFileError: It is no safetensors file, it is cut off, or a dtype is none of `DTYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise TensorFileError(f"{path}: {error.strerror}") from None
        try:
            self.specs, self._begins = self._header()
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise TensorFileError(f"{path}: no whole safetensors file ({error})") from None

    def _header(self) -> tuple[dict[str, Spec], dict[str, int]]:
        size = self.path.stat().st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"its header would have {length} of the file's {size} bytes")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        specs, begins = {}, {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is {entry['dtype']}, and weights are {', '.join(DTYPES)}")
            specs[name] = Spec(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
            start, stop = entry["data_offsets"]
            if stop - start != specs[name].nbytes or not 0 <= start <= stop <= size - 8 - length:
                raise ValueError(f"{name} lies at bytes {start} to {stop}, which do not fit its shape or the file")
            begins[name] = 8 + length + start
        return specs, begins

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows `start` to `stop` of a tensor, [stop - start, columns]; by default all of them."""
        spec = self.specs[name]
        stop = spec.rows if stop is None else stop
        width = spec.columns * spec.dtype.itemsize
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        place, rest = self._begins[name] + start * width, data.numpy().data
        while rest:
            got = os.preadv(self._file.fileno(), [rest], place)
            if not got:
                raise TensorFileError(f"{self.path}: the file ends inside {name}")
            rest, place = rest[got:], place + got
        return data.view(spec.dtype).view(stop - start, spec.columns)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
