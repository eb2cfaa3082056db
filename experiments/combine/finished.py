"""How much of a grid there is to merge: runs that are missing, and diverged ones, which merges leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.combine.cells import ordered_levels
from experiments.combine.groups import plain


@dataclass(frozen=True)
class Finished:
    """How far a grid is, as far as merging needs to know.

    Attributes:
        runs: of the grid.
        missing: of those, not done.
        diverged: experts that are left out, since they diverged.
        by_level: of those, how many at each level of the factor, levels without any included; empty without a factor.
        factor: that the levels are of.
    """

    runs: int
    missing: int
    diverged: int
    by_level: tuple[tuple[Any, int], ...] = ()
    factor: str = ""

    @property
    def words(self) -> str:
        """One line."""
        levels = ", ".join(f"{count} at {level}" for level, count in self.by_level if count)
        where = f" ({self.factor}: {levels})" if levels else ""
        left_out = f"{self.diverged:,} diverged experts were left out{where}"
        return f"{self.missing:,} of {self.runs:,} runs are missing; {left_out}"

    def to_row(self) -> dict[str, Any]:
        """The same as plain data."""
        levels = [{"level": level, "diverged": count} for level, count in self.by_level]
        found: dict[str, Any] = {"runs": self.runs, "missing_runs": self.missing, "diverged_experts": self.diverged}
        return found | ({"factor": self.factor, "diverged_by_level": levels} if self.factor else {})


def how_finished(
    frame: pd.DataFrame,
    *,
    runs: int,
    missing: int,
    factor: str = "",
    levels: Sequence[Any] = (),
    fixed: Mapping[str, Any] | None = None,
) -> Finished:
    """Count.

    Args:
        frame: table of the grid, one row per run and checkpoint.
        runs: of the grid.
        missing: of those, not done.
        factor: that a design varies, if it does.
        levels: of the factor, as the design has them; intervals (texts such as ``(0.1, 0.2]``) are looked into.
        fixed: what the design holds; diverged runs with other values are not counted.
    """
    lost = frame[frame["outcome"] == "diverged"].drop_duplicates("digest")
    for name, wanted in (fixed or {}).items():
        values = list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
        if name in lost.columns and name != "step":
            lost = lost[[any(_same(value, one) for one in values) for value in lost[name]]]
    counts: dict[Any, int] = {}
    if factor and factor in lost.columns:
        counts = {plain(level): 0 for level in levels}
        for value in lost[factor]:
            level = next((one for one in counts if _same(value, one) or _within(value, one)), None)
            if level is None:
                level = ordered_levels([value])[0]
            counts[level] = counts.get(level, 0) + 1
    return Finished(runs, missing, len(lost), tuple(counts.items()), factor)


def _same(value: Any, level: Any) -> bool:
    return bool(ordered_levels([value])[0] == level)


def _within(value: Any, level: Any) -> bool:
    """Whether a number is in an interval that is written ``(a, b]``."""
    if not isinstance(level, str) or level[:1] not in "([" or level[-1:] != "]" or not isinstance(value, int | float):
        return False
    low, _, high = level[1:-1].partition(",")
    try:
        return float(low) < value <= float(high)
    except ValueError:
        return False
