"""The master inequality in numbers (theory section 8): terms, private heads, shared samples, effective dispersion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.dispersion import smallest, smallest_bound
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous
from theory.symbols import symbol

TERM_NAMES = ("training", "dispersion", "instability")


def master_formula() -> Formula:
    """``(sqrt(R) + sqrt(L V/2) + sqrt(I))^2`` with ``I = sum p_i L_i/2 (c_i^2 eps_i^2 + eps_i,private^2)``."""
    import sympy

    R, L, V, instability = symbol("R"), symbol("L"), symbol("V"), symbol("I")
    expression = (sympy.sqrt(R) + sympy.sqrt(L * V / 2) + sympy.sqrt(instability)) ** 2
    return Formula("risk", ("R", "L", "V", "I"), expression, "section 8, master bound")


@dataclass(frozen=True, eq=False)
class MasterTerms:
    """The master bound in numbers: square-root terms (unit sqrt(loss)) and ``value`` (loss), shape ``(...)``."""

    training: FloatArray
    dispersion: FloatArray
    instability: FloatArray
    value: FloatArray


@np.errstate(all="ignore")
def assemble_master(
    expert_risks: ArrayLike,
    weights: ArrayLike,
    smoothness: ArrayLike,
    dispersion: ArrayLike,
    sensitivity: ArrayLike,
    epsilon_shared: ArrayLike,
    epsilon_private: ArrayLike = 0.0,
) -> MasterTerms:
    """The master bound from its ingredients, broadcasting over configurations.

    ``expert_risks``, ``weights``, ``sensitivity``, ``epsilon_shared``, ``epsilon_private`` and (unless one number)
    ``smoothness`` have shape ``(N, ...)``; ``dispersion`` V has shape ``(...)``.  Numbers apply to every expert.  The
    dispersion is multiplied by the largest smoothness, the instability uses each task's own.
    """
    risks, p, L, c, shared, private = lifted(
        expert_risks, weights, smoothness, sensitivity, epsilon_shared, epsilon_private
    )
    R = times(p, risks).sum(axis=0)
    with np.errstate(over="ignore"):
        stability = times(c, shared) ** 2 + private**2
    instability = times(p * L / 2, stability).sum(axis=0)
    largest = L.max(axis=0)
    V = np.asarray(dispersion, dtype=np.float64)
    second = times(largest / 2, V)
    value = evaluate(master_formula, R, 2.0, second, instability)
    return MasterTerms(np.sqrt(R), np.sqrt(second), np.sqrt(instability), value)


def lifted(*values: ArrayLike) -> list[FloatArray]:
    """Arrays with experts on axis 0, brought to the same depth by axes of length one at the end, and broadcast."""
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    depth = max(array.ndim for array in arrays)
    lifted = [array.reshape(array.shape + (1,) * (depth - array.ndim)) if array.ndim else array for array in arrays]
    return list(np.broadcast_arrays(*lifted)) if depth else [np.atleast_1d(array) for array in lifted]


@vacuous
def task_stability(
    sensitivity: ArrayLike,
    epsilon: ArrayLike,
    *,
    trained: ArrayLike = False,
    split: tuple[ArrayLike, ArrayLike] | None = None,
    shared_samples: bool = False,
    samples: ArrayLike | None = None,
) -> FloatArray:
    """``E ||M_i - M_i'||^2`` per task, shape ``(N, ...)``: private heads and shared samples (theory section 1).

    ``epsilon`` is the stability of everything an expert trains.  With trained heads only
    ``max(1, c^2) eps^2`` follows from it; ``split`` = (shared part, private part) separates the two and the smaller is
    taken.  ``shared_samples``: all copies of a sample are exchanged at once and experts add up, expert l weighing
    ``sqrt(n_l/n_i)`` in task i (1 for equal ``samples``).
    """
    c, eps, head = np.broadcast_arrays(*lifted(sensitivity, epsilon, np.asarray(trained, dtype=np.float64)))
    own, private, outward = times(np.where(head > 0, np.maximum(1.0, c), c), eps), np.zeros_like(eps), eps
    if split is not None:
        inner, outer = (np.broadcast_to(part, c.shape) for part in lifted(split[0], split[1], c)[:2])
        with np.errstate(over="ignore"):
            better = (times(c, inner) ** 2 + outer**2 < own**2) & (head > 0)
        own, private = np.where(better, times(c, inner), own), np.where(better, outer, private)
        outward = np.where(head > 0, np.minimum(outward, inner), outward)
    if shared_samples:
        n = np.broadcast_to(1.0, c.shape) if samples is None else lifted(samples, c)[0]
        others = times(c, outward)
        added = [
            sum((others[k] * np.sqrt(n[k] / n[i]) for k in range(len(c)) if k != i), np.zeros(c.shape[1:]))
            for i in range(len(c))
        ]
        own = own + np.stack(added)
    with np.errstate(over="ignore"):
        return np.asarray(own**2 + private**2)


@np.errstate(all="ignore")
def effective_dispersion(
    drift: FloatArray, alpha: FloatArray, p: FloatArray, L: FloatArray, extra: FloatArray, orthogonal: bool
) -> tuple[FloatArray, str]:
    """V such that ``max(L)/2 V`` bounds the term: the smaller of the p-weighted and the pL-weighted inequality."""
    d, a, w, stiff = lifted(drift, alpha, p, L)
    plain, form = smallest_bound(d, a, w, orthogonal=orthogonal)
    if np.all(stiff == stiff[:1]):
        return plain + extra, form
    mean, largest = (w * stiff).sum(axis=0), stiff.max(axis=0)
    weighted, other = smallest_bound(d, a, w * stiff / mean, orthogonal=orthogonal)
    value, which = smallest({"p": plain + extra, "pL": times(mean / largest, weighted + extra)})
    names = {"p": form, "pL": f"{other} (weights p L)"}
    return value, " or ".join(names[name] for name in which.split(" or "))
