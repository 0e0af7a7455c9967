"""Laws of the data stream that hold for every corpus, seed, length and cut."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve, frozen
from hypothesis import given, reject
from hypothesis import strategies as st
from tiny import tiny

from tangram.core.assembly import past_skipped, sequences_at
from tangram.core.curve import Curve
from tangram.core.experiment import TrainConfig
from tangram.core.records import IGNORE, Batch, Progress
from tangram.plugins.data.bpe import BOS, EOS, SMALLEST_VOCABULARY, train
from tangram.plugins.data.corpus import DataError
from tangram.plugins.data.packing import windows_of
from tangram.plugins.data.shards import Folder, Shards
from tangram.plugins.data.stream import Stream
from tangram.plugins.data.text import TextConfig
from tangram.plugins.data.tokens import TokensConfig

LETTERS = [chr(code) for code in range(ord("!"), ord("~") + 1)]
TOKENIZER = train(["".join(LETTERS)], SMALLEST_VOCABULARY)
seeds = st.integers(0, 2**31)


def settings_of(length: int, seed: int) -> TrainConfig:
    return TrainConfig(
        tokens=1, sequence_length=length, batch_sequences=Curve.constant(1), lr=Curve.constant(0.1), seed=seed
    )


@frozen(eq=False)
class Corpus:
    """Documents without text: every id but BOS and EOS stands once, so that it tells its place."""

    documents: tuple[int, ...]
    length: int
    isolate: bool

    @property
    def ids(self) -> list[int]:
        names = iter(range(10, 10**6))
        return [i for size in self.documents for i in (BOS, *(next(names) for _ in range(size)), EOS)]

    @property
    def epoch(self) -> int:
        """Sequences of an epoch."""
        return windows_of(len(self.ids), self.length)

    def stream(self, seed: int, cuts: tuple[int, ...] = ()) -> Stream:
        """Return the stream, of ids that are cut into shards at `cuts`."""
        parts = np.split(np.array(self.ids, np.uint32), sorted(cuts))
        return Stream(
            Folder(source="x", tokenizer=TOKENIZER, training=Shards(parts), held_out=Shards([])),
            settings_of(self.length, seed),
            isolate=self.isolate,
        )


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    documents = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    n_tokens = sum(documents) + 2 * len(documents)
    return Corpus(tuple(documents), draw(st.integers(2, min(9, n_tokens - 1))), draw(st.booleans()))


def at(sequences: int) -> Progress:
    return Progress(sequences=sequences)


def targets_of(batch: Batch) -> list[int]:
    assert batch.targets is not None
    return batch.targets[batch.targets != IGNORE].tolist()


def rows_of(batch: Batch) -> list[tuple[object, ...]]:
    """Return each row as what can be compared."""
    assert batch.targets is not None
    columns = (batch.tokens, batch.targets, batch.positions, batch.segments)
    return list(zip(*(map(tuple, column.tolist()) for column in columns), strict=True))


# --- epochs -----------------------------------------------------------------------------------------------


@given(corpora(), seeds, st.integers(0, 4))
def test_an_epoch_has_every_token_as_a_target_once_but_for_less_than_a_sequence(
    corpus: Corpus, seed: int, epoch: int
) -> None:
    n = corpus.epoch
    seen = targets_of(corpus.stream(seed).batch(at(epoch * n), n))
    told_apart = [i for i in seen if i not in (BOS, EOS)]
    assert len(set(told_apart)) == len(told_apart)
    missing = [i for i in corpus.ids if i not in (BOS, EOS) and i not in told_apart]
    assert len(missing) < corpus.length
    assert len(corpus.documents) - seen.count(EOS) <= corpus.length - len(missing)
    assert seen.count(BOS) < len(corpus.documents) if not corpus.isolate else BOS not in seen


@given(corpora(), seeds, seeds, st.integers(0, 3))
def test_another_seed_or_epoch_is_another_order_of_the_same_tokens(
    corpus: Corpus, seed: int, other: int, epoch: int
) -> None:
    whole = Corpus(corpus.documents, len(corpus.ids) - 1, isolate=False)  # one sequence, so nothing is left over
    here, there = whole.stream(seed).batch(at(0), 1), whole.stream(other).batch(at(epoch), 1)
    assert sorted(targets_of(here)) == sorted(targets_of(there))


def test_no_two_seeds_or_epochs_have_one_order() -> None:
    corpus = Corpus((1,) * 40, 4, isolate=False)
    n = corpus.epoch
    orders = {str(rows_of(corpus.stream(seed).batch(at(epoch * n), n))) for seed in range(25) for epoch in range(2)}
    assert len(orders) == 50


# --- what is kept apart -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def build(folder: Path, documents: list[str], config: TextConfig, length: int, seed: int) -> Stream:
    """Write documents to a file and build their stream; reject what is too little text."""
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    try:
        return evolve(config, corpus="files", files=(f"{folder}/documents.jsonl",)).build(
            settings_of(length, seed), SMALLEST_VOCABULARY
        )
    except DataError:
        reject()


@given(
    sizes=st.lists(st.integers(1, 9), min_size=8, max_size=40),
    copies=st.lists(st.integers(0, 39), max_size=9),
    every=st.integers(2, 5),
    length=st.integers(2, 9),
    seed=seeds,
)
def test_no_token_of_a_held_out_document_is_ever_trained_on(
    sizes: list[int], copies: list[int], every: int, length: int, seed: int
) -> None:
    """Each document is of a letter of its own, a byte and a token; its copies are of the same."""
    documents = [letter * size for letter, size in zip(LETTERS, sizes, strict=False)]
    documents += [documents[i] for i in copies if i < len(sizes)]
    with tempfile.TemporaryDirectory() as folder:
        data = build(Path(folder), documents, TextConfig(held_out_every=every), length, seed)
    n = 3 * windows_of(sum(map(len, documents)) + 2 * len(documents), length)  # three epochs at least
    trained = set(data.batch(at(0), n).tokens.flatten().tolist())
    counts = Counter("".join(documents))
    held_out = Counter(i for batch, _ in data.held_out.batches(4) for i in targets_of(batch)) if data.held_out else {}
    for letter, count in counts.items():
        (token,) = data.tokenizer.encode(letter)
        assert held_out.get(token, 0) in (0, count)
        assert not (token in trained and token in held_out)


@given(
    shard=st.integers(1, 150),
    start=st.integers(0, 300),
    n=st.integers(1, 9),
    length=st.integers(2, 20),
    isolate=st.booleans(),
    seed=seeds,
)
def test_tokens_on_disk_give_the_batches_of_their_text_in_shards_of_any_size(
    shard: int, start: int, n: int, length: int, isolate: bool, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        texts = [letter * (1 + i % 7) for i, letter in enumerate(LETTERS[:24])]
        text = build(Path(folder), texts, TextConfig(held_out_every=4, isolate=isolate), length, seed)
        text.write(Path(folder, "tokens"), shard)
        config = TokensConfig(folder=f"{folder}/tokens", isolate=isolate)
        tokens = config.build(settings_of(length, seed), SMALLEST_VOCABULARY)
        assert tokens.fingerprint == text.fingerprint
        assert rows_of(tokens.batch(at(start), n)) == rows_of(text.batch(at(start), n))
        assert tokens.held_out is not None
        assert text.held_out is not None
        for (ours, our_bytes), (theirs, their_bytes) in zip(
            tokens.held_out.batches(n), text.held_out.batches(n), strict=True
        ):
            assert (rows_of(ours), our_bytes) == (rows_of(theirs), their_bytes)


@given(corpora(), seeds, st.sets(st.integers(0, 150), max_size=6), st.integers(0, 60))
def test_it_does_not_matter_where_shards_are_cut(corpus: Corpus, seed: int, cuts: set[int], start: int) -> None:
    inside = tuple(cut for cut in cuts if cut <= len(corpus.ids))
    assert rows_of(corpus.stream(seed, inside).batch(at(start), 5)) == rows_of(corpus.stream(seed).batch(at(start), 5))


# --- what is passed over ----------------------------------------------------------------------------------

TINY = tiny()


@st.composite
def batch_sizes(draw: st.DrawFn) -> Curve:
    """A curve whose pieces end within a run of 25 small steps."""
    size = st.floats(1, 9)
    pieces: list[dict[str, float]] = []
    for unit, largest in (("until_step", 25), ("until", 1500)):
        pieces += [
            {unit: end, "value": draw(size)} for end in sorted(draw(st.sets(st.integers(1, largest), max_size=2)))
        ]
    return Curve.parse([*pieces, {"value": draw(size)}])


@given(
    curve=batch_sizes(),
    micro=st.integers(1, 3),
    bad=st.sets(st.integers(0, 25)),
    checkpoints=st.sets(st.integers(1, 25)),
)
def test_a_skipped_sequence_is_never_yielded_again_and_no_other_is_lost(
    curve: Curve, micro: int, bad: set[int], checkpoints: set[int]
) -> None:
    """A run whose `bad` steps, counted from 0, break the weights each time; it goes back to its last checkpoint."""
    experiment = evolve(TINY, train=evolve(TINY.train, batch_sequences=curve, micro_sequences=micro))
    data = experiment.data.build(experiment.train, experiment.model.vocab_size)
    now, yielded, skipped, poison = Progress(), list[range](), list[range](), set[int]()
    saved, kept, tried = now, 0, set[int]()
    while len(yielded) < 25:
        now = past_skipped(experiment, now)
        batch = data.batch(now, sequences_at(experiment, now))
        took = range(now.sequences, now.sequences + batch.n_sequences)
        if took.start not in tried and len(tried) in bad:
            poison.add(took.start)
        tried.add(took.start)
        if took.start in poison:
            assert took not in skipped
            skipped.append(took)
            saved = now = evolve(saved, skipped=(*now.skipped, now.sequences))
            del yielded[kept:]
            continue
        yielded.append(took)
        now = now.after(batch)
        if now.step in checkpoints:
            saved, kept = now, len(yielded)
    consumed = sorted(i for took in (*yielded, *skipped) for i in took)
    assert consumed == list(range(now.sequences))
    assert now.step == len(yielded)
    assert now.tokens == sum(map(len, yielded)) * experiment.train.sequence_length
