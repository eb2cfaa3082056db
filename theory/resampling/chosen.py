"""Coefficients chosen on the images: how far they spread, and how much too low their risk looks there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from theory.errors import MergeboundError
from theory.function_space import (
    Array,
    Field,
    QuadraticField,
    cross_entropy,
    log_softmax,
    minimise_risk,
)
from theory.resampling.images import Images, expanded, take
from theory.resampling.intervals import Interval, check_level, risk_interval, task_weights

Fit = Callable[[Sequence[Field]], Array]


@dataclass(frozen=True)
class MinimiserInterval:
    """Coefficients that minimise a prediction, resampled.

    Attributes:
        alpha: interval of every coefficient (percentiles), (K,); ``alpha.replicates`` are the minimisers, (B, K).
        risk: predicted risk at the minimiser on its own images: biased downwards.
        optimism: by how much, estimated as the mean over resamples of ``R(alpha*) - R*(alpha*)`` with the minimiser and
            the risk R* of a resample and the risk R of the images as they are (Efron 1983).
        corrected: ``risk + optimism``.
    """

    alpha: Interval
    risk: float
    optimism: float
    corrected: float
    tier: str = "estimated"


def risk_optimal_fit(
    weights: npt.ArrayLike | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    simplex: bool = False,
    hull: bool = False,
    layers: int = 1,
    start: npt.ArrayLike | None = None,
) -> Fit:
    """The choice of coefficients that ``risk_optimal`` makes, as a function of the fields."""
    return lambda fields: (
        minimise_risk(fields, weights, bounds=bounds, simplex=simplex, hull=hull, layers=layers, start=start).alpha
    )


def minimiser_interval(
    fields: Sequence[Field],
    fit: Fit | None = None,
    weights: npt.ArrayLike | None = None,
    *,
    sources: Sequence[npt.ArrayLike] | None = None,
    level: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> MinimiserInterval:
    """Choose the coefficients again on every resample of the images.

    Args:
        fields: one per task.
        fit: fields to coefficients (K,); default :func:`risk_optimal_fit` over the box [0, 1].  Anything that chooses
            on the images belongs inside: the search over lambda, the choice between methods.
        weights: p_j of the risk that is reported, default 1/N.
        sources, level, resamples, seed: see :func:`risk_interval`.

    Percentile intervals: coefficients at a bound often stay there, and their intervals are then one-sided and not to be
    trusted to the level.

    >>> from theory import secant
    >>> rng = np.random.default_rng(0)
    >>> task = secant(np.zeros((40, 2)), rng.normal(size=(2, 40, 2)), rng.integers(0, 2, 40))
    >>> minimiser_interval([task], resamples=20).alpha.low.shape
    (2,)
    """
    p = task_weights(weights, len(fields))
    check_level(level)
    choose = risk_optimal_fit(p) if fit is None else fit
    images = Images.of([len(field.labels) for field in fields], sources)
    counts = images.draw(resamples, np.random.default_rng(seed))
    alpha = np.asarray(choose(fields), dtype=np.float64)
    risk = float(_risk(fields, alpha, p))
    chosen, optimism = np.zeros((resamples, *alpha.shape)), np.zeros(resamples)
    for b in range(resamples):
        sample = [take(field, expanded(c[b])) for field, c in zip(fields, counts, strict=True)]
        chosen[b] = choose(sample)
        optimism[b] = _risk(fields, chosen[b], p) - _risk(sample, chosen[b], p)
    low, high = np.quantile(chosen, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    interval = Interval(alpha, low, high, chosen.std(axis=0, ddof=1), level, chosen, seed)
    mean = float(optimism.mean())
    return MinimiserInterval(interval, risk, mean, risk + mean)


@dataclass(frozen=True)
class CrossFitted:
    """Predicted risk of coefficients that were chosen on other images.

    Attributes:
        risk: interval of the cross-fitted joint risk: each image is priced at coefficients chosen without it.
        in_sample: predicted risk at the coefficients chosen on all images, on the same images.
        optimism: ``risk.estimate - in_sample``.
        alpha: coefficients chosen on all images, (K,).
        fold_alphas: coefficients of each fold's complement, (repeats * folds, K): their spread is instability.
    """

    risk: Interval
    in_sample: float
    optimism: float
    alpha: Array
    fold_alphas: Array
    tier: str = "estimated"


def cross_fitted_risk(
    fields: Sequence[Field],
    fit: Fit | None = None,
    weights: npt.ArrayLike | None = None,
    *,
    folds: int = 5,
    repeats: int = 1,
    sources: Sequence[npt.ArrayLike] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> CrossFitted:
    """Choose on all folds but one, price on that one.

    It estimates the risk of the *procedure* at ``(1 - 1/folds)`` of the images: unbiased for that many, slightly too
    large for all of them.  The interval takes the fold's coefficients as given.

    Args:
        fields, fit, weights, sources: see :func:`minimiser_interval`.
        folds: split of the images; shared images stay together.
        repeats: random splits to average over.
        level, resamples, seed: of the interval of the cross-fitted risk.

    >>> from theory import secant
    >>> rng = np.random.default_rng(0)
    >>> task = secant(np.zeros((40, 2)), rng.normal(size=(2, 40, 2)), rng.integers(0, 2, 40))
    >>> found = cross_fitted_risk([task], resamples=50)
    >>> bool(found.optimism == found.risk.estimate - found.in_sample)
    True
    """
    p = task_weights(weights, len(fields))
    check_level(level)
    if repeats < 1:
        raise MergeboundError(f"repeats = {repeats}: at least one split")
    choose = risk_optimal_fit(p) if fit is None else fit
    images, rng = Images.of([len(field.labels) for field in fields], sources), np.random.default_rng(seed)
    alpha = np.asarray(choose(fields), dtype=np.float64)
    losses = [np.zeros(len(field.labels)) for field in fields]
    alphas = []
    for _ in range(repeats):
        assigned = images.folds(folds, rng)
        for k in range(folds):
            kept = [take(field, np.flatnonzero(f != k)) for field, f in zip(fields, assigned, strict=True)]
            chosen = np.asarray(choose(kept), dtype=np.float64)
            alphas.append(chosen)
            for loss, field, f in zip(losses, fields, assigned, strict=True):
                held = np.flatnonzero(f == k)
                part = take(field, held)
                loss[held] += cross_entropy(part.at(chosen), part.labels) / repeats
    interval = risk_interval(losses, p, sources=sources, level=level, resamples=resamples, seed=seed)
    in_sample = float(_risk(fields, alpha, p))
    return CrossFitted(interval, in_sample, float(interval.estimate) - in_sample, alpha, np.stack(alphas))


def asymptotic_optimism(
    fields: Sequence[Field],
    alpha: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    free: npt.ArrayLike | None = None,
    sources: Sequence[npt.ArrayLike] | None = None,
) -> tuple[float, Array]:
    """Optimism and covariance of an interior minimiser by linearisation, without resampling.

    With H the Hessian of the predicted risk, and J the covariance of its gradient over the images (of all tasks they
    occur in), ``cov(alpha) ~ H^-1 J H^-1`` (Huber's sandwich) and ``E R(alpha^) - E R^(alpha^) ~ tr(H^-1 J)``
    (Takeuchi 1976).

    Args:
        fields: affine in alpha, one per task.
        alpha: the minimiser, (K,).
        weights: p_j.
        free: (K,) booleans: coefficients that are not at a bound; default all.  The others count as fixed.
        sources: names of the images.

    Returns:
        Optimism in nats, and covariance (K, K), zero for fixed coefficients.

    Raises:
        MergeboundError: a field that is quadratic in alpha, or a Hessian that is singular in the free directions.
    """
    p, a = task_weights(weights, len(fields)), np.asarray(alpha, dtype=np.float64)
    keep = np.ones(len(a), dtype=bool) if free is None else np.asarray(free, dtype=bool)
    if keep.shape != a.shape:
        raise MergeboundError(f"free has shape {keep.shape}, expected {a.shape}: one yes or no per coefficient")
    covariance = np.zeros((len(a), len(a)))
    if not keep.any():
        return 0.0, covariance
    images = Images.of([len(field.labels) for field in fields], sources)
    hessian, scores = np.zeros_like(covariance), np.zeros((len(images.strata), len(a)))
    for field, w, c in zip(fields, p, images.clusters, strict=True):
        if isinstance(field, QuadraticField):
            raise MergeboundError("asymptotic_optimism needs fields that are affine in alpha: use the bootstrap")
        q = np.exp(log_softmax(field.at(a)))
        mean = (q * field.slopes).sum(axis=-1)  # (K, n)
        picked = field.slopes[:, np.arange(len(field.labels)), field.labels]
        hessian += w / len(q) * (np.einsum("inc,nc,knc->ik", field.slopes, q, field.slopes) - mean @ mean.T)
        gradient = (mean - picked).T
        np.add.at(scores, c, w / len(q) * (gradient - gradient.mean(axis=0)))
    H, J = hessian[np.ix_(keep, keep)], (scores.T @ scores)[np.ix_(keep, keep)]
    if not np.linalg.cond(H) <= 1e12:
        raise MergeboundError("the predicted risk is flat in some direction: fix coefficients (free), or bound them")
    solved = np.linalg.solve(H, J)
    covariance[np.ix_(keep, keep)] = np.linalg.solve(H, solved.T)
    return float(np.trace(solved)), covariance


def _risk(fields: Sequence[Field], alpha: Array, weights: Array) -> Array:
    parts = [cross_entropy(field.at(alpha), field.labels).mean(axis=-1) for field in fields]
    return np.asarray(np.stack(parts, axis=-1) @ weights)
