import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.curve import Curve
from tangram.core.experiment import TrainConfig
from tangram.core.records import IGNORE, Batch, Progress
from tangram.core.registry import Registry
from tangram.plugins.data import synthetic, text
from tangram.plugins.data.bpe import BOS, EOS, PAD, SMALLEST_VOCABULARY, train
from tangram.plugins.data.corpus import DataError, split
from tangram.plugins.data.shards import Shards
from tangram.plugins.data.stream import HeldOutStream, Stream
from tangram.plugins.data.text import TextConfig

VOCAB_SIZE = 300
DOCUMENTS = [f"document {i}: " + "naïve café 世界 🙂 " * (i % 5) + f"ends {i}.\n" for i in range(120)]
TRAINING, HELD_OUT = split(DOCUMENTS, 5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"body": document}) + "\n" for document in DOCUMENTS))
    return path


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def train_config(length: int, seed: int = 0) -> TrainConfig:
    return TrainConfig(
        tokens=1, sequence_length=length, batch_sequences=Curve.constant(1), lr=Curve.constant(0.1), seed=seed
    )


def build(
    corpus: Path,
    *,
    length: int = 16,
    seed: int = 0,
    isolate: bool = False,
    vocab_size: int = VOCAB_SIZE,
    held_out_every: int = 5,
) -> Stream:
    config = TextConfig(
        corpus="files", files=(str(corpus),), field="body", isolate=isolate, held_out_every=held_out_every
    )
    return config.build(train_config(length, seed), vocab_size)


def held_out_of(data: Stream) -> HeldOutStream:
    assert isinstance(data.held_out, HeldOutStream)
    return data.held_out


def same(a: Batch, b: Batch) -> bool:
    assert a.targets is not None
    assert b.targets is not None
    return (
        a.tokens.equal(b.tokens)
        and a.targets.equal(b.targets)
        and a.positions.equal(b.positions)
        and a.segments.equal(b.segments)
    )


def test_both_components_are_found_under_their_names() -> None:
    registry = Registry()
    for module in (text, synthetic):
        registry.collect(module, "test")
    assert registry.uses("data") == ["synthetic", "text"]


def test_each_epoch_has_an_order_of_its_own_and_a_batch_may_span_several(corpus: Path) -> None:
    data = build(corpus)
    assert data.tokenizer is not None
    n = (sum(len(data.tokenizer.encode(document)) + 2 for document in TRAINING) - 1) // 16
    epochs = [data.batch(Progress(sequences=i * n), n).tokens for i in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not epochs[one].equal(epochs[other])
    across = data.batch(Progress(sequences=n - 2), n + 4).tokens
    assert across.equal(torch.cat([epochs[0][-2:], epochs[1], epochs[2][:2]]))


@pytest.mark.parametrize("isolate", [False, True])
def test_an_epoch_trains_on_the_training_documents_and_on_nothing_held_out(corpus: Path, isolate: bool) -> None:
    data = build(corpus, isolate=isolate)
    assert data.tokenizer is not None
    stream = [i for d in TRAINING for i in [BOS, *data.tokenizer.encode(d), EOS]]
    n = (len(stream) - 1) // 16
    batch = data.batch(Progress(sequences=3 * n), n)  # the fourth epoch
    assert batch.targets is not None
    seen = np.bincount(batch.targets[batch.targets != IGNORE], minlength=VOCAB_SIZE)
    missing = np.bincount(stream, minlength=VOCAB_SIZE) - seen
    if isolate:
        assert seen[BOS] == 0
        missing[BOS] = 0
    assert (missing >= 0).all()
    assert missing.sum() <= 16
    rows = {data.tokenizer.decode(row) for row in batch.tokens.tolist()}
    assert not any(document[:14] in row for document in HELD_OUT for row in rows)
    assert any(document[:14] in row for document in TRAINING for row in rows)


@given(length=st.integers(2, 70), n=st.integers(1, 9), isolate=st.booleans())
def test_held_out_text_is_covered_once_to_the_last_byte(corpus: Path, length: int, n: int, isolate: bool) -> None:
    data = build(corpus, length=length, isolate=isolate)
    assert data.tokenizer is not None
    stream = [i for d in HELD_OUT for i in [BOS, *data.tokenizer.encode(d), EOS]]
    batches = [batch for batch, _ in held_out_of(data).batches(n)]
    targets = torch.cat([batch.targets.flatten() for batch in batches if batch.targets is not None])
    expected = [i for i in stream[1:] if not (isolate and i == BOS)]
    assert targets[targets != IGNORE].tolist() == expected
    assert torch.cat([batch.tokens.flatten() for batch in batches]).tolist()[: len(stream) - 1] == stream[:-1]
    assert [len(batch.tokens) for batch in batches[:-1]] == [n] * (len(batches) - 1)
    for batch in batches:
        assert batch.targets is not None
        assert batch.n_targets == int((batch.targets != IGNORE).sum()) > 0
        assert batch.n_sequences == len(batch.tokens)
        assert batch.tokens.shape[1] == length


@given(length=st.integers(2, 70), n=st.integers(1, 9), isolate=st.booleans())
def test_a_batch_covers_the_bytes_that_its_targets_spell(corpus: Path, length: int, n: int, isolate: bool) -> None:
    data = build(corpus, length=length, isolate=isolate)
    held_out = held_out_of(data)
    vocabulary = json.loads(data.tokenizer.to_json())["model"]["vocab"]  # type: ignore[union-attr]
    spelt = {i: len(token) if i > PAD + 6 else 0 for token, i in vocabulary.items()} | {IGNORE: 0}
    total = 0
    for batch, n_bytes in held_out.batches(n):
        assert batch.targets is not None
        assert n_bytes == sum(spelt[i] for i in batch.targets.flatten().tolist())
        total += n_bytes
    assert total == held_out.n_bytes == len("".join(HELD_OUT).encode())


def test_the_references_say_how_well_compressors_do(corpus: Path) -> None:
    references = held_out_of(build(corpus)).references
    assert set(references) == {"gzip -9", "xz -6"}
    assert references == held_out_of(build(corpus)).references
    noise = "".join(chr(33 + i) for i in np.random.default_rng(0).integers(0, 64, 50_000))
    tokenizer = train([noise], SMALLEST_VOCABULARY)
    even = HeldOutStream(Shards([tokenizer.encode_documents([noise])]), tokenizer, 2, None)
    for bits in even.references.values():
        assert 6 <= bits < 6.5  # the entropy of a uniform choice of 64
    assert all(0 < bits < 4 for bits in references.values())


def test_the_fingerprint_tells_apart_all_that_decides_the_batches(corpus: Path, tmp_path: Path) -> None:
    longer = tmp_path / "longer.jsonl"
    longer.write_text(corpus.read_text() + '{"body": "one more"}\n')
    bytes_only = 265  # without merges every text has the same tokenizer, which then tells nothing apart
    runs = [
        build(corpus, vocab_size=bytes_only),
        build(longer, vocab_size=bytes_only),
        build(corpus, vocab_size=bytes_only, length=17),
        build(corpus, vocab_size=bytes_only, seed=1),
        build(corpus, vocab_size=bytes_only, isolate=True),
        build(corpus, vocab_size=bytes_only, held_out_every=6),
        build(corpus, vocab_size=bytes_only + 1),
    ]
    assert len({run.fingerprint for run in runs}) == len(runs)


def test_the_fingerprint_does_not_depend_on_the_cache(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = build(corpus)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = build(corpus)
    assert fresh.fingerprint == cached.fingerprint
    assert same(fresh.batch(Progress(), 4), cached.batch(Progress(), 4))


def test_a_corpus_without_held_out_documents_has_no_held_out_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TRAINING[0] * 20)
    data = TextConfig(corpus="files", files=(f"{tmp_path}/*.txt",), held_out_every=5 * 10**9).build(
        train_config(16), 265
    )
    assert data.held_out is None


def test_a_corpus_shorter_than_a_sequence_says_how_long_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    config = TextConfig(corpus="files", files=(f"{tmp_path}/a.txt",))
    assert config.build(train_config(4), 265).batch(Progress(), 2).tokens.shape == (2, 4)
    with pytest.raises(DataError, match=r"holds 5 tokens, less than one sequence of 5 \+ 1"):
        config.build(train_config(5), 265)


def test_a_corpus_all_held_out_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(HELD_OUT[0])
    config = TextConfig(corpus="files", files=(f"{tmp_path}/a.txt",), held_out_every=5)
    with pytest.raises(DataError, match="no document is left to train on"):
        config.build(train_config(4), 265)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "files"}, "needs globs in files"),
        ({"files": ("a.txt",)}, "say corpus: files"),
        ({"corpus": "web"}, "corpus"),
        ({"held_out_every": 1}, "held_out_every"),
        ({"field": ""}, "field"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextConfig(**settings)  # type: ignore[arg-type]


def test_the_python_corpus_trains_a_tokenizer_of_4096_out_of_the_box() -> None:
    data = TextConfig().build(train_config(512), 4096)
    held_out = held_out_of(data)
    assert data.fingerprint.startswith("python-3.")
    batch = data.batch(Progress(), 4)
    assert batch.tokens.shape == (4, 512)
    assert int(batch.tokens.max()) < 4096
    covered = [(b.n_targets, n_bytes) for b, n_bytes in held_out.batches(32)]
    n_targets, n_bytes = (sum(column) for column in zip(*covered, strict=True))
    assert n_bytes == held_out.n_bytes > 200_000
    assert 3 < n_bytes / n_targets < 5
    assert all(1 < bits < 3 for bits in held_out.references.values())
