"""Text as data: a corpus, the tokenizer trained on it, and packed sequences (arXiv:2412.19437, section 4.1)."""

import json
import platform
from hashlib import sha256
from pathlib import Path

import attrs
from attrs import frozen
from attrs.validators import ge, in_, min_len, optional

from tangram.core.experiment import TrainConfig
from tangram.core.registry import component
from tangram.plugins.data import corpus
from tangram.plugins.data.bpe import ByteLevelBPE, Cache, encoded, read_tokenizer, trained
from tangram.plugins.data.corpus import DataError
from tangram.plugins.data.shards import Folder, Shards
from tangram.plugins.data.stream import Stream


@component("data", use="text")
@frozen(kw_only=True)
class TextConfig:
    """Train on text, with a byte-level BPE tokenizer made from it or given.

    Attributes:
        corpus: `python` for the sources of the running Python's standard library, `files` for your own text.
        files: Globs of .txt, .jsonl and .parquet files, relative to the working directory; `**` is any depth.
        field: Field of a .jsonl line, or column of a .parquet file, that holds the text.
        tokenizer: A tokenizer.json to use instead, relative to the working directory: byte-level, with DeepSeek-V3's
            ids for the ends of a text and for padding; null trains one.
        isolate: Whether documents that share a sequence are kept from seeing each other.
        held_out_every: About one document in so many, chosen by its content, is held out for evaluation.
    """

    corpus: str = attrs.field(default="python", validator=in_(("python", "files")))
    files: tuple[str, ...] = ()
    field: str = attrs.field(default="text", validator=min_len(1))
    tokenizer: str | None = attrs.field(default=None, validator=optional(min_len(1)))
    isolate: bool = False
    held_out_every: int = attrs.field(default=20, validator=ge(2))

    def __attrs_post_init__(self) -> None:
        if self.corpus == "files" and not self.files:
            raise ValueError("corpus: files needs globs in files")
        if self.corpus == "python" and self.files:
            raise ValueError("files are given, but corpus is python: say corpus: files")

    @classmethod
    def example(cls, folder: Path) -> "TextConfig":
        """Return a config of a small text, which is written into the folder: with it the laws are tried."""
        texts = [f"{i}: " + "naïve café 世界 🙂 " * (i % 3) + f"ends {i}.\n" for i in range(60)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / "documents.jsonl").write_text("".join(lines), encoding="utf-8")
        return cls(corpus="files", files=(f"{folder}/documents.jsonl",), held_out_every=5)

    def build(self, train: TrainConfig, vocab_size: int) -> Stream:
        """Read the corpus, train its tokenizer or read the given one, and encode it.

        Raises:
            DataError: There is no such text, or too little for the vocabulary or for one sequence; or the given
                tokenizer is missing or unfit.
        """
        name, documents = self._documents()
        training, held_out = corpus.split(documents, self.held_out_every)
        if not training:
            raise DataError("no document is left to train on: give more text")
        cache = Cache()
        if self.tokenizer is None:
            tokenizer = trained(training, vocab_size, cache)
        else:
            tokenizer = read_tokenizer(Path(self.tokenizer).expanduser(), vocab_size)
        decides = (corpus.fingerprint(documents), self.held_out_every, tokenizer.fingerprint)
        ids = Folder(
            source=f"{name}-{sha256(repr(decides).encode()).hexdigest()}",
            tokenizer=tokenizer,
            training=Shards([encoded(training, tokenizer, cache)]),
            held_out=Shards([encoded(held_out, tokenizer, cache)]),
        )
        return Stream(ids, train, isolate=self.isolate)

    def read_tokenizer(self, path: Path, vocab_size: int) -> ByteLevelBPE:
        """Read the tokenizer that a run keeps.

        Raises:
            DataError: It cannot be read, or is unfit.
        """
        return read_tokenizer(path, vocab_size)

    def _documents(self) -> tuple[str, list[str]]:
        """Return a name for the source of the corpus, and its documents."""
        if self.corpus == "files":
            return "files", corpus.from_files(self.files, self.field)
        return f"python-{platform.python_version()}", corpus.standard_library()
