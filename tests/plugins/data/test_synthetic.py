import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.core.curve import Curve
from tangram.core.experiment import TrainConfig
from tangram.core.records import Progress
from tangram.plugins.data.synthetic import Synthetic, SyntheticConfig


def build(vocab_size: int = 50, *, length: int = 8, seed: int = 0, skew: float = 1.0) -> Synthetic:
    train = TrainConfig(
        tokens=1, sequence_length=length, batch_sequences=Curve.constant(1), lr=Curve.constant(0.1), seed=seed
    )
    return SyntheticConfig(skew=skew).build(train, vocab_size)


@given(st.integers(1, 300), st.integers(2, 20), st.integers(0, 2**40), st.integers(0, 10**9), st.integers(1, 6))
def test_sequences_are_well_formed_at_any_size(vocab_size: int, length: int, seed: int, first: int, n: int) -> None:
    batch = build(vocab_size, length=length, seed=seed).batch(Progress(sequences=first), n)
    assert batch.targets is not None
    assert batch.tokens.shape == batch.targets.shape == (n, length)
    assert batch.targets[:, :-1].equal(batch.tokens[:, 1:])
    assert 0 <= int(batch.tokens.min()) <= int(torch.maximum(batch.tokens, batch.targets).max()) < vocab_size
    assert (batch.n_targets, batch.n_sequences) == (n * length, n)


def test_seeds_and_sequences_differ() -> None:
    rows = torch.cat([build(seed=seed).batch(Progress(), 50).tokens for seed in range(2)])
    assert len({tuple(row) for row in rows.tolist()}) == 100


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_tokens_are_as_frequent_as_zipfs_law_says(skew: float) -> None:
    vocab_size, n = 20, 40_000
    tokens = build(vocab_size, length=1000, skew=skew).batch(Progress(), n // 1000).tokens
    counts = tokens.flatten().bincount(minlength=vocab_size)
    expected = [(k + 1) ** -skew for k in range(vocab_size)]
    for count, weight in zip(counts.tolist(), expected, strict=True):
        p = weight / sum(expected)
        assert abs(count - n * p) < 6 * math.sqrt(n * p * (1 - p))


def test_the_fingerprint_tells_every_setting_apart() -> None:
    runs = [build(), build(51), build(length=9), build(seed=1), build(skew=0.5)]
    assert len({run.fingerprint for run in runs}) == len(runs)
    assert build().fingerprint == build().fingerprint
    assert build().tokenizer is None
    assert build().held_out is None


def test_a_negative_skew_is_refused() -> None:
    with pytest.raises(ValueError, match="skew"):
        SyntheticConfig(skew=-1.0)
