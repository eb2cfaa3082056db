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

from theory.errors import MergeboundError
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

    Source: section 8 of the mathematics; the proof is ``theory.derive("output certificate")``.

    >>> logits = np.array([[2.0, 0.0], [0.0, 1.0]])
    >>> float(remainder_bound(logits, np.array([0, 1]), np.array([[0.5, 0.0], [0.0, 0.0]])).round(4))
    0.353
    """
    return output_bound(cross_entropy(logits, labels).mean(axis=-1), remainder)


def output_bound(own_risk: npt.ArrayLike, change: Array) -> Array:
    """Label-free certificate F_j(M) <= ( sqrt(F_j(x_j)) + sqrt(E range(delta)^2 / 8) )^2, delta = h(M) - h(x_j).

    Args:
        own_risk: F_j(x_j), the mean cross-entropy of task j's own expert, in nats.
        change: logits of the merge minus the expert's, (..., n, C), on the images of that mean.

    Returns:
        Upper bounds, (...): a theorem on these images.

    Source: section 8 of the mathematics; the proof is ``theory.derive("output certificate")``.

    >>> float(output_bound(0.25, np.array([[1.0, -1.0], [0.0, 0.0]])).round(4))
    1.0
    """
    return evaluate(output_formula, own_risk, np.sqrt((logit_range(change) ** 2).mean(axis=-1)))


def output_bound_everywhere(
    own_losses: npt.ArrayLike,
    ranges: npt.ArrayLike,
    alpha: npt.ArrayLike,
    own: int,
    *,
    delta: float | None = None,
    largest_loss: float | None = None,
    largest_range: float | None = None,
) -> Array:
    """The label-free certificate for **all** coefficients at once, from N numbers per image.

    Statement: for logits that are affine in alpha, ``sqrt F_j(M) <= sqrt F_j(x_j) + sum_i |alpha_i - [i = j]| rho_i /
    sqrt 8`` with ``rho_i^2 = E range(s_ji)^2`` (Minkowski).  Without ``delta`` it is exact on the images given.  With
    it, F_j is the risk on the population the images were drawn from (independently, and not used to train or choose
    x_j or the field), and the bounds of all alpha hold *simultaneously* with probability at least ``1 - delta``: N + 1
    upper confidence limits (Hoeffding, ``delta/(N+1)`` each), none of which depends on alpha.

    Args:
        own_losses: losses of expert j, (n,).
        ranges: range over classes of each slope ``s_ji`` (:func:`logit_range` of a field's ``slopes``), (N, n).
        alpha: (..., N).
        own: j, the place of the task's own expert among the N.
        delta: probability of failure, in (0, 1); needs the next two.
        largest_loss, largest_range: no loss and no range of the population exceeds them.  Losses may be clipped: then
            F_j is the risk of the clipped loss on both sides (clipping is a contraction of the root).

    Returns:
        Upper bounds, (...): a theorem for linearised models, *estimated* otherwise (add the remainder's range).

    Raises:
        MergeboundError: shapes that do not fit, negative values, or values above what is stated.

    >>> float(output_bound_everywhere([0.5, 0.5], [[2.0, 2.0], [1.0, 3.0]], [1.0, 0.0], 0).round(9))  # the expert
    0.5
    """
    losses, spread, a = (np.asarray(value, dtype=np.float64) for value in (own_losses, ranges, alpha))
    if losses.ndim != 1 or not losses.size or spread.ndim != 2 or spread.shape[1] != losses.size:
        raise MergeboundError(
            f"own_losses has shape {losses.shape} and ranges {spread.shape}: give (images,) and (experts, images)"
        )
    count, n = spread.shape
    if a.shape[-1:] != (count,) or not np.isfinite(a).all():
        raise MergeboundError(f"alpha has shape {a.shape} or is not finite: give {count} numbers, one per expert")
    if not 0 <= own < count:
        raise MergeboundError(f"own = {own}, expected 0..{count - 1}: the place of the task's own expert")
    for name, values in (("own_losses", losses), ("ranges", spread)):
        if not (np.isfinite(values) & (values >= 0.0)).all():
            raise MergeboundError(f"{name} holds values that are negative or not finite: collect the logits again")
    risk, squares = losses.mean(), (spread**2).mean(axis=1)
    if delta is not None:
        if not 0.0 < delta < 1.0 or largest_loss is None or largest_range is None:
            raise MergeboundError(
                "delta needs a value in (0, 1), largest_loss and largest_range: clip the loss, and state what no range "
                "exceeds; or leave delta out for these images only"
            )
        if losses.max() > largest_loss or spread.max() > largest_range:
            raise MergeboundError(
                "own_losses exceed largest_loss, or ranges exceed largest_range: clip the losses or raise the first, "
                "raise the second (ranges cannot be clipped)"
            )
        slack = np.sqrt(np.log((count + 1) / delta) / (2 * n))
        risk, squares = risk + largest_loss * slack, squares + largest_range**2 * slack
        risk, squares = min(risk, largest_loss), np.minimum(squares, largest_range**2)
    moved = np.abs(a - np.eye(count)[own]) @ np.sqrt(squares)
    return evaluate(output_formula, risk, moved)


def output_bound_labelled(logits: Array, labels: Labels, change: Array) -> Array:
    """F_j(M) <= F_j(x_j) + E min{ (p - e_y) . delta + range(delta)^2 / 8,  max_c delta_c - delta_y }.

    Args:
        logits: h(x_j), (n, C).
        labels: (n,).
        change: delta, (..., n, C).

    Returns:
        Upper bounds, (...): a theorem on these images, never above either of its two parts.

    Source: section 8 of the mathematics; the proof is ``theory.derive("output certificate")``.

    >>> expert, moved = np.array([[2.0, 0.0]]), np.array([[-1.0, 1.0]])
    >>> float(output_bound_labelled(expert, np.array([0]), moved).round(4))  # the truth is log 2 = 0.6931
    0.8653
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
