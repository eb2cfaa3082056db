"""Weighted rank statistics and intervals that respect shared experts.

Merges are not independent: two merges that contain the same expert move together.  Every interval here therefore
resamples *experts*, not merges.

The expert bootstrap
--------------------
Resampling experts with replacement and giving a merge the product of its experts' counts degenerates: a merge of
eight experts survives with probability about (1 - 1/e)^8 = 2.5 %.  A multiplier version is used instead.  Counts c
(multinomial, one per expert, mean one) give merge m the weight

    w_m = max(0, 1 + s * sum_{i in m} (c_i - 1) / (1 - f_i)),

f_i the share of merges that contain expert i, s small.  The deviations T(w) - T(1) are divided by s.

*Why it reproduces the variance.*  Let psi_m be the influence of merge m on T, so that T(w) - T(1) is close to (1/M)
sum_m (w_m - 1) psi_m with sum_m psi_m = 0.  The rescaled deviation is sum_i (c_i - 1) g_i with g_i = sum_{m contains
i} psi_m / (M (1 - f_i)), and its variance given the data is sum_i g_i^2 - (sum_i g_i)^2 / E.  When psi_m is a mean of
expert effects a_i (the Hajek projection of a statistic of a multiple-membership design) plus noise of variance v, an
expert effect enters T as (M_i / M) a_i / N.  In a balanced design g_i = (M_i / M) (a_i - mean a) / N * (1 -
(N-1)/(E-1)) / (1 - N/E) = (M_i / M) (a_i - mean a) / N * E/(E-1): the factor 1/(1 - f_i), which is the one of the
delete-one-expert jackknife, removes the shrinkage caused by finite groups (30 % of the standard deviation for groups
of 8 among 24 experts).  Noise is counted once per member, N v / M in place of v / M, and random co-membership adds
further positive terms: both errors are on the safe side.  The intervals are conservative where noise, not the choice
of experts, dominates.

s must keep most weights positive: the sum has standard deviation of about sqrt(N), so s = 0.1 for N up to 8.  A
larger s clips weights at zero and, through the curvature of T, biases the deviations, which the division by s would
magnify.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Maps weights of shape (R, M) to R values of a statistic."""


@dataclass(frozen=True)
class Estimate:
    """A value with an interval; the bounds are NaN where no interval could be computed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Membership:
    """Which expert (column of ``matrix``, named in ``experts``) belongs to which merge (row of ``matrix``)."""

    experts: tuple[str, ...]
    matrix: NDArray[np.bool_]


def membership(groups: Sequence[Sequence[str]]) -> Membership:
    """Membership of M merges, each given by the names of its experts."""
    names = tuple(sorted({name for group in groups for name in group}))
    column = {name: k for k, name in enumerate(names)}
    matrix = np.zeros((len(groups), len(names)), dtype=bool)
    for row, group in enumerate(groups):
        matrix[row, [column[name] for name in group]] = True
    return Membership(names, matrix)


def membership_of(experts: pd.Series) -> Membership:
    """Membership from a column of expert names joined by ``;``."""
    return membership([str(text).split(";") for text in experts])


def expert_weights(
    members: Membership,
    resamples: int = 1000,
    seed: int = 0,
    scale: float = 0.1,
    strata: ArrayLike | None = None,
) -> Floats:
    """Multiplier weights of the expert bootstrap, shape (resamples, M); see the module's docstring.

    ``strata`` (length M, for instance N) makes f_i the share *within* a merge's stratum, for statistics that are
    computed stratum by stratum.  The same seed gives the same counts whatever the strata.
    """
    matrix = members.matrix
    merges, experts = matrix.shape
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(experts, np.full(experts, 1.0 / max(experts, 1)), size=resamples).astype(float)
    labels = np.zeros(merges, dtype=int) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    weights = np.empty((resamples, merges))
    for label in np.unique(labels):
        rows = labels == label
        share = np.minimum(matrix[rows].mean(axis=0), 0.75)
        weights[:, rows] = 1.0 + scale * ((counts - 1.0) / (1.0 - share)) @ matrix[rows].T.astype(float)
    return np.maximum(weights, 0.0)


def interval(
    statistic: Statistic,
    weights: Floats,
    scale: float = 0.1,
    level: float = 0.95,
    domain: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """Percentile interval of ``statistic`` under ``weights`` from :func:`expert_weights` with the same ``scale``.

    The interval is clipped to ``domain``, the values that the statistic can take.
    """
    value = float(statistic(np.ones((1, weights.shape[1])))[0])
    draws = statistic(weights)
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(value) or draws.size < 2:
        return Estimate(value, float("nan"), float("nan"))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(value + (draws - value) / scale, [tail, 1.0 - tail])
    return Estimate(value, float(np.clip(low, *domain)), float(np.clip(high, *domain)))


def _as_weights(weights: ArrayLike | None, merges: int) -> Floats:
    matrix = np.ones((1, merges)) if weights is None else np.atleast_2d(np.asarray(weights, dtype=float))
    if matrix.shape[1] != merges:
        raise ValueError(f"weights have {matrix.shape[1]} columns, but there are {merges} values")
    return matrix


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, NaN where the denominator vanishes."""
    out = np.full(np.broadcast(top, bottom).shape, np.nan)
    np.divide(top, bottom, out=out, where=np.asarray(bottom) > 1e-12)
    return out


def midranks(values: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Weighted midranks, shape (R, M).

    The weight below a value plus half of the weight tied with it (unit weights: rank - 1/2).
    """
    array = np.asarray(values, dtype=float)
    matrix = _as_weights(weights, array.size)
    order = np.argsort(array, kind="stable")
    group = np.concatenate([[0], np.cumsum(np.diff(array[order]) != 0)])
    starts = np.flatnonzero(np.concatenate([[True], np.diff(group) != 0]))
    mass = np.add.reduceat(matrix[:, order], starts, axis=1)
    middle = np.cumsum(mass, axis=1) - 0.5 * mass
    ranks = np.empty_like(matrix)
    ranks[:, order] = middle[:, group]
    return ranks


def spearman(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Weighted Spearman correlation, one value per row of ``weights``.

    The weighted Pearson correlation of weighted midranks.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    matrix = _as_weights(weights, x.size)
    if x.size < 2:
        return np.full(matrix.shape[0], np.nan)
    total = matrix.sum(axis=1, keepdims=True)
    a, b = midranks(x, matrix) - total / 2.0, midranks(y, matrix) - total / 2.0
    scale = np.sqrt((matrix * a * a).sum(axis=1) * (matrix * b * b).sum(axis=1))
    return _ratio((matrix * a * b).sum(axis=1), scale)


def _tied_weight(values: Floats, matrix: Floats) -> Floats:
    """Sum over pairs of tied values (a value is tied with itself) of w_i w_j, one value per row."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) != 0]))
    return np.asarray((np.add.reduceat(matrix[:, order], starts, axis=1) ** 2).sum(axis=1), dtype=float)


def kendall(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Weighted Kendall tau-b, one value per row of ``weights``.

    The numerator is the quadratic form w' K w of the M x M concordance matrix K = sign(x_i - x_j) sign(y_i - y_j); the
    denominators are the weight of the pairs that are untied in x and in y.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    matrix = _as_weights(weights, x.size)
    if x.size < 2:
        return np.full(matrix.shape[0], np.nan)
    concordance = np.sign(x[:, None] - x[None, :]) * np.sign(y[:, None] - y[None, :])
    pairs = matrix.sum(axis=1) ** 2
    scale = np.sqrt(np.maximum(pairs - _tied_weight(x, matrix), 0) * np.maximum(pairs - _tied_weight(y, matrix), 0))
    return _ratio(((matrix @ concordance) * matrix).sum(axis=1), scale)


def auc(score: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Weighted area under the ROC curve (ties count one half), one value per row of ``weights``.

    NaN with a single class.
    """
    score, flag = np.asarray(score, dtype=float), np.asarray(positive, dtype=bool)
    matrix = _as_weights(weights, score.size)
    if score.size == 0:
        return np.full(matrix.shape[0], np.nan)
    above = matrix[:, flag].sum(axis=1)
    below = matrix[:, ~flag].sum(axis=1)
    ranked = (matrix * midranks(score, matrix))[:, flag].sum(axis=1)
    return _ratio(ranked - above**2 / 2.0, above * below)


def mean(values: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Weighted mean, one value per row of ``weights``."""
    array = np.asarray(values, dtype=float)
    matrix = _as_weights(weights, array.size)
    return _ratio(matrix @ array, matrix.sum(axis=1))


def quantile(values: ArrayLike, q: float, weights: ArrayLike | None = None) -> Floats:
    """Weighted quantile, one value per row of ``weights``: the values interpolated at their weighted midranks.

    Unlike a step function it varies smoothly with the weights, which the rescaling of the expert bootstrap needs.
    """
    array = np.asarray(values, dtype=float)
    matrix = _as_weights(weights, array.size)
    if array.size == 0:
        return np.full(matrix.shape[0], np.nan)
    order = np.argsort(array, kind="stable")
    ordered, mass = array[order], matrix[:, order]
    cumulated = np.cumsum(mass, axis=1)
    middle = (cumulated - 0.5 * mass) / np.maximum(cumulated[:, -1:], 1e-300)
    return np.array([np.interp(q, row, ordered) for row in middle])


def within(
    statistic: Callable[[Floats, Floats, Floats], Floats], x: ArrayLike, y: ArrayLike, strata: ArrayLike
) -> Statistic:
    """A statistic of (x, y) computed inside every stratum and averaged with the strata's merge counts as fixed weights.

    Strata with fewer than three merges, or where the statistic is undefined (constant values), are left out.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    labels = np.unique(np.asarray(strata), return_inverse=True)[1]

    def pooled(weights: Floats) -> Floats:
        total, mass = np.zeros(weights.shape[0]), np.zeros(weights.shape[0])
        for label in np.unique(labels):
            rows = labels == label
            if rows.sum() < 3:
                continue
            values = statistic(x[rows], y[rows], weights[:, rows])
            good = np.isfinite(values)
            total[good] += rows.sum() * values[good]
            mass[good] += rows.sum()
        return _ratio(total, mass)

    return pooled


def mean_interval(
    values: ArrayLike,
    members: Membership,
    resamples: int = 1000,
    seed: int = 0,
    scale: float = 0.1,
    level: float = 0.95,
    domain: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """Mean of one value per merge or group with its expert-bootstrap interval.

    For a paired comparison pass the differences, one per group: pairing is kept because whole groups are weighted.
    Non-finite values are left out.
    """
    array = np.asarray(values, dtype=float)
    good = np.isfinite(array)
    if not good.any():
        return Estimate(float("nan"), float("nan"), float("nan"))
    kept = members.matrix[good]
    used = kept.any(axis=0)
    reduced = Membership(tuple(name for name, flag in zip(members.experts, used, strict=True) if flag), kept[:, used])
    weights = expert_weights(reduced, resamples, seed, scale)
    return interval(lambda w: mean(array[good], w), weights, scale, level, domain)
