"""A small run with a tokenizer, really trained for a few steps, to evaluate."""

import json
from functools import cache
from pathlib import Path

from corpus import folder
from tiny import tiny

from tangram.core.run import train
from tangram.plugins.data.text import TextConfig

LENGTH = 64


@cache
def run() -> Path:
    """Return its directory; who writes there takes a copy."""
    files = json.dumps(list(TextConfig.example(folder()).files))
    experiment = tiny(
        "model.blocks.1={repeat: 1}",
        "model.vocab_size=280",
        f"data={{use: text, corpus: files, files: {files}, held_out_every: 5}}",
        f"train={{sequence_length: {LENGTH}, tokens: 512}}",
        "precision.compute=float64",
        "observers.ema.decay=0.5",
    )
    train(experiment, folder() / "scored")
    return folder() / "scored"
