"""Exact ground truth: linear regression with Gaussian inputs, where the Hessian is random (theory section 9).

A sample is ``z = (a, y)`` with ``a ~ N(0, Sigma)`` and ``y = a'w + noise``, ``noise ~ N(0, s^2)`` independent of a; the
loss is ``f(x; z) = (a'x - y)^2/2``, so ``F(x) = (x-w)' Sigma (x-w)/2 + s^2/2``.  Unlike the additive family the
gradient noise grows with the distance from w.  What closes:

* one pass of minibatch SGD over fresh samples, everything (:mod:`theory.one_pass`, Isserlis' theorem);
* ordinary least squares, by the moments of the inverse Wishart distribution (here); its stability within a factor
  ``n/(n-d-2)``;
* ridge and full-batch descent given the inputs (:mod:`theory.fixed_inputs`).  Over Gaussian inputs they do *not* close:
  ``E (A'A + n lambda I)^(-1)`` is no elementary function of Sigma, so only an average over drawn inputs is offered.

No per-sample smoothness exists (``||a||^2`` is unbounded), so the theorems with L do not certify anything here: this
family tests what needs no L (cap, floor, dispersion) and shows what the additive family cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import require_sgd, write_out
from theory.errors import RecipeError
from theory.quadratic import _form, _plain, _trace
from theory.recipe import Expert, _numbers
from theory.symbolic import FloatArray


@dataclass(frozen=True, eq=False)
class RegressionTask:
    """``Sigma`` (..., d, d) covariance of the inputs, ``w`` (..., d), ``noise`` (...): standard deviation of y given a.

    Units: with ``[y]^2`` the unit of the loss, w has ``[y]/[a]``.
    """

    Sigma: FloatArray
    w: FloatArray
    noise: FloatArray | float


@dataclass(frozen=True, eq=False)
class RegressionMoments:
    """One expert: ``mean`` E x (..., d), ``covariance`` (..., d, d), ``risk`` E F(x), ``drift``, ``epsilon`` (...)."""

    mean: FloatArray
    covariance: FloatArray
    risk: FloatArray | float
    drift: FloatArray | float
    epsilon: FloatArray | float


@dataclass(frozen=True, eq=False)
class RegressionMerge:
    """Joint ``risk`` E F(M), dispersion ``V`` and ``stability`` E_bar of a linear merge of independent experts."""

    risk: FloatArray
    V: FloatArray
    stability: FloatArray


def checked(task: RegressionTask) -> tuple[FloatArray, FloatArray, FloatArray]:
    """``Sigma``, ``w``, ``noise`` as arrays; what is malformed is refused by name (:class:`RecipeError`).

    >>> checked(RegressionTask(np.eye(2), np.zeros(2), 1.0))[0].shape
    (2, 2)
    """
    Sigma, w, noise = (_numbers("regression task", key, getattr(task, key)) for key in ("Sigma", "w", "noise"))
    if w.ndim < 1 or Sigma.ndim < 2 or Sigma.shape[-2:] != (w.shape[-1],) * 2:
        raise RecipeError(
            f"regression task: Sigma has shape {Sigma.shape} and w {w.shape}; give (..., d, d) and (..., d)"
        )
    for key, value in (("Sigma", Sigma), ("w", w), ("noise", noise)):
        if not np.all(np.isfinite(value)):
            raise RecipeError(f"regression task: {key} holds a number that is not finite; give finite numbers")
    scale = np.abs(Sigma).max()
    if not np.all(np.abs(Sigma - np.swapaxes(Sigma, -1, -2)) <= 1e-12 * scale) or np.linalg.eigvalsh(Sigma).min() < (
        -1e-12 * scale
    ):
        raise RecipeError("regression task: Sigma is no covariance; give a symmetric positive semidefinite matrix")
    if np.any(noise < 0):
        raise RecipeError("regression task: noise is negative; give a standard deviation of at least 0")
    return Sigma, w, noise


def regression_merge(
    tasks: Sequence[RegressionTask],
    base: ArrayLike,
    moments: Sequence[RegressionMoments],
    coefficients: ArrayLike,
    weights: ArrayLike,
) -> RegressionMerge:
    """Exact joint risk, dispersion and stability of ``x_0 + sum alpha_i (x_i - x_0)``, experts independent.

    ``coefficients`` and ``weights`` have shape ``(N, ...)``; ``base`` x_0 (..., d).  Covariances need not commute.

    >>> task = RegressionTask(np.eye(1), np.zeros(1), 1.0)
    >>> one = RegressionMoments(np.zeros(1), np.eye(1), 1.0, 1.0, 0.2)
    >>> float(regression_merge([task] * 2, [0.0], [one] * 2, [0.5, 0.5], [0.5, 0.5]).risk)  # half the variance
    0.75
    """
    x0 = np.asarray(base, dtype=np.float64)
    alpha, p = np.asarray(coefficients, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    pairs = list(zip(alpha, moments, strict=True))
    with np.errstate(all="ignore"):
        mean = x0 + sum((a[..., None] * (m.mean - x0) for a, m in pairs), np.zeros(()))
        covariance = sum((a[..., None, None] ** 2 * m.covariance for a, m in pairs), np.zeros(()))
        risk = V = stability = np.zeros(())
        for weight, a, task, moment in zip(p, alpha, tasks, moments, strict=True):
            Sigma, w, noise = checked(task)
            apart = mean - moment.mean
            spread = _trace(covariance) + (1 - 2 * a) * _trace(moment.covariance)
            risk = risk + weight * 0.5 * (_form(Sigma, mean - w) + _trace(Sigma @ covariance) + noise**2)
            V = V + weight * (np.sum(apart * apart, axis=-1) + spread)
            stability = stability + weight * (a * np.asarray(moment.epsilon)) ** 2
    plain = (_plain(np.where(np.isnan(value), np.inf, value)) for value in (risk, V, stability))
    return RegressionMerge(*plain)


@dataclass(frozen=True, eq=False)
class LeastSquaresMerge:
    """Merged least-squares fits: joint ``risk`` E F(M), ``training_risk`` E F_S(M), ``gap``, dispersion ``V``."""

    risk: FloatArray
    training_risk: FloatArray
    gap: FloatArray
    V: FloatArray


def least_squares_merge(
    tasks: Sequence[RegressionTask],
    base: ArrayLike,
    samples: Sequence[ArrayLike],
    coefficients: ArrayLike,
    weights: ArrayLike,
) -> LeastSquaresMerge:
    """Exact expectations for ``x_0 + sum alpha_i (x_i - x_0)``, x_i the least-squares fit to ``n_i > d + 1`` samples.

    *Statement:* ``E x_i = w_i``, ``Cov x_i = s_i^2 Sigma_i^(-1)/(n_i-d-1)``, and the gap is ``sum_i p_i s_i^2 (d/2)
    [2 alpha_i/n_i + alpha_i^2 (1/(n_i-d-1) - 1/n_i)]``.  *Proof:* with ``M - w_i = alpha_i (x_i - w_i) + c``, c
    independent of S_i, the residuals are ``alpha_i P xi + A c - xi`` with the hat matrix P of trace d; the cross terms
    with c vanish given A.  Unlike the additive family, where the gap is linear in alpha_i, it has a quadratic part: the
    Hessian of the sample is random.  The gap is a difference of expectations and holds for any x_0.

    ``samples`` n_i, each (...).  Raises :class:`RecipeError` for ``n_i <= d + 1``, where the covariance is infinite.

    >>> task = RegressionTask(np.eye(2), np.zeros(2), 1.0)
    >>> fit = least_squares_merge([task], [0.0, 0.0], [13], [1.0], [1.0])
    >>> float(fit.risk), round(float(fit.training_risk), 9)  # (1 + 2/10)/2 and (1 - 2/13)/2
    (0.6, 0.423076923)
    """
    dim = np.asarray(base).shape[-1]
    moments, gap = [], np.zeros(())
    alpha, p = np.asarray(coefficients, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    for index, (task, count) in enumerate(zip(tasks, samples, strict=True)):
        Sigma, w, noise = checked(task)
        n = _enough(count, dim, index)
        covariance = (noise**2 / (n - dim - 1))[..., None, None] * _inverse(Sigma)
        moments.append(RegressionMoments(w, covariance, 0.0, 0.0, 0.0))
        a = alpha[index]
        bracket = 2 * a / n + a**2 * (1 / (n - dim - 1) - 1 / n)
        gap = gap + p[index] * noise**2 * dim / 2 * bracket
    merged = regression_merge(tasks, base, moments, alpha, p)
    return LeastSquaresMerge(risk=merged.risk, training_risk=_plain(merged.risk - gap), gap=_plain(gap), V=merged.V)


def _enough(count: ArrayLike, dim: int, index: int) -> FloatArray:
    n = _numbers("least squares", "n", count)
    if not np.all((n > dim + 1) & (n == np.floor(n))):
        raise RecipeError(
            f"least squares: n is {float(n.min()):g} for task {index}; the covariance is infinite unless n is a whole "
            f"number above d + 1 = {dim + 1}"
        )
    return n


def _inverse(Sigma: FloatArray) -> FloatArray:
    try:
        inverse = np.linalg.inv(Sigma)
    except np.linalg.LinAlgError:
        inverse = np.full(Sigma.shape, np.inf)
    if not np.all(np.isfinite(inverse)):
        raise RecipeError(
            "least squares: Sigma is singular, so the fit is not unique; drop the inputs that are redundant"
        )
    return np.asarray(inverse)


@dataclass(frozen=True, eq=False)
class LeastSquaresStability:
    """``floor <= epsilon^2 <= ceiling = 2 removal`` (param^2): exchanging, and ``removal`` leaving out, one sample."""

    floor: FloatArray
    removal: FloatArray
    ceiling: FloatArray


def least_squares_stability(task: RegressionTask, n: ArrayLike) -> LeastSquaresStability:
    """Stability of least squares on n Gaussian samples: leaving one out exactly, exchanging one within n/(n-d-2).

    *Statement:* ``E ||x - x_(-j)||^2 = s^2 tr Sigma^(-1)/((n-d-1)(n-d-2))`` (``removal``), and ``2 s^2 tr Sigma^(-1)/(n
    (n-d-1)) <= epsilon^2 <= 2 removal``.  *Proof:* with ``G = A_(-j)'A_(-j)`` and ``h = a'G^(-1)a``, ``x - x_(-j) =
    G^(-1)a (xi - a'(x_(-j)-w))/(1+h)``; the residual has variance ``s^2 (1+h)`` given the inputs, which leaves ``s^2
    a'G^(-2)a/(1+h) = s^2 (tr G^(-1) - tr (A'A)^(-1))`` (Sherman-Morrison), two inverse Wishart means.  The twins'
    differences to ``x_(-j)`` are conditionally iid, so their covariance is a squared norm: ``epsilon^2 <= 2 removal``.
    The floor is Efron-Stein's.  The exchange itself does not close for d > 1 (``E aa'/(1 + a'G^(-1)a)``).

    ``n`` (...); ``removal`` and ``ceiling`` are ``inf`` for n = d + 2.  Raises :class:`RecipeError` for n <= d + 1.

    >>> found = least_squares_stability(RegressionTask(np.eye(1), np.zeros(1), 1.0), 12)
    >>> round(float(found.removal), 9), round(float(found.ceiling / found.floor), 9)  # 1/(10 * 9), 12/9
    (0.011111111, 1.333333333)
    """
    Sigma, w, noise = checked(task)
    dim = w.shape[-1]
    size = _enough(n, dim, 0)
    spread = noise**2 * _trace(_inverse(Sigma)) / (size - dim - 1)
    last = size - dim - 2
    removal = np.where(last > 0, spread / np.maximum(last, 1.0), np.where(spread > 0, np.inf, 0.0))
    return LeastSquaresStability(_plain(2 * spread / size), _plain(removal), _plain(2 * removal))


def draw_regression(
    task: RegressionTask, n: int, replicates: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Gaussian inputs ``(replicates, n, d)`` and targets ``(replicates, n)`` of one task.

    >>> draw_regression(RegressionTask(np.eye(2), np.ones(2), 1.0), 5, 3, np.random.default_rng(0))[1].shape
    (3, 5)
    """
    Sigma, w, noise = checked(task)
    values, vectors = np.linalg.eigh(Sigma)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    inputs = rng.standard_normal((replicates, n, len(w))) @ root.T
    return inputs, np.asarray(inputs @ w + noise * rng.standard_normal((replicates, n)))


def simulate_regression(
    base: ArrayLike, expert: Expert, inputs: FloatArray, targets: FloatArray, batches: Sequence[np.ndarray]
) -> FloatArray:
    """Real minibatch SGD (heavy ball, Nesterov, decay) on regression data; returns x_K, ``(replicates, d)``.

    ``inputs`` ``(replicates, n, d)`` and ``targets`` ``(replicates, n)`` as from :func:`draw_regression`, ``batches``
    as from :func:`theory.quadratic.draw_batches`.  Raises :class:`AssumptionError` for optimizers other than SGD.
    """
    require_sgd(expert)
    steps = write_out(expert)
    x = np.broadcast_to(np.asarray(base, dtype=np.float64), (inputs.shape[0], inputs.shape[2])).copy()
    buffer, rows = np.zeros_like(x), np.arange(inputs.shape[0])[:, None]
    momentum, decay = float(expert.momentum), float(expert.weight_decay)
    for eta, batch in zip(steps.learning_rate, batches, strict=True):
        a, y = inputs[rows, batch], targets[rows, batch]
        residual = np.einsum("rbd,rd->rb", a, x) - y
        pull = np.einsum("rb,rbd->rd", residual, a) / batch.shape[1] + (0.0 if expert.decoupled_decay else decay * x)
        buffer = momentum * buffer + pull
        kept = x * (1 - eta * decay) if expert.decoupled_decay else x
        x = kept - eta * (pull + momentum * buffer if expert.nesterov else buffer)
    return x
