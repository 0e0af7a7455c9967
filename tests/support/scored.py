"""A small run with a tokenizer, really trained for a few steps, to evaluate."""

from functools import cache
from pathlib import Path

from corpus import folder
from tiny import on_text

from tangram.core.run import train

LENGTH = 64


@cache
def run() -> Path:
    """Return its directory; who writes there takes a copy."""
    experiment = on_text(f"train={{sequence_length: {LENGTH}, tokens: 512}}", "observers.ema.decay=0.5")
    train(experiment, folder() / "scored")
    return folder() / "scored"
