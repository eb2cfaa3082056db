"""How sure a prediction is: resampling the calibration images, and the optimism of coefficients chosen on them.

The images are the only random thing here: experts, merges and statistics are held fixed, so the intervals speak about
other images of the same tasks, not about training again.  Images are drawn with replacement within *strata*: all images
that occur in the same tasks the same number of times (strata of fewer than 20 images are pooled: a stratum of m images
shows only (m - 1)/m of its variance).  Tasks with images of their own are therefore resampled one by
one with their sizes kept; an image that several tasks share (one data set under several transformations) is drawn for
all of them at once.

*Traps.* (1) Treating shared images as independent makes the joint risk's interval wrong, usually too short.  (2) Two
merges priced on the same images must be compared by the interval of their difference
(:func:`difference_interval`), not by whether their intervals overlap.  (3) The predicted risk *at its own minimiser* is
biased downwards on the images that chose it: report :func:`cross_fitted_risk`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from theory.errors import MergeboundError
from theory.function_space import (
    Array,
    Field,
    Labels,
    QuadraticField,
    cross_entropy,
    log_softmax,
    minimise_risk,
    uniform_weights,
)

Method = Literal["bca", "percentile"]
Fit = Callable[[Sequence[Field]], Array]

_SMALL = 20


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


@dataclass(frozen=True)
class Images:
    """Which images each task was measured on.

    Attributes:
        clusters: per task, the number 0..M-1 of every image, (n_j,); the same number is the same image.
        strata: stratum of every image, (M,).
    """

    clusters: tuple[npt.NDArray[np.int64], ...]
    strata: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sizes: Sequence[int], sources: Sequence[npt.ArrayLike] | None = None) -> Images:
        """From the number of images of each task, and their names (integers) where tasks share images."""
        if not sizes or min(sizes) < 1:
            raise MergeboundError(f"sizes = {list(sizes)}: every task needs at least one image")
        if sources is None:
            ends = np.cumsum([0, *sizes])
            clusters = tuple(np.arange(a, b) for a, b in pairwise(ends))
        else:
            names = [np.asarray(source) for source in sources]
            if [name.shape for name in names] != [(size,) for size in sizes]:
                raise MergeboundError("sources must name every image of every task: give one integer per image")
            inverse = np.unique(np.concatenate(names), return_inverse=True)[1].astype(np.int64)
            clusters = tuple(np.split(inverse, np.cumsum(sizes)[:-1]))
        total = 1 + max(int(c.max()) for c in clusters)
        table = np.stack([np.bincount(c, minlength=total) for c in clusters], axis=1)
        strata = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
        if sources is not None:
            small = np.bincount(strata)[strata] < _SMALL
            strata = np.unique(np.where(small, -1, strata), return_inverse=True)[1].astype(np.int64)
        return cls(clusters, strata)

    def draw(self, resamples: int, rng: np.random.Generator) -> list[Array]:
        """How often every image of every task is drawn: one array (resamples, n_j) per task.

        Rows sum to n_j, up to the draws of pooled strata; a draw that would leave a task empty is the sample itself.
        """
        if resamples < 2:
            raise MergeboundError(f"resamples = {resamples}: at least two, and hundreds for an interval")
        counts = np.zeros((resamples, len(self.strata)))
        for stratum in range(int(self.strata.max()) + 1):
            members = np.flatnonzero(self.strata == stratum)
            counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1.0 / len(members)), resamples)
        for c in self.clusters:
            counts[counts[:, c].sum(axis=1) == 0.0] = 1.0
        return [counts[:, c] for c in self.clusters]

    def folds(self, count: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """Fold 0..count-1 of every image of every task: strata split evenly, an image in one fold for all tasks."""
        smallest = min(len(np.unique(c)) for c in self.clusters)
        if not 2 <= count <= smallest:
            raise MergeboundError(f"folds = {count}, expected 2..{smallest}: every task needs an image in every fold")
        fold = np.zeros(len(self.strata), dtype=np.int64)
        start = 0
        for stratum in range(int(self.strata.max()) + 1):
            members = rng.permutation(np.flatnonzero(self.strata == stratum))
            fold[members] = (start + np.arange(len(members))) % count
            start += len(members)
        found = [fold[c] for c in self.clusters]
        if any(len(np.unique(f)) < count for f in found):
            raise MergeboundError(f"folds = {count} leave a task without images in a fold: use fewer folds")
        return found


# --- risks and their differences ----------------------------------------------------------------------------------


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
    p = _weights(weights, len(losses))
    values = [np.asarray(one, dtype=np.float64) for one in losses]
    lead = values[0].shape[:-1]
    for j, one in enumerate(values):
        if one.ndim < 1 or one.shape[:-1] != lead:
            raise MergeboundError(f"losses of task {j} have shape {one.shape}, expected (*{lead}, images)")
        if not np.isfinite(one).all():
            raise MergeboundError(f"losses of task {j} hold values that are not finite: check its logits")
    _check_level(level)
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


# --- coefficients chosen on the images ----------------------------------------------------------------------------


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
    p = _weights(weights, len(fields))
    _check_level(level)
    choose = risk_optimal_fit(p) if fit is None else fit
    images = Images.of([len(field.labels) for field in fields], sources)
    counts = images.draw(resamples, np.random.default_rng(seed))
    alpha = np.asarray(choose(fields), dtype=np.float64)
    risk = float(_risk(fields, alpha, p))
    chosen, optimism = np.zeros((resamples, *alpha.shape)), np.zeros(resamples)
    for b in range(resamples):
        sample = [take(field, _expanded(c[b])) for field, c in zip(fields, counts, strict=True)]
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
    p = _weights(weights, len(fields))
    _check_level(level)
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
    p, a = _weights(weights, len(fields)), np.asarray(alpha, dtype=np.float64)
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


def take(field: Field, images: npt.NDArray[np.int64]) -> Field:
    """The field on some of its images, repeated ones repeated."""
    if isinstance(field, QuadraticField):
        return QuadraticField(
            field.constant[images], field.slopes[:, images], field.squares[:, images], field.labels[images], field.kind
        )
    return type(field)(field.constant[images], field.slopes[:, images], field.labels[images], field.kind)


# --- parts --------------------------------------------------------------------------------------------------------


def _risk(fields: Sequence[Field], alpha: Array, weights: Array) -> Array:
    parts = [cross_entropy(field.at(alpha), field.labels).mean(axis=-1) for field in fields]
    return np.asarray(np.stack(parts, axis=-1) @ weights)


def _expanded(counts: Array) -> Labels:
    return np.repeat(np.arange(len(counts)), counts.astype(np.int64))


def _weights(weights: npt.ArrayLike | None, count: int) -> Array:
    if not count:
        raise MergeboundError("no task was given: at least one is needed")
    p = uniform_weights(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if p.shape != (count,) or not (np.isfinite(p) & (p >= 0.0)).all():
        raise MergeboundError(f"weights has shape {p.shape}: give {count} nonnegative numbers, one per task")
    return p


def _check_level(level: float) -> None:
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
