"""Random starts and a pattern search on whole steps, batches and samples: the best recipe found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from theory.inverse_design.problem import Problem
from theory.symbolic import FloatArray

_SIZES = 4  # step sizes of the pattern search that are bounded at once


def repaired(problem: Problem, x: FloatArray) -> FloatArray:
    """Candidates moved back into the budgets by fewer steps, smaller batches, fewer samples (in this order)."""
    x = x.copy()
    for budget in problem.budgets:
        order = ("n",) if budget.kind == "data" else ("steps", "batch_size")
        for field in order:
            rows = [row for row, item in enumerate(problem.variables) if item.field == field]
            for _ in range(3):
                with np.errstate(over="ignore"):
                    over = np.maximum(problem.spent(x, budget) / budget.limit, 1.0)
                for row in rows:
                    moved = np.floor(x[row] / over) if problem.variables[row].whole else x[row] / over
                    x[row] = np.where(over > 1, np.maximum(moved, problem.variables[row].lower), x[row])
    return x


def starting_points(problem: Problem, rng: np.random.Generator, count: int) -> FloatArray:
    """Random candidates within limits and budgets, with both ends and the middle, shape ``(variables, count)``."""
    low, high = np.log(problem.lower)[:, None], np.log(problem.upper)[:, None]
    shares = rng.random((len(problem.variables), count))
    shares[:, 0], shares[:, 1], shares[:, 2] = 0.0, 1.0, 0.5
    x = problem.snapped(np.exp(low + (high - low) * shares))
    for index, expert in enumerate(problem.merge.experts):
        if expert.sampling == "with_replacement":
            continue
        for row, item in enumerate(problem.variables):
            if item.field == "batch_size" and index in item.experts:
                x[row] = np.minimum(x[row], problem.column(x, "n", index))
    return repaired(problem, x)


def _pattern(count: int) -> FloatArray:
    """Directions of the pattern search: one variable, and two together or against each other; ``(variables, m)``."""
    single = np.eye(count)
    pairs = [single[i] + sign * single[j] for i in range(count) for j in range(i) for sign in (1.0, -1.0)]
    ways = np.array([*single, *pairs]).T
    return np.concatenate([ways, -ways], axis=1)


def descend(problem: Problem, start: FloatArray, *, relaxed: bool) -> tuple[FloatArray, float]:
    """Pattern search in logarithms from one point, then by single steps, batches and samples."""
    ways = _pattern(len(problem.variables))
    whole = np.array([item.whole for item in problem.variables])[:, None]
    best = start.copy()
    value = float(problem.objective(best[:, None])[0])

    def improve(*groups: FloatArray) -> int | None:
        """Move to the best point of the first group that improves, and its number; all groups are bounded at once."""
        nonlocal best, value
        trial = np.concatenate(groups, axis=1)
        if not relaxed:
            trial = problem.snapped(trial)
        trial = np.clip(trial, problem.lower[:, None], problem.upper[:, None])
        found = problem.objective(trial)
        start = 0
        for number, group in enumerate(groups):
            winner = start + int(np.argmin(found[start : start + group.shape[1]]))
            if found[winner] < value * (1 - 1e-12):
                best, value = trial[:, winner], float(found[winner])
                return number
            start += group.shape[1]
        return None

    size, finest = 0.5, 1e-6 if relaxed else 1e-5
    while size > finest:
        sizes = [size / 2**halvings for halvings in range(_SIZES) if size / 2**halvings > finest]
        better = improve(*(best[:, None] * np.exp(one * ways) for one in sizes))
        size = sizes[-1] / 2 if better is None else sizes[better]
    if not relaxed:
        for _ in range(200):
            near = best[:, None] + np.where(whole, 1, 0) * np.concatenate([ways, 2 * ways, 5 * ways], axis=1)
            fine = near * np.exp(np.where(whole, 0, 1e-3) * np.tile(ways, 3))
            if improve(np.concatenate([near, fine], axis=1), best[:, None] * np.exp(1e-4 * ways)) is None:
                break
    return best, value


def best_found(problem: Problem, rng: np.random.Generator, starts: int) -> tuple[FloatArray, float, str]:
    """Best point and objective from the best random starts, and how well the starts agree."""
    sample = starting_points(problem, rng, max(starts, 8))
    found = problem.objective(sample)
    if problem.target is not None and not np.isfinite(found).any():
        # meet the target first: go down the bound
        easier = replace(problem, target=None)
        order = np.argsort(easier.objective(sample))[:4]
        points = [descend(easier, sample[:, place], relaxed=False)[0] for place in order]
        sample = np.stack(points, axis=1)
        found = problem.objective(sample)
    order = np.argsort(found)
    chosen: list[int] = []
    for place in order:
        far = all(np.max(np.abs(np.log(sample[:, place]) - np.log(sample[:, other]))) > 0.3 for other in chosen)
        if np.isfinite(found[place]) and far:
            chosen.append(int(place))
        if len(chosen) == 4:
            break
    if not chosen:
        return sample[:, 0], float("inf"), "no allowed recipe in the sample"
    ends = [descend(problem, sample[:, place], relaxed=False) for place in chosen]
    best, value = min(ends, key=lambda item: item[1])
    close = sum(end <= value * 1.01 for _, end in ends)
    return best, value, f"{close} of {len(ends)} starts end within 1 % of the best"
