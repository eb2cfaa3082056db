"""One round of federated averaging with client drift, in the style of FedNova (Wang et al. 2020, arXiv 2007.07481).

A merge is one communication round: experts are clients, the base is the server model.  The paper analyses many rounds
and bounds gradient norms, with constants inside O(.); its introduction was read.  What follows is ours, in full, with
the paper's ingredients: the surrogate objective that unequal local work implies (objective inconsistency), client
drift, and noise.

*Statement.*  Let ``M = x_0 + sum alpha_i Delta_i``, ``T_i = sum_k eta_ik``, ``T = sum alpha_i T_i > 0``,
``w_i = alpha_i T_i/T`` (FedNova chooses alpha so that w = p).  For L_i-smooth losses, SGD with conditionally unbiased
batches, drawn independently of those of the other experts, no momentum, no decay, with ``Lbar = sum p_i L_i``,

  ``E F_S(M) <= F_S(x_0) - (T/2) gamma^2 + (T/2) chi^2 + Lbar W + max(Lbar - 1/(2T), 0) h^2``,

where ``gamma^2 <= E ||grad F_S(x_0)||^2`` is any known lower bound (0 always; g^2 for one expert), and

* ``chi = sum_i |p_i - w_i| g_i + sum_i |w_i| L_i sum_k (eta_ik/T_i) d_ik``: inconsistency, then client drift;
* ``d_ik`` bounds the rms of ``||x_ik - x_0||``: Theorem 3 (a) for the first k steps;
* ``W = sum_i alpha_i^2 sigma_i^2 sum_k eta_ik^2/b_ik``: noise;
* ``h = sum_i |alpha_i| sum_k eta_ik (g_i + L_i d_ik)``.

*Proof.*  ``M - x_0 = -H - xi`` with ``H = sum_i alpha_i sum_k eta_ik grad F_Si(x_ik)`` and ``xi`` a sum of martingale
differences over steps and experts (hence independent batches: experts that share indices may correlate),
``E||xi||^2 = W`` at most.  The descent lemma for F_S gives
``E F_S(M) <= F_S(x_0) - E<grad F_S(x_0), H> + (Lbar/2) E||H + xi||^2``; polarisation,
``-<u, H> = -(T/2)||u||^2 - ||H||^2/(2T) + (T/2)||u - H/T||^2``; Minkowski,
``rms||u - H/T|| <= chi``; and ``||H + xi||^2 <= 2||H||^2 + 2||xi||^2``, ``rms||H|| <= h``.  DARE's masks add
``(Lbar/2)`` times what they add to the dispersion.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from theory.assumptions import Assumption
from theory.clocks import smoothness, step_excess, write_out
from theory.drift import _need, _noise, _unbiased
from theory.errors import AssumptionError
from theory.operators import added_dispersion, coefficients
from theory.published.common import (
    PublishedBound,
    align,
    evaluated,
    numbers,
    published,
    refuse_merge,
    require_plain_sgd,
    stack,
    used,
)
from theory.recipe import Expert, Merge, Values, per_expert
from theory.symbolic import FloatArray, Formula, times, vacuous
from theory.symbols import symbol

PAPER = "one round of FedAvg/FedNova with client drift (after Wang et al. 2020, arXiv 2007.07481)"
CHECKED = "the paper's introduction was read; its theorem is about many rounds; this one-round bound is derived here"


def one_round_formula() -> Formula:
    """``F_0 + (T/2)(chi^2 - g^2) + L W + max(L - 1/(2T), 0) h^2``; g bounds the joint gradient from below."""
    import sympy

    keys = ("F0", "T", "chi", "g", "L", "W", "h")
    start, T, chi, g, L, W, h = (symbol(key) for key in keys)
    expression = start + T / 2 * (chi**2 - g**2) + L * W + sympy.Max(L - 1 / (2 * T), 0) * h**2
    return Formula("F_S(M)", keys, expression, PAPER)


def fedavg_one_round(
    merge: Merge, *, joint_gradient_norm: Values = 0.0, measured: Collection[str] = ()
) -> PublishedBound:
    """The bound above on ``E F_S(M)``, the optimisation side (compare Theorem 4), shape ``(...)``.

    Needs of every expert: ``initial_risk``, ``initial_gradient_norm``, ``sigma``, L; sampling with independent batches.
    ``joint_gradient_norm`` is a lower bound of the rms norm of ``grad F_S(x_0) = sum p_i grad F_Si(x_0)`` (loss/param);
    without it no descent is credited and the bound can only say how little the merge has lost.

    >>> from theory import Expert, Merge
    >>> e = Expert("a", n=100, batch_size=10, learning_rate=0.01, steps=20, L=1.0, curvature="convex",
    ...            initial_risk=1.0, initial_gradient_norm=1.0, sigma=0.5)
    >>> bool(fedavg_one_round(Merge((e,)), joint_gradient_norm=1.0).value < 1.0)
    True
    """
    name = "one-round FedAvg with client drift"
    refuse_merge(merge, name)
    alpha = coefficients(merge)
    pieces = [_client(expert, name) for expert in merge.experts]
    totals, local_drift, noise, ends = (stack([piece[i] for piece in pieces]) for i in range(4))
    L = stack([smoothness(expert) for expert in merge.experts])
    g = stack([np.asarray(expert.initial_gradient_norm, dtype=np.float64) for expert in merge.experts])
    start = stack([np.asarray(expert.initial_risk, dtype=np.float64) for expert in merge.experts])
    p, a, totals, local_drift, noise, L, g, start, ends = align(
        per_expert(merge, "weights"), alpha, totals, local_drift, noise, L, g, start, ends
    )
    if np.any((a * totals).sum(axis=0) <= 0):
        raise AssumptionError(
            f"merge: coefficients give sum alpha_i sum eta_ik <= 0, so the merge does not descend; {name} needs > 0"
        )
    descent = numbers("joint_gradient_norm", joint_gradient_norm)
    value = _assembled(p, a, totals, local_drift, noise, L, g, start, descent)
    value = _lost(value, L, p, added_dispersion(merge, ends))
    return published(
        merge,
        name,
        "training",
        value,
        one_round_formula(),
        needs=(
            Assumption(
                "FedAvg", "unbiased batches, independent across experts; no momentum, no decay", "holds", "recipe"
            ),
            _joint(joint_gradient_norm, measured),
        ),
        measured=used(merge, ("L", "mu", "kappa", "initial_risk", "initial_gradient_norm", "sigma"), measured),
        source=PAPER,
        checked=CHECKED,
    )


@vacuous
def _assembled(
    p: FloatArray,
    a: FloatArray,
    totals: FloatArray,
    local_drift: FloatArray,
    noise: FloatArray,
    L: FloatArray,
    g: FloatArray,
    start: FloatArray,
    descent: FloatArray,
) -> FloatArray:
    """The statement of the module from its pieces, all of shape ``(N, ...)`` but ``descent`` ``(...)``."""
    T = (a * totals).sum(axis=0)
    w = a * totals / T
    chi = (np.abs(p - w) * g).sum(axis=0) + times(np.abs(w) * L, local_drift / totals).sum(axis=0)
    h = times(np.abs(a), times(totals, g) + times(L, local_drift)).sum(axis=0)
    noisy = times(a**2, noise).sum(axis=0)
    return one_round(times(p, start).sum(axis=0), T, chi, descent, times(p, L).sum(axis=0), noisy, h)


@vacuous
def _lost(value: FloatArray, L: FloatArray, p: FloatArray, added: FloatArray) -> FloatArray:
    """With what DARE's masks add; a nonnegative risk has no negative bound."""
    return np.maximum(value + times((p * L).sum(axis=0) / 2, added), 0.0)


def one_round(*arguments: FloatArray) -> FloatArray:
    """:func:`one_round_formula` on arrays ``(F0, T, chi, g, L, W, h)``; ``inf`` where it overflows."""
    start, T, chi, g, L, W, h = arguments
    # a term that is exactly zero must not meet an infinite h
    excess = np.maximum(L - 1 / (2 * T), 0.0)
    return np.asarray(evaluated(one_round_formula, (start, T, chi, g, L, W, np.where(excess == 0, 0.0, h))))


@vacuous
def _client(expert: Expert, name: str) -> FloatArray:
    """``T_i``, ``sum_k eta_k d_k``, noise ``sum eta_k^2 sigma^2/b_k`` and the drift at the end, shape ``(4, ...)``."""
    require_plain_sgd(expert, name)
    _unbiased(expert, "a")
    _, g, sigma = _need(expert, "a", "initial_risk", "initial_gradient_norm", "sigma")
    steps = write_out(expert)
    variance = _noise(expert, steps, sigma)
    excess = step_excess(expert, steps.learning_rate, per_step=True)
    pull, spread = np.zeros(()), np.zeros(())
    total, drifted, noise = np.zeros(()), np.zeros(()), np.zeros(())
    for k in range(steps.learning_rate.shape[-1]):
        eta, here = steps.learning_rate[..., k], steps.present[..., k]
        factor = 1 + excess[..., k]
        total = total + eta
        drifted = drifted + times(eta, pull + np.sqrt(spread))
        noise = noise + eta**2 * variance[..., k]
        pull = np.where(here, factor * pull + eta * g, pull)
        spread = np.where(here, factor**2 * spread + eta**2 * variance[..., k], spread)
    return stack([total, drifted, noise, pull + np.sqrt(spread)])


def _joint(joint_gradient_norm: Values, measured: Collection[str]) -> Assumption:
    statement = "the rms joint gradient at the base is at least joint_gradient_norm"
    if not np.any(np.asarray(joint_gradient_norm) > 0):
        return Assumption("descent", statement, "holds", "0 was used: no descent is credited")
    if "joint_gradient_norm" in measured:
        return Assumption("descent", statement, "unknown", "the constant was measured")
    return Assumption("descent", statement, "holds", "stated as known")
