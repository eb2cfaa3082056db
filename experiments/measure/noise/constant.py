"""Numbers with their uncertainty: intervals of means, of roots, of quantiles and of largest values.

Every interval has level 95 %.  Three kinds, named in ``how``:

* *every sample*: the number is a property of the finite sample S_i and all of S_i was used: no sampling error;
* *influence*: normal interval from influence values (the infinitesimal jackknife; Efron, *The Jackknife, the Bootstrap
  and Other Resampling Plans*, SIAM 1982, chapter 6), with the finite-population factor 1 - m/n where m of the n samples
  of S_i were drawn without replacement;
* *order statistics*: exact binomial limits of a quantile, any distribution; for the largest of m values no upper limit
  exists (``high`` is infinite), and ``exceeding`` says which share of the distribution may lie above (95 % confidence,
  1 - 0.05^(1/m)).

A largest value that was seen is a *lower estimate* of a supremum: its interval is one-sided, and so is that of whatever
grows with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
"""Of every interval."""
_Z = 1.959963984540054


@dataclass(frozen=True)
class Constant:
    """A measured constant.

    Attributes:
        value: the estimate.
        low, high: 95 % interval; an end that nothing bounds is infinite.
        samples: how many samples it comes from.
        how: kind of interval, in words.
        seed: of the draws behind it.
        exceeding: of a largest value: the share of the distribution that may lie above it (95 % confidence), else 0.
        tier: always *estimated*.
    """

    value: float
    low: float
    high: float
    samples: int
    how: str
    seed: int
    exceeding: float = 0.0
    tier: str = "estimated"

    @property
    def lower_estimate(self) -> bool:
        """Whether nothing bounds the true constant from above: a largest value of what was looked at."""
        return bool(np.isposinf(self.high) and np.isfinite(self.value))

    def at(self, which: str) -> float:
        """``value``, ``low`` or ``high`` for a formula; the value in place of an infinite end.

        What is made with the value of a lower estimate is itself a lower estimate: ask :attr:`lower_estimate`.
        """
        found = float(getattr(self, which))
        return found if np.isfinite(found) else float(self.value)

    def scaled(self, factor: float) -> Constant:
        """The constant times a known factor of at least 0."""
        value, low, high = (factor * end if factor > 0 else 0.0 for end in (self.value, self.low, self.high))
        return replace(self, value=value, low=low, high=high)


def exactly(value: float, samples: int, seed: int, how: str = "every sample") -> Constant:
    """A number without sampling error."""
    return Constant(float(value), float(value), float(value), samples, how, seed)


def from_parts(
    value: float, *parts: tuple[ArrayLike, int | None], seed: int, lowest: float = -np.inf, how: str = "influence"
) -> Constant:
    """A statistic of independent samples with its normal interval from influence values.

    Args:
        value: the estimate.
        parts: of each sample its influence values (m,), whose mean's error is the statistic's, and the size n of the
            finite population that it was drawn from without replacement (``None``: independent draws).
        seed: of the draws.
        lowest: values and limits are not below.
    """
    variance, count, complete = 0.0, 0, True
    for influence, population in parts:
        values = np.asarray(influence, dtype=np.float64)
        m = len(values)
        count += m
        if population is not None and m >= population:
            continue
        complete = False
        left = 1.0 if population is None else 1.0 - m / population
        variance += left * float(values.var(ddof=1)) / m if m > 1 else np.inf
    value = max(float(value), lowest)
    if complete:
        return exactly(value, count, seed)
    error = _Z * float(np.sqrt(variance))
    return Constant(value, max(value - error, lowest), value + error, count, how, seed)


def root(square: Constant) -> Constant:
    """The square root of a nonnegative constant, limits included."""
    low, value, high = (float(np.sqrt(max(v, 0.0))) for v in (square.low, square.value, square.high))
    return replace(square, value=value, low=low, high=high)


def quantile(values: ArrayLike, share: float, seed: int, population: int | None = None) -> Constant:
    """A quantile of a distribution with exact limits from order statistics (limits beyond the sample: its extremes).

    Args:
        values: (m,) independent draws, or all of a finite population of ``population`` values.
        share: 0.5 for the median.
        seed: of the draws.
        population: size of the finite population, if that is meant.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    m = len(ordered)
    value = float(np.quantile(ordered, share))
    if population is not None and m >= population:
        return exactly(value, m, seed)
    from scipy.stats import binom

    below = int(binom.ppf((1 - LEVEL) / 2, m, share))
    above = int(binom.ppf((1 + LEVEL) / 2, m, share))
    low, high = float(ordered[max(below - 1, 0)]), float(ordered[min(above, m - 1)])
    return Constant(value, min(low, value), max(high, value), m, "order statistics", seed)


def largest(values: ArrayLike, seed: int, *, samples: int | None = None) -> Constant:
    """The largest of m values, a lower estimate of the supremum: ``high`` is infinite, and ``exceeding`` bounds the
    share of the distribution above it.

    ``samples``: independent draws behind the values, where there are fewer than values (pairs share samples).
    """
    array = np.asarray(values, dtype=np.float64)
    m = array.size if samples is None else samples
    value = float(array.max())
    share = 1.0 - (1.0 - LEVEL) ** (1.0 / m)
    return Constant(value, value, float("inf"), m, "largest seen: a lower estimate", seed, exceeding=share)


def largest_of(constants: list[Constant]) -> Constant:
    """The largest of several constants, limit by limit (a path's largest value at the points that were looked at; the
    interval is that of these points, and between them it may be larger)."""
    top = max(constants, key=lambda c: c.value)
    how = top.how if len(constants) == 1 else f"{top.how}; largest of {len(constants)} points"
    return replace(top, low=max(c.low for c in constants), high=max(c.high for c in constants), how=how)


def smallest_of(constants: list[Constant]) -> Constant:
    """The smallest of several constants, limit by limit (of the points that were looked at)."""
    bottom = min(constants, key=lambda c: c.value)
    how = bottom.how if len(constants) == 1 else f"{bottom.how}; smallest of {len(constants)} points"
    return replace(bottom, low=min(c.low for c in constants), high=min(c.high for c in constants), how=how)
