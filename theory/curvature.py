"""Coefficients that minimise a curvature model of the merged risk (theory.md section 8; tier *estimated*).

    R^(alpha) = sum_j p_j ( sqrt(F_j(x_j)) + sqrt( max_s q_js(alpha) / 2 ) )^2,
    q_js(alpha) = (alpha - e_j)^T Q_js (alpha - e_j),      Q_js[i, k] = Delta_i^T H_j(s) Delta_k,

with Gauss-Newton curvatures ``H_j(s)`` of task j's risk at anchors s (x_j, x_0, ...) and ``e_j`` the coefficients of
expert j itself.  Per-layer coefficients are the same with one coefficient per (expert, layer).  For positive
semidefinite Q the model is convex in alpha.  It is not a bound: the curvature at an end of a segment says little about
its middle where an expert is saturated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from theory.arguments import advised_fields
from theory.certificate import curvature_risk
from theory.constrained import coefficient_domain
from theory.convex import minimise_over
from theory.errors import MergeboundError
from theory.function_space import Array, Optimum, uniform_weights

_SMOOTHING = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_ROUNDING = 1e-6  # relative: forms are sums of products in single precision
_POWERS = (4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)


@advised_fields
@dataclass(frozen=True)
class CurvatureModel:
    """The quadratic model of one task.

    Attributes:
        own_risk: F_j(x_j), in nats.
        forms: Q_js, (anchors, K, K) for K coefficients, positive semidefinite (see :func:`positive_part`); checked.
        centre: e_j, (K,): the coefficients that give expert j.
    """

    own_risk: float
    forms: Array
    centre: Array

    def __post_init__(self) -> None:
        if self.forms.ndim != 3 or self.forms.shape[1:] != (len(self.centre), len(self.centre)) or not len(self.forms):
            raise MergeboundError(
                f"forms have shape {self.forms.shape}, expected (anchors, {len(self.centre)}, {len(self.centre)}): one "
                "matrix per anchor over the coefficients of the centre"
            )
        if not 0.0 <= self.own_risk < np.inf:
            raise MergeboundError(
                f"own_risk = {self.own_risk}: a cross-entropy is finite and at least zero; measure it again"
            )
        if not (np.isfinite(self.forms).all() and np.isfinite(self.centre).all()):
            raise MergeboundError("forms or centre hold values that are not finite: collect the products again")
        scale = np.abs(self.forms).max(axis=(1, 2), initial=0.0)
        if (np.abs(self.forms - self.forms.swapaxes(1, 2)).max(axis=(1, 2), initial=0.0) > _ROUNDING * scale).any():
            raise MergeboundError("forms are not symmetric: average each with its transpose (positive_part does)")
        if (np.linalg.eigvalsh(self.forms).min(axis=1) < -_ROUNDING * scale * len(self.centre)).any():
            raise MergeboundError(
                "forms are not positive semidefinite, so the prediction would not be convex and its minimum not "
                "proven: clip the eigenvalues of each (positive_part)"
            )

    def curvature(self, alpha: npt.ArrayLike) -> Array:
        """``max_s q_js`` at coefficients (..., K): (...)."""
        d = np.asarray(alpha, dtype=np.float64) - self.centre
        return np.asarray(np.einsum("...i,sik,...k->...s", d, self.forms, d).clip(min=0.0).max(axis=-1))


def positive_part(form: Array) -> Array:
    """The nearest positive semidefinite matrix: eigenvalues clipped at zero (of the matrix, never of a scalar)."""
    values, vectors = np.linalg.eigh(0.5 * (form + form.T))
    return np.asarray((vectors * values.clip(min=0.0)) @ vectors.T)


def predict_curvature(
    models: Sequence[CurvatureModel], alpha: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> Array:
    """R^ at coefficients (..., K): (...).

    Args:
        models: one per task, over the same K coefficients.
        alpha: (..., K).
        weights: p_j, default 1/N.

    Source: section 8 of the mathematics (curvature along the segment, square-root form).

    >>> import numpy as np
    >>> models = [CurvatureModel(0.1, np.eye(2)[None], np.eye(2)[j]) for j in range(2)]
    >>> [float(value) for value in predict_curvature(models, [[1.0, 0.0], [0.5, 0.5]]).round(4)]
    [0.9162, 0.6662]
    """
    if not len(models):
        raise MergeboundError("models is empty: give the curvature model of at least one task")
    p = uniform_weights(len(models)) if weights is None else np.asarray(weights, dtype=np.float64)
    curvature = np.stack([model.curvature(alpha) for model in models], axis=-1)
    return curvature_risk([model.own_risk for model in models], curvature, p)


def minimise_curvature(
    models: Sequence[CurvatureModel],
    weights: npt.ArrayLike | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    simplex: bool = False,
    hull: bool = False,
    layers: int = 1,
    tolerance: float = 1e-9,
    max_iterations: int = 500,
) -> Optimum:
    """The merging method ``curvature_optimal``: minimise the convex R^ over a box, the simplex or the hull.

    R^ has kinks (at ``alpha = e_j``, and where two anchors' curvatures cross).  Smooth convex lower bounds of it are
    minimised, ever closer ones; the last, with its own Frank-Wolfe gap, proves how far from the minimum alpha is.

    Args:
        models: one per task, over K = N * ``layers`` coefficients, expert by expert (``i * layers + l``).
        weights: p_j, default 1/N.
        bounds, simplex, hull: see :func:`theory.function_space.minimise_risk`; with layers, the coefficients of each
            layer are on a simplex, or in a hull.
        layers: coefficients per expert.
        tolerance, max_iterations: of the solver.

    Returns:
        ``gap`` bounds R^(alpha) minus its minimum.

    Raises:
        MergeboundError: models of different sizes, or bounds that are empty.

    >>> import numpy as np
    >>> models = [CurvatureModel(0.1, np.eye(2)[None], np.eye(2)[j]) for j in range(2)]
    >>> [float(value) for value in minimise_curvature(models).alpha.round(3)]
    [0.5, 0.5]
    """
    if not len(models):
        raise MergeboundError("models is empty: give the curvature model of at least one task")
    size = len(models[0].centre)
    if any(len(model.centre) != size for model in models):
        raise MergeboundError("the models have different numbers of coefficients: collect them for one group")
    p = uniform_weights(len(models)) if weights is None else np.asarray(weights, dtype=np.float64)
    domain = coefficient_domain(size, bounds, simplex=simplex, hull=hull, layers=layers)
    alpha = np.clip(np.full(size, layers / size), domain.lower, domain.upper)
    best, lowest, steps = alpha, -np.inf, 0
    value = float(predict_curvature(models, alpha, p))
    for smoothing, power in zip(_SMOOTHING, _POWERS, strict=True):
        smooth = [_Smooth.of(model, smoothing, power) for model in models]
        found = minimise_over(
            partial(_joint, smooth, p), domain, alpha, tolerance=tolerance, max_iterations=max_iterations, planes=0
        )
        alpha, steps = found.point, steps + found.iterations
        lowest = max(lowest, found.value - found.gap)
        reached = float(predict_curvature(models, alpha, p))
        if reached < value:
            best, value = alpha, reached
    return Optimum(best, value, max(value - lowest, 0.0), steps)


@dataclass(frozen=True)
class _Smooth:
    """``(a + T(alpha))^2`` of one task, T a smooth convex lower bound of ``sqrt(max_s q_s / 2)``.

    ``t_s = sqrt(q_s / 2 + e^2) - e <= sqrt(q_s / 2)`` and ``T = (mean_s t_s^power)^(1 / power) <= max_s t_s``.
    """

    root: float
    forms: Array
    centre: Array
    offset: float
    power: float

    @classmethod
    def of(cls, model: CurvatureModel, smoothing: float, power: float) -> _Smooth:
        scale = float(np.sqrt(0.5 * max(np.trace(form) for form in model.forms) / len(model.centre)))
        offset = smoothing * max(scale, np.sqrt(model.own_risk), 1e-12)
        return cls(float(np.sqrt(model.own_risk)), model.forms, model.centre, offset, power)

    def at(self, alpha: Array) -> tuple[float, Array]:
        d = alpha - self.centre
        slopes = self.forms @ d  # (s, K)
        hypotenuse = np.sqrt(0.5 * (slopes @ d).clip(min=0.0) + self.offset**2)
        t = hypotenuse - self.offset
        largest = t.max()
        if largest <= 0.0:
            return self.root**2, np.zeros_like(alpha)
        ratio = t / largest
        mean = float((ratio**self.power).mean())
        height = largest * mean ** (1.0 / self.power)
        outer = mean ** (1.0 / self.power - 1.0) * ratio ** (self.power - 1.0) / len(t)
        gradient = (outer / (2.0 * hypotenuse)) @ slopes
        return (self.root + height) ** 2, 2.0 * (self.root + height) * gradient


def _joint(parts: Sequence[_Smooth], weights: Array, alpha: Array) -> tuple[float, Array]:
    value, gradient = 0.0, np.zeros_like(alpha)
    for part, p in zip(parts, weights, strict=True):
        one, slope = part.at(alpha)
        value += float(p) * one
        gradient += float(p) * slope
    return value, gradient
