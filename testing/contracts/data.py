"""What all data owes: batches that depend on the seed and the place alone, and targets that are the next tokens."""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from attrs import evolve
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.contracts import Data, TokenizerReader
from tangram.core.curve import Curve
from tangram.core.experiment import TrainConfig
from tangram.core.records import IGNORE, Batch, Progress
from tangram.testing.laws import Contract, law, written
from tangram.testing.mutants import data as mutants

_SEEDS = st.integers(0, 3)
_LENGTHS = st.integers(3, 20)
_STARTS = st.integers(1, 200)
_SIZES = st.lists(st.integers(1, 3), min_size=2, max_size=4)


class DataContract(Contract):
    """The laws of the slot `data`.

    Attributes:
        vocab_size: Rows of the model's embedding; as many as the data's tokenizer wants.
    """

    slot = "data"
    optional: ClassVar[Mapping[str, str]] = {}
    vocab_size: ClassVar[int] = 300

    @classmethod
    def make(cls, config: Any, train: TrainConfig | None = None) -> Data:
        """Return what the config builds for these settings of a run."""
        data: Data = config.build(train or cls.settings(8, 0), cls.vocab_size)
        return data

    @classmethod
    def settings(cls, length: int, seed: int) -> TrainConfig:
        """Return the settings of a run with sequences of `length`."""
        one, rate = Curve.constant(1), Curve.constant(0.1)
        return TrainConfig(tokens=1, sequence_length=length, batch_sequences=one, lr=rate, seed=seed)

    @law(
        length=_LENGTHS,
        seed=_SEEDS,
        start=_STARTS,
        sizes=_SIZES,
        kills=[mutants.skips_a_batch_on_resume, mutants.counts_steps_itself],
    )
    def resumed_anywhere_the_remainder_is_the_same(
        self, config: Any, length: int, seed: int, start: int, sizes: list[int]
    ) -> None:
        """A batch depends on the seed and its place alone: resumed at any step, the remaining batches are the same."""
        train = self.settings(length, seed)
        starts = list(accumulate(sizes, initial=start))
        whole, places = self.make(config, train), list(zip(starts, sizes, strict=False))
        expected = [whole.batch(_at(place), n) for place, n in places]
        for cut in range(len(places)):
            resumed = self.make(config, train)
            for (place, n), batch in zip(places[cut:], expected[cut:], strict=True):
                assert _same(resumed.batch(_at(place), n), batch), f"resumed at {starts[cut]}, {place} is another batch"
        assert _same(whole.batch(_at(start), sizes[0]), expected[0]), "asked for again, it is another batch"

    @law(
        length=_LENGTHS,
        seed=_SEEDS,
        start=_STARTS,
        ranks=st.integers(2, 4),
        each=st.integers(1, 3),
        kills=[mutants.lets_ranks_overlap],
    )
    def the_rows_of_the_ranks_are_disjoint_and_complete(
        self, config: Any, length: int, seed: int, start: int, ranks: int, each: int
    ) -> None:
        """However many ranks share a batch, each has the sequences at its own place, and together they have all."""
        data = self.make(config, self.settings(length, seed))
        whole, targets = data.batch(_at(start), ranks * each), 0
        for rank in range(ranks):
            part, alone = whole.micro(rank, ranks), data.batch(_at(start + rank * each), each)
            assert _same_rows(part, alone), f"the rows of rank {rank} are not the sequences at its place"
            targets += alone.n_targets
        assert targets == whole.n_targets, f"the ranks have {targets} targets, the batch {whole.n_targets}"

    @law(length=_LENGTHS, seed=_SEEDS, start=_STARTS, n=st.integers(2, 5), kills=[mutants.counts_its_own_rows])
    def a_batch_has_what_it_says(self, config: Any, length: int, seed: int, start: int, n: int) -> None:
        """A batch has the sequences, positions and targets that it says, and no token past the vocabulary."""
        batch = self.make(config, self.settings(length, seed)).batch(_at(start), n)
        self._is_a_batch(batch, length)
        assert batch.n_sequences == n, f"asked for {n} sequences, it says {batch.n_sequences}"

    def _is_a_batch(self, batch: Batch, length: int) -> None:
        assert batch.targets is not None, "it has no targets"
        tensors = {name: getattr(batch, name) for name in ("tokens", "targets", "positions", "segments")}
        for name, tensor in tensors.items():
            assert tensor.dtype is torch.int64, f"{name} is {tensor.dtype}"
            assert tensor.shape == (batch.n_sequences, length), f"{name} is {list(tensor.shape)}"
        known = batch.targets[batch.targets != IGNORE]
        assert batch.n_targets == known.numel(), f"it has {known.numel()} targets and says {batch.n_targets}"
        used = torch.cat([batch.tokens.flatten(), known])
        assert int(used.min()) >= 0 and int(used.max()) < self.vocab_size, "a token is past the vocabulary"

    @law(
        length=_LENGTHS,
        seed=_SEEDS,
        start=_STARTS,
        kills=[
            mutants.is_off_by_one,
            mutants.leaks_across_documents,
            mutants.predicts_the_next_document,
            mutants.runs_positions_on,
        ],
    )
    def targets_are_the_next_tokens_of_their_document(self, config: Any, length: int, seed: int, start: int) -> None:
        """A target is the next token, none crosses into the next segment, and positions begin anew with each."""
        data = self.make(config, self.settings(length, seed))
        batches = [data.batch(_at(start), 12)]
        if data.held_out is not None:
            batches += [batch for batch, _ in data.held_out.batches(12)]
        for batch in batches:
            _is_next(batch)

    @law(
        length=_LENGTHS,
        n=st.integers(1, 9),
        kills=[mutants.forgets_the_last_held_out, mutants.sees_held_out_text_twice],
    )
    def held_out_text_is_covered_once(self, config: Any, length: int, n: int) -> None:
        """However large its batches, the held-out text has the same targets, and its bytes are counted once."""
        data = self.make(config, self.settings(length, 0))
        if data.held_out is None:
            return
        seen = {}
        for size in (n, n + 1):
            found = list(data.held_out.batches(size))
            for batch, _ in found:
                self._is_a_batch(batch, length)
                assert batch.n_sequences <= size, f"asked for {size} sequences, it gives {batch.n_sequences}"
            n_bytes = sum(some for _, some in found)
            assert n_bytes == data.held_out.n_bytes, f"its batches cover {n_bytes} bytes of {data.held_out.n_bytes}"
            targets = [batch.targets.flatten() for batch, _ in found if batch.targets is not None]
            seen[size] = torch.cat(targets)[torch.cat(targets) != IGNORE]
        assert torch.equal(seen[n], seen[n + 1]), "batches of another size have other targets"
        if data.tokenizer is not None:
            spelt = len(data.tokenizer.decode(seen[n].tolist()).encode())
            assert spelt == data.held_out.n_bytes, f"its targets spell {spelt} bytes of {data.held_out.n_bytes}"

    @law(
        length=_LENGTHS,
        seed=_SEEDS,
        kills=[mutants.has_one_fingerprint_for_all, mutants.has_a_fingerprint_for_each],
    )
    def its_fingerprint_is_that_of_its_batches(self, config: Any, length: int, seed: int) -> None:
        """Data that give other batches have another fingerprint, and what decides no batch does not change it."""
        train = self.settings(length, seed)
        data = self.make(config, train)
        bare = evolve(train, lr=Curve.constant(0.5), clip=7.0, tokens=99, micro_sequences=2, prompt="x")
        for same in (train, bare):
            assert self.make(config, same).fingerprint == data.fingerprint, "the same data has another fingerprint"
        for changed in (evolve(train, seed=seed + 1), evolve(train, sequence_length=length + 1)):
            other = self.make(config, changed)
            if not _same(other.batch(_at(0), 5), data.batch(_at(0), 5)):
                assert other.fingerprint != data.fingerprint, "other batches have the same fingerprint"

    @law(text=st.text(max_size=30), kills=[mutants.describes_a_tokenizer_without_merges])
    def a_run_keeps_its_tokenizer_in_a_file(self, config: Any, text: str) -> None:
        """A config that reads tokenizers reads the one that its data describes, and it gives the same ids."""
        tokenizer, reader = self.make(config).tokenizer, written(config)
        if tokenizer is None or not isinstance(reader, TokenizerReader):
            return
        with TemporaryDirectory() as folder:
            path = Path(folder, "tokenizer.json")
            path.write_text(tokenizer.to_json(), encoding="utf-8")
            again = reader.read_tokenizer(path, self.vocab_size)
        assert again.to_json() == tokenizer.to_json(), "the one that is read describes itself otherwise"
        ends = [(one.bos, one.eos) for one in (tokenizer, again)]
        assert ends[0] == ends[1], f"the ids of the ends of a text are {ends[1]}, not {ends[0]}"
        for some in (text, tokenizer.decode(range(self.vocab_size))):
            assert again.encode(some) == tokenizer.encode(some), f"{some!r} has other ids"


def _at(sequences: int) -> Progress:
    """Return the progress of a run of equal steps that has consumed so many sequences."""
    return Progress(step=sequences, tokens=8 * sequences, sequences=sequences)


def _tensors(batch: Batch) -> list[Tensor]:
    assert batch.targets is not None, "it has no targets"
    return [batch.tokens, batch.targets, batch.positions, batch.segments]


def _same_rows(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(other), strict=True))


def _same(one: Batch, other: Batch) -> bool:
    return _same_rows(one, other) and (one.n_targets, one.n_sequences) == (other.n_targets, other.n_sequences)


def _is_next(batch: Batch) -> None:
    """Assert that what a batch predicts lies ahead, in the same segment."""
    tokens, targets, positions, segments = _tensors(batch)
    inner, ahead = targets[:, :-1], tokens[:, 1:]
    known, crossing = inner != IGNORE, segments.diff(dim=1)
    assert torch.equal(inner[known], ahead[known]), "a target is not the next token"
    assert bool((crossing >= 0).all()), "segments decrease along a row"
    assert not bool((known & (crossing > 0)).any()), "a token predicts the next document"
    assert not bool(positions[:, 0].any()), "a row does not begin at position 0"
    moves = positions.diff(dim=1)
    assert bool((moves[crossing == 0] == 1).all()), "positions do not count up in a segment"
    assert not bool(positions[:, 1:][crossing > 0].any()), "positions do not begin anew with a segment"
