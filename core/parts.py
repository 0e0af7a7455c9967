"""The tensors of a checkpoint that several ranks wrote: each in a file of its own, a tensor or some of its rows.

A rank writes `model.part-3.safetensors` where one rank alone writes `model.safetensors`; the rows 4 to 7 of a tensor,
which are experts where these come first, have the name `blocks.1.feedforward.down.weight[4:8]`. Whoever reads asks for
what it holds, in whatever layout.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from attrs import frozen
from torch import Tensor

from tangram.core.tensor_file import Spec, TensorReader

_SHARE = re.compile(r"(.+)\[(\d+):(\d+)\]")


def file_of(name: str, rank: int, ranks: int) -> str:
    """Return the name, without suffix, of the file in which a rank writes."""
    return name if ranks == 1 else f"{name}.part-{rank}"


def files_of(folder: Path, name: str) -> list[Path]:
    """Return the files of a name, whoever wrote them: that of one rank alone where there are none of several."""
    return sorted(folder.glob(f"{name}.part-*.safetensors")) or [folder / f"{name}.safetensors"]


def share_name(key: str, rows: range) -> str:
    """Return the name of some rows of a tensor."""
    return f"{key}[{rows.start}:{rows.stop}]"


@frozen
class _Piece:
    """What a file has of a tensor: from which row on, in which file, and under which name."""

    start: int
    file: int
    name: str


def _pieces(files: Sequence[Iterable[str]]) -> dict[str, list[_Piece]]:
    """Return the pieces of each tensor, given the names in each file."""
    found: dict[str, list[_Piece]] = {}
    for number, names in enumerate(files):
        for name in names:
            match = _SHARE.fullmatch(name)
            key, start = (match[1], int(match[2])) if match else (name, 0)
            found.setdefault(key, []).append(_Piece(start, number, name))
    return found


class Parts:
    """Reads what was written under a name.

    Args:
        folder: The checkpoint.
        name: The name.

    Attributes:
        values: What is no tensor.

    Raises:
        FileNotFoundError: Nothing was written under it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from safetensors import safe_open

        self._files = [safe_open(path, framework="pt") for path in files_of(folder, name)]
        self._pieces = _pieces([file.keys() for file in self._files])
        self.values: dict[str, int | float | str] = {}
        for file in self._files:
            self.values |= json.loads((file.metadata() or {}).get("values", "{}"))

    def keys(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return list(self._pieces)

    def shape(self, key: str) -> torch.Size:
        """Return the shape of the whole tensor.

        Raises:
            KeyError: There is no such tensor.
        """
        shapes = [self._files[piece.file].get_slice(piece.name).get_shape() for piece in self._distinct(key)]
        return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else ())

    def read(self, key: str, rows: range | None = None) -> Tensor:
        """Return a tensor, or only some rows of it: those of its first dimension.

        Raises:
            KeyError: There is no such tensor.
        """
        found = list[Tensor]()
        for piece in self._distinct(key):
            stored = self._files[piece.file].get_slice(piece.name)
            shape = stored.get_shape()
            if not shape:
                whole: Tensor = self._files[piece.file].get_tensor(piece.name)
                return whole
            wanted = range(piece.start, piece.start + shape[0])
            if rows is not None:
                wanted = range(max(wanted.start, rows.start), min(wanted.stop, rows.stop))
            if wanted or not found:  # the first also where nothing is wanted, for the other dimensions
                found.append(stored[wanted.start - piece.start : max(wanted.start, wanted.stop) - piece.start])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _distinct(self, key: str) -> list[_Piece]:
        """Return the pieces of a tensor in order, each once: ranks may write what is the same for all."""
        return [found for _, found in sorted({piece.start: piece for piece in self._pieces[key]}.items())]


class PartsReader:
    """Reads rows of the tensors of a name, as `TensorReader` reads those of one file.

    Attributes:
        path: The folder.
        specs: All tensors by name, whole.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder
        self._readers = [TensorReader(file) for file in files_of(folder, name)]
        self._pieces = _pieces([reader.specs for reader in self._readers])
        self.specs: Mapping[str, Spec] = {key: self._whole(pieces) for key, pieces in self._pieces.items()}

    def _whole(self, pieces: list[_Piece]) -> Spec:
        specs = [self._readers[piece.file].specs[piece.name] for piece in pieces]
        if len(specs) == 1:
            return specs[0]
        return Spec(specs[0].dtype, (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:]))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows `start` to `stop` of a tensor, [stop - start, columns]; by default all of them."""
        whole, pieces = self.specs[name], sorted(self._pieces[name], key=lambda piece: piece.start)
        stop = whole.rows if stop is None else stop
        if len(pieces) == 1:
            return self._readers[pieces[0].file].read(pieces[0].name, start, stop)
        if len(whole.shape) == 1:  # a vector is one row
            parts = [self._readers[piece.file].read(piece.name) for piece in pieces]
            return torch.cat(parts, 1)[start:stop]
        found, height = [], whole.rows // whole.shape[0]
        for piece in pieces:
            first = piece.start * height
            rows = self._readers[piece.file].specs[piece.name].rows
            if max(start, first) < min(stop, first + rows):
                bounds = max(start, first) - first, min(stop, first + rows) - first
                found.append(self._readers[piece.file].read(piece.name, *bounds))
        return torch.cat(found) if found else torch.empty(0, whole.columns, dtype=whole.dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.close()
