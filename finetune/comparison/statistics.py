"""Means over seeds with their intervals, and whether intervals leave a winner.

Floor 1. Student's t, not the bootstrap: resampling three or five values cannot show a spread that they do not have, and gives
intervals that are too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the `LEVEL` interval of Student's t; low and high are None where there is one seed only."""

    mean: float
    low: float | None
    high: float | None

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two have a point in common. An interval that is not known might reach anywhere."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


def interval(values: Sequence[float]) -> Interval:
    """The mean of finite `values` with its interval."""
    assert values
    assert all(map(math.isfinite, values)), values
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(0.5 + LEVEL / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean of value - baseline, pair by pair (the same seed in both), with its interval."""
    return interval([value - base for value, base in zip(values, baseline, strict=True)])


def median(values: Sequence[float]) -> float:
    """The middle value; infinity counts as a value, so that a miss is not left out."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with so many degrees of freedom, for a probability from 0.5 on, to six digits."""
    assert 0.5 <= probability < 1, probability
    assert freedom >= 1, freedom
    low, high = 0.0, math.pi / 2
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _probability_within(middle, freedom) / 2 + 0.5 < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _probability_within(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) * tan(angle)): the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    first = 3 if freedom % 2 else 2
    term = cosine if freedom % 2 else 1.0
    total = 0.0 if freedom == 1 else term
    for n in range(first, freedom - 1, 2):
        term *= cosine * cosine * (n - 1) / n
        total += term
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
