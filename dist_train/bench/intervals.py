"""Estimates with their 95 % intervals, from a few launches each."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided, by degrees of freedom from 1 on.
T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
T_99 = (63.66, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.25, 3.169, 3.106, 3.055)


def t_95(freedom: int) -> float:
    """Return Student's t of a two-sided 95 % interval."""
    return T_95[freedom - 1] if freedom <= len(T_95) else 1.96 + 2.4 / freedom


def t_99(freedom: int) -> float:
    """Return Student's t of a two-sided 99 % interval."""
    return T_99[freedom - 1] if freedom <= len(T_99) else 2.576 + 5.6 / freedom


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, and the interval in which it lies in 95 of 100 repetitions."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        """Return it in other units; `factor` is positive."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def inverted(self, numerator: float) -> "Estimate":
        """Return `numerator` / it, which is positive."""
        low = numerator / self.high if self.high > 0 else 0.0
        return Estimate(numerator / self.value, low, numerator / max(self.low, 1e-12))


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean; with one value, an interval without ends."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def geometric_mean_of(values: Sequence[float]) -> Estimate:
    """Return the geometric mean of positive values: right for times and their ratios."""
    found = mean_of([math.log(value) for value in values])
    return Estimate(math.exp(found.value), math.exp(found.low), _exp(found.high))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the least value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _exp(value: float) -> float:
    return math.inf if value == math.inf else math.exp(value)
