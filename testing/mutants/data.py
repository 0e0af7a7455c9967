"""Data with one known fault each."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import evolve

from tangram.core.records import IGNORE, Batch, Progress


def _changed(data: Any, change: Callable[[Batch], Batch]) -> Any:
    """Return the data with every batch changed."""
    batch = data.batch
    data.batch = lambda now, n_sequences: change(batch(now, n_sequences))
    return data


def skips_a_batch_on_resume(data: Any) -> Any:
    """The first batch that is asked for in the midst of a run is the one after it."""
    batch, asked = data.batch, list[None]()

    def skipping(now: Progress, n_sequences: int) -> Any:
        first = not asked
        asked.append(None)
        skipped = n_sequences if first and now.sequences else 0
        return batch(evolve(now, sequences=now.sequences + skipped), n_sequences)

    data.batch = skipping
    return data


def counts_steps_itself(data: Any) -> Any:
    """Every call goes on from where the one before it ended, whatever it is asked for."""
    batch, at = data.batch, [0]

    def going_on(now: Progress, n_sequences: int) -> Any:
        found = batch(evolve(now, sequences=at[0]), n_sequences)
        at[0] += n_sequences
        return found

    data.batch = going_on
    return data


def lets_ranks_overlap(data: Any) -> Any:
    """The second half of a batch begins one sequence early, so that two ranks train on the same one."""

    def overlapping(batch: Batch) -> Batch:
        rows = torch.arange(len(batch.tokens))
        rows = torch.where(rows >= (len(rows) + 1) // 2, rows - 1, rows)
        targets = None if batch.targets is None else batch.targets[rows]
        return evolve(
            batch,
            tokens=batch.tokens[rows],
            targets=targets,
            positions=batch.positions[rows],
            segments=batch.segments[rows],
            n_targets=0 if targets is None else int((targets != IGNORE).sum()),
        )

    return _changed(data, overlapping)


def counts_its_own_rows(data: Any) -> Any:
    """The number of targets is that of one sequence."""
    return _changed(data, lambda batch: evolve(batch, n_targets=batch.n_targets // batch.n_sequences))


def is_off_by_one(data: Any) -> Any:
    """A target is the token itself, not the next one."""

    def shifted(batch: Batch) -> Batch:
        assert batch.targets is not None
        return evolve(batch, targets=torch.where(batch.targets == IGNORE, IGNORE, batch.tokens))

    return _changed(data, shifted)


def leaks_across_documents(data: Any) -> Any:
    """Documents that should not see each other are one segment."""
    return _changed(data, lambda batch: evolve(batch, segments=torch.zeros_like(batch.segments)))


def predicts_the_next_document(data: Any) -> Any:
    """The last token of a document predicts the first one of the next."""

    def predicting(batch: Batch) -> Batch:
        assert batch.targets is not None
        targets = batch.targets.clone()
        inner = targets[:, :-1]
        inner[inner == IGNORE] = batch.tokens[:, 1:][inner == IGNORE]
        return evolve(batch, targets=targets, n_targets=int((targets != IGNORE).sum()))

    return _changed(data, predicting)


def runs_positions_on(data: Any) -> Any:
    """Positions do not begin anew with a document."""

    def running(batch: Batch) -> Batch:
        return evolve(batch, positions=torch.arange(batch.tokens.shape[1]).expand_as(batch.positions))

    return _changed(data, running)


class _HeldOut:
    """Held-out text that is covered otherwise."""

    def __init__(self, real: Any, change: Callable[[list[Any]], list[Any]]) -> None:
        self._real, self._change, self.n_bytes, self.references = real, change, real.n_bytes, real.references

    def batches(self, n_sequences: int) -> Iterator[tuple[Batch, int]]:
        yield from self._change(list(self._real.batches(n_sequences)))


def forgets_the_last_held_out(data: Any) -> Any:
    """The last batch of the held-out text is left out."""
    data.held_out = _HeldOut(data.held_out, lambda batches: batches[:-1])
    return data


def sees_held_out_text_twice(data: Any) -> Any:
    """The first batch of the held-out text comes again at the end."""
    data.held_out = _HeldOut(data.held_out, lambda batches: [*batches, batches[0]])
    return data


def has_one_fingerprint_for_all(data: Any) -> Any:
    """Data of every seed and length have the same fingerprint."""
    data.fingerprint = "data"
    return data


def has_a_fingerprint_for_each(data: Any) -> Any:
    """Two of the same have two fingerprints, so that no run can be resumed."""
    data.fingerprint = f"{data.fingerprint}-{id(data)}-{torch.seed()}"
    return data


def describes_a_tokenizer_without_merges(data: Any) -> Any:
    """What a run keeps of its tokenizer spells every text in single bytes."""
    if data.tokenizer is not None:
        data.tokenizer = _WithoutMerges(data.tokenizer)
    return data


class _WithoutMerges:
    def __init__(self, real: Any) -> None:
        self._real, self.bos, self.eos, self.encode, self.decode = real, real.bos, real.eos, real.encode, real.decode

    def to_json(self) -> str:
        description = json.loads(self._real.to_json())
        description["model"]["merges"] = []
        return json.dumps(description)
