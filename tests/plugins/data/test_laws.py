"""All data keeps the laws of its slot."""

from collections.abc import Iterator

import pytest
from corpus import folder, text, tokens

from tangram.plugins.data.synthetic import SyntheticConfig
from tangram.plugins.data.tokens import TokensConfig
from tangram.testing import DataContract


@pytest.fixture(scope="module", autouse=True)
def a_cache_of_our_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder() / "cache"))
        yield


class TestSynthetic(DataContract):
    config = SyntheticConfig


class TestText(DataContract):
    config = text()


class TestIsolatedText(DataContract):
    config = text(isolate=True)


class TestTokens(DataContract):
    config = TokensConfig(folder=tokens(), isolate=True)
