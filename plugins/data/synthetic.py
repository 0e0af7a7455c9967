"""Random tokens as data: no corpus, no tokenizer, any vocabulary."""

from hashlib import sha256

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from tangram.core.contracts import HeldOut, Tokenizer
from tangram.core.experiment import TrainConfig
from tangram.core.records import Batch, Progress
from tangram.core.registry import component
from tangram.plugins.data.packing import draws, pack


@component("data", use="synthetic")
@frozen(kw_only=True)
class SyntheticConfig:
    """Train on independent random tokens that follow Zipf's law, to try a model or to measure its speed.

    Attributes:
        skew: Exponent of the law: token k has probability proportional to (k + 1) ** -skew; 0 for uniform.
            With a skew the loss can fall from the logarithm of the vocabulary to the entropy of the law.
    """

    skew: float = field(default=1.0, validator=ge(0.0))

    def build(self, train: TrainConfig, vocab_size: int) -> "Synthetic":
        """Build it."""
        return Synthetic(self.skew, vocab_size, train.sequence_length, train.seed)


class Synthetic:
    """Sequences without end, each one segment; sequence i depends on the settings, the seed and i alone.

    Args:
        skew: Exponent of Zipf's law.
        vocab_size: Tokens V.
        length: Positions S of a sequence.
        seed: Seed of the tokens.
    """

    def __init__(self, skew: float, vocab_size: int, length: int, seed: int) -> None:
        settings = repr((skew, vocab_size, length, seed))
        self.fingerprint = f"synthetic-{sha256(settings.encode()).hexdigest()}"
        self.tokenizer: Tokenizer | None = None
        self.held_out: HeldOut | None = None
        mass = np.cumsum(np.arange(1, vocab_size + 1, dtype=np.float64) ** -skew)
        self._below = mass / mass[-1]
        self._length = length
        self._seed = seed

    def batch(self, now: Progress, n_sequences: int) -> Batch:
        """Return sequences `now.sequences` and the `n_sequences` - 1 after it."""
        wanted = range(now.sequences, now.sequences + n_sequences)
        bits = np.stack([draws(self._length + 1, self._seed, i) for i in wanted])
        uniform = (bits >> np.uint64(11)) * 2.0**-53  # [n, S + 1], in [0, 1)
        return pack(np.searchsorted(self._below, uniform, side="right"))
