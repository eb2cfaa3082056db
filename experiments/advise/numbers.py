"""A number of advice: its value, interval, tier and seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z95 = 1.959964


@dataclass(frozen=True)
class Number:
    """A number as advice states it.

    Attributes:
        value, low, high: in the unit that its name says; the interval's level is 95 % unless ``note`` says otherwise.
            Limits that are not known are NaN, and the number says "no interval".
        tier: ``measured``, ``estimated``, ``calibrated`` or ``certified``.
        seed: of the draws behind it.
        note: what the interval covers.
    """

    value: float
    low: float
    high: float
    tier: str
    seed: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.value:.3g} ({between(self.low, self.high)}; {self.tier})"


def between(low: float, high: float) -> str:
    """An interval in words.

    >>> between(0.1, 0.25), between(float("nan"), 1.0)
    ('0.1 to 0.25', 'no interval')
    """
    return f"{low:.3g} to {high:.3g}" if math.isfinite(low) and math.isfinite(high) else "no interval"


def around(value: float, error: float, tier: str, seed: int, note: str = "", z: float = Z95) -> Number:
    """``value`` with ``z`` standard errors on both sides, not below 0; no interval where the error is NaN."""
    return Number(value, max(value - z * error, 0.0), value + z * error, tier, seed, note)


def simultaneous(count: int, level: float = 0.95) -> float:
    """Standard errors of a two-sided normal interval that holds for ``count`` values at once (Bonferroni).

    >>> round(simultaneous(1), 3), round(simultaneous(5), 3)
    (1.96, 2.576)
    """
    from scipy.stats import norm

    return float(norm.ppf(1.0 - (1.0 - level) / (2.0 * max(count, 1))))


def finite(value: float) -> float | None:
    """The value for JSON, ``None`` where it is not finite."""
    return value if math.isfinite(value) else None
