"""What is fitted on merges of some experts and judged on those of others (tier *calibrated*).

Pure functions of tables with one row per merge, so that a study decides what is fitted on what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from theory.errors import MergeboundError
from theory.function_space import Array, Labels

if TYPE_CHECKING:
    import pandas as pd

SPLIT = 0x5B117
"""Names the stream that divides groups into fitting and calibrating: ``default_rng([seed, SPLIT])``."""
_TINY = 1e-12


@dataclass(frozen=True)
class Combination:
    """A weighted mean of predictions on the logarithmic scale: ``log risk = constant + sum_k weight_k log pred_k``.

    Attributes:
        columns: of the predictions.
        weights: one per column.
        constant: in log nats.
        rows: merges that it was fitted on.
        tier: always ``"calibrated"``.
    """

    columns: tuple[str, ...]
    weights: tuple[float, ...]
    constant: float
    rows: int
    tier: str = "calibrated"

    def predict(self, rows: pd.DataFrame) -> Array:
        """Predicted risks of the merges of a table, (rows,), in nats."""
        logs = np.log(np.maximum(_numbers(rows, self.columns), _TINY))
        return np.asarray(np.exp(self.constant + logs @ np.asarray(self.weights)))


def fit_combination(
    rows: pd.DataFrame,
    columns: Sequence[str],
    measured: str = "measured",
    *,
    between: bool = True,
    constant: bool = False,
) -> Combination:
    """Fit weights on merges of one half of the experts by least absolute deviations of the logarithms.

    Args:
        rows: one merge each.
        columns: predictions; with two of them and ``between``, a place inside the bracket.
        measured: column of the measured risk.
        between: weights nonnegative with sum one.
        constant: whether a constant factor is fitted too.

    Raises:
        MergeboundError: a column that is missing, holds no positive numbers, or fewer rows than weights.
    """
    from scipy.optimize import linprog

    X = np.log(np.maximum(_numbers(rows, columns), _TINY))
    y = np.log(np.maximum(_numbers(rows, [measured])[:, 0], _TINY))
    n, k = X.shape
    if n < k + 1:
        raise MergeboundError(f"{n} rows for {k} weights: give merges of more experts")
    design = np.column_stack([X, np.ones(n)])
    cost = np.concatenate([np.zeros(k + 1), np.full(2 * n, 1.0 / n)])
    equations, right = np.hstack([design, np.eye(n), -np.eye(n)]), y
    if between:
        simplex = np.concatenate([np.ones(k), np.zeros(1 + 2 * n)])
        equations, right = np.vstack([equations, simplex]), np.append(right, 1.0)
    free = (0.0, 1.0) if between else (None, None)
    bounds = [free] * k + [(None, None) if constant else (0.0, 0.0)] + [(0.0, None)] * (2 * n)
    found = linprog(cost, A_eq=equations, b_eq=right, bounds=bounds, method="highs")
    if not found.success or found.x is None:
        raise MergeboundError(f"the weights could not be fitted ({found.message}); check the columns")
    return Combination(tuple(columns), tuple(float(v) for v in found.x[:k]), float(found.x[k]), n)


@dataclass(frozen=True)
class Interval:
    """A prediction interval for measured risks: ``prediction exp(quantile(gap) -+ margin)``.

    Attributes:
        prediction, gap: columns it is made from.
        low, high: coefficients (constant, slope) of the lower and upper quantile of ``log(measured / prediction)`` as
            a function of the gap.
        margin: conformal widening (or, if negative, narrowing) of both ends, in log; ``inf`` where there were too few
            groups to promise the coverage.
        coverage: what was asked for.
        groups: independent groups it was calibrated on.
        widest: largest gap that was seen; wider ones are extrapolated and should be flagged.
        tier: always ``"calibrated"``.
    """

    prediction: str
    gap: str
    low: tuple[float, float]
    high: tuple[float, float]
    margin: float
    coverage: float
    groups: int
    widest: float
    seed: int
    tier: str = "calibrated"

    def ends(self, rows: pd.DataFrame) -> tuple[Array, Array]:
        """Lower and upper end for every row, (rows,) each, in nats."""
        table = _numbers(rows, [self.prediction, self.gap])
        centre = np.log(np.maximum(table[:, 0], _TINY))
        low, high = _quantiles(self.low, self.high, table[:, 1])
        with np.errstate(over="ignore"):
            return np.exp(centre + low - self.margin), np.exp(centre + high + self.margin)

    def covers(self, rows: pd.DataFrame, measured: str = "measured") -> Array:
        """Whether the measured risk of every row lies inside, (rows,) bool."""
        low, high = self.ends(rows)
        truth = _numbers(rows, [measured])[:, 0]
        return np.asarray((low <= truth) & (truth <= high))


def calibrate_interval(
    rows: pd.DataFrame,
    *,
    prediction: str = "prediction",
    gap: str = "gap",
    measured: str = "measured",
    groups: str | None = None,
    coverage: float = 0.9,
    seed: int = 0,
) -> Interval:
    """Split-conformal interval for the log ratio of measured to predicted risk, given the gap of the bracket.

    Half of the groups give linear quantiles of the log ratio in the gap (conformalised quantile regression: Romano,
    Patterson and Candes 2019), the other half the margin.  Every group weighs the same and a new group is one more
    (hierarchical conformal prediction: Lee, Barber and Willett 2023), so that merges of the same experts do not count
    as independent.  Coverage is promised for merges of a new group that is exchangeable with those of the table.

    Args:
        rows: merges of some experts: one row each.
        prediction, gap, measured: columns.
        groups: column that names independent groups of experts; ``None``: every row by itself.
        coverage: to be promised, in (0, 1).
        seed: names the division into halves.

    Raises:
        MergeboundError: fewer than four groups, a coverage outside (0, 1), or columns that do not fit.
    """
    if not 0.0 < coverage < 1.0:
        raise MergeboundError(f"coverage = {coverage}: give a number between 0 and 1, as 0.9")
    table = _numbers(rows, [prediction, gap, measured])
    names = np.arange(len(rows)) if groups is None else np.unique(rows[groups].to_numpy(), return_inverse=True)[1]
    members = np.unique(names)
    if len(members) < 4:
        raise MergeboundError(f"{len(members)} groups: a calibrated interval needs four or more")
    ratio = np.log(np.maximum(table[:, 2], _TINY)) - np.log(np.maximum(table[:, 0], _TINY))
    order = np.random.default_rng([seed, SPLIT]).permutation(members)
    fitting = np.isin(names, order[: len(members) // 2])
    tail = (1.0 - coverage) / 2.0
    low = quantile_line(table[fitting, 1], ratio[fitting], tail)
    high = quantile_line(table[fitting, 1], ratio[fitting], 1.0 - tail)
    below, above = _quantiles(low, high, table[~fitting, 1])
    scores = np.maximum(below - ratio[~fitting], ratio[~fitting] - above)
    held = len(members) - len(members) // 2
    margin = _conformal(scores, names[~fitting], coverage)
    return Interval(prediction, gap, low, high, margin, coverage, held, float(table[:, 1].max(initial=0.0)), seed)


def _quantiles(low: tuple[float, float], high: tuple[float, float], gap: Array) -> tuple[Array, Array]:
    one, other = low[0] + low[1] * gap, high[0] + high[1] * gap
    return np.minimum(one, other), np.maximum(one, other)


def _conformal(scores: Array, names: Labels, coverage: float) -> float:
    """The ``coverage`` quantile of scores in which every group weighs 1/(G + 1) and the rest lies at infinity."""
    count = np.bincount(np.unique(names, return_inverse=True)[1])
    weight = 1.0 / (len(count) + 1) / count[np.unique(names, return_inverse=True)[1]]
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weight[order]) >= coverage - 1e-12
    return float(scores[order][reached.argmax()]) if reached.any() else float("inf")


def quantile_line(x: Array, y: Array, level: float) -> tuple[float, float]:
    """Constant and slope of the linear quantile of y given x (quantile regression as a linear program)."""
    from scipy.optimize import linprog

    n = len(y)
    if n < 2 or np.ptp(x) < 1e-9:
        return float(np.quantile(y, level)) if n else 0.0, 0.0
    design = np.column_stack([np.ones(n), x])
    cost = np.concatenate([np.zeros(2), np.full(n, level), np.full(n, 1.0 - level)])
    equations = np.hstack([design, np.eye(n), -np.eye(n)])
    bounds = [(None, None)] * 2 + [(0.0, None)] * (2 * n)
    found = linprog(cost, A_eq=equations, b_eq=y, bounds=bounds, method="highs")
    if not found.success or found.x is None:
        raise MergeboundError(f"the quantile could not be fitted ({found.message}); check the columns")
    return float(found.x[0]), float(found.x[1])


@dataclass(frozen=True)
class Flag:
    """ "Do not trust": a merge whose score is at least the threshold.

    Attributes:
        score: column.
        threshold: on it; ``-inf`` flags everything.
        misses: share of collapsed merges of a new group that go unnoticed at most, if groups are exchangeable.
        alarms: share of the other merges that were flagged where it was fitted.
        tier: always ``"calibrated"``.
    """

    score: str
    threshold: float
    misses: float
    alarms: float
    tier: str = "calibrated"

    def raised(self, rows: pd.DataFrame) -> Array:
        """Whether each row is flagged, (rows,) bool."""
        return np.asarray(_numbers(rows, [self.score])[:, 0] >= self.threshold)


def calibrate_flag(
    rows: pd.DataFrame,
    *,
    score: str = "gap",
    collapsed: str = "collapsed",
    groups: str | None = None,
    misses: float = 0.02,
) -> Flag:
    """The highest threshold below which at most a share ``misses`` of collapsed merges lies (conformal, one-sided).

    Args:
        rows: merges of some experts.
        score: column that is larger where a merge is worse: the bracket's gap, or a predicted risk.
        collapsed: column of truth values.
        groups: column that names independent groups.
        misses: to be allowed, in (0, 1).

    Raises:
        MergeboundError: no collapsed merge in the table, or columns that do not fit.
    """
    values, bad = _numbers(rows, [score])[:, 0], rows[collapsed].to_numpy(dtype=bool)
    if not bad.any():
        raise MergeboundError(f"{collapsed}: no merge of the table collapsed; a flag needs some to learn from")
    names = np.arange(len(rows)) if groups is None else np.unique(rows[groups].to_numpy(), return_inverse=True)[1]
    threshold = -_conformal(-values[bad], names[bad], 1.0 - misses)
    alarms = float((values[~bad] >= threshold).mean()) if (~bad).any() else 0.0
    return Flag(score, threshold, misses, alarms)


def _numbers(rows: pd.DataFrame, columns: Sequence[str]) -> Array:
    for column in columns:
        if column not in rows.columns:
            raise MergeboundError(
                f"column {column!r} is not in the table: there are {', '.join(map(str, rows.columns))}"
            )
    found = rows[list(columns)].to_numpy(dtype=np.float64)
    if not np.isfinite(found).all():
        raise MergeboundError(f"columns {', '.join(columns)} hold values that are not finite: leave these merges out")
    return found
