"""Trained private heads: the 2x2 recursion that separates shared and private stability (theory section 1)."""

from __future__ import annotations

import numpy as np

from theory.clocks import lowest_curvature, require_sgd, smoothness, step_excess, write_out
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert
from theory.stability import gamma_of_weights, largest_gap
from theory.symbolic import FloatArray, vacuous


def head_responses(expert: Expert) -> FloatArray:
    """Responses of the two blocks, shape ``(2, 2, ..., K_max)``: entry ``[r, c]`` moves block r per kick of block c.

    Blocks are 0 (shared) and 1 (private).  ``(d_s, d_p)+ <= [[q, eta L_sp], [eta L_sp, q]] (d_s, d_p) + (eta/b) I u``
    with the step factor q of the full Hessian (its diagonal blocks inherit its bounds) and ``L_sp`` =
    ``cross_smoothness``, at most ``(L - m)/2`` for a symmetric matrix with eigenvalues in [m, L].  SGD; right-aligned,
    ``inf`` where it overflows.
    """
    require_sgd(expert)
    momentum = np.asarray(expert.momentum)
    if np.all(momentum != 0):
        raise AssumptionError(
            f"expert {expert.name!r}: momentum is not 0, which the 2x2 recursion of trained heads needs; give the "
            "measured private_drift instead"
        )
    steps = write_out(expert)
    excess = step_excess(expert, steps.learning_rate, per_step=True)
    if expert.cross_smoothness is not None:
        cross = np.asarray(expert.cross_smoothness, dtype=np.float64)
    else:
        cross = (smoothness(expert) - lowest_curvature(expert)) / 2
    shape = np.broadcast_shapes(steps.present.shape, excess.shape, (*cross.shape, 1), (*momentum.shape, 1))
    eta, q = np.broadcast_to(steps.learning_rate, shape), np.broadcast_to(1 + excess, shape)
    coupling = eta * cross[..., None]
    # both blocks have the same q, so the matrix is [[q, e], [e, q]]: products stay of that form, sums and differences
    # of the blocks decouple
    out = np.empty((2, 2, *shape))
    own, other = np.ones(shape[:-1]), np.zeros(shape[:-1])
    with np.errstate(all="ignore"):
        for k in range(shape[-1] - 1, -1, -1):
            out[0, 0, ..., k] = out[1, 1, ..., k] = eta[..., k] * own
            out[0, 1, ..., k] = out[1, 0, ..., k] = eta[..., k] * other
            own, other = (
                own * q[..., k] + other * coupling[..., k],
                own * coupling[..., k] + other * q[..., k],
            )
    out = np.where(np.isnan(out) | (momentum != 0)[..., None], np.inf, out)
    return np.where(steps.present, out, 0.0)


def head_split(expert: Expert) -> tuple[FloatArray, FloatArray]:
    """Bounds on ``(epsilon_shared, epsilon_private)`` of an expert with a trained head (Theorem 2, block by block).

    Needs ``D_inf_private`` and ``D_inf_shared`` (default: the gap of everything, ``D_inf`` or 2G).  Any sampling, SGD.
    Each block is ``sqrt((sum r_k/n)^2 + Gamma(r))`` with ``r_k`` the two responses weighted by the two gaps.  Raises
    :class:`RecipeError` if a gap is missing.

    >>> run = dict(n=100, batch_size=10, learning_rate=0.1, steps=20, curvature="convex", L=1.0, head="trained")
    >>> shared, private = head_split(Expert("a", D_inf_shared=2.0, D_inf_private=0.1, cross_smoothness=0.0, **run))
    >>> bool(private < 0.06 * shared)
    True
    """
    if expert.D_inf_private is None:
        raise RecipeError(
            f"expert {expert.name!r}: D_inf_private is missing; give the largest gap of the head's gradients (and "
            "D_inf_shared), or the measured private_drift"
        )
    outer = np.asarray(expert.D_inf_private, dtype=np.float64)
    inner = largest_gap(expert) if expert.D_inf_shared is None else np.asarray(expert.D_inf_shared, dtype=np.float64)
    return _block(expert, (inner, outer), 0), _block(expert, (inner, outer), 1)


@vacuous
def _block(expert: Expert, gaps: tuple[FloatArray, FloatArray], block: int) -> FloatArray:
    response, steps = head_responses(expert), write_out(expert)
    parts = [np.where(gap[..., None] == 0, 0.0, response[block, c] * gap[..., None]) for c, gap in enumerate(gaps)]
    push = parts[0] + parts[1]
    n = np.asarray(expert.n, dtype=np.float64)
    size = np.broadcast_to(steps.batch_size, push.shape)
    spread = gamma_of_weights(push, size, n, expert.sampling, np.broadcast_to(steps.position, push.shape))
    return np.asarray(np.hypot(push.sum(axis=-1) / n, np.sqrt(spread)))
