"""Token ids in pieces that read as one long array, in memory or mapped from files, and the folder that keeps them.

A folder of tokens holds `tokenizer.json`, the ids of the training and of the held-out documents in files of one
numpy array each, and `index.json`, which is written last and knows the SHA-256 and the length of every file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any, cast

import attrs
import numpy as np
from attrs import frozen

from tangram.plugins.data.bpe import ByteLevelBPE, Ids, read_tokenizer
from tangram.plugins.data.corpus import DataError
from tangram.plugins.data.packing import Int64

FORMAT = 1
SHARD_TOKENS = 1 << 28
"""Ids of one file: at most 1 GiB."""


class Shards:
    """Arrays of ids, end to end.

    Args:
        parts: The arrays in order.
    """

    def __init__(self, parts: Sequence[Ids]) -> None:
        self._parts = tuple(parts)
        self._begins = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._begins[-1])

    def take(self, places: Int64) -> Int64:
        """Return the ids at `places`, of the same shape."""
        found = np.empty(places.shape, np.int64)
        part = np.searchsorted(self._begins, places, side="right") - 1
        for i in np.unique(part):
            here = part == i
            found[here] = self._parts[i][places[here] - self._begins[i]]
        return found

    def places_of(self, token: int) -> Int64:
        """Return where `token` stands, ascending."""
        pairs = zip(self._begins, self._parts, strict=False)
        return np.concatenate(
            [np.empty(0, np.int64), *(begin + np.flatnonzero(part == token) for begin, part in pairs)]
        )

    def pieces(self, most: int) -> Iterator[Ids]:
        """Yield the ids in order, in arrays of at most `most`."""
        for part in self._parts:
            for start in range(0, len(part), most):
                yield part[start : start + most]


@frozen
class Shard:
    """One file of ids.

    Attributes:
        file: Its name.
        tokens: Ids in it.
        sha256: Its hash, in hex.
    """

    file: str
    tokens: int
    sha256: str


@frozen(eq=False)
class Folder:
    """A corpus in ids, as it is kept on disk.

    Attributes:
        source: Name and hash of the corpus, its division and its tokenizer.
        tokenizer: What made the ids.
        training: Ids of the documents to train on, each between BOS and EOS.
        held_out: Ids of the documents apart from these.
    """

    source: str
    tokenizer: ByteLevelBPE
    training: Shards
    held_out: Shards


def write(folder: Path, corpus: Folder, shard_tokens: int = SHARD_TOKENS) -> None:
    """Write a corpus to a folder that is not there yet, in files of at most `shard_tokens` ids.

    Raises:
        DataError: The folder is there, or cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        corpus.tokenizer.save(folder / "tokenizer.json")
        index = {
            "format": FORMAT,
            "source": corpus.source,
            "vocab_size": corpus.tokenizer.vocab_size,
            "tokenizer": _sha256(folder / "tokenizer.json"),
            "training": [attrs.asdict(shard) for shard in _written(folder, "shard", corpus.training, shard_tokens)],
            "held_out": [attrs.asdict(shard) for shard in _written(folder, "held-out", corpus.held_out, shard_tokens)],
        }
        (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    except FileExistsError as error:
        raise DataError(f"{folder} is there already; choose another name") from error
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error


def _written(folder: Path, stem: str, ids: Shards, most: int) -> Iterator[Shard]:
    for number, piece in enumerate(ids.pieces(most)):
        path = folder / f"{stem}-{number:05}.npy"
        np.save(path, piece)
        yield Shard(path.name, len(piece), _sha256(path))


def read(folder: Path) -> Folder:
    """Return the corpus that `write` wrote, its ids mapped into memory. Every file is hashed once.

    Raises:
        DataError: A file is missing, is not what the index says, or cannot be read.
    """
    index = _index(folder)
    tokenizer = folder / "tokenizer.json"
    _check(tokenizer, str(index["tokenizer"]))
    return Folder(
        source=str(index["source"]),
        tokenizer=read_tokenizer(tokenizer, cast(int, index["vocab_size"])),
        training=_mapped(folder, index["training"]),
        held_out=_mapped(folder, index["held_out"]),
    )


_REMEDY = "write the folder again with `tangram tokenize`"


def _index(folder: Path) -> Mapping[str, object]:
    path = folder / "index.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no index.json, so it is no complete folder of tokens; {_REMEDY}")
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: broken JSON; {_REMEDY}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path} is not of format {FORMAT}; {_REMEDY}")
    missing = {"source", "vocab_size", "tokenizer", "training", "held_out"} - index.keys()
    if missing:
        raise DataError(f"{path}: no {', '.join(sorted(missing))}; {_REMEDY}")
    return index


def _mapped(folder: Path, shards: object) -> Shards:
    try:
        listed = [Shard(**entry) for entry in cast(list[dict[str, Any]], shards)]
    except TypeError as error:
        raise DataError(f"{folder / 'index.json'}: a list of files is damaged; {_REMEDY}") from error
    return Shards([_array(folder / shard.file, shard) for shard in listed])


def _array(path: Path, shard: Shard) -> Ids:
    _check(path, shard.sha256)
    try:
        ids: Ids = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no array of numpy; {_REMEDY}") from error
    if ids.shape != (shard.tokens,):
        raise DataError(f"{path} holds {ids.shape} ids, but index.json says {shard.tokens}; {_REMEDY}")
    return ids


def _check(path: Path, sha256: str) -> None:
    """Refuse a file that is not the one that was written."""
    if not path.is_file():
        raise DataError(f"{path} is missing, but index.json names it; {_REMEDY}")
    if _sha256(path) != sha256:
        raise DataError(f"{path} is damaged: its SHA-256 is not the one in index.json; {_REMEDY}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
