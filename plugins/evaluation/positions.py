"""Loss by position: how much better or worse a model predicts a text the more of it stands before."""

from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from tangram.core.contracts import HeldOut
from tangram.core.records import IGNORE
from tangram.plugins.evaluation.scoring import Scorer

_FIRST = 64
"""Positions of the first range; each further one ends twice as far."""


class Range(NamedTuple):
    """Positions up to `stop`, from where the range before it ends: targets there, and their mean loss in nats."""

    stop: int
    targets: int
    loss: float


def stops_of(length: int) -> list[int]:
    """Return where the ranges of so many positions end: 64, 128, 256, ..., and the length itself."""
    return [*takewhile(lambda stop: stop < length, (_FIRST << i for i in range(length.bit_length()))), length]


def by_position(scorer: Scorer, held_out: HeldOut, length: int) -> list[Range]:
    """Return the mean loss of held-out text in each range of positions, up to the last that has targets.

    Args:
        scorer: Knows the model.
        held_out: Its sequences have `length` positions, which begin anew with each document where these are isolated.
        length: Positions of a sequence.
    """
    stops = stops_of(length)
    nats = torch.zeros(len(stops), dtype=torch.float64)
    targets = torch.zeros(len(stops), dtype=torch.float64)
    for batch, _ in held_out.batches(1):
        assert batch.targets is not None
        counted = batch.targets != IGNORE
        place = torch.bucketize(batch.positions[counted], torch.tensor(stops), right=True)
        nats += _sums(place, scorer.nats(batch)[counted], len(stops))
        targets += _sums(place, torch.ones_like(place), len(stops))
    rows = zip(stops, targets.tolist(), nats.tolist(), strict=True)
    return [Range(stop, int(count), total / count) for stop, count, total in takewhile(lambda row: row[1], rows)]


def _sums(place: Tensor, values: Tensor, count: int) -> Tensor:
    """Return the sum of the values of each place, float64 [count]."""
    return torch.bincount(place, values.double(), count)
