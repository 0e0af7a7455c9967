"""Tokens written once give the batches of the text that they came from; what is damaged is named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.curve import Curve
from tangram.core.experiment import TrainConfig
from tangram.core.records import Batch, Progress
from tangram.plugins.data.corpus import DataError
from tangram.plugins.data.shards import Shards
from tangram.plugins.data.stream import Stream
from tangram.plugins.data.text import TextConfig
from tangram.plugins.data.tokens import TokensConfig

DOCUMENTS = [f"document {i}: " + "naïve café 世界 🙂 " * (i % 5) + f"ends {i}.\n" for i in range(120)]


def train_config(length: int = 16, seed: int = 0) -> TrainConfig:
    return TrainConfig(
        tokens=1, sequence_length=length, batch_sequences=Curve.constant(1), lr=Curve.constant(0.1), seed=seed
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Stream]:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))

    def build(length: int = 16, seed: int = 0, isolate: bool = False) -> Stream:
        config = TextConfig(corpus="files", files=(f"{folder}/documents.jsonl",), isolate=isolate, held_out_every=5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
            return config.build(train_config(length, seed), 300)

    return build


@pytest.fixture(scope="module")
def written(text: Callable[..., Stream], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "made" / "here"
    text().write(folder, shard_tokens=700)
    return folder


@pytest.fixture
def mine(text: Callable[..., Stream], tmp_path: Path) -> Path:
    """A folder to damage."""
    text().write(tmp_path / "tokens", shard_tokens=700)
    return tmp_path / "tokens"


def read(folder: Path, vocab_size: int = 300) -> Stream:
    return TokensConfig(folder=str(folder)).build(train_config(), vocab_size)


def same(a: Batch, b: Batch) -> bool:
    assert a.targets is not None
    assert b.targets is not None
    return (
        a.tokens.equal(b.tokens)
        and a.targets.equal(b.targets)
        and a.positions.equal(b.positions)
        and a.segments.equal(b.segments)
        and (a.n_targets, a.n_sequences) == (b.n_targets, b.n_sequences)
    )


@given(
    start=st.integers(0, 2000),
    n=st.integers(1, 7),
    length=st.integers(2, 70),
    isolate=st.booleans(),
    seed=st.integers(0, 3),
)
def test_tokens_give_the_batches_of_their_text_bit_for_bit(
    text: Callable[..., Stream], written: Path, start: int, n: int, length: int, isolate: bool, seed: int
) -> None:
    ours = TokensConfig(folder=str(written), isolate=isolate).build(train_config(length, seed), 300)
    theirs = text(length, seed, isolate)
    assert same(ours.batch(Progress(sequences=start), n), theirs.batch(Progress(sequences=start), n))
    assert ours.fingerprint == theirs.fingerprint
    assert ours.held_out is not None and theirs.held_out is not None
    assert ours.held_out.n_bytes == theirs.held_out.n_bytes
    pairs = zip(ours.held_out.batches(n), theirs.held_out.batches(n), strict=True)
    assert all(same(a, b) and a_bytes == b_bytes for (a, a_bytes), (b, b_bytes) in pairs)


def test_tokens_keep_the_tokenizer_and_the_references_of_their_text(text: Callable[..., Stream], written: Path) -> None:
    ours, theirs = read(written), text()
    assert ours.tokenizer is not None and theirs.tokenizer is not None
    assert ours.tokenizer.encode(DOCUMENTS[4]) == theirs.tokenizer.encode(DOCUMENTS[4])
    assert ours.held_out is not None and theirs.held_out is not None
    assert ours.held_out.references == theirs.held_out.references


def test_no_shard_is_larger_than_asked_and_together_they_are_whole(written: Path) -> None:
    index = json.loads((written / "index.json").read_text())
    for kind, pattern in (("training", "shard-*.npy"), ("held_out", "held-out-*.npy")):
        shards = index[kind]
        assert [shard["file"] for shard in shards] == [path.name for path in sorted(written.glob(pattern))]
        assert all(shard["tokens"] == 700 for shard in shards[:-1])
        assert 0 < shards[-1]["tokens"] <= 700
    assert len(index["training"]) > 2
    assert np.load(written / "shard-00000.npy").dtype == np.uint16


def test_tokens_are_written_again_from_tokens(written: Path, tmp_path: Path) -> None:
    read(written).write(tmp_path / "again", shard_tokens=350)
    again = read(tmp_path / "again")
    assert same(again.batch(Progress(), 9), read(written).batch(Progress(), 9))


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_shards_read_as_one_array(sizes: list[int], seed: int) -> None:
    stream = np.random.default_rng(seed)
    parts = [stream.integers(0, 3, size).astype(np.uint16) for size in sizes]
    shards, whole = Shards(parts), np.concatenate(parts)
    assert len(shards) == len(whole)
    assert shards.places_of(1).tolist() == np.flatnonzero(whole == 1).tolist()
    assert np.concatenate([np.empty(0), *shards.pieces(2)]).tolist() == whole.tolist()
    if len(whole):
        places = stream.integers(0, len(whole), (3, 4))
        assert shards.take(places).tolist() == whole[places].tolist()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "shard-00001.npy").unlink(), r"shard-00001\.npy is missing"),
    (lambda folder: flip(folder / "shard-00001.npy"), r"shard-00001\.npy is damaged"),
    (lambda folder: (folder / "held-out-00000.npy").write_bytes(b""), r"held-out-00000\.npy is damaged"),
    (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    (lambda folder: flip(folder / "tokenizer.json"), r"tokenizer\.json is damaged"),
    (lambda folder: (folder / "index.json").unlink(), r"holds no index\.json"),
    (lambda folder: (folder / "index.json").write_text("{"), r"index\.json: broken JSON"),
    (lambda folder: edit(folder / "index.json", format=99), r"index\.json is not of format 1"),
    (lambda folder: edit(folder / "index.json", training=[{"file": 1}]), r"index\.json: .* damaged"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_what_is_damaged_or_missing_is_named(mine: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(mine)
    with pytest.raises(DataError, match=message):
        read(mine)


def test_a_folder_that_is_there_is_not_written_over(mine: Path, text: Callable[..., Stream]) -> None:
    with pytest.raises(DataError, match="is there already"):
        text().write(mine)


def test_a_model_without_a_row_for_every_token_is_refused(written: Path) -> None:
    assert read(written, 301).batch(Progress(), 1).tokens.shape == (1, 16)
    with pytest.raises(DataError, match=r"set model\.vocab_size to 300"):
        read(written, 299)
