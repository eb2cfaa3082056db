"""A PAC-Bayes bound for merges: Gaussian prior at the base, Gaussian posterior at the merge.

Dalili, Mahdavi (2025), *Model merging via multi-teacher knowledge distillation* (arXiv 2512.21288), give a
flatness-aware PAC-Bayes bound for merging with a cross-task heterogeneity term, by way of a linearisation around the
base.  The abstract was read, the theorem was not available to us; what follows is ours in that style (shared Gaussian
perturbation, flatness paid by smoothness), from standard ingredients, in full.

*In expectation.*  Losses in [0, B], L_i-smooth, samples independent across tasks, prior ``N(x_0, s^2 I)`` fixed before
the data.  For any data-dependent M, with ``rho^2 >= E||M - x_0||^2``, ``v = sum p_i^2/n_i``, ``Lbar = sum p_i L_i``:

  ``E[F(M) - F_S(M)] <= Lbar s^2 dim + (B rho/(2 s)) sqrt(v)``  for every s > 0, and at the best s
  ``= 3 (Lbar dim)^(1/3) (B rho sqrt(v)/4)^(2/3)``.

*Proof.*  ``xi ~ N(0, s^2 I)``.  Smoothness: ``F(M) <= E F(M+xi) + Lbar s^2 dim/2`` (the linear term has mean zero) and
``E F_S(M+xi) <= F_S(M) + Lbar s^2 dim/2``.  Donsker-Varadhan with ``t > 0``:
``E_xi[F - F_S](M+xi) <= (KL + ln E_prior exp(t(F - F_S)))/t``, ``KL = ||M-x_0||^2/(2s^2)``; take the expectation over
the data, Jensen and Hoeffding: ``<= rho^2/(2 s^2 t) + t B^2 v/8``; best t.  s and t depend on rho only, not on data.

*High probability.*  With probability at least ``1 - delta`` over the data, at once for all M and n_i >= 1:
``E_xi F(M+xi) <= sum_i p_i (E_xi F_Si(M+xi) + B sqrt((||M-x_0||^2/(2s^2) + ln(2 N sqrt(n_i)/delta))/(2 n_i)))``
(Maurer 2004 with Pinsker, a union over tasks); s fixed before the data.

A loss on all of space that is convex and bounded is constant, so convexity buys nothing here.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike

from theory.assumptions import Assumption
from theory.clocks import smoothness
from theory.errors import RecipeError
from theory.expert_terms import expert_drift
from theory.published.common import (
    PublishedBound,
    align,
    bounded_assumption,
    constants,
    evaluated,
    numbers,
    published,
    refuse_merge,
    sensitivities,
    stack,
    used,
)
from theory.recipe import Merge, Values, per_expert
from theory.symbolic import FloatArray, Formula, times, vacuous
from theory.symbols import symbol

PAPER = "PAC-Bayes for merges (in the style of Dalili, Mahdavi 2025, arXiv 2512.21288)"
CHECKED = "only the abstract of the paper was available; statement, constants and proof are ours"


def expectation_formula() -> Formula:
    """``L s^2 dim + B rho sqrt(v)/(2 s)``: gap at a given standard deviation of the posterior."""
    import sympy

    keys = ("L", "s", "dim", "B", "moved", "v")
    L, s, dim, B, rho, v = (symbol(key) for key in keys)
    return Formula("gap", keys, L * s**2 * dim + B * rho * sympy.sqrt(v) / (2 * s), PAPER)


def best_expectation_formula() -> Formula:
    """``3 (L dim)^(1/3) (B rho sqrt(v)/4)^(2/3)``: the smallest value over s of :func:`expectation_formula`."""
    import sympy

    keys = ("L", "dim", "B", "moved", "v")
    L, dim, B, rho, v = (symbol(key) for key in keys)
    third = sympy.Rational(1, 3)
    return Formula("gap", keys, 3 * (L * dim) ** third * (B * rho * sympy.sqrt(v) / 4) ** (2 * third), PAPER)


def high_probability_formula() -> Formula:
    """``B sqrt((rho^2/(2 s^2) + ln(2 N sqrt(n)/delta))/(2 n))``: excess of one task over its empirical risk."""
    import sympy

    keys = ("B", "moved", "s", "N", "n", "delta")
    B, rho, s, N, n, delta = (symbol(key) for key in keys)
    divergence = rho**2 / (2 * s**2)
    expression = B * sympy.sqrt((divergence + sympy.log(2 * N * sympy.sqrt(n) / delta)) / (2 * n))
    return Formula("gap", keys, expression, f"{PAPER}, Maurer 2004")


def pac_bayes_expectation(
    merge: Merge,
    dimension: Values | None = None,
    *,
    merge_distance: Values | None = None,
    measured: Collection[str] = (),
) -> PublishedBound:
    """The bound in expectation on ``E[F(M) - F_S(M)]`` at the best s, shape ``(...)``; at most ``sum p_i B_i``.

    Needs ``B`` and ``L`` of every expert; ``dimension`` is the number of merged parameters, ``merge_distance`` the rms
    of ``||M - x_0||`` (param) if known, else ``sum c_i d_i`` with the drifts of the recipe.  No assumption on the
    optimizer beyond what the drift needs, none on convexity.

    >>> from theory import Expert, Merge
    >>> e = Expert("a", n=10_000, batch_size=10, learning_rate=0.01, steps=20, L=0.1, B=1.0, drift=0.1)
    >>> round(float(pac_bayes_expectation(Merge((e,)), 10).value), 4)
    0.0119
    """
    name = "PAC-Bayes in expectation"
    refuse_merge(merge, name)
    if dimension is None:
        raise RecipeError(f"dimension is missing; {name} needs the number of merged parameters")
    bounds = constants(merge, "B", name)
    dim = numbers("dimension", dimension, positive=True)
    rho, fields = merge_reach(merge, merge_distance)
    p, n, L, bounds = align(
        per_expert(merge, "weights"),
        stack([np.asarray(expert.n, dtype=np.float64) for expert in merge.experts]),
        stack([smoothness(expert) for expert in merge.experts]),
        bounds,
    )
    # losses of different size: only p_i B_i enters (Hoeffding), so the largest B is taken out of the sum
    B = bounds.max(axis=0)
    relative = np.where(B > 0, bounds / np.where(B > 0, B, 1.0), 0.0)
    rows = ((p * L).sum(axis=0), dim, B, rho, ((p * relative) ** 2 / n).sum(axis=0))
    value = evaluated(best_expectation_formula, rows)
    value = np.where((rho == 0) | (rows[0] == 0) | (B == 0), 0.0, value)
    return published(
        merge,
        name,
        "gap",
        np.minimum(value, (p * bounds).sum(axis=0)),
        best_expectation_formula(),
        needs=(
            bounded_assumption(merge),
            _base(merge),
        ),
        measured=used(merge, (*fields, "B"), measured),
        source=PAPER,
        checked=CHECKED,
    )


def _base(merge: Merge) -> Assumption:
    statement = "the base does not depend on the samples"
    if merge.data_independent_choices is None:
        return Assumption("PAC-Bayes", statement, "unknown", "not stated; set data_independent_choices")
    return Assumption("PAC-Bayes", statement, "holds", "stated (data_independent_choices)")


@np.errstate(all="ignore")
def merge_reach(merge: Merge, merge_distance: Values | None = None) -> tuple[FloatArray, tuple[str, ...]]:
    """Bound on the rms of ``||M - x_0||``, given or ``sum c_i d_i``, and the recipe fields it used; shape ``(...)``."""
    if merge_distance is not None:
        return numbers("merge_distance", merge_distance), ("L",)
    d = stack([expert_drift(expert)[0] for expert in merge.experts])
    c, d = align(sensitivities(merge), d)
    fields = ("L", "mu", "kappa", "initial_gradient_norm", "sigma", "sigma0", "initial_risk", "training_risk")
    extra = tuple(
        name
        for name in ("drift", "batch_gradient_norms", "batch_losses")
        if any(getattr(expert, name) is not None for expert in merge.experts)
    )
    given = tuple(
        name for name in (*fields, *extra) if any(getattr(expert, name) is not None for expert in merge.experts)
    )
    return np.asarray(times(c, d).sum(axis=0)), given


@vacuous
def pac_bayes_penalty(
    samples: ArrayLike,
    weights: ArrayLike,
    distance: ArrayLike,
    prior_std: ArrayLike,
    delta: ArrayLike,
    loss_bound: ArrayLike = 1.0,
) -> FloatArray:
    """High-probability excess of the randomised merge ``M + xi`` over its empirical risk, shape ``(...)`` (loss).

    ``samples`` and ``weights`` have shape ``(N, ...)``; ``distance`` is ``||M - x_0||`` of the merge that was made;
    ``prior_std`` s was fixed before the data; the statement fails with probability at most ``delta`` in (0, 1).
    Add ``Lbar s^2 dim`` for the merge itself instead of ``M + xi``.  Raises :class:`RecipeError`.

    >>> round(float(pac_bayes_penalty([1000, 1000], [0.5, 0.5], distance=0.5, prior_std=0.1, delta=0.05)), 4)
    0.1008
    """
    n, p = align(np.atleast_1d(numbers("samples", samples, positive=True)), np.atleast_1d(numbers("weights", weights)))
    s, B = numbers("prior_std", prior_std, positive=True), numbers("loss_bound", loss_bound, positive=True)
    failure, rho = numbers("delta", delta, positive=True), numbers("distance", distance)
    if np.any(failure >= 1):
        raise RecipeError("delta is at least 1; give a probability of failure in (0, 1)")
    if np.any(np.abs(p.sum(axis=0) - 1) > 1e-9):
        raise RecipeError("weights do not sum to one; divide them by their sum")
    n, p, B, rho, s, failure = align(n, p, B[None], rho[None], s[None], failure[None])
    excess = evaluated(high_probability_formula, (B, rho, s, np.asarray(float(len(p))), n, failure))
    return np.asarray(times(p, excess).sum(axis=0))
