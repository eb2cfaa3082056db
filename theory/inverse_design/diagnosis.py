"""Whether a design is only "train as little as allowed", and what orthogonal task vectors would make of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from theory.bound import Bound
from theory.dispersion import orthogonal_distances, task_distances
from theory.errors import MergeboundError
from theory.inverse_design.least_training import LeastTraining
from theory.inverse_design.problem import Problem
from theory.inverse_design.search import best_found
from theory.operators import coefficients
from theory.risk import master_bound
from theory.symbolic import FloatArray

TRAINING = ("learning_rate", "steps")
STARTS = 256


def least_training(problem: Problem, point: FloatArray, value: float, bound: Bound) -> LeastTraining | None:
    """The diagnosis at a solution; None where training is not free, a target is asked for, or training does pay."""
    if problem.target is not None or not _is_least(problem, point):
        return None
    gained, lost = _exchange(problem, point)
    if not lost > gained:  # training pays, and something else (a budget, whole numbers) holds it at its lower limit
        return None
    reach = _reach(bound)
    unlocked, objective = _if_orthogonal(problem, value)
    cause = "norms" if reach is not None and reach >= 1 - 1e-12 else "constants"
    return LeastTraining(cause, reach, gained, lost, unlocked, objective)


def _rows(problem: Problem) -> list[int]:
    return [row for row, item in enumerate(problem.variables) if item.field in TRAINING and item.upper > item.lower]


def _is_least(problem: Problem, point: FloatArray) -> bool:
    """All free learning rates and steps at (or within a per cent of) their lower limits."""
    rows = _rows(problem)
    return bool(rows) and all(point[row] <= problem.variables[row].lower * 1.01 for row in rows)


def _exchange(problem: Problem, point: FloatArray) -> tuple[float, float]:
    """What a tenth more training (relaxed to real numbers) takes from the training term and adds to the others."""
    more = point.copy()
    for row in _rows(problem):
        more[row] = min(point[row] * 1.1, problem.variables[row].upper)
    try:
        here, there = (
            [float(term.value) for term in master_bound(problem.candidate(x), recursion=False).terms]
            for x in (point, more)
        )
    except MergeboundError:  # a tenth more is outside the domain
        return 0.0, float("inf")
    with np.errstate(invalid="ignore"):
        change = np.nan_to_num(np.array(there) - np.array(here), nan=0.0, posinf=np.inf, neginf=-np.inf)
    return float(-change[0]), float(change[1] + change[2])


def _reach(bound: Bound) -> float | None:
    """Smallest ratio of an expert's distance to the merge, as the bound knows it, to its drift."""
    merge = bound.merge
    if merge is None or merge.dispersion is not None or any(row.drift is None for row in bound.experts):
        return None
    drift = np.array([float(np.asarray(row.drift)) for row in bound.experts])
    if not np.all(np.isfinite(drift) & (drift > 0)):
        return None
    alpha = np.asarray(coefficients(merge), dtype=np.float64)
    squares = np.square(task_distances(drift, alpha))
    if merge.orthogonal_task_vectors:
        squares = np.minimum(squares, orthogonal_distances(drift, alpha))
    return float(np.min(np.sqrt(squares) / drift))


def _if_orthogonal(problem: Problem, value: float) -> tuple[dict[str, float] | None, float | None]:
    """The choices and the bound with orthogonal task vectors, where that leads to more training."""
    merge = problem.merge
    if merge.size < 2 or merge.orthogonal_task_vectors or merge.dispersion is not None:
        return None, None
    other = replace(problem, merge=replace(merge, orthogonal_task_vectors=True))
    best, objective, _ = best_found(other, np.random.default_rng(0), STARTS)
    if not objective < value or _is_least(other, best):
        return None, None
    return {item.name: float(best[row]) for row, item in enumerate(problem.variables)}, objective
