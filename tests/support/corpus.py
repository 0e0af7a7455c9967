"""A small corpus, as text and as the tokens of it, for tests that need files before they run."""

import atexit
import json
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

from tangram.core.curve import Curve
from tangram.core.experiment import TrainConfig
from tangram.plugins.data.text import TextConfig

VOCAB_SIZE = 300
DOCUMENTS = [f"{i}: " + "naïve café 世界 🙂 " * (i % 3) + f"ends {i}.\n" for i in range(60)]


@cache
def folder() -> Path:
    """Return a folder that is gone when the process ends."""
    made = Path(mkdtemp(prefix="tangram-corpus-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    (made / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return made


def text(*, isolate: bool = False) -> TextConfig:
    """Return the config of the text."""
    return TextConfig(corpus="files", files=(f"{folder()}/documents.jsonl",), isolate=isolate, held_out_every=5)


@cache
def tokens() -> str:
    """Return the folder of the text's tokens."""
    one = Curve.constant(1)
    train = TrainConfig(tokens=1, sequence_length=8, batch_sequences=one, lr=one)
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder() / "cache")):
        text().build(train, VOCAB_SIZE).write(folder() / "tokens", shard_tokens=300)
    return str(folder() / "tokens")
