"""Statistics: intervals that cover what they promise, corrections worked by hand, and words that follow from them."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tangram.core.statistics import (
    FEWEST,
    LEVEL,
    Finding,
    Paired,
    correlation,
    finding,
    holm,
    noise,
    paired,
    spread,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int) -> None:
    """Of n trials a share of 0.95 +- 4 standard deviations; at 3 seeds a normal interval would cover 0.81."""
    draws = np.random.default_rng(seeds)
    trials, effect = 2000, 0.3
    covered = wrong = 0
    for _ in range(trials):
        shared = draws.normal(0, 1, seeds)  # of the seed, in both
        base = shared + draws.normal(0, 0.4, seeds)
        found = paired(base.tolist(), (shared + effect + draws.normal(0, 0.4, seeds)).tolist())
        null = paired(base.tolist(), (shared + draws.normal(0, 0.4, seeds)).tolist())
        assert found is not None and null is not None and null.p is not None
        assert found.low is not None and found.high is not None
        covered += found.low <= effect <= found.high
        wrong += null.p < LEVEL
    slack = 4 * math.sqrt(LEVEL * (1 - LEVEL) * trials)
    assert abs(covered - (1 - LEVEL) * trials) <= slack
    assert abs(wrong - LEVEL * trials) <= slack


@given(VALUES, st.integers(0, 2**32 - 1))
def test_the_comparison_is_scipys_paired_t_test(base: list[float], seed: int) -> None:
    variant = (np.array(base) + np.random.default_rng(seed).normal(1, 2, len(base))).tolist()
    found = paired(base, variant)
    expected = stats.ttest_rel(variant, base)
    low, high = expected.confidence_interval(1 - LEVEL)
    assert found is not None
    # Differences of numbers of size 100 are off by some 1e-14, and the error of their mean is divided by itself.
    close = {"rel": 1e-9, "abs": 1e-12}
    assert found.p == pytest.approx(float(expected.pvalue), **close)
    assert (found.low, found.high) == pytest.approx((float(low), float(high)), **close)


@given(VALUES, VALUES)
def test_the_correlation_is_pearsons(a: list[float], b: list[float]) -> None:
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    found = correlation(a, b)
    if spread(a) < 1e-6 or spread(b) < 1e-6:
        return  # what rounding leaves of a spread has no direction
    assert found == pytest.approx(float(np.corrcoef(a, b)[0, 1]), abs=1e-6)


def test_a_side_that_does_not_vary_correlates_with_nothing() -> None:
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_holm_worked_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04, none below the one before it."""
    assert holm({"a": 0.02, "b": 0.01, "c": 0.04, "d": 0.03}) == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.06, "d": 0.06}
    )
    assert holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.03}) == {"a": 0.03}
    assert holm({}) == {}


@given(st.dictionaries(st.text(), st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_lies_between_one_and_all_corrections(chances: dict[str, float]) -> None:
    corrected = holm(chances)
    assert list(corrected) == list(chances)
    for name, p in chances.items():
        assert p <= corrected[name] <= min(1.0, len(chances) * p)
        for other, q in chances.items():
            assert p > q or corrected[name] <= corrected[other]


def test_all_seeds_together_rarely_find_what_is_not_there() -> None:
    """Of five variants without effect one is called better or worse in 5% of studies; without Holm in 20%."""
    draws = np.random.default_rng(1)
    studies, wrong = 600, 0
    for _ in range(studies):
        base = draws.normal(0, 1, 4)
        found = {str(i): paired(base.tolist(), draws.normal(0, 1, 4).tolist()) for i in range(5)}
        wrong += min(holm({name: pair.p for name, pair in found.items()}).values()) < LEVEL  # type: ignore[misc,union-attr]
    assert wrong <= LEVEL * studies + 4 * math.sqrt(LEVEL * (1 - LEVEL) * studies)


def compared(mean: float, half: float, n: int = 5) -> Paired:
    return Paired(n, mean, mean - half, mean + half, 0.5, None)


FLOOR = 1.0
CASES = [
    (compared(-2, 1), 0.01, True, Finding.BETTER),
    (compared(-2, 1), 0.01, False, Finding.WORSE),
    (compared(2, 1), 0.01, True, Finding.WORSE),
    (compared(2, 1), 0.01, False, Finding.BETTER),
    (compared(0.1, 0.2), 0.01, True, Finding.WORSE),  # small, and yet sure
    (compared(0.1, 0.8), 0.5, True, Finding.WITHIN_NOISE),
    (compared(-0.3, 0.8), 0.5, True, Finding.INCONCLUSIVE),  # reaches past the noise on one side
    (compared(0.3, 0.8), 0.5, True, Finding.INCONCLUSIVE),
    (compared(-2, 1), LEVEL, True, Finding.INCONCLUSIVE),
    (compared(-2, 1, FEWEST - 1), 0.0, True, Finding.NONE),
    (None, None, True, Finding.NONE),
]


@pytest.mark.parametrize(("pair", "p", "lower", "expected"), CASES)
def test_the_word_for_a_comparison(pair: Paired | None, p: float | None, lower: bool, expected: Finding) -> None:
    assert finding(pair, p, FLOOR, lower_is_better=lower) is expected


def test_one_pair_has_a_difference_and_no_interval() -> None:
    assert paired([1.0], [3.0]) == Paired(1, 2.0, None, None, None, None)
    assert paired([], []) is None


def test_equal_differences_leave_nothing_to_chance() -> None:
    same, moved = paired([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]), paired([1.0, 2.0, 4.0], [2.0, 3.0, 5.0])
    assert same is not None and (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
    assert moved is not None and (moved.low, moved.high, moved.p, moved.correlation) == (1.0, 1.0, 0.0, 1.0)


def test_unequal_sides_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])


def test_noise_is_the_usual_distance_of_two_runs() -> None:
    draws = np.random.default_rng(2)
    values = draws.normal(0, 3, 4000)
    apart = values[::2] - values[1::2]
    assert noise(values.tolist()) == pytest.approx(float(np.sqrt((apart**2).mean())), rel=0.06)


def test_scipy_waits_until_it_is_needed() -> None:
    source = Path(__file__).parents[2].joinpath("core/statistics.py").read_text()
    assert not [line for line in source.splitlines() if line.startswith(("import scipy", "from scipy"))]
