"""What a factor does to merges: means over groups, and paired differences between levels, with intervals.

Groups that share experts move together, so intervals resample experts (:mod:`experiments.statistics`).  All numbers are
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.combine.cells import ordered_levels
from experiments.statistics import Estimate, mean_interval, membership_of
from theory.errors import MergeboundError

RESAMPLES = 1000
_DOMAINS = {"accuracy": (0.0, 1.0), "ece": (0.0, 1.0), "brier": (0.0, 2.0), "loss": (0.0, np.inf)}
_CELL = ("factor", "stratum", "size", "label", "merge_seed", "evaluation")


def factor_means(
    table: pd.DataFrame, metric: str = "accuracy", *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Mean of a metric over the groups of every level.

    Args:
        table: of :func:`~experiments.combine.api.combine`.
        metric: a column: ``accuracy``, ``loss``, ``normalised``, ``gain``, ``merging_cost``, ...
        resamples, seed: of the expert bootstrap.
        level: of the intervals.

    Returns:
        One row for each level, stratum, size, method and evaluation: ``mean``, ``low``, ``high``, ``groups`` (those
        with a finite value), ``experts``.

    Raises:
        MergeboundError: an unknown metric, or no rows.
    """
    _check(table, metric)
    found = []
    for cell, rows in _cells(table):
        for value in ordered_levels(rows["level"]):
            own = rows[[one == value for one in rows["level"]]]
            estimate = _mean(own[metric], own["experts"], metric, resamples, level, seed)
            found.append({**cell, "level": value, "metric": metric, **_columns(estimate, own[metric], own["experts"])})
    return pd.DataFrame(found)


def factor_differences(
    table: pd.DataFrame, metric: str = "accuracy", *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Paired differences of a metric between every two levels (the later minus the earlier in order).

    Pairs are groups of one seed, stratum and size of a matched design: the same tasks, and where ``matched_seeds`` says
    so the same seeds of fine-tuning.

    Returns:
        As :func:`factor_means`, with ``level``, ``reference`` and ``matched_seeds``; ``groups`` counts pairs.

    Raises:
        MergeboundError: as there, or groups that are not matched.
    """
    _check(table, metric)
    if not bool(table["matched"].all()):
        raise MergeboundError("the groups are not matched between levels, so there are no pairs; draw them matched")
    found = []
    for cell, rows in _cells(table):
        levels = ordered_levels(rows["level"])
        by_level = {value: rows[[one == value for one in rows["level"]]].set_index("seed") for value in levels}
        for number, later in enumerate(levels):
            for earlier in levels[:number]:
                a, b = by_level[later], by_level[earlier]
                seeds = a.index.intersection(b.index)
                a, b = a.loc[seeds], b.loc[seeds]
                gaps = a[metric].astype(float) - b[metric].astype(float)
                experts = a["experts"] + ";" + b["experts"]
                estimate = _mean(gaps, experts, "", resamples, level, seed)
                known = {"level": later, "reference": earlier, "metric": metric}
                if "matched_seeds" in rows.columns:
                    known["matched_seeds"] = bool(rows["matched_seeds"].all())
                found.append({**cell, **known, **_columns(estimate, gaps, experts)})
    return pd.DataFrame(found)


def size_differences(
    table: pd.DataFrame, metric: str = "accuracy", *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """The same between every two sizes of group: the number of experts is the factor.

    Groups of one seed, stratum and level are a pair; in factor designs the smaller one is part of the larger one.
    """
    renamed = table.assign(level=table["size"], size=0, factor="size", matched=True)
    inner = table["level"] if "level" in table.columns else pd.Series("", index=table.index)
    renamed["stratum"] = [f"{stratum} {value}" for stratum, value in zip(table["stratum"], inner, strict=True)]
    return factor_differences(renamed, metric, resamples=resamples, level=level, seed=seed)


def _mean(values: Any, experts: Any, metric: str, resamples: int, level: float, seed: int) -> Estimate:
    domain = _DOMAINS.get(metric, (-np.inf, np.inf))
    return mean_interval(
        np.asarray(values, dtype=float), membership_of(experts), resamples, seed, level=level, domain=domain
    )


def _columns(estimate: Estimate, values: Any, experts: Any) -> dict[str, Any]:
    good = np.isfinite(np.asarray(values, dtype=float))
    different = {name for text in experts for name in str(text).split(";")}
    row: dict[str, Any] = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
    return row | {"groups": int(good.sum()), "experts": len(different), "tier": "measured"}


def _cells(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    names: Sequence[str] = [name for name in _CELL if name in table.columns]
    for values, rows in table.groupby(list(names), sort=False, dropna=False):
        yield dict(zip(names, values, strict=True)), rows


def _check(table: pd.DataFrame, metric: str) -> None:
    if not len(table) or "level" not in table.columns:
        raise MergeboundError("there are no merges of a factor to compare; draw groups with by_factor (--factor)")
    if metric not in table.columns or not pd.api.types.is_numeric_dtype(table[metric]):
        raise MergeboundError(
            f"metric: the merges have no numbers {metric!r}; choose accuracy, loss, normalised, gain or merging_cost"
        )
