"""The master inequality in numbers (theory section 8): terms, private heads, shared samples, effective dispersion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.checks import amounts, fitting_experts, summing_to_one
from theory.dispersion import (
    base_distance,
    orthogonal_distances,
    smallest,
    smallest_bound,
    task_distances,
)
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

    >>> float(assemble_master([0.04, 0.04], [0.5, 0.5], 2.0, 0.01, 0.5, 0.1).value.round(6))
    0.1225
    """
    given = amounts(
        "master bound",
        expert_risks=expert_risks,
        weights=weights,
        smoothness=smoothness,
        sensitivity=sensitivity,
        epsilon_shared=epsilon_shared,
        epsilon_private=epsilon_private,
    )
    names = ("expert_risks", "weights", "smoothness", "sensitivity", "epsilon_shared", "epsilon_private")
    fitting_experts("master bound", **dict(zip(names, given, strict=True)))
    risks, p, L, c, shared, private = lifted(*given)
    summing_to_one("master bound", p)
    R = times(p, risks).sum(axis=0)
    with np.errstate(over="ignore"):
        stability = times(c, shared) ** 2 + private**2
    instability = times(p * L / 2, stability).sum(axis=0)
    largest = L.max(axis=0)
    (V,) = amounts("master bound", dispersion=dispersion)
    second = times(largest / 2, V)
    value = evaluate(master_formula, R, 2.0, second, instability)
    return MasterTerms(np.sqrt(R), np.sqrt(second), np.sqrt(instability), value)


@np.errstate(all="ignore")
def assemble_sides(
    side: OptimizationSide, weights: ArrayLike, smoothness: ArrayLike, movement: ArrayLike
) -> MasterTerms:
    """The master bound from its optimisation side and the rms movement of every task's model, shape ``(N, ...)``."""
    p, L, moved = lifted(weights, smoothness, movement)
    instability = times(p * L / 2, moved**2).sum(axis=0)
    value = evaluate(master_formula, side.training**2, 2.0, side.dispersion**2, instability)
    return MasterTerms(side.training, side.dispersion, np.sqrt(instability), value)


def lifted(*values: ArrayLike) -> list[FloatArray]:
    """Arrays with experts on axis 0, broadcast; the axes of configurations are aligned at the end, as everywhere."""
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    depth = max(array.ndim for array in arrays)
    lifted = [
        array.reshape(array.shape[:1] + (1,) * (depth - array.ndim) + array.shape[1:]) if array.ndim else array
        for array in arrays
    ]
    return list(np.broadcast_arrays(*lifted)) if depth else [np.atleast_1d(array) for array in lifted]


@dataclass(frozen=True, eq=False)
class OptimizationSide:
    """Theorem 4 in numbers: ``training`` + ``dispersion`` (unit sqrt(loss)) bound ``sqrt E F_S(M)``; shape ``(...)``.

    ``V`` bounds the dispersion ``E sum p_j ||M - x_j||^2``; ``effective_V`` is what the second term is made of
    (``dispersion^2 = max(L)/2 effective_V``), possibly below the true dispersion, and ``form`` the inequality that
    gave it; ``from_base`` (shape ``(N, ...)``) marks tasks whose anchor is the base.
    """

    training: FloatArray
    dispersion: FloatArray
    V: FloatArray
    effective_V: FloatArray
    form: str
    from_base: NDArray[np.bool_]


@np.errstate(all="ignore")
def sharpest_side(
    expert_risks: ArrayLike,
    weights: ArrayLike,
    smoothness: ArrayLike,
    expert_distances: ArrayLike,
    base_risks: ArrayLike | None = None,
    base_distances: ArrayLike | None = None,
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """The sharpest aggregation (theory section 7), ``sqrt(sum p_j min_a (sqrt F_j(a) + sqrt(L_j/2 E||M-a||^2))^2)``.

    The anchor a is the expert x_j, or the base x_0 where ``base_risks`` F_j(x_0) (with the final heads) and
    ``base_distances`` E||M - x_0||^2 are given.  Risks, ``smoothness``, ``expert_distances`` E||M - x_j||^2 and
    ``base_risks`` have shape ``(N, ...)``.  Returns the bound on ``sqrt E F_S(M)`` (shape ``(...)``), the part of it
    that the anchors' risks make, and which anchors are the base.  Never above ``sqrt R + sqrt(sum p_j L_j/2 V_j)``
    (Minkowski).  For a directional bound give ``smoothness`` 1 and curvatures A in place of the squared distances.

    >>> bound, _, base = sharpest_side([0.01, 0.01], [0.5, 0.5], 2.0, [4.0, 4.0], [1.0, 9.0], 0.25)
    >>> round(float(bound), 4), base.tolist()  # task 1: 1 + 0.5 from the base, task 2: 0.1 + 2 from its expert
    (1.8248, [True, False])
    """
    if base_risks is None or base_distances is None:
        risks, p, L, far = lifted(expert_risks, weights, smoothness, expert_distances)
        steps = np.sqrt(times(L / 2, far))
        return _rooted(p, np.sqrt(risks) + steps), _rooted(p, np.sqrt(risks)), np.zeros(risks.shape, dtype=bool)
    moved = np.asarray(base_distances, dtype=np.float64)[None]
    risks, p, L, far, base, near = lifted(expert_risks, weights, smoothness, expert_distances, base_risks, moved)
    own, other = np.sqrt(risks) + np.sqrt(times(L / 2, far)), np.sqrt(base) + np.sqrt(times(L / 2, near))
    from_base = other < own
    anchors = np.where(from_base, base, risks)
    return _rooted(p, np.where(from_base, other, own)), _rooted(p, np.sqrt(anchors)), from_base


def _rooted(p: FloatArray, values: FloatArray) -> FloatArray:
    """``sqrt(sum p values^2)`` over axis 0 with ``0 * inf = 0``."""
    return np.asarray(np.sqrt(times(p, values**2).sum(axis=0)))


@np.errstate(all="ignore")
def optimization_side(
    expert_risks: FloatArray,
    weights: FloatArray,
    smoothness: FloatArray,
    drift: FloatArray,
    alpha: FloatArray,
    extra: FloatArray,
    orthogonal: bool,
    base_risks: FloatArray | None = None,
) -> OptimizationSide:
    """Theorem 4 from drifts: the smallest of the joint inequality, its pL-weighted form, and task by task (anchors x_j
    or, where ``base_risks`` are given, x_0).

    Per-expert arguments have shape ``(N, ...)``; ``base_risks`` is ``inf`` where unknown; ``extra`` is what random
    masks add to every squared distance.
    """
    V, effective, form = effective_dispersion(drift, alpha, weights, smoothness, extra, orthogonal)
    risks, p, L, d, a = lifted(expert_risks, weights, smoothness, drift, alpha)
    largest = L.max(axis=0)
    training = np.sqrt(times(p, risks).sum(axis=0))
    second = np.sqrt(times(largest / 2, effective))
    squares = task_distances(d, a) ** 2
    if orthogonal:
        squares = np.minimum(squares, orthogonal_distances(d, a))
    near = base_distance(d, a, orthogonal=False)
    if orthogonal:
        near = np.minimum(near, base_distance(d, a, orthogonal=True))
    nearby = None if base_risks is None else near + extra
    squares, added = lifted(squares, np.asarray(extra, dtype=np.float64)[None])
    total, anchors, from_base = sharpest_side(risks, p, L, squares + added, base_risks, nearby)
    sharper = total < training + second
    if not sharper.any():
        return OptimizationSide(training, second, V, effective, form, np.zeros(risks.shape, dtype=bool))
    left = np.maximum(total - anchors, 0.0)
    taken = np.logical_and(*lifted(from_base, sharper[None]))
    name = "task by task, base anchors" if taken.any() else "task by task"
    stiff = np.where(largest > 0, largest, 1.0)
    return OptimizationSide(
        np.where(sharper, anchors, training),
        np.where(sharper, left, second),
        V,
        np.where(sharper, 2 * left**2 / stiff, effective),
        name if sharper.all() else f"{form} or {name}",
        taken,
    )


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

    >>> task_stability([0.5, 2.0], [1.0, 1.0]).tolist()
    [0.25, 4.0]
    >>> task_stability([0.5, 2.0], [1.0, 1.0], trained=True).tolist()  # heads: no gain below c = 1
    [1.0, 4.0]
    """
    if split is None and not shared_samples and not np.any(trained):
        movement = times(*lifted(sensitivity, epsilon))
        return np.asarray(movement * movement)
    parts = (np.inf, np.inf) if split is None else split
    c, eps, head, inner, outer, n = lifted(sensitivity, epsilon, trained, *parts, 1.0 if samples is None else samples)
    own, private, outward = times(np.where(head > 0, np.maximum(1.0, c), c), eps), np.zeros_like(eps), eps
    if split is not None:
        with np.errstate(over="ignore"):
            better = (times(c, inner) ** 2 + outer**2 < own**2) & (head > 0)
        own, private = np.where(better, times(c, inner), own), np.where(better, outer, private)
        outward = np.where(head > 0, np.minimum(outward, inner), outward)
    if shared_samples:
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
) -> tuple[FloatArray, FloatArray, str]:
    """V by the p-weighted inequality; the effective V such that ``max(L)/2 V`` bounds the term, the smaller of the
    p-weighted and the pL-weighted inequality; and which."""
    d, a, w, stiff = lifted(drift, alpha, p, L)
    plain, form = smallest_bound(d, a, w, orthogonal=orthogonal)
    if np.all(stiff == stiff[:1]):
        return plain + extra, plain + extra, form
    mean, largest = (w * stiff).sum(axis=0), stiff.max(axis=0)
    flat = mean == 0  # nothing to weigh by
    weighted, other = smallest_bound(d, a, w * stiff / np.where(flat, 1.0, mean), orthogonal=orthogonal)
    sharper = np.where(flat, np.inf, times(mean / np.where(flat, 1.0, largest), weighted + extra))
    value, which = smallest({"p": plain + extra, "pL": sharper})
    names = {"p": form, "pL": f"{other} (weights p L)"}
    return plain + extra, value, " or ".join(names[name] for name in which.split(" or "))
