"""What paired runs say of a difference: its interval, its probability by chance, and one of four words.

Student's t is the one interval of those in use that covers what it promises at three to five seeds; a bootstrap over
three covers 75 percent where it promises 95.
"""

import math
from collections.abc import Mapping, Sequence
from enum import Enum

from attrs import frozen

LEVEL = 0.05
"""Chance of a wrong `better` or `worse` that all comparisons of a table may have together."""

FEWEST = 3
"""Seeds below which there is no verdict."""


class Finding(Enum):
    """What a comparison comes to."""

    BETTER = "better"
    WORSE = "worse"
    WITHIN_NOISE = "within noise"
    INCONCLUSIVE = "inconclusive"
    NONE = "no verdict"


@frozen
class Paired:
    """Differences between pairs of runs that share a seed.

    Attributes:
        n: Pairs.
        mean: Mean difference, variant less base.
        low: Lower end of the 95% Student-t interval of the mean; None for one pair.
        high: Its upper end.
        p: Chance of a mean as far from 0 if there is no difference, two-sided; None for one pair.
        correlation: Pearson correlation of the two sides over the seeds; None where one side does not vary.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    correlation: float | None


def paired(base: Sequence[float], variant: Sequence[float]) -> Paired | None:
    """Compare runs of equal seeds, in the same order; None where there is no pair.

    Raises:
        ValueError: The sides are not equally long.
    """
    differences = [b - a for a, b in zip(base, variant, strict=True)]
    n = len(differences)
    if n == 0:
        return None
    mean = math.fsum(differences) / n
    if n == 1:
        return Paired(1, mean, None, None, None, None)
    error = spread(differences) / math.sqrt(n)
    half = _quantile(1 - LEVEL / 2, n - 1) * error
    return Paired(n, mean, mean - half, mean + half, _chance(mean, error, n - 1), correlation(base, variant))


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample, with n - 1; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None where one side does not vary."""
    scale = spread(a) * spread(b) * (len(a) - 1)
    if scale == 0.0:
        return None
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    together = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return max(-1.0, min(1.0, together / scale))


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """Return p values corrected for their number (Holm 1979): what each would have to be alone to count as much."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for i, (name, p) in enumerate(sorted(chances.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(chances) - i) * p))
        corrected[name] = largest
    return {name: corrected[name] for name in chances}


def noise(base: Sequence[float]) -> float:
    """Return how far two runs of the base that differ in the seed alone are usually apart: sqrt(2) times the spread."""
    return math.sqrt(2.0) * spread(base)


def finding(compared: Paired | None, p: float | None, floor: float, *, lower_is_better: bool) -> Finding:
    """Return the word for a comparison.

    `better` or `worse` where the corrected p is below `LEVEL`. Otherwise `within noise` where all of the interval is
    closer to 0 than `floor`, what another seed does by itself; and `inconclusive` where it is wider. With fewer than
    `FEWEST` pairs no word is given.

    Args:
        compared: The comparison.
        p: Its p value after correction.
        floor: The noise of the base.
        lower_is_better: Of the metric.
    """
    if compared is None or compared.n < FEWEST or p is None or compared.low is None or compared.high is None:
        return Finding.NONE
    if p < LEVEL:
        return Finding.BETTER if (compared.mean < 0) == lower_is_better else Finding.WORSE
    if max(-compared.low, compared.high) <= floor:
        return Finding.WITHIN_NOISE
    return Finding.INCONCLUSIVE


def _quantile(p: float, freedom: int) -> float:
    from scipy.special import stdtrit  # which loads in a fifth of the time of scipy.stats

    return float(stdtrit(freedom, p))


def _chance(mean: float, error: float, freedom: int) -> float:
    from scipy.special import stdtr

    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2.0 * stdtr(freedom, -abs(mean) / error))
