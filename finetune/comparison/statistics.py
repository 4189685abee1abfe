"""Means over seeds with their intervals, and whether intervals leave a winner.

Floor 1. Student's t, not the bootstrap: resampling three or five values cannot show a spread that they do not have, and gives
intervals that are too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

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
    mean, freedom = fmean(values), len(values) - 1
    if not freedom:
        return Interval(mean, None, None)
    from scipy.special import (
        stdtrit,
    )  # here: of the extra `compare`, which is asked for by name when a search begins

    half = float(stdtrit(freedom, 0.5 + LEVEL / 2)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The mean of value - baseline, pair by pair (the same seed in both), with its interval."""
    return interval([value - base for value, base in zip(values, baseline, strict=True)])
