"""Merges whose BatchNorm variances became negative and were set to 0: how many, method by method."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.combine.rows import CLAMPED


@dataclass(frozen=True)
class Clamped:
    """What one method did.

    Attributes:
        label: of the method, with its settings.
        merges: that had a variance set to 0.
        of: merges where this was counted.
        largest: share of the variances of one merge, at most.
        not_recorded: merges of older versions, where it was not counted.
    """

    label: str
    merges: int
    of: int
    largest: float
    not_recorded: int = 0

    @property
    def words(self) -> str:
        """One sentence, with the remedy."""
        return (
            f"{self.label}: in {self.merges:,} of {self.of:,} merges running variances of BatchNorm became negative "
            f"and were set to 0 (up to {100 * self.largest:.3g} % of them, column {CLAMPED}): such merges are usually "
            "far worse than their experts; keep the coefficients nonnegative with a sum of at most 1, or measure them "
            "with --batchnorm reestimated"
        )


def clamped_counts(table: pd.DataFrame) -> tuple[Clamped, ...]:
    """By method, in the order of the table's rows.

    Args:
        table: rows of merges, as :func:`experiments.combine.api.combine` returns them.
    """
    if not len(table):
        return ()
    shares = table[CLAMPED] if CLAMPED in table.columns else pd.Series(float("nan"), index=table.index)
    found = []
    for label, own in shares.astype(float).groupby(table["label"], sort=False):
        known = own.dropna()
        largest = float(known.max()) if len(known) else 0.0
        found.append(Clamped(str(label), int((known > 0).sum()), len(known), largest, len(own) - len(known)))
    return tuple(found)
