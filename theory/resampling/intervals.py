"""Intervals of predicted risks and of their differences, by resampling the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from theory.errors import MergeboundError
from theory.function_space import (
    Array,
    Field,
    cross_entropy,
    uniform_weights,
)
from theory.resampling.images import Images

Method = Literal["bca", "percentile"]


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval, (...) each.

    Attributes:
        estimate: on the images as they are.
        low, high: ends of the interval.
        standard_error: standard deviation of the replicates.
        level: nominal coverage.
        replicates: the resampled values, (resamples, ...).
        seed: of the draws.
        tier: always ``"estimated"``.
    """

    estimate: Array
    low: Array
    high: Array
    standard_error: Array
    level: float
    replicates: Array
    seed: int
    tier: str = "estimated"


def risk_interval(
    losses: Sequence[Array],
    weights: npt.ArrayLike | None = None,
    *,
    sources: Sequence[npt.ArrayLike] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Interval of the joint risk ``sum_j p_j mean(losses_j)``, for one merge or for many on the same draws.

    Args:
        losses: per-image losses of each task, (..., n_j), all with the same leading axes (merges, lambdas).
        weights: p_j, default 1/N.
        sources: names of the images, (n_j,) integers per task; ``None``: no task shares images.
        level: nominal coverage, pointwise over the leading axes.
        resamples, seed: of the bootstrap.
        method: ``"percentile"``, or ``"bca"`` (Efron 1987: bias-corrected and accelerated; the acceleration of a
            weighted sum of means is exact, from its influence values).  Few images and skewed losses cover less than
            the level with either.

    Raises:
        MergeboundError: losses that are not finite or do not fit, a level outside (0, 1).

    >>> import numpy as np
    >>> found = risk_interval([np.array([0.0, 1.0] * 50)], seed=1)
    >>> float(found.estimate), bool(found.low < 0.5 < found.high)
    (0.5, True)
    """
    p = task_weights(weights, len(losses))
    values = [np.asarray(one, dtype=np.float64) for one in losses]
    lead = values[0].shape[:-1]
    for j, one in enumerate(values):
        if one.ndim < 1 or one.shape[:-1] != lead:
            raise MergeboundError(f"losses of task {j} have shape {one.shape}, expected (*{lead}, images)")
        if not np.isfinite(one).all():
            raise MergeboundError(f"losses of task {j} hold values that are not finite: check its logits")
    check_level(level)
    if method not in ("bca", "percentile"):
        raise MergeboundError(f"method = {method!r}: choose 'bca' or 'percentile'")
    flat = [one.reshape(-1, one.shape[-1]) for one in values]
    images = Images.of([one.shape[-1] for one in flat], sources)
    counts = images.draw(resamples, np.random.default_rng(seed))
    estimate = sum((w * one.mean(axis=1) for w, one in zip(p, flat, strict=True)), np.zeros(len(flat[0])))
    replicates = sum(
        (w / c.sum(axis=1, keepdims=True) * (c @ one.T) for w, one, c in zip(p, flat, counts, strict=True)),
        np.zeros((resamples, len(flat[0]))),
    )
    shift = np.zeros(len(estimate))
    acceleration = np.zeros(len(estimate))
    if method == "bca":
        shift = _bias(replicates, estimate)
        acceleration = _acceleration(flat, p, images)
    low, high = _ends(replicates, level, shift, acceleration)
    return Interval(
        estimate.reshape(lead),
        low.reshape(lead),
        high.reshape(lead),
        replicates.std(axis=0, ddof=1).reshape(lead),
        level,
        replicates.reshape(resamples, *lead),
        seed,
    )


def prediction_interval(
    fields: Sequence[Field],
    alpha: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    sources: Sequence[npt.ArrayLike] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Interval of the predicted joint risk at coefficients (..., K): a whole lambda curve at once.

    It does not contain the error of the prediction itself (:mod:`theory.linearization_error`).

    >>> from theory import secant
    >>> rng = np.random.default_rng(0)
    >>> task = secant(np.zeros((40, 2)), rng.normal(size=(2, 40, 2)), rng.integers(0, 2, 40))
    >>> found = prediction_interval([task], [0.5, 0.5], resamples=200)
    >>> bool(found.low < found.estimate < found.high)
    True
    """
    losses = [cross_entropy(field.at(alpha), field.labels) for field in fields]
    return risk_interval(losses, weights, sources=sources, level=level, resamples=resamples, seed=seed, method=method)


def difference_interval(
    first: Sequence[Array],
    second: Sequence[Array],
    weights: npt.ArrayLike | None = None,
    *,
    sources: Sequence[npt.ArrayLike] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Interval of the risk of ``first`` minus that of ``second`` on the same images (paired).

    Args:
        first, second: per-image losses of each task, (..., n_j), of two merges or two predictions of one.
        weights, sources, level, resamples, seed, method: see :func:`risk_interval`.

    >>> import numpy as np
    >>> hard = np.linspace(0.0, 9.0, 40)
    >>> found = difference_interval([hard + 0.1], [hard])
    >>> round(float(found.low), 6), round(float(found.high), 6)
    (0.1, 0.1)
    """
    if [np.shape(a) for a in first] != [np.shape(b) for b in second]:
        raise MergeboundError("first and second were not measured on the same images: give losses of equal shapes")
    gaps = [np.asarray(a, dtype=np.float64) - np.asarray(b) for a, b in zip(first, second, strict=True)]
    return risk_interval(gaps, weights, sources=sources, level=level, resamples=resamples, seed=seed, method=method)


def share_below_zero(difference: Interval) -> Array:
    """Share of the replicates in which the first merge is better, ties counted half, (...)."""
    below = (difference.replicates < 0.0).mean(axis=0)
    return np.asarray(below + 0.5 * (difference.replicates == 0.0).mean(axis=0))


def task_weights(weights: npt.ArrayLike | None, count: int) -> Array:
    """The tasks' weights, (count,); uniform by default; raises MergeboundError for others than nonnegative ones."""
    if not count:
        raise MergeboundError("no task was given: at least one is needed")
    p = uniform_weights(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if p.shape != (count,) or not (np.isfinite(p) & (p >= 0.0)).all():
        raise MergeboundError(f"weights has shape {p.shape}: give {count} nonnegative numbers, one per task")
    return p


def check_level(level: float) -> None:
    """Raise MergeboundError unless a coverage lies between 0 and 1."""
    if not 0.0 < level < 1.0:
        raise MergeboundError(f"level = {level}: a coverage lies between 0 and 1, e.g. 0.95")


def _bias(replicates: Array, estimate: Array) -> Array:
    """Normal quantile of the share of replicates below the estimate, ties counted half."""
    import scipy.special

    slack = 1e-12 * (1.0 + np.abs(estimate))
    below = (replicates < estimate - slack).mean(axis=0) + 0.5 * (np.abs(replicates - estimate) <= slack).mean(axis=0)
    edge = 0.5 / len(replicates)
    return np.asarray(scipy.special.ndtri(below.clip(edge, 1.0 - edge)))


def _acceleration(losses: Sequence[Array], weights: Array, images: Images) -> Array:
    """Skewness of the influence values over 6, each stratum with a mean of its own, (m,)."""
    influence = np.zeros((len(images.strata), len(losses[0])))
    for one, p, c in zip(losses, weights, images.clusters, strict=True):
        np.add.at(influence, c, (p / one.shape[1] * (one - one.mean(axis=1, keepdims=True))).T)
    for stratum in range(int(images.strata.max()) + 1):
        members = images.strata == stratum
        influence[members] -= influence[members].mean(axis=0)
    spread = (influence**2).sum(axis=0)
    with np.errstate(all="ignore"):
        skew = (influence**3).sum(axis=0) / (6.0 * spread**1.5)
    return np.where(np.isfinite(skew), skew, 0.0)


def _ends(replicates: Array, level: float, shift: Array, acceleration: Array) -> tuple[Array, Array]:
    import scipy.special

    ends = []
    for tail in (0.5 - level / 2, 0.5 + level / 2):
        z = shift + float(scipy.special.ndtri(tail))
        with np.errstate(all="ignore"):
            moved = scipy.special.ndtr(shift + z / (1.0 - acceleration * z))
        share = np.where(np.isfinite(moved) & (acceleration * z < 1.0), moved, tail)
        ends.append(np.array([np.quantile(column, q) for column, q in zip(replicates.T, share, strict=True)]))
    return ends[0], ends[1]
