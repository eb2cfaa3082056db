"""Lei, Ying (2020), *Fine-grained analysis of stability and generalization for SGD* (arXiv 2006.08157), for merges.

On-average model stability of SGD on convex, L-smooth, nonnegative losses, without a Lipschitz constant: the risk of the
iterates takes its place (a smooth nonnegative f has ``||grad f||^2 <= 2 L f``).

The abstract and introduction of the paper were read, its Theorem 3 was not; both forms are derived here in full, with
the constants that are quoted for it.  One batch of one sample per step, drawn uniformly; ``x, x'`` twins for sample j.

* With probability ``1 - 1/n`` both use the same sample and do not separate (``eta <= 2/L``).  Else they separate by at
  most ``eta (||grad f(x; z_j)|| + ||grad f(x'; z'_j)||) <= eta sqrt(2L) (sqrt f(x; z_j) + sqrt f(x'; z'_j))``.
* l1: average over j and over the exchangeable pair: ``eps_1 <= 2 sqrt(2L)/n sum eta_k E sqrt F_S(x_k)``.
* l2: ``(u+v)^2 <= (1+r) u^2 + (1+1/r) v^2`` on the second event:
  ``E u_{k+1}^2 <= (1 + r/n) E u_k^2 + 8 (1 + 1/r) L eta_k^2/n E F_S(x_k)`` for any r > 0; unroll.
"""

from __future__ import annotations

import numpy as np

from theory.assumptions import Assumption
from theory.clocks import smoothness, write_out
from theory.errors import AssumptionError, RecipeError
from theory.published.common import (
    PublishedBound,
    align,
    constants,
    evaluated,
    lipschitz_assumption,
    published,
    refuse_merge,
    require_convex,
    require_plain_sgd,
    require_rate,
    sensitivities,
    single_samples,
    stack,
    used,
    weighted,
)
from theory.recipe import Expert, Merge
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous
from theory.symbols import symbol

PAPER = "Lei, Ying 2020, arXiv 2006.08157, Theorem 3"
CHECKED = "abstract and introduction read, the theorem itself not; derived in full here, constants as quoted for it"
FREE_CONSTANTS = np.exp(np.linspace(np.log(1e-4), np.log(1e6), 81))


def l1_step_formula() -> Formula:
    """What step k adds to the l1 stability: ``2 sqrt(2L)/n eta_k sqrt(F_S(x_k))``."""
    import sympy

    L, n, eta, risk = (symbol(key) for key in ("L", "n", "eta", "Fk"))
    expression = 2 * sympy.sqrt(2 * L) / n * eta * sympy.sqrt(risk)
    return Formula("epsilon", ("L", "n", "eta", "Fk"), expression, f"{PAPER}, l1, one step")


def l2_step_formula() -> Formula:
    """What step k adds to the squared l2 stability: ``8 (1+1/r) L/n (1+r/n)^(later steps) eta_k^2 F_S(x_k)``."""
    keys = ("L", "n", "r", "later", "eta", "Fk")
    L, n, r, later, eta, risk = (symbol(key) for key in keys)
    expression = 8 * (1 + 1 / r) * L / n * (1 + r / n) ** later * eta**2 * risk
    return Formula("epsilon^2", keys, expression, f"{PAPER}, l2, one step")


def l1_gap_formula() -> Formula:
    """``c G eps_1``: what a distance in parameters costs a Lipschitz loss (Theorem 2 (a) of the paper)."""
    c, G, epsilon = (symbol(key) for key in ("c", "G", "epsilon"))
    return Formula("gap", ("c", "G", "epsilon"), c * G * epsilon, "Lei, Ying 2020, Theorem 2 (a)")


def l2_instability_formula() -> Formula:
    """``L/2 c^2 eps_2^2``: Theorem 2 (b) of the paper at its best gamma, which is Theorem 1 of the theory."""
    L, c, epsilon = (symbol(key) for key in ("L", "c", "epsilon"))
    return Formula("instability", ("L", "c", "epsilon"), L / 2 * (c * epsilon) ** 2, "Lei, Ying 2020, Theorem 2 (b)")


def epsilon_l1(expert: Expert) -> FloatArray:
    """On-average l1 stability of an expert from the risks before each step (``batch_losses``), shape ``(...)``.

    Convex, L-smooth, nonnegative; ``eta_k <= 2/L``; batches of one sample, fresh each step; no momentum, no decay.
    ``E sqrt F_S <= sqrt(E F_S)`` is used.
    """
    L, n, steps_rate, risks, _ = _log(expert, "Lei-Ying l1")
    return np.asarray(_sum(evaluated(l1_step_formula, (L, n, steps_rate, risks))))


def epsilon_l2(expert: Expert) -> FloatArray:
    """On-average l2 stability of an expert, smallest over r on a grid (every r > 0 is valid), shape ``(...)``."""
    L, n, rates, risks, later = _log(expert, "Lei-Ying l2")
    best = np.asarray(np.inf)
    for r in FREE_CONSTANTS:
        growth = _growth(r, n, later)
        plain = evaluate(l2_step_formula, L, n, r, 0.0, rates, risks)
        best = np.minimum(best, _sum(times(growth, plain)))
    return np.asarray(np.sqrt(best))


@vacuous
def _growth(r: float, n: FloatArray, later: FloatArray) -> FloatArray:
    return np.exp(later * np.log1p(r / n))


@vacuous
def _sum(values: FloatArray) -> FloatArray:
    return np.asarray(values.sum(axis=-1))


def _log(expert: Expert, name: str) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """L, n (trailing axis of one), learning rates, risks before each step and number of later steps ``(..., K)``."""
    require_plain_sgd(expert, name)
    require_convex(expert, name)
    require_rate(expert, 2.0, name)
    single_samples(expert, name)
    if expert.sampling == "reshuffle":
        raise AssumptionError(
            f"expert {expert.name!r}: sampling is 'reshuffle', but {name} needs a fresh uniform sample at every step"
        )
    if expert.batch_losses is None:
        raise RecipeError(
            f"expert {expert.name!r}: batch_losses is missing; {name} needs E F_S(x_k) before each step (the logged "
            "batch losses, which have that mean)"
        )
    steps = write_out(expert)
    length = steps.learning_rate.shape[-1]
    later = np.arange(length - 1, -1, -1, dtype=np.float64)
    n = np.asarray(expert.n, dtype=np.float64)[..., None]
    return smoothness(expert)[..., None], n, steps.learning_rate, expert.batch_losses.values, later


def lei_ying_l1(merge: Merge) -> PublishedBound:
    """``E[F(M) - F_S(M)] <= sum_i p_i c_i G_i eps_1,i`` (l1 form; needs Lipschitz losses for the last step only).

    >>> from theory import Expert, Merge, Schedule
    >>> run = dict(n=100, batch_size=1, learning_rate=0.1, steps=50, curvature="convex", L=1.0)
    >>> losses = Schedule(np.full(50, 0.02))
    >>> round(float(lei_ying_l1(Merge((Expert("a", G=1.0, batch_losses=losses, **run),))).value), 4)
    0.02
    """
    name = "Lei-Ying, l1"
    refuse_merge(merge, name)
    epsilon = stack([epsilon_l1(expert) for expert in merge.experts])
    rows = align(sensitivities(merge), constants(merge, "G", name), epsilon)
    return published(
        merge,
        name,
        "gap",
        weighted(merge, evaluated(l1_gap_formula, rows)),
        l1_gap_formula(),
        needs=(lipschitz_assumption(merge), _convexity()),
        measured=used(merge, ("L", "G", "batch_losses")),
        source=f"{PAPER} (l1) with Theorem 2 (a)",
        checked=CHECKED,
    )


def lei_ying_l2(merge: Merge) -> PublishedBound:
    """``I = sum_i p_i (L_i/2) c_i^2 eps_2,i^2`` in ``sqrt(E F(M)) <= sqrt(E F_S(M)) + sqrt(I)`` (l2 form; no G).

    >>> from theory import Expert, Merge, Schedule
    >>> run = dict(n=100, batch_size=1, learning_rate=0.1, steps=50, curvature="convex", L=1.0)
    >>> losses = Schedule(np.full(50, 0.02))
    >>> round(float(lei_ying_l2(Merge((Expert("a", batch_losses=losses, **run),))).value), 4)
    0.001
    """
    name = "Lei-Ying, l2"
    refuse_merge(merge, name)
    epsilon = stack([epsilon_l2(expert) for expert in merge.experts])
    L = stack([smoothness(expert) for expert in merge.experts])
    rows = align(L, sensitivities(merge), epsilon)
    return published(
        merge,
        name,
        "instability",
        weighted(merge, evaluated(l2_instability_formula, rows)),
        l2_instability_formula(),
        needs=(_convexity(),),
        measured=used(merge, ("L", "batch_losses")),
        source=f"{PAPER} (l2) with Theorem 2 (b)",
        checked=CHECKED,
    )


def _convexity() -> Assumption:
    statement = "convex nonnegative losses, eta <= 2/L, one fresh uniform sample per step"
    return Assumption("LY", statement, "holds", "from the recipe")
