"""A measured number: never without its interval, its tier and the seed of what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NORMAL = 1.959963984540054
"""Standard errors on each side that hold 95 % of a normal law."""


@dataclass(frozen=True)
class Number:
    """A value with what is known about its error.

    Attributes:
        value: the estimate.
        low, high: interval.
        standard_error: where the interval is ``value`` plus or minus 1.96 of it, else NaN.
        covers: what the interval accounts for (probes, images, residual), and what it does not.
        seed: of the draws.
        tier: ``estimated``, or ``certified`` where a theorem gives the value.
    """

    value: float
    low: float
    high: float
    standard_error: float
    covers: str
    seed: int
    tier: str = "estimated"

    @classmethod
    def normal(cls, value: float, standard_error: float, covers: str, seed: int) -> Number:
        """Value with a 95 % interval from its standard error."""
        half = NORMAL * standard_error
        return cls(float(value), float(value - half), float(value + half), float(standard_error), covers, seed)

    def row(self, prefix: str = "") -> dict[str, float]:
        """Columns of a table."""
        head = prefix or "value"
        return {head: self.value, f"{head}_low": self.low, f"{head}_high": self.high}


def over_blocks(values: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over images and its standard error, from means over blocks of images.

    Args:
        values: means over the images of each block, (blocks, ...).
        sizes: images of each block.

    Returns:
        Mean and standard error, (...): the error is NaN for a single block.  Blocks of unequal size are weighted by
        their size; the error is that of a weighted mean of independent blocks whose variances go like one over their
        sizes (unbiased for equal expectations).
    """
    weight = np.asarray(sizes, dtype=np.float64)
    share = weight / weight.sum()
    mean = np.tensordot(share, values, axes=1)
    count = len(weight)
    if count < 2:
        return mean, np.full(np.shape(mean), np.nan)
    spread = np.tensordot(weight, (values - mean) ** 2, axes=1) / (count - 1)
    return mean, np.sqrt(spread / weight.sum())
