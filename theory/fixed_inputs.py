"""Linear regression given its inputs: ridge, least squares and full-batch descent in closed form (theory section 9).

All three are linear in the labels: with ``H = A'A/n`` and ``q = A'y/n``, ``x = C x_0 + T q``, C and T functions of H.
Hence every expectation over the label noise is exact for the inputs at hand; an average over drawn inputs (they
broadcast) estimates the expectation over them, with the inputs' own sampling error only.  That last expectation closes
for least squares (:func:`theory.least_squares_merge`), not for ridge or for many steps of full-batch descent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import require_sgd, write_out
from theory.errors import AssumptionError, RecipeError
from theory.quadratic import _form, _plain, _trace, mode_response
from theory.recipe import Expert, _numbers
from theory.regression import RegressionTask, checked
from theory.symbolic import FloatArray


@dataclass(frozen=True, eq=False)
class LinearFit:
    """``x = carry x_0 + gain A'y/n``: ``carry`` and ``gain`` (..., d, d), ``H = A'A/n`` (..., d, d), ``n`` samples."""

    carry: FloatArray
    gain: FloatArray
    H: FloatArray
    n: int


@dataclass(frozen=True, eq=False)
class GivenInputs:
    """Expectations over label noise (and fresh samples), shape ``(...)``: joint ``risk`` E F(M), ``training_risk`` E
    F_S(M), their ``gap``, dispersion ``V``, and per expert (N, ...) ``drift`` rms ``||x_i - x_0||`` and ``risks``."""

    risk: FloatArray
    training_risk: FloatArray
    gap: FloatArray
    V: FloatArray
    drift: FloatArray
    risks: FloatArray


def _spectrum(inputs: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray, int]:
    A = _numbers("linear fit", "inputs", inputs)
    if A.ndim < 2 or not np.all(np.isfinite(A)):
        raise RecipeError(f"linear fit: inputs has shape {A.shape} or is not finite; give finite numbers (..., n, d)")
    n = A.shape[-2]
    H = np.swapaxes(A, -1, -2) @ A / n
    values, vectors = np.linalg.eigh(H)
    return H, np.maximum(values, 0.0), vectors, n


def _function(vectors: FloatArray, values: FloatArray) -> FloatArray:
    return np.asarray((vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2))


def ridge_fit(inputs: ArrayLike, ridge: ArrayLike, *, anchored: bool = True) -> LinearFit:
    """The minimiser of ``|Ax - y|^2/(2n) + ridge/2 |x - x_0|^2`` (``anchored``, else ``ridge/2 |x|^2``).

    *Statement:* ``gain = (H + ridge)^(-1)`` and ``carry = ridge (H + ridge)^(-1)`` (0 if not anchored).  ``inputs``
    (..., n, d), ``ridge`` (...) of at least 0; 0 is least squares.  Raises :class:`RecipeError` where ridge is 0 and H
    is singular.

    >>> fit = ridge_fit([[1.0], [1.0]], 1.0)
    >>> fit.gain.tolist(), fit.carry.tolist()
    ([[0.5]], [[0.5]])
    """
    H, values, vectors, n = _spectrum(inputs)
    decay = _numbers("linear fit", "ridge", ridge)
    if not np.all(np.isfinite(decay) & (decay >= 0)):
        raise RecipeError("linear fit: ridge is negative or not finite; give numbers of at least 0")
    if np.any((decay == 0) & (values[..., 0] <= 1e-12 * values[..., -1])):
        raise RecipeError("linear fit: ridge is 0 and the inputs do not span the space; give a positive ridge")
    inverse = 1 / (values + decay[..., None])
    kept = decay[..., None] * inverse if anchored else np.zeros_like(inverse)
    return LinearFit(_function(vectors, kept), _function(vectors, inverse), H, n)


def descent_fit(inputs: ArrayLike, expert: Expert) -> LinearFit:
    """Full-batch gradient descent from x_0: any schedule, heavy ball, Nesterov, coupled or decoupled decay.

    *Statement:* per eigenvalue h of H, ``gain = tau(h)`` (signed clock) and ``carry`` as in
    :func:`theory.quadratic.mode_response`.  ``expert.batch_size`` must be n, without replacement.  ``inputs`` (..., n,
    d); fields of the expert broadcast.  Raises :class:`AssumptionError` for minibatches (they are random affine maps of
    the labels given the inputs: use :func:`theory.one_pass_merge` for one pass) and for other optimizers.

    >>> run = Expert("a", n=2, batch_size=2, learning_rate=0.5, steps=2)
    >>> fit = descent_fit([[1.0], [1.0]], run)
    >>> fit.gain.tolist(), fit.carry.tolist()  # tau = 1 - 1/4
    ([[0.75]], [[0.25]])
    """
    require_sgd(expert)
    H, values, vectors, n = _spectrum(inputs)
    steps = write_out(expert)
    full = np.all(steps.batch_size[np.broadcast_to(steps.present, steps.batch_size.shape)] == n)
    if np.any(np.asarray(expert.n) != n) or not full or expert.sampling == "with_replacement":
        raise AssumptionError(
            f"expert {expert.name!r}: batch_size is not the {n} samples of the inputs (without replacement); only "
            "full-batch descent is linear in the labels with a known matrix"
        )
    with np.errstate(all="ignore"):
        response, carry = mode_response(
            steps.learning_rate,
            values,
            np.asarray(expert.momentum, dtype=np.float64),
            np.asarray(expert.weight_decay, dtype=np.float64),
            steps.present,
            nesterov=expert.nesterov,
            decoupled=expert.decoupled_decay,
        )
        return LinearFit(_function(vectors, carry), _function(vectors, response.sum(axis=-1)), H, n)


def given_inputs(
    tasks: Sequence[RegressionTask],
    base: ArrayLike,
    fits: Sequence[LinearFit],
    coefficients: ArrayLike,
    weights: ArrayLike,
) -> GivenInputs:
    """Exact expectations over the labels for ``x_0 + sum alpha_i (x_i - x_0)``, x_i linear fits, given the inputs.

    *Statement:* ``E x_i = C x_0 + T H w_i``, ``Cov x_i = s_i^2 T H T/n_i``; on the samples of task j the merge has ``E
    F_(S_j) = [ |E M - w_j|_H^2 + tr H Cov M + s_j^2 - 2 alpha_j s_j^2 tr(T H)/n_j ]/2`` (the last term is the degrees
    of freedom).  *Proof:* ``A'y/n = H w + A'xi/n``, and ``Cov(A'xi/n) = s^2 H/n``; C, T and H commute.

    ``tasks`` may differ in w, Sigma (the *true* covariance, used in the risk) and noise; only the noise's first two
    moments matter.  ``base`` (..., d), ``coefficients`` and ``weights`` (N, ...).  The gap may be negative for unlucky
    inputs.  Overflow is ``inf``.  Raises :class:`RecipeError` for malformed tasks.

    >>> task = RegressionTask(np.eye(1), np.zeros(1), 1.0)
    >>> found = given_inputs([task], [0.0], [ridge_fit([[1.0], [1.0]], 0.0)], [1.0], [1.0])
    >>> float(found.risk), float(found.training_risk)  # (1 + 1/2)/2 and (1 - 1/2)/2
    (0.75, 0.25)
    """
    x0 = np.asarray(base, dtype=np.float64)
    alpha, p = np.asarray(coefficients, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    known = [checked(task) for task in tasks]
    rows = list(zip(p, alpha, known, fits, strict=True))
    with np.errstate(all="ignore"):
        means = [_times(fit.carry, x0) + _times(fit.gain @ fit.H, w) for _, _, (_, w, _), fit in rows]
        covariances = [
            (noise**2 / fit.n)[..., None, None] * (fit.gain @ fit.H @ fit.gain) for _, _, (_, _, noise), fit in rows
        ]
        mean = x0 + sum((a[..., None] * (m - x0) for a, m in zip(alpha, means, strict=True)), np.zeros(()))
        spread = sum((a[..., None, None] ** 2 * c for a, c in zip(alpha, covariances, strict=True)), np.zeros(()))
        risk = training = V = np.zeros(())
        drift, risks = [], []
        for (weight, a, (Sigma, w, noise), fit), own, covariance in zip(rows, means, covariances, strict=True):
            freedom = noise**2 * _trace(fit.gain @ fit.H) / fit.n
            true = _loss(Sigma, mean - w, spread, noise)
            seen = _loss(fit.H, mean - w, spread, noise) - a * freedom
            apart = mean - own
            risk, training = risk + weight * true, training + weight * seen
            V = V + weight * (np.sum(apart**2, axis=-1) + _trace(spread) + (1 - 2 * a) * _trace(covariance))
            drift.append(np.sqrt(np.sum((own - x0) ** 2, axis=-1) + _trace(covariance)))
            risks.append(_loss(Sigma, own - w, covariance, noise))
        fine = np.isfinite(risk) & np.isfinite(training) & np.isfinite(V)
        parts = [_plain(np.where(fine, value, np.inf)) for value in (risk, training, risk - training, V)]
    per_expert = [np.stack(np.broadcast_arrays(*values)) for values in (drift, risks)]
    return GivenInputs(*parts, *(np.where(np.isnan(values), np.inf, values) for values in per_expert))


def _times(matrix: FloatArray, vector: FloatArray) -> FloatArray:
    return np.asarray((matrix @ vector[..., None])[..., 0])


def _loss(H: FloatArray, away: FloatArray, covariance: FloatArray, noise: FloatArray) -> FloatArray:
    return np.asarray(0.5 * (_form(H, away) + _trace(H @ covariance) + noise**2))
