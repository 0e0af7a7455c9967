import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from tangram.plugins.data import bpe
from tangram.plugins.data.bpe import (
    BOS,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    ByteLevelBPE,
    Cache,
    encoded,
    train,
    trained,
)
from tangram.plugins.data.corpus import DataError

DOCUMENTS = [
    f"def function_{i}(self, number={i * 7919}):\n    return [self.value, 'text {i}', 3.14159]\n\n\n"
    for i in range(200)
] + ["你好，世界 🙂 <|EOT|> <｜User｜>"] * 20
VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def tokenizer() -> ByteLevelBPE:
    return train(DOCUMENTS, VOCAB_SIZE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Cache()


def is_never_called(*arguments: object) -> None:
    raise AssertionError("made again")


any_text = st.text(max_size=60) | st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "def f(x):\n", "  \t \r\n\n", "12345.678", "e\u0301", "👩‍💻", "中文かな", "\x00"])
).map("".join)


@given(text=any_text)
@example(text="def f(x):\n\treturn x  +  12345.678\r\n\r\n   # 终わり 👩‍💻\u2028\ufeff")
def test_any_text_comes_back_from_its_ids(tokenizer: ByteLevelBPE, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=any_text)
def test_text_never_gives_a_special_id_even_where_it_spells_a_special_token(tokenizer: ByteLevelBPE, text: str) -> None:
    assert all(i >= len(SPECIAL_TOKENS) for i in tokenizer.encode(text))


@given(text=any_text)
def test_the_bytes_of_its_tokens_are_the_bytes_of_the_text(tokenizer: ByteLevelBPE, text: str) -> None:
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


def test_special_tokens_stand_first_and_are_left_out_of_decoded_text(tokenizer: ByteLevelBPE, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [saved.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(len(SPECIAL_TOKENS)))
    assert (saved.token_to_id("<｜begin▁of▁sentence｜>"), saved.token_to_id("<｜end▁of▁sentence｜>")) == (
        tokenizer.bos,
        tokenizer.eos,
    )
    assert tokenizer.decode([BOS, *tokenizer.encode("hello"), *ids]) == "hello"
    assert saved.encode("def f(x)").ids == tokenizer.encode("def f(x)")


def test_text_is_cut_as_deepseek_v3_cuts_it(tokenizer: ByteLevelBPE, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    cut = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    text = "def f(x):\n    return x+12345.678"
    pieces = [text[start:stop] for _, (start, stop) in cut.pre_tokenize_str(text)]
    assert pieces == ["def", " f", "(x", "):\n", "   ", " return", " x", "+", "123", "45", ".", "678"]


def test_documents_are_encoded_alike_alone_and_together_between_bos_and_eos(tokenizer: ByteLevelBPE) -> None:
    stream = [i for text in DOCUMENTS for i in [BOS, *tokenizer.encode(text), EOS]]
    assert tokenizer.encode_documents(DOCUMENTS).tolist() == stream
    assert tokenizer.encode_documents([]).tolist() == []


@pytest.mark.parametrize("vocab_size", [bpe.SMALLEST_VOCABULARY, 300])
def test_the_vocabulary_has_exactly_the_size_asked_for(vocab_size: int) -> None:
    assert train(DOCUMENTS, vocab_size).vocab_size == vocab_size


def test_a_size_that_the_text_cannot_fill_is_an_error_with_the_size_it_can() -> None:
    text = ["abc abd"]
    with pytest.raises(DataError, match=r"only (\d+) different pieces, not 1000") as caught:
        train(text, 1000)
    reached = int(str(caught.value).split("only ")[1].split()[0])
    assert train(text, reached).vocab_size == reached


def test_a_size_below_one_token_a_byte_is_an_error() -> None:
    with pytest.raises(DataError, match=r"set model\.vocab_size to 265 or more"):
        train(DOCUMENTS, 264)


def test_what_is_cached_is_not_made_again_and_is_the_same(
    tokenizer: ByteLevelBPE, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(DOCUMENTS, VOCAB_SIZE, cache)
    ids = encoded(DOCUMENTS, first, cache)
    monkeypatch.setattr(bpe, "train", is_never_called)
    monkeypatch.setattr(ByteLevelBPE, "encode_documents", is_never_called)
    second = trained(DOCUMENTS, VOCAB_SIZE, Cache())
    again = encoded(DOCUMENTS, second, Cache())
    assert first.fingerprint == second.fingerprint == tokenizer.fingerprint
    assert isinstance(again, np.memmap)
    assert np.array_equal(ids, again)
    assert all(i >= len(SPECIAL_TOKENS) for i in second.encode("<｜User｜>"))


def test_other_documents_or_another_size_are_another_entry(cache: Cache) -> None:
    one = trained(DOCUMENTS, VOCAB_SIZE, cache)
    assert trained(DOCUMENTS, VOCAB_SIZE - 1, cache).vocab_size == VOCAB_SIZE - 1
    assert trained(DOCUMENTS[50:], VOCAB_SIZE, cache).fingerprint != one.fingerprint
    assert len(encoded(DOCUMENTS, one, cache)) > len(encoded(DOCUMENTS[50:], one, cache))
    assert len(list(cache.folder.iterdir())) == 5


def swap_an_id(content: bytes) -> bytes:
    ids = np.frombuffer(content, np.uint16).copy()
    last = np.flatnonzero(ids == VOCAB_SIZE - 1)[-1]  # the last merge, so of two bytes or more
    ids[last] = len(SPECIAL_TOKENS)  # a single byte
    return ids.tobytes()


def lose_a_mark(mark: int) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        if not content.startswith(b"\x93NUMPY"):
            return content
        ids = np.frombuffer(content, np.uint16).copy()
        ids[np.flatnonzero(ids == mark)[-1]] = PAD
        return ids.tobytes()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\x00" * len(content),
        lambda content: b"\xff garbage",
        lambda content: content.replace(b'"<|EOT|>"', b'"<|EOX|>"'),
        lambda content: swap_an_id(content) if content.startswith(b"\x93NUMPY") else b"{}",
        lose_a_mark(BOS),
        lose_a_mark(EOS),
    ],
    ids=["empty", "cut", "zeros", "garbage", "renamed", "swapped", "no BOS", "no EOS"],
)
def test_a_damaged_cache_is_made_again(tokenizer: ByteLevelBPE, cache: Cache, damage: Callable[[bytes], bytes]) -> None:
    ids = np.array(encoded(DOCUMENTS, trained(DOCUMENTS, VOCAB_SIZE, cache), cache))
    files = {path: path.read_bytes() for path in cache.folder.iterdir()}
    for path, content in files.items():
        path.write_bytes(damage(content))
    again = trained(DOCUMENTS, VOCAB_SIZE, cache)
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(encoded(DOCUMENTS, again, cache), ids)
    assert {path: path.read_bytes() for path in cache.folder.iterdir()} == files


@pytest.fixture(params=["a file in the way", "a disk that fails"])
def unwritable(request: pytest.FixtureRequest, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    if request.param == "a file in the way":
        cache.folder.write_bytes(b"")
    else:

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
    yield cache
    if cache.folder.is_dir():
        assert list(cache.folder.iterdir()) == []


def test_a_cache_that_cannot_be_written_costs_one_warning(tokenizer: ByteLevelBPE, unwritable: Cache) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = trained(DOCUMENTS, VOCAB_SIZE, unwritable)
        ids = encoded(DOCUMENTS, made, unwritable)
    assert made.fingerprint == tokenizer.fingerprint
    assert ids.tolist() == tokenizer.encode_documents(DOCUMENTS).tolist()
    assert ["point XDG_CACHE_HOME" in str(warning.message) for warning in caught] == [True]


def test_the_cache_lies_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().folder == tmp_path / ".cache" / "tangram"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert Cache().folder == tmp_path / "other" / "tangram"
