"""Function-space prediction of merged risk for every coefficient vector (theory.md section 8; tier *estimated*).

The logits of a merge are replaced by a field that is affine in the merging coefficients; the loss stays the true
cross-entropy:

    R~(alpha) = sum_j p_j E ell( c_j(z) + sum_i alpha_i s_ji(z), y ).

* *secant*: ``c_j = h_j(x_0)``, ``s_ji = h_j(x_i) - h_j(x_0)``: forward passes only;
* *tangent* at an anchor a: ``c_j = h_j(a) + J_j(a)(x_0 - a)``, ``s_ji = J_j(a) Delta_i``; exact for linearised models.

R~ is convex in alpha, so :func:`minimise_risk` finds its global minimum and proves it by a Frank-Wolfe gap.  Under
restriction to one line through the base the true loss is convex in the logits but the logits are not affine in alpha:
where merging hurts, the secant was found below and the tangent at the base above the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from theory.constrained import coefficient_domain
from theory.convex import minimise_over
from theory.errors import MergeboundError

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LogitField:
    """Logits of one task that are affine in the merging coefficients.

    Attributes:
        constant: logits at alpha = 0, shape (n, C) for n images and C classes.
        slopes: change per unit of each coefficient, shape (N, n, C).
        labels: true classes, shape (n,).
        kind: ``"secant"``, ``"tangent"``, or what was combined.
    """

    constant: Array
    slopes: Array
    labels: Labels
    kind: str

    def __post_init__(self) -> None:
        for name in ("constant", "slopes"):
            object.__setattr__(self, name, _logits(name, getattr(self, name)))
        object.__setattr__(self, "labels", _classes(self.labels))
        if self.constant.ndim != 2 or not self.constant.size:
            raise MergeboundError(f"constant has shape {self.constant.shape}, expected (images, classes)")
        n, classes = self.constant.shape
        if self.slopes.ndim != 3 or self.slopes.shape[1:] != (n, classes):
            raise MergeboundError(
                f"slopes of a logit field have shape {self.slopes.shape}, expected (experts, {n}, {classes}); "
                "collect them on the same images as the constant"
            )
        if self.labels.shape != (n,):
            raise MergeboundError(f"labels have shape {self.labels.shape}, expected ({n},): one class per image")
        if not 0 <= self.labels.min() <= self.labels.max() < classes:
            raise MergeboundError(f"labels must lie in 0..{classes - 1}, one of the {classes} classes of the logits")

    def at(self, alpha: npt.ArrayLike) -> Array:
        """Logits at the coefficients ``alpha`` of shape (..., N): shape (..., n, C)."""
        a = _coefficients(alpha, len(self.slopes))
        return np.asarray(self.constant + np.tensordot(a, self.slopes, axes=1))

    def slopes_at(self, alpha: Array) -> Array:
        """Derivative of the logits by each coefficient, (N, n, C); the same everywhere."""
        return self.slopes


def _logits(name: str, values: npt.ArrayLike) -> Array:
    """Finite numbers, or a typed error: one logit that is not a number would spoil every prediction."""
    try:
        array = np.asarray(values)
        array = array if array.dtype.kind == "f" else array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise MergeboundError(f"{name} of a logit field are not an array of numbers: give logits") from error
    if not np.isfinite(array).all():
        raise MergeboundError(
            f"{name} of a logit field hold a value that is not finite: leave out experts that diverged"
        )
    return array


def _classes(labels: npt.ArrayLike) -> Labels:
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise MergeboundError(f"labels of a logit field are {array.dtype}, expected whole numbers: the true classes")
    return array


def _coefficients(alpha: npt.ArrayLike, count: int) -> Array:
    try:
        a = np.asarray(alpha, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MergeboundError("alpha is not an array of numbers: give one coefficient per expert") from error
    if a.shape[-1:] != (count,):
        raise MergeboundError(f"alpha has shape {a.shape}, expected {count} coefficients, one per expert")
    if not np.isfinite(a).all():
        raise MergeboundError("alpha holds values that are not finite: give one number per coefficient")
    return a


def _task_weights(weights: npt.ArrayLike | None, count: int) -> Array:
    if not count:
        raise MergeboundError("fields is empty: give the logits of at least one task")
    if weights is None:
        return uniform_weights(count)
    p = np.asarray(weights, dtype=np.float64)
    if p.shape != (count,) or not (np.isfinite(p) & (p >= 0.0)).all():
        raise MergeboundError(f"weights has shape {p.shape}: give {count} nonnegative numbers, one per task")
    return p


def secant(base_logits: Array, expert_logits: Array, labels: Labels) -> LogitField:
    """Chords from the base to each expert.

    Args:
        base_logits: h_j(x_0), (n, C), through task j's head.
        expert_logits: h_j(x_i) for every expert i, (N, n, C), through the same head.
        labels: (n,).

    Estimated tier (theory section 8, function-space prediction).  *Trap:* where merging hurts, an under-estimate.

    >>> field = secant(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 2.0]]]), np.array([0]))
    >>> field.at([0.5, 0.5]).tolist()  # averaging: the mean of the experts' logits
    [[1.0, 1.0]]
    """
    base_logits, expert_logits = _logits("base_logits", base_logits), _logits("expert_logits", expert_logits)
    if expert_logits.shape[1:] != base_logits.shape:
        raise MergeboundError(
            f"expert_logits have shape {expert_logits.shape}, expected (experts, *{base_logits.shape}); "
            "collect them on the same images as the base's"
        )
    return LogitField(base_logits, expert_logits - base_logits, labels, "secant")


def tangent(anchor_logits: Array, products: Array, labels: Labels, anchor: Array | None = None) -> LogitField:
    """First-order expansion at an anchor ``a = x_0 + sum_i anchor_i Delta_i``.

    Args:
        anchor_logits: h_j(a), (n, C).
        products: J_j(a) Delta_i, (N, n, C).
        labels: (n,).
        anchor: coefficients of the anchor, (N,); ``None`` for the base.

    Estimated tier, exact for linearised models (theory section 8).  *Trap:* where merging hurts, an over-estimate.

    >>> tangent(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 2.0]]]), np.array([0])).at([1.0, 0.5]).tolist()
    [[2.0, 1.0]]
    """
    anchor_logits, products = _logits("anchor_logits", anchor_logits), _logits("products", products)
    if products.ndim != 3 or products.shape[1:] != anchor_logits.shape:
        raise MergeboundError(
            f"products have shape {products.shape}, expected (experts, *{anchor_logits.shape}); collect them on the "
            "same images as the anchor's logits"
        )
    if anchor is not None:
        anchor = _coefficients(anchor, len(products))
    constant = anchor_logits if anchor is None else anchor_logits - np.tensordot(anchor, products, axes=1)
    return LogitField(constant, products, labels, "tangent")


@dataclass(frozen=True)
class QuadraticField:
    """Logits of one task that are quadratic in each merging coefficient, without cross terms.

    ``c + sum_i (alpha_i s_i + alpha_i^2 q_i)`` with ``constant`` c (n, C), ``slopes`` s and ``squares`` q (N, n, C);
    ``labels`` (n,).
    """

    constant: Array
    slopes: Array
    squares: Array
    labels: Labels
    kind: str

    def at(self, alpha: npt.ArrayLike) -> Array:
        """Logits at the coefficients ``alpha`` of shape (..., N): shape (..., n, C)."""
        a = _coefficients(alpha, len(self.slopes))
        linear = np.tensordot(a, self.slopes, axes=1)
        return np.asarray(self.constant + linear + np.tensordot(a**2, self.squares, axes=1))

    def slopes_at(self, alpha: Array) -> Array:
        """Derivative of the logits by each coefficient, (N, n, C)."""
        return np.asarray(self.slopes + 2.0 * alpha[:, None, None] * self.squares)


Field = LogitField | QuadraticField


class AnyField(Protocol):
    """What prices merges of one task: logits as a function of the coefficients, with their derivatives."""

    @property
    def labels(self) -> Labels:
        """True classes, (n,)."""

    @property
    def slopes(self) -> Array:
        """Derivatives of the logits by each coefficient at the base, (K, n, C)."""

    def at(self, alpha: npt.ArrayLike) -> Array:
        """Logits at the coefficients ``alpha`` of shape (..., K): shape (..., n, C)."""

    def slopes_at(self, alpha: Array) -> Array:
        """Derivatives at one coefficient vector (K,): (K, n, C)."""


def _same_images(first: LogitField, second: LogitField) -> None:
    """Refuse two fields of one task that were not collected for the same experts and on the same images."""
    if first.slopes.shape != second.slopes.shape or not np.array_equal(first.labels, second.labels):
        raise MergeboundError(
            f"the {first.kind} and the {second.kind} differ in shape or labels ({first.slopes.shape} and "
            f"{second.slopes.shape}): collect both for the same experts, on the same images in the same order"
        )


def second_order_field(at_secant: LogitField, at_tangent: LogitField) -> QuadraticField:
    """Tangent plus each expert's own quadratic term, so that it also passes through the expert: the curvature along
    Delta_i is read off from the secant's excess over the tangent.  Both fields must be anchored at the base.

    Exact for quadratic logits whose mixed second derivatives between task vectors vanish.
    """
    _same_images(at_secant, at_tangent)
    excess = at_secant.slopes - at_tangent.slopes
    return QuadraticField(at_tangent.constant, at_tangent.slopes, excess, at_tangent.labels, "second_order")


def second_order(at_secant: LogitField, at_tangent: LogitField, alpha: npt.ArrayLike) -> Array:
    """Logits of :func:`second_order_field` at ``alpha``: ``t(alpha) + sum_i alpha_i^2 (s_i - t_i)``."""
    return second_order_field(at_secant, at_tangent).at(alpha)


def combine(first: LogitField, second: LogitField, weight: float = 0.5) -> LogitField:
    """The field ``(1 - weight) first + weight second``, averaged in the logits: same experts, same images."""
    _same_images(first, second)
    return LogitField(
        (1 - weight) * first.constant + weight * second.constant,
        (1 - weight) * first.slopes + weight * second.slopes,
        first.labels,
        f"{first.kind}+{second.kind}",
    )


def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def cross_entropy(logits: Array, labels: Labels) -> Array:
    """Per-image loss ell = -log softmax(logits)_y.

    Args:
        logits: (..., n, C).
        labels: (n,).

    Returns:
        (..., n), in nats.
    """
    picked = np.take_along_axis(log_softmax(logits), np.broadcast_to(labels[:, None], (*logits.shape[:-1], 1)), axis=-1)
    return np.asarray(-picked[..., 0])


def joint_standard_error(
    losses: Sequence[Array], sources: Sequence[Labels] | None = None, weights: npt.ArrayLike | None = None
) -> float:
    """Standard error of the joint risk sum_j p_j mean(losses_j), by images.

    Args:
        losses: per-image losses of each task, (n_j,).
        sources: names of the images (integers), (n_j,) per task; an image that occurs in several tasks counts as one
            draw.  ``None``: all images are different.
        weights: p_j, default 1/N.

    Returns:
        The standard error, in the unit of the losses; NaN where a task that counts has fewer than two images, whose
        spread nothing says.
    """
    p = uniform_weights(len(losses)) if weights is None else np.asarray(weights, dtype=np.float64)
    if any(len(v) < 2 for w, v in zip(p, losses, strict=True) if w != 0.0):
        return float("nan")
    influence = np.concatenate([w * (v - v.mean()) / len(v) for w, v in zip(p, losses, strict=True)])
    if sources is None:
        clusters = np.arange(len(influence))
    else:
        clusters = np.unique(np.concatenate([np.asarray(s) for s in sources]), return_inverse=True)[1]
    sums = np.bincount(clusters, weights=influence)
    return float(np.sqrt((sums**2).sum() * len(sums) / max(len(sums) - 1, 1)))


@dataclass(frozen=True)
class Prediction:
    """A predicted joint risk with its parts.

    Attributes:
        risk: predicted joint risk, in nats; shape of the leading axes of alpha.
        per_task: predicted risk of each task, (..., tasks).
        standard_error: of ``risk``, from the calibration images (tasks taken as independent); NaN where a task has one.
        tier: always ``"estimated"``.
    """

    risk: Array
    per_task: Array
    standard_error: Array
    tier: str = "estimated"


def uniform_weights(count: int) -> Array:
    """Weights p_j = 1/N of the joint risk."""
    return np.full(count, 1.0 / count)


def predict_from_logits(
    logits: Sequence[Array], labels: Sequence[Labels], weights: npt.ArrayLike | None = None
) -> Prediction:
    """Joint risk sum_j p_j E ell of given logits, one array (..., n_j, C) per task."""
    p = _task_weights(weights, len(logits))
    losses = [cross_entropy(h, y) for h, y in zip(logits, labels, strict=True)]
    means = np.stack([loss.mean(axis=-1) for loss in losses], axis=-1)
    variances = np.stack([_variance_of_mean(loss) for loss in losses], axis=-1)
    return Prediction(means @ p, means, np.sqrt(variances @ p**2))


def _variance_of_mean(losses: Array) -> Array:
    """Estimated variance of the mean over the last axis (n,); NaN for one image."""
    count = losses.shape[-1]
    return np.asarray(losses.var(axis=-1) / (count - 1) if count > 1 else np.full(losses.shape[:-1], np.nan))


def predict_risk(fields: Sequence[AnyField], alpha: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Prediction:
    """R~ at the coefficients ``alpha``, shape (N,) or (many, N): the risk of every merge, none of which is formed.

    Args:
        fields: one per task j, all over the same N experts.
        alpha: merging coefficients.
        weights: p_j, default 1/N.

    Raises:
        MergeboundError: no task, coefficients or weights that do not fit or are not finite.

    >>> field = secant(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 2.0]]]), np.array([0]))
    >>> predict_risk([field], [[0.5, 0.5], [1.0, 0.0]]).risk.round(3).tolist()
    [0.693, 0.127]
    """
    return predict_from_logits([field.at(alpha) for field in fields], [field.labels for field in fields], weights)


def risk_gradient(fields: Sequence[AnyField], alpha: Array, weights: Array) -> tuple[float, Array]:
    """Value and gradient of R~ at one coefficient vector (N,)."""
    value, gradient = 0.0, np.zeros(len(alpha))
    for field, p in zip(fields, weights, strict=True):
        log_p = log_softmax(field.at(alpha))
        n = len(field.labels)
        rows = np.arange(n)
        value -= float(p) * float(log_p[rows, field.labels].mean())
        residual = np.exp(log_p)
        residual[rows, field.labels] -= 1.0
        gradient += float(p) / n * np.tensordot(field.slopes_at(alpha), residual, axes=([1, 2], [0, 1]))
    return value, gradient


@dataclass(frozen=True)
class Optimum:
    """The coefficients that minimise a prediction, and the proof.

    Attributes:
        alpha: (N,).
        risk: R~(alpha).
        gap: Frank-Wolfe gap.  For fields affine in alpha R~ is convex and exceeds its minimum by at most this; for a
            :class:`QuadraticField` it only measures how far alpha is from stationary.
        iterations: evaluations by the solver.
    """

    alpha: Array
    risk: float
    gap: float
    iterations: int
    tier: str = "estimated"


def minimise_risk(
    fields: Sequence[AnyField],
    weights: npt.ArrayLike | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    simplex: bool = False,
    hull: bool = False,
    layers: int = 1,
    start: npt.ArrayLike | None = None,
    tolerance: float = 1e-7,
    max_iterations: int = 500,
) -> Optimum:
    """The merging method ``risk_optimal``: minimise the convex R~ over a box, the simplex or the hull.

    Args:
        fields: one per task, over K = N * ``layers`` coefficients.
        weights: p_j, default 1/N.
        bounds: lower and upper bound of every coefficient (box).
        simplex: coefficients nonnegative with sum one instead of the box (with layers: sum one in each layer).
        hull: coefficients nonnegative with sum at most one instead of the box: the convex hull of the base and the
            experts, in which running variances of BatchNorm stay positive (outside they may not, and no prediction
            here sees what a merge with clamped variances does).
        layers: coefficients per expert; coefficient ``i * layers + l`` is expert i's in layer l.
        start: where the solver starts, (K,); default 1/N everywhere.
        tolerance: relative tolerance of the solver.
        max_iterations: limit of the solver's iterations.

    Raises:
        MergeboundError: empty or inverted bounds, or a number of coefficients that does not fit the layers.

    >>> task = secant(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 2.0]]]), np.array([0]))
    >>> best = minimise_risk([task], bounds=(0.0, 1.0))
    >>> best.alpha.round(3).tolist(), best.gap < 1e-6
    ([1.0, 0.0], True)
    """
    p = _task_weights(weights, len(fields))
    size = len(fields[0].slopes)
    domain = coefficient_domain(size, bounds, simplex=simplex, hull=hull, layers=layers)
    found = minimise_over(
        lambda alpha: risk_gradient(fields, alpha, p),
        domain,
        np.full(size, layers / size) if start is None else start,
        tolerance=tolerance,
        max_iterations=max_iterations,
        planes=0,
    )
    return Optimum(found.point, found.value, found.gap, found.iterations)
