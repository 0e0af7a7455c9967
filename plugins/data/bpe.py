"""A byte-level BPE tokenizer trained on the corpus itself, and the corpus in its ids; both are cached.

Pre-tokenizer and names of special tokens are those of DeepSeek-V3's release (arXiv:2412.19437, section 4.1);
the special tokens stand at ids 0 and up, since a small vocabulary has no room for V3's ids.
"""

import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tangram.plugins.data.corpus import DataError, fingerprint

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

Ids: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # one token a byte

_DIGITS = r"\p{N}{1,3}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_RECIPE = 1  # part of every cache key; raise it with any change of the above, of `train` or of the ids' layout
_PROBE = " \t\n  a  é 漢字 🙂\r\n\x00 12345 \u200d"  # what tokenizers of other kinds do not keep
_ENCODED_AT_ONCE = 64  # documents; the encodings of a whole corpus would take gigabytes


class ByteLevelBPE:
    """A trained tokenizer. Any text comes back from its ids exactly.

    The name of a special token inside a text is text like any other and never gives that token's id.
    """

    bos = BOS
    eos = EOS

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # which in that library means: as ordinary text

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self._tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's description."""
        return sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS and EOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_documents(self, documents: Sequence[str]) -> Ids:
        """Return the ids of all documents in order, each between BOS and EOS."""
        kind = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        pieces = []
        for start in range(0, len(documents), _ENCODED_AT_ONCE):
            some = list(documents[start : start + _ENCODED_AT_ONCE])
            for encoding in self._tokenizer.encode_batch_fast(some, add_special_tokens=False):
                pieces.append(np.array([BOS, *encoding.ids, EOS], dtype=kind))
        return np.concatenate([np.empty(0, kind), *pieces])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> NDArray[np.int64]:
        """Return the UTF-8 bytes of every token, zero for special ones, [V]."""
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            sizes[i] = len(token)  # byte-level tokens are spelt with one character a byte
        for i, added in self.added().items():
            sizes[i] = 0 if added.special else len(added.content.encode())
        return sizes

    def added(self) -> "dict[int, AddedToken]":
        """Return the tokens that were not made from text, by id."""
        return self._tokenizer.get_added_tokens_decoder()

    def to_json(self) -> str:
        """Return the tokenizer's description, the content of a Hugging Face tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)

    def save(self, path: Path) -> None:
        """Write the description to `path`."""
        path.write_text(self.to_json(), encoding="utf-8")


class Cache:
    """A folder of files that can be made again. Where it cannot be written, only the caching is lost.

    Args:
        folder: The folder; without it, `tangram` below `$XDG_CACHE_HOME` or `~/.cache`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.folder = folder or Path(home, "tangram")
        self._writable = True

    def store(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file whole or not at all; warn once if that cannot be done."""
        if not self._writable:
            return
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"cannot cache the tokenized corpus in {self.folder} ({error.strerror or error}), so every "
                "run makes it again; point XDG_CACHE_HOME to a folder that can be written",
                RuntimeWarning,
                stacklevel=2,
            )
        finally:
            with suppress(OSError):  # it is gone, unless the writing failed
                temporary.unlink()


def train(documents: Iterable[str], vocab_size: int) -> ByteLevelBPE:
    """Return a tokenizer of exactly `vocab_size` tokens, trained on `documents`.

    Raises:
        DataError: The size is below one token a byte, or the text does not hold that many different pieces.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocab_size} cannot hold 256 bytes and {len(SPECIAL_TOKENS)} special tokens: "
            f"set model.vocab_size to {SMALLEST_VOCABULARY} or more"
        )
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGITS, _CJK, _WORDS)]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise DataError(
            f"the text holds only {reached} different pieces, not {vocab_size}: "
            f"set model.vocab_size to {reached} or less, or give more text"
        )
    return ByteLevelBPE(tokenizer)


def trained(documents: Sequence[str], vocab_size: int, cache: Cache) -> ByteLevelBPE:
    """Return what `train` returns, from the cache if it is there.

    Raises:
        DataError: As `train`.
    """
    from tokenizers import __version__

    key = f"{fingerprint(documents)} {vocab_size} {_RECIPE} {__version__}"
    name = f"{sha256(key.encode()).hexdigest()[:32]}.tokenizer.json"
    found = load_tokenizer(cache.folder / name, vocab_size)
    if found is not None:
        return found
    made = train(documents, vocab_size)
    cache.store(name, lambda file: file.write(made.to_json().encode()))
    return made


def encoded(documents: Sequence[str], tokenizer: ByteLevelBPE, cache: Cache) -> Ids:
    """Return what `encode_documents` returns, from the cache and mapped into memory if it can be."""
    key = f"{fingerprint(documents)} {tokenizer.fingerprint} {_RECIPE}"
    name = f"{sha256(key.encode()).hexdigest()[:32]}.ids.npy"
    found = _load_ids(cache.folder / name, documents, tokenizer)
    if found is not None:
        return found
    made = tokenizer.encode_documents(documents)
    cache.store(name, lambda file: np.save(file, made))
    return made


def load_tokenizer(path: Path, vocab_size: int) -> ByteLevelBPE | None:
    """Return the cached tokenizer, or None if it is missing or damaged."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(path.read_bytes().decode())
    except Exception:  # the library raises bare Exception on a damaged description
        return None
    special = tuple(found.id_to_token(i) for i in range(len(SPECIAL_TOKENS)))
    if found.get_vocab_size() != vocab_size or special != SPECIAL_TOKENS:
        return None
    return ByteLevelBPE(found)


def read_tokenizer(path: Path, vocab_size: int) -> ByteLevelBPE:
    """Return a tokenizer that someone else made, with the ids of DeepSeek-V3's for the ends of a text and for padding.

    Raises:
        DataError: It cannot be read, has other ids there, ids from `vocab_size` on or gaps between them, or does not
            spell bytes.
    """
    from tokenizers import Tokenizer

    try:
        read = Tokenizer.from_str(path.read_bytes().decode())
    except Exception as error:  # the library raises bare Exception on a damaged description
        raise DataError(f"{path}: the tokenizers library cannot read it ({error})") from None
    found, largest = ByteLevelBPE(read), max(read.get_vocab(with_added_tokens=True).values(), default=-1)
    added = {i: token.content for i, token in found.added().items() if token.special}
    ends = [added.get(i) for i in (BOS, EOS, PAD)]
    if ends != list(SPECIAL_TOKENS[:3]):
        raise DataError(f"{path}: its tokens 0, 1 and 2 are {ends}, not {list(SPECIAL_TOKENS[:3])}, DeepSeek-V3's")
    if largest >= vocab_size:
        raise DataError(f"{path} has ids up to {largest}: set model.vocab_size to {largest + 1} or more")
    if largest >= found.vocab_size:
        raise DataError(f"{path}: its {found.vocab_size} tokens leave ids below {largest} out")
    ids = found.encode(_PROBE)
    if found.decode(ids) != _PROBE or int(found.token_bytes()[ids].sum()) != len(_PROBE.encode()):
        raise DataError(f"{path}: it is no byte-level tokenizer, since text does not come back from it as it was")
    return found


def _load_ids(path: Path, documents: Sequence[str], tokenizer: ByteLevelBPE) -> Ids | None:
    """Return the cached ids, or None if they are missing or do not spell as many bytes as `documents`."""
    try:
        ids: Ids = np.load(path, mmap_mode="r")
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        for start in range(0, len(ids), 1 << 20):
            counts += np.bincount(ids[start : start + (1 << 20)], minlength=len(counts))
    except Exception:  # numpy raises many things on a damaged file
        return None
    n_bytes = sum(len(text.encode()) for text in documents)
    if counts[BOS] != len(documents) or counts[EOS] != len(documents) or counts @ tokenizer.token_bytes() != n_bytes:
        return None
    return ids
