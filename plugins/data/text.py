"""Text as data: a corpus, the tokenizer trained on it, packed sequences, and held-out documents."""

import gzip
import lzma
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from hashlib import sha256

import attrs
import numpy as np
from attrs import frozen
from attrs.validators import ge, in_, min_len

from tangram.core.contracts import HeldOut, Tokenizer
from tangram.core.experiment import TrainConfig
from tangram.core.records import Batch, Progress
from tangram.core.registry import component
from tangram.plugins.data import corpus
from tangram.plugins.data.bpe import BOS, PAD, Cache, Ids, encoded, trained
from tangram.plugins.data.corpus import DataError
from tangram.plugins.data.packing import Epoch, Int64, epoch_of, pack, windows_of


@component("data", use="text")
@frozen(kw_only=True)
class TextConfig:
    """Train on text, with a byte-level BPE tokenizer made from it.

    Attributes:
        corpus: `python` for the sources of the running Python's standard library, `files` for your own text.
        files: Globs of .txt, .jsonl and .parquet files, relative to the working directory; `**` is any depth.
        field: Field of a .jsonl line, or column of a .parquet file, that holds the text.
        isolate: Whether documents that share a sequence are kept from seeing each other.
        held_out_every: About one document in so many, chosen by its content, is held out for evaluation.
    """

    corpus: str = attrs.field(default="python", validator=in_(("python", "files")))
    files: tuple[str, ...] = ()
    field: str = attrs.field(default="text", validator=min_len(1))
    isolate: bool = False
    held_out_every: int = attrs.field(default=20, validator=ge(2))

    def __attrs_post_init__(self) -> None:
        if self.corpus == "files" and not self.files:
            raise ValueError("corpus: files needs globs in files")
        if self.corpus == "python" and self.files:
            raise ValueError("files are given, but corpus is python: say corpus: files")

    def build(self, train: TrainConfig, vocab_size: int) -> "Text":
        """Read the corpus, train its tokenizer and encode it.

        Raises:
            DataError: There is no such text, or too little for the vocabulary or for one sequence.
        """
        name, documents = self._documents()
        training, held_out = corpus.split(documents, self.held_out_every)
        if not training:
            raise DataError("no document is left to train on: give more text")
        cache = Cache()
        tokenizer = trained(training, vocab_size, cache)
        ids = encoded(training, tokenizer, cache)
        length, seed, bos = train.sequence_length, train.seed, BOS if self.isolate else None
        if windows_of(len(ids), length) == 0:
            raise DataError(
                f"the training text holds {len(ids)} tokens, less than one sequence of {length} + 1: "
                "give more text or lower train.sequence_length"
            )
        apart = HeldOutText(held_out, encoded(held_out, tokenizer, cache), tokenizer.token_bytes(), length, bos)
        decides = (
            corpus.fingerprint(documents),
            self.held_out_every,
            tokenizer.fingerprint,
            length,
            seed,
            bos,
        )
        return Text(
            fingerprint=f"{name}-{sha256(repr(decides).encode()).hexdigest()}",
            tokenizer=tokenizer,
            held_out=apart if held_out else None,
            ids=ids,
            length=length,
            seed=seed,
            bos=bos,
        )

    def _documents(self) -> tuple[str, list[str]]:
        """Return a name for the source of the corpus, and its documents."""
        if self.corpus == "files":
            return "files", corpus.from_files(self.files, self.field)
        return f"python-{platform.python_version()}", corpus.standard_library()


class Text:
    """Packed sequences of a corpus, without end; sequence i depends on the corpus, the seed and i alone.

    Args:
        fingerprint: Hash of all that decides the batches.
        tokenizer: What made the ids.
        held_out: Documents apart from these.
        ids: The training documents, each between BOS and EOS.
        length: Positions S of a sequence.
        seed: Seed of the order.
        bos: BOS if documents are isolated, else None.
    """

    def __init__(
        self,
        *,
        fingerprint: str,
        tokenizer: Tokenizer,
        held_out: HeldOut | None,
        ids: Ids,
        length: int,
        seed: int,
        bos: int | None,
    ) -> None:
        self.fingerprint = fingerprint
        self.tokenizer: Tokenizer | None = tokenizer
        self.held_out = held_out
        self._ids = ids
        self._starts = np.flatnonzero(ids == BOS)
        self._length = length
        self._seed = seed
        self._bos = bos
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    def batch(self, now: Progress, n_sequences: int) -> Batch:
        """Return sequences `now.sequences` and the `n_sequences` - 1 after it."""
        wanted = now.sequences + np.arange(n_sequences)
        epochs, inside = np.divmod(wanted, windows_of(len(self._ids), self._length))
        places = [self._epoch(int(epoch)).places(inside[epochs == epoch]) for epoch in np.unique(epochs)]
        return pack(self._ids[np.concatenate(places)].astype(np.int64), bos=self._bos)

    def _make_epoch(self, epoch: int) -> Epoch:
        return epoch_of(self._starts, len(self._ids), self._length, self._seed, epoch)


class HeldOutText:
    """Documents that are never trained on, as one stream in their own order.

    Args:
        documents: The texts.
        ids: The same, each between BOS and EOS.
        token_bytes: UTF-8 bytes of every token of the vocabulary, [V].
        length: Positions S of a sequence.
        bos: BOS if documents are isolated, else None.
    """

    def __init__(self, documents: Sequence[str], ids: Ids, token_bytes: Int64, length: int, bos: int | None) -> None:
        self._text = "".join(documents).encode()
        self.n_bytes = len(self._text)
        self._ids = ids
        self._token_bytes = token_bytes
        self._length = length
        self._bos = bos

    @cached_property
    def references(self) -> Mapping[str, float]:
        """Bits per byte that gzip and xz reach on the whole held-out text."""
        sizes = {
            "gzip -9": len(gzip.compress(self._text, compresslevel=9, mtime=0)),
            "xz -6": len(lzma.compress(self._text, preset=6)),
        }
        return {name: 8 * size / self.n_bytes for name, size in sizes.items()}

    def batches(self, n_sequences: int) -> Iterator[tuple[Batch, int]]:
        """Yield batches of at most `n_sequences` rows, each with the UTF-8 bytes that its targets spell.

        Every token but the first is a target once; isolated, no BOS is. Padding fills the last row.
        """
        n_rows = -(-(len(self._ids) - 1) // self._length)
        padded = np.pad(
            self._ids.astype(np.int64), (0, n_rows * self._length + 1 - len(self._ids)), constant_values=PAD
        )
        windows = np.lib.stride_tricks.sliding_window_view(padded, self._length + 1)[:: self._length]
        for start in range(0, n_rows, n_sequences):
            some = windows[start : start + n_sequences]
            yield pack(some, bos=self._bos, pad=PAD), int(self._token_bytes[some[:, 1:]].sum())
