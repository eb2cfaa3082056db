"""Certificates and curvature predictions from measured logits (theory.md section 8).

Two facts about the cross-entropy ell(h, y) with C classes carry everything here:

* sqrt(E ell(h)) and sqrt(E ell(h')) differ by at most sqrt(E range(h - h')^2 / 8), range = max - min over classes
  (the Gauss-Newton curvature of ell along a direction d is Var_p(d) <= range(d)^2 / 4);
* along a line in logit space, ell(h + d) <= ell(h) + (p - e_y) . d + range(d)^2 / 8.

Tiers: *certified* given the logits of the merge itself; *estimated* when the logit change comes from Jacobian products.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from theory.function_space import Array, Labels, cross_entropy, log_softmax
from theory.symbolic import Formula, evaluate
from theory.symbols import symbol


def output_formula() -> Formula:
    """``(sqrt(F) + rho/sqrt(8))^2``, rho the root mean square over images of the range of the logit change."""
    import sympy

    risk, rho = symbol("FK"), symbol("rho")
    expression = (sympy.sqrt(risk) + rho / sympy.sqrt(8)) ** 2
    return Formula("risk", ("FK", "rho"), expression, "section 8, output-space certificate")


def logit_range(change: Array) -> Array:
    """max - min over classes of a logit change (..., n, C): shape (..., n)."""
    return np.asarray(change.max(axis=-1) - change.min(axis=-1))


def remainder_bound(logits: Array, labels: Labels, remainder: Array) -> Array:
    """F_j(M) <= ( sqrt(E ell(h^)) + sqrt(E range(h(M) - h^)^2 / 8) )^2 from predicted logits and their remainder.

    Args:
        logits: predicted logits h^, (..., n, C).
        labels: (n,).
        remainder: h(M) - h^ or an estimate of it, (..., n, C).

    Returns:
        Upper bound on the mean loss, (...); a theorem when ``remainder`` is exact, *estimated* otherwise.
    """
    return output_bound(cross_entropy(logits, labels).mean(axis=-1), remainder)


def output_bound(own_risk: npt.ArrayLike, change: Array) -> Array:
    """Label-free certificate F_j(M) <= ( sqrt(F_j(x_j)) + sqrt(E range(delta)^2 / 8) )^2, delta = h(M) - h(x_j)."""
    return evaluate(output_formula, own_risk, np.sqrt((logit_range(change) ** 2).mean(axis=-1)))


def output_bound_labelled(logits: Array, labels: Labels, change: Array) -> Array:
    """F_j(M) <= F_j(x_j) + E min{ (p - e_y) . delta + range(delta)^2 / 8,  max_c delta_c - delta_y }.

    Args:
        logits: h(x_j), (n, C).
        labels: (n,).
        change: delta, (..., n, C).
    """
    picked = np.take_along_axis(change, np.broadcast_to(labels[:, None], (*change.shape[:-1], 1)), axis=-1)[..., 0]
    slope = (np.exp(log_softmax(logits)) * change).sum(axis=-1) - picked
    step = np.minimum(slope + logit_range(change) ** 2 / 8.0, change.max(axis=-1) - picked)
    return np.asarray(cross_entropy(logits, labels).mean() + step.mean(axis=-1))


def gauss_newton_form(logits: Array, first: Array, second: Array | None = None) -> Array:
    """Gauss-Newton quadratic forms d_i^T J^T (diag p - p p^T) J d_k, averaged over images.

    Args:
        logits: (n, C) at the anchor.
        first: products J d_i, (N, n, C).
        second: products J d_k, (K, n, C); default ``first``.

    Returns:
        (N, K), positive semidefinite when ``second`` is ``first``.
    """
    other = first if second is None else second
    p = np.exp(log_softmax(logits))
    centred = other - (p * other).sum(axis=-1, keepdims=True)
    return np.asarray(np.einsum("inc,knc->ik", first, p * centred) / len(p))


def directional_curvature(logits: Array, product: Array) -> Array:
    """phi'' (Gauss-Newton) of the mean loss along one direction: mean over images of Var_p(Ju); Ju is (..., n, C)."""
    p = np.exp(log_softmax(logits))
    mean = (p * product).sum(axis=-1, keepdims=True)
    return np.asarray((p * (product - mean) ** 2).sum(axis=-1).mean(axis=-1))


def directional_slope(logits: Array, labels: Labels, product: Array) -> Array:
    """phi' of the mean loss along one direction: mean over images of (p - e_y) . Ju; Ju is (..., n, C)."""
    p = np.exp(log_softmax(logits))
    picked = np.take_along_axis(product, np.broadcast_to(labels[:, None], (*product.shape[:-1], 1)), axis=-1)[..., 0]
    return np.asarray(((p * product).sum(axis=-1) - picked).mean(axis=-1))


def curvature_risk(own_risk: npt.ArrayLike, curvature: npt.ArrayLike, weights: npt.ArrayLike) -> Array:
    """R^ = sum_j p_j ( sqrt(F_j(x_j)) + sqrt(A_j / 2) )^2 with A_j the curvature along M - x_j (contains |u|^2).

    Args:
        own_risk, curvature: (..., tasks).
        weights: p_j, (tasks,).
    """
    a = np.maximum(np.asarray(curvature, dtype=np.float64), 0.0)
    root = np.sqrt(np.asarray(own_risk, dtype=np.float64)) + np.sqrt(a / 2.0)
    return np.asarray((root**2) @ np.asarray(weights, dtype=np.float64))


def gradient_aware_risk(
    own_risk: npt.ArrayLike, slope: npt.ArrayLike, curvature: npt.ArrayLike, weights: npt.ArrayLike
) -> Array:
    """sum_j p_j max(0, F_j(x_j) + phi_j'(0) + max phi_j'' / 2): Taylor with the largest sampled curvature."""
    taylor = np.asarray(own_risk) + np.asarray(slope) + np.maximum(np.asarray(curvature), 0.0) / 2.0
    return np.asarray(np.maximum(taylor, 0.0) @ np.asarray(weights, dtype=np.float64))
