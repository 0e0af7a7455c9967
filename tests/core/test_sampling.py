"""Distributions that tokens are drawn from, against their definitions; and draws against distributions."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tangram.core.sampling import Sampling, distribution, drawn, left_over, uniform
from tangram.testing import assert_close

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9)
SHARES = st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3)


def shares_of(logits: list[float], sampling: Sampling, seen: list[int] | None = None) -> Tensor:
    return distribution(torch.tensor([logits]), [sampling], [seen or []])[0]


def plain(logits: list[float], temperature: float = 1.0) -> Tensor:
    return (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1)


@given(logits=LOGITS, temperature=st.floats(0.1, 10))
def test_without_filters_it_is_the_softmax(logits: list[float], temperature: float) -> None:
    assert_close(shares_of(logits, Sampling(temperature=temperature)), plain(logits, temperature), length=9)


@given(logits=LOGITS)
def test_without_temperature_the_likeliest_token_is_certain(logits: list[float]) -> None:
    shares = shares_of(logits, Sampling(top_k=2, top_p=0.5, min_p=0.1))
    assert shares.tolist() == [float(i == logits.index(max(logits))) for i in range(len(logits))]


@given(logits=LOGITS, top_k=st.integers(1, 10))
def test_top_k_keeps_the_likeliest(logits: list[float], top_k: int) -> None:
    assume(len(set(logits)) == len(logits))
    shares = shares_of(logits, Sampling(temperature=1.0, top_k=top_k))
    kept = torch.tensor(logits) >= sorted(logits, reverse=True)[:top_k][-1]
    assert_close(shares, plain(logits) * kept / (plain(logits) * kept).sum(), length=9)


@given(logits=LOGITS, top_p=st.floats(0.05, 0.999))
def test_top_p_keeps_the_fewest_that_have_the_probability(logits: list[float], top_p: float) -> None:
    shares, whole = shares_of(logits, Sampling(temperature=1.0, top_p=top_p)), plain(logits)
    kept = shares > 0
    assert float(whole[kept].sum()) >= top_p - 1e-9
    least = whole[kept].min()
    assert float(whole[kept].sum() - least) < top_p + 1e-9, "the last one was not needed"
    assert float(whole[~kept].max()) <= float(least) + 1e-12 if (~kept).any() else True
    assert_close(shares, whole * kept / (whole * kept).sum(), length=9)


@given(logits=LOGITS, min_p=st.floats(0.01, 1))
def test_min_p_keeps_what_is_nearly_as_likely_as_the_likeliest(logits: list[float], min_p: float) -> None:
    shares, whole = shares_of(logits, Sampling(temperature=1.0, min_p=min_p)), plain(logits)
    ratio = whole / whole.max()
    assume(bool(((ratio - min_p).abs() > 1e-9).all()) or min_p == 1)
    kept = ratio >= min_p
    assert_close(shares, whole * kept / (whole * kept).sum(), length=9)


@given(logits=LOGITS, penalty=st.floats(0.5, 3), data=st.data())
def test_a_repetition_is_penalised_once_whatever_its_sign(
    logits: list[float], penalty: float, data: st.DataObject
) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=5))
    changed = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)]
    sampling = Sampling(temperature=1.0, repetition_penalty=penalty)
    assert_close(shares_of(logits, sampling, seen), plain(changed), length=9)


def test_rows_do_not_know_each_other() -> None:
    samplings = [
        Sampling(temperature=1.0, top_k=2),
        Sampling(),
        Sampling(temperature=0.5, top_p=0.7, repetition_penalty=2.0),
        Sampling(temperature=2.0, min_p=0.3),
    ]
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    seen = [[1], [2], [3, 4], []]
    together = distribution(logits, samplings, seen)
    for row in range(4):
        alone = distribution(logits[row : row + 1], samplings[row : row + 1], seen[row : row + 1])
        assert torch.equal(together[row], alone[0])


@given(shares=SHARES, at=st.floats(0, 1, exclude_max=True))
def test_a_number_falls_on_the_token_whose_part_it_is_in(shares: list[float], at: float) -> None:
    assume(sum(shares) > 0)
    token = drawn(torch.tensor([shares], dtype=torch.float64), [at])[0]
    assert shares[token] > 0
    before, whole = sum(shares[:token]), sum(shares)
    assert before <= at * whole + 1e-9
    assert at * whole <= before + shares[token] + 1e-9


@given(wanted=SHARES, guessed=SHARES)
def test_a_refused_draft_leaves_what_makes_the_whole_right(wanted: list[float], guessed: list[float]) -> None:
    assume(min(sum(wanted), sum(guessed)) > 1e-3)
    p, q = (torch.tensor(each, dtype=torch.float64) / sum(each) for each in (wanted, guessed))
    kept = torch.minimum(p, q)  # drafted with q and kept with min(1, p / q)
    rest = left_over(p[None], q[None])[0]
    whole = kept + (1 - kept.sum()) * rest / rest.sum()
    assert_close(whole, p, length=9)


def test_a_seed_says_its_numbers_one_by_one() -> None:
    numbers = [uniform(seed, count) for seed in (0, 1, 2**31) for count in range(200)]
    assert len(set(numbers)) == len(numbers)
    assert numbers[:200] == [uniform(0, count) for count in range(200)]
    assert all(0 <= number < 1 for number in numbers)
    # The mean of n uniform numbers is off by 5 / sqrt(12 n) once in two million times.
    assert abs(sum(numbers) / len(numbers) - 0.5) < 5 / math.sqrt(12 * len(numbers))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 1.5), ("repetition_penalty", 0.0)],
)
def test_settings_that_are_none_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})
