"""A small corpus, as text and as the tokens of it, for tests that need files before they run."""

import atexit
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

from attrs import evolve

from tangram.plugins.data.text import TextConfig
from tangram.plugins.data.tokens import TokensConfig


@cache
def folder() -> Path:
    """Return a folder that is gone when the process ends."""
    made = Path(mkdtemp(prefix="tangram-corpus-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def text(*, isolate: bool = False) -> TextConfig:
    """Return the config of the text."""
    return evolve(TextConfig.example(folder()), isolate=isolate)


@cache
def tokens() -> str:
    """Return the folder of the text's tokens."""
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder() / "cache")):
        return TokensConfig.example(folder()).folder
