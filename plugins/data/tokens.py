"""Tokens as data: the shards that `tangram tokenize` wrote, mapped into memory; nothing is read or trained again."""

from pathlib import Path

import attrs
from attrs import frozen
from attrs.validators import min_len

from tangram.core.curve import Curve
from tangram.core.experiment import TrainConfig
from tangram.core.registry import component
from tangram.plugins.data import shards
from tangram.plugins.data.bpe import ByteLevelBPE, read_tokenizer
from tangram.plugins.data.corpus import DataError
from tangram.plugins.data.stream import Stream
from tangram.plugins.data.text import TextConfig

_EXAMPLE_VOCABULARY = 300


@component("data", use="tokens")
@frozen(kw_only=True)
class TokensConfig:
    """Train on tokens that `tangram tokenize` wrote; the batches are those of the text, bit for bit.

    Attributes:
        folder: The folder that was written, relative to the working directory.
        isolate: Whether documents that share a sequence are kept from seeing each other.
    """

    folder: str = attrs.field(validator=min_len(1))
    isolate: bool = False

    @classmethod
    def example(cls, folder: Path) -> "TokensConfig":
        """Return a config of a few tokens, which are written into the folder: with it the laws are tried."""
        one = Curve.constant(1)
        train = TrainConfig(tokens=1, sequence_length=8, batch_sequences=one, lr=one)
        TextConfig.example(folder).build(train, _EXAMPLE_VOCABULARY).write(folder / "tokens", shard_tokens=300)
        return cls(folder=str(folder / "tokens"), isolate=True)

    def build(self, train: TrainConfig, vocab_size: int) -> Stream:
        """Check the files and map them.

        Raises:
            DataError: A file is missing or damaged, the model has no row for some tokens, or there are too few
                for one sequence.
        """
        corpus = shards.read(Path(self.folder).expanduser())
        made = corpus.tokenizer.vocab_size
        if made > vocab_size:
            raise DataError(
                f"the tokens of {self.folder} are of a vocabulary of {made}, the model's has {vocab_size}: "
                f"set model.vocab_size to {made}"
            )
        return Stream(corpus, train, isolate=self.isolate)

    def read_tokenizer(self, path: Path, vocab_size: int) -> ByteLevelBPE:
        """Read the tokenizer that a run keeps.

        Raises:
            DataError: It cannot be read, or is unfit.
        """
        return read_tokenizer(path, vocab_size)
