"""The files of weights of a folder in DeepSeek-V3's format, checked as a whole and read a few rows at a time."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tangram.core.deepseek_format import SCALE, Piece
from tangram.core.tensor_file import Spec, TensorReader
from tangram.kernels import dequantize

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_HELD = 1 << 24
"""Bytes of float32 that are held at a time."""

_IGNORED = re.compile(r".*rotary_emb\.inv_freq")
"""Tables that old versions of transformers wrote; everyone computes them."""


class InterchangeError(Exception):
    """A model cannot be written or read; the message names the file and what is wrong."""


def batches(rows: int, columns: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that are small in memory, all but the last multiples of `multiple`."""
    step = max(1, _HELD // (4 * columns * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def read_json(path: Path) -> dict[str, Any]:
    """Return the map that a JSON file holds.

    Raises:
        InterchangeError: It is missing, broken or no map.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InterchangeError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InterchangeError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise InterchangeError(f"{path} holds no map")
    return content


class WeightFolder:
    """The tensors of a folder in the format, over all its files, by name.

    Args:
        folder: The folder.
        stack: Closes the files.
        tile: Rows and columns that share a scale; None where nothing is quantised.

    Raises:
        InterchangeError: The index is missing or broken.
        TensorFileError: A file is.
    """

    def __init__(self, folder: Path, stack: ExitStack, tile: tuple[int, int] | None) -> None:
        self._folder, self._tile = folder, tile
        self._files: dict[str, TensorReader] = {}
        for name in self._names():
            reader = stack.enter_context(TensorReader(folder / name))
            self._files |= dict.fromkeys(reader.specs, reader)

    def _names(self) -> list[str]:
        if not (self._folder / INDEX).exists():
            if not (self._folder / WHOLE).exists():
                raise InterchangeError(f"{self._folder} has no {WHOLE} and no {INDEX}{self._pickles()}")
            return [WHOLE]
        places = read_json(self._folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise InterchangeError(f"{self._folder / INDEX} has no weight_map from tensors to files")
        names = sorted(set(places.values()))
        missing = [name for name in names if not (self._folder / name).exists()]
        if missing:
            count = f"{len(missing)} of the {len(names)} files that {INDEX} names"
            raise InterchangeError(f"{self._folder / missing[0]} is missing: {count} must be got first")
        return names

    def _pickles(self) -> str:
        found = sorted(path.name for path in self._folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        return f"; {found[0]} may hold a pickle, which can run code, and is not read" if found else ""

    def depth(self, n_layers: object) -> int:
        """Return how many layers there are beyond the `n_layers` of the trunk."""
        found = {int(match[1]) for name in self._files if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        return len([layer for layer in found if isinstance(n_layers, int) and layer >= n_layers])

    def check(self, wanted: Sequence[Piece]) -> None:
        """Compare what is there with what should be.

        Raises:
            InterchangeError: A tensor is missing, unexpected, of another shape or dtype, or no copy of what it repeats.
        """
        for piece in wanted:
            if piece.name in self._files:
                self._check(piece)
            elif not piece.copied:
                raise InterchangeError(f"{self._folder}: {piece.name} {list(piece.shape)} is missing")
        names = {piece.name for piece in wanted}
        for name, file in self._files.items():
            base = name.removesuffix(SCALE)
            scales = base != name and base in names and self._spec(base).dtype == torch.float8_e4m3fn
            if name not in names and not scales and not _IGNORED.fullmatch(name):
                raise InterchangeError(f"{file.path}: {name} has no place in a model of this config.json")
        origins = {piece.address: piece for piece in wanted if not piece.copied}
        for piece in wanted:
            if piece.copied and piece.name in self._files:
                self._check_copy(piece, origins[piece.address])

    def _check(self, piece: Piece) -> None:
        spec, path = self._spec(piece.name), self._files[piece.name].path
        if spec.shape != piece.shape:
            raise InterchangeError(f"{path}: {piece.name} is {list(spec.shape)}, config.json says {list(piece.shape)}")
        if spec.dtype != torch.float8_e4m3fn:
            return
        if self._tile is None or len(spec.shape) != 2:
            why = "config.json has no quantization_config" if self._tile is None else "it is no matrix"
            raise InterchangeError(f"{path}: {piece.name} is FP8, but {why}")
        blocks = tuple(-(-size // side) for size, side in zip(piece.shape, self._tile, strict=True))
        name = piece.name + SCALE
        if name not in self._files or self._spec(name).shape != blocks:
            found = list(self._spec(name).shape) if name in self._files else "missing"
            raise InterchangeError(f"{path}: the scales {name} are {found}, and should be {list(blocks)}")

    def _check_copy(self, copy: Piece, origin: Piece) -> None:
        pairs = zip(self.batches(copy), self.batches(origin), strict=True)
        if any(not torch.equal(one, other) for (_, one), (_, other) in pairs):
            path = self._files[copy.name].path
            raise InterchangeError(f"{path}: {copy.name} is not {origin.name}; we have one for both")

    def batches(self, piece: Piece) -> Iterator[tuple[int, Tensor]]:
        """Yield the values of a tensor, [rows, columns], each batch with the number of its first row."""
        spec, file = self._spec(piece.name), self._files[piece.name]
        quantised = self._tile if spec.dtype == torch.float8_e4m3fn else None
        side = quantised[0] if quantised else 1
        for start, stop in batches(spec.rows, spec.columns, side):
            rows = file.read(piece.name, start, stop)
            if quantised:
                name = piece.name + SCALE
                rows = dequantize(rows, self._files[name].read(name, start // side, -(-stop // side)), quantised)
            yield start, rows

    def _spec(self, name: str) -> Spec:
        return self._files[name].specs[name]
