"""Packed sequences of a corpus in ids, without end, and its held-out documents once."""

import gzip
import lzma
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from tangram.core.contracts import HeldOut, Tokenizer
from tangram.core.experiment import TrainConfig
from tangram.core.records import Batch, Progress
from tangram.plugins.data import shards
from tangram.plugins.data.bpe import BOS, PAD, ByteLevelBPE
from tangram.plugins.data.corpus import DataError
from tangram.plugins.data.packing import Epoch, epoch_of, pack, windows_of
from tangram.plugins.data.shards import SHARD_TOKENS, Folder, Shards

_COUNTED_AT_ONCE = 1 << 20


class Stream:
    """Sequences without end; sequence i depends on the corpus, the seed and i alone.

    Args:
        corpus: The ids.
        train: Length of a sequence, and seed of the order.
        isolate: Whether documents that share a sequence are kept from seeing each other.

    Raises:
        DataError: The training documents do not fill one sequence.
    """

    def __init__(self, corpus: Folder, train: TrainConfig, *, isolate: bool) -> None:
        length, bos = train.sequence_length, BOS if isolate else None
        if windows_of(len(corpus.training), length) == 0:
            raise DataError(
                f"the training text holds {len(corpus.training)} tokens, less than one sequence of {length} + 1: "
                "give more text or lower train.sequence_length"
            )
        settings = sha256(repr((length, train.seed, bos)).encode()).hexdigest()
        self.fingerprint = f"{corpus.source}-{settings[:16]}"
        self.tokenizer: Tokenizer | None = corpus.tokenizer
        self.held_out: HeldOut | None = None
        if len(corpus.held_out):
            self.held_out = HeldOutStream(corpus.held_out, corpus.tokenizer, length, bos)
        self._corpus = corpus
        self._starts = corpus.training.places_of(BOS)
        self._length = length
        self._seed = train.seed
        self._bos = bos
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    def batch(self, now: Progress, n_sequences: int) -> Batch:
        """Return sequences `now.sequences` and the `n_sequences` - 1 after it."""
        wanted = now.sequences + np.arange(n_sequences)
        epochs, inside = np.divmod(wanted, windows_of(len(self._corpus.training), self._length))
        places = [self._epoch(int(epoch)).places(inside[epochs == epoch]) for epoch in np.unique(epochs)]
        return pack(self._corpus.training.take(np.concatenate(places)), bos=self._bos)

    def write(self, folder: Path, shard_tokens: int = SHARD_TOKENS) -> None:
        """Write the ids for `data: tokens`, in files of at most `shard_tokens`.

        Raises:
            DataError: The folder is there already, or cannot be written.
        """
        shards.write(folder, self._corpus, shard_tokens)

    def _make_epoch(self, epoch: int) -> Epoch:
        return epoch_of(self._starts, len(self._corpus.training), self._length, self._seed, epoch)


class HeldOutStream:
    """Documents that are never trained on, as one stream in their own order.

    Args:
        ids: The documents, each between BOS and EOS.
        tokenizer: What made the ids.
        length: Positions S of a sequence.
        bos: BOS if documents are isolated, else None.
    """

    def __init__(self, ids: Shards, tokenizer: ByteLevelBPE, length: int, bos: int | None) -> None:
        self._ids = ids
        self._tokenizer = tokenizer
        self._token_bytes = tokenizer.token_bytes()
        self._length = length
        self._bos = bos
        self.n_bytes = sum(int(self._token_bytes[piece].sum()) for piece in ids.pieces(_COUNTED_AT_ONCE))

    @cached_property
    def references(self) -> Mapping[str, float]:
        """Bits per byte that gzip and xz reach on the whole held-out text."""
        text = self._tokenizer.decode(i for piece in self._ids.pieces(_COUNTED_AT_ONCE) for i in piece).encode()
        sizes = {
            "gzip -9": len(gzip.compress(text, compresslevel=9, mtime=0)),
            "xz -6": len(lzma.compress(text, preset=6)),
        }
        return {name: 8 * size / self.n_bytes for name, size in sizes.items()}

    def batches(self, n_sequences: int) -> Iterator[tuple[Batch, int]]:
        """Yield batches of at most `n_sequences` rows, each with the UTF-8 bytes that its targets spell.

        Every token but the first is a target once; isolated, no BOS is. Padding fills the last row.
        """
        last = len(self._ids) - 1
        n_rows = -(-last // self._length)
        for start in range(0, n_rows, n_sequences):
            rows = np.arange(start, min(start + n_sequences, n_rows))
            places = rows[:, None] * self._length + np.arange(self._length + 1)
            some = np.where(places > last, PAD, self._ids.take(np.minimum(places, last)))
            yield pack(some, bos=self._bos, pad=PAD), int(self._token_bytes[some[:, 1:]].sum())
