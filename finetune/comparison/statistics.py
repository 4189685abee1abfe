"""Means over seeds with their intervals.

The intervals are Student's t, not the bootstrap. Resampling three or five values cannot show a
spread that they do not have, so its intervals are too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its `LEVEL` interval; low and high are None with one seed only."""

    mean: float
    low: float | None
    high: float | None

    def overlaps(self, other: "Interval") -> bool:
        """Return whether the two have a point in common. An unknown interval overlaps with any."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of finite `values` with its interval."""
    assert values
    assert all(map(math.isfinite, values)), values
    mean, freedom = fmean(values), len(values) - 1
    if not freedom:
        return Interval(mean, None, None)
    # Imported here: scipy is in the extra `compare`, which a search checks for when it begins.
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, 0.5 + LEVEL / 2)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Return the mean of value - baseline with its interval; a pair has the same seed in both."""
    return interval([value - base for value, base in zip(values, baseline, strict=True)])
