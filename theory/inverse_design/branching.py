"""Branch and bound: how far the best recipe found is, at most, above the true minimum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from theory.enclosure import enclose
from theory.errors import AssumptionError
from theory.inverse_design.problem import Problem
from theory.inverse_design.search import repaired
from theory.recipe import Schedule
from theory.symbolic import FloatArray


@dataclass(frozen=True)
class Proof:
    """``lower``: no point has a smaller objective; ``closed``: all boxes settled; ``better``: a point seen below."""

    lower: float
    boxes: int
    closed: bool
    better: FloatArray | None


def _box_lower(problem: Problem, low: FloatArray, high: FloatArray) -> FloatArray:
    """Guaranteed lower end of the bound in every box, shape ``(boxes,)``."""
    ranges: dict[str, dict[str, tuple[FloatArray, FloatArray]]] = {}
    names = [expert.name for expert in problem.merge.experts]
    for row, item in enumerate(problem.variables):
        if item.field != "coefficients":
            for index in item.experts:
                if isinstance(problem.merge.experts[index].learning_rate, Schedule):
                    raise AssumptionError(f"expert {names[index]!r} has a schedule, whose peak is free")
                ranges.setdefault(names[index], {})[item.field] = (low[row], high[row])
    span = None
    if any(item.field == "coefficients" for item in problem.variables):
        size = range(problem.merge.size)
        ends = [np.stack([problem.column(end, "coefficients", i) for i in size]) for end in (low, high)]
        span = (ends[0], ends[1])
    return np.broadcast_to(enclose(problem.merge, ranges, coefficient_range=span, recursion=False).lower, low.shape[1:])


def branch_and_bound(problem: Problem, incumbent: float, tolerance: float, most: int) -> Proof:
    """Branch and bound: the smallest objective that any point of the design range can have."""
    low, high = problem.lower[:, None].copy(), problem.upper[:, None].copy()
    whole = np.array([item.whole for item in problem.variables])[:, None]
    ends, better, done = np.array([-np.inf]), None, 0
    width = np.maximum((np.log(high) - np.log(low))[:, 0], 1e-300)
    while True:
        cut = incumbent * (1 - tolerance)
        alive = ends < cut
        low, high, ends = low[:, alive], high[:, alive], ends[alive]
        if not len(ends):
            return Proof(cut, done, True, better)
        if done >= most:
            return Proof(float(min(cut, ends.min())), done, False, better)
        order = np.argsort(ends)
        take, keep = order[:1024], order[1024:]
        a, b = low[:, take], high[:, take]
        length = np.log(b) - np.log(a)
        spread = length / width[:, None] * np.where(length > 1e-9, 1, 0)
        longest = np.argmax(spread, axis=0)
        columns = np.arange(a.shape[1])
        middle = np.sqrt(a[longest, columns]) * np.sqrt(b[longest, columns])
        is_whole = whole[longest, 0]
        left_end = np.where(is_whole, np.floor(middle), middle)
        right_end = np.where(is_whole, np.floor(middle) + 1, middle)
        point = np.max(spread, axis=0) <= 0
        b_left, a_right = b.copy(), a.copy()
        b_left[longest, columns], a_right[longest, columns] = left_end, right_end
        b_left = np.where(point, b, b_left)
        new_low = np.concatenate([a, a_right[:, ~point]], axis=1)
        new_high = np.concatenate([b_left, b[:, ~point]], axis=1)
        done += new_low.shape[1]
        fits = _feasible(problem, new_low, new_high)
        new_low, new_high = new_low[:, fits], new_high[:, fits]
        if new_low.shape[1]:
            bound = _box_lower(problem, new_low, new_high)
            if problem.target is None:
                new_ends = bound
            else:
                new_ends = np.where(bound <= problem.target, problem.spent(new_low, problem.cost), np.inf)
            middles = repaired(problem, problem.snapped(np.sqrt(new_low) * np.sqrt(new_high)))
            found = problem.objective(middles)
            winner = int(np.argmin(found))
            if found[winner] < incumbent:
                incumbent, better = float(found[winner]), middles[:, winner]
            # a box that is one point is settled by its value
            single = np.all(np.log(new_high) - np.log(new_low) <= 1e-9, axis=0)
            new_ends = np.where(single, np.maximum(new_ends, cut), new_ends)
        else:
            new_ends = np.zeros(0)
        low = np.concatenate([low[:, keep], new_low], axis=1)
        high = np.concatenate([high[:, keep], new_high], axis=1)
        ends = np.concatenate([ends[keep], new_ends])


def _feasible(problem: Problem, low: FloatArray, high: FloatArray) -> np.ndarray:
    """Boxes that can hold an allowed point."""
    good = np.all(low <= high * (1 + 1e-12), axis=0)
    for budget in problem.budgets:
        good &= problem.spent(low, budget) <= budget.limit * (1 + 1e-12)
    for index, expert in enumerate(problem.merge.experts):
        if expert.sampling != "with_replacement":
            good &= problem.column(low, "batch_size", index) <= problem.column(high, "n", index)
    return np.asarray(good)
