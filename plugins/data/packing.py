"""From the ids of documents to batches: pure functions of the seed and the number of the sequence.

A corpus is one array of ids, `BOS ... EOS` for each document. An epoch is a permutation of its documents,
read as one stream and cut into windows that are taken in a permuted order too. A window holds S + 1 tokens
and shares the last one with its successor in the stream, so each token of an epoch is a target once, but for
the stream's first and the rest after its last full window.
"""

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from tangram.core.records import IGNORE, Batch, one_document

Int64 = NDArray[np.int64]


def draws(n: int, *seeds: int) -> NDArray[np.uint64]:
    """Return n uniform 64-bit numbers that depend on `seeds` alone.

    They are raw bits of PCG64: numpy promises that those stay the same in every version, which it does not of
    shuffles and floats.
    """
    return np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(n)


def permutation(n: int, *seeds: int) -> Int64:
    """Return the numbers below n in an order that depends on `seeds` alone."""
    return np.argsort(draws(n, *seeds), kind="stable").astype(np.int64)


@frozen(eq=False)
class Epoch:
    """One pass over the documents, as places in the corpus.

    Attributes:
        starts: Where each document begins in the epoch's stream, [documents].
        shifts: Place in the corpus minus place in the stream, for each of these documents, [documents].
        windows: Windows of the stream in the order in which they are taken, [windows].
        length: Positions S of a sequence.
    """

    starts: Int64
    shifts: Int64
    windows: Int64
    length: int

    def places(self, sequences: Int64) -> Int64:
        """Return where in the corpus the tokens of the epoch's given sequences stand, [n, S + 1]."""
        stream = self.windows[sequences, None] * self.length + np.arange(self.length + 1)
        document = np.searchsorted(self.starts, stream, side="right") - 1
        return stream + self.shifts[document]


def windows_of(n_tokens: int, length: int) -> int:
    """Return how many windows of `length` + 1 tokens a stream holds, which is the sequences of an epoch."""
    return max(0, (n_tokens - 1) // length)


def epoch_of(starts: Int64, n_tokens: int, length: int, seed: int, epoch: int) -> Epoch:
    """Return pass number `epoch` over the documents that begin at `starts` in a corpus of `n_tokens`."""
    sizes = np.diff(starts, append=n_tokens)
    order = permutation(len(starts), seed, epoch, 0)
    begins = np.cumsum(sizes[order]) - sizes[order]
    windows = permutation(windows_of(n_tokens, length), seed, epoch, 1)
    return Epoch(begins, starts[order] - begins, windows, length)


def pack(windows: Int64, *, bos: int | None = None, pad: int | None = None) -> Batch:
    """Return the rows of `windows` [B, S + 1] as a batch of its own.

    Args:
        windows: Consecutive tokens.
        bos: The id that begins a document, if documents are to be isolated: then a row's documents are its
            segments, positions restart with each (and are 0 at the start of the row), and no token predicts
            the next document's BOS. Without it a row is one segment, as DeepSeek-V3 packs in pre-training
            (arXiv:2412.19437, section 4.1).
        pad: The id that is never a target.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segments = None
    if bos is not None:
        begins = tokens == bos
        begins[:, 0] = True
        positions = positions - np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
        segments = _tensor(np.cumsum(begins, axis=1) - 1)
    targets = np.where(np.isin(targets, [i for i in (bos, pad) if i is not None]), IGNORE, targets)
    inputs = _tensor(tokens)
    return Batch(
        tokens=inputs,
        targets=_tensor(targets),
        positions=_tensor(positions),
        segments=one_document(inputs) if segments is None else segments,
        n_targets=int((targets != IGNORE).sum()),
        n_sequences=len(windows),
    )


def _tensor(array: Int64) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))  # a copy: some are views of read-only memory
