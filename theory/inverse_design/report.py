"""Reading a solution: limits reached, shadow prices, sensitivities, evidence."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from theory.enclosure import unchecked
from theory.errors import RecipeError
from theory.inverse_design.branching import Proof
from theory.inverse_design.diagnosis import least_training
from theory.inverse_design.problem import Problem
from theory.inverse_design.question import WHOLE, Budget
from theory.inverse_design.result import Design, Sensitivity, ShadowPrice
from theory.inverse_design.search import descend, repaired
from theory.recipe import Expert, Merge, Schedule
from theory.risk import master_bound
from theory.symbolic import FloatArray

SENSITIVE = (
    *("learning_rate", "steps", "batch_size", "n", "weight_decay", "L", "mu", "kappa", "pl_constant"),
    *("initial_gradient_norm", "sigma", "sigma0", "G", "D_inf", "D_2", "D_envelope", "initial_risk", "minimal_risk"),
    "training_risk",
)


def as_design(
    problem: Problem, best: FloatArray, value: float, proof: Proof | None, reason: str, agree: str, starts: int
) -> Design:
    """The best point as a :class:`Design` with its costs, limits, prices, sensitivities and evidence."""
    point = problem.snapped(best[:, None])[:, 0]
    merge = _final(problem, point)
    bound = master_bound(merge)
    kinds: dict[str, Budget] = {"samples": Budget("samples", 1), "steps": Budget("steps", 1), "data": Budget("data", 1)}
    kinds |= {budget.kind: budget for budget in (*problem.budgets, problem.cost)}
    cost = {kind: float(problem.spent(point[:, None], budget)[0]) for kind, budget in kinds.items()}
    lower = None if proof is None else min(proof.lower, value)
    gap = None if lower is None else (value - lower) / value if value > 0 else 0.0
    if proof is None:
        evidence = f"no proven gap ({reason}); {agree}, from {starts} random recipes"
    else:
        state = "closed" if proof.closed else "stopped at its limit of boxes"
        evidence = (
            f"branch and bound on {proof.boxes} boxes ({state}): no recipe of the design range is below {lower:.6g} "
            f"(gap {100 * (gap or 0):.2f} %); {agree}"
        )
    term = max(bound.terms, key=lambda item: float(item.share)).name
    return Design(
        merge=merge,
        bound=bound,
        objective=value,
        choices={item.name: float(point[row]) for row, item in enumerate(problem.variables)},
        cost=cost,
        active_term=term,
        limits=_reached(problem, point),
        shadow_prices=_prices(problem, point),
        sensitivities=_sensitivities(problem, point),
        lower_bound=lower,
        gap=gap,
        evidence=evidence,
        least_training=least_training(problem, point, value, bound),
    )


def _final(problem: Problem, point: FloatArray) -> Merge:
    """The chosen merge with checked experts and plain numbers."""
    relaxed = problem.candidate(point)
    made = []
    for expert in relaxed.experts:
        values = {item.name: getattr(expert, item.name) for item in fields(Expert)}
        for name, value in values.items():
            if isinstance(value, (np.ndarray, np.floating)) and np.ndim(value) == 0:
                values[name] = int(value) if name in WHOLE else float(value)
        made.append(Expert(**values))
    return replace(relaxed, experts=tuple(made))


def _reached(problem: Problem, point: FloatArray) -> tuple[str, ...]:
    found = []
    for row, item in enumerate(problem.variables):
        if point[row] <= item.lower * (1 + 1e-6):
            found.append(f"{item.name} at its lower limit")
        elif point[row] >= item.upper * (1 - 1e-6):
            found.append(f"{item.name} at its upper limit")
    for budget in problem.budgets:
        # whole steps rarely use a budget to the last unit: one more step of the largest kind would exceed it
        spent = problem.spent(point[:, None], budget)[0]
        units = [0.0]
        for row, item in enumerate(problem.variables):
            if item.whole and point[row] < item.upper:
                more = point.copy()
                more[row] += 1
                units.append(float(problem.spent(more[:, None], budget)[0] - spent))
        if spent + max(units) > budget.limit * (1 + 1e-12) or spent >= budget.limit * (1 - 1e-6):
            found.append(f"budget of {budget.kind}")
    for index, expert in enumerate(problem.merge.experts):
        if expert.sampling != "with_replacement" and any(
            item.field == "batch_size" and index in item.experts for item in problem.variables
        ):
            b, n = (float(problem.column(point[:, None], field, index)[0]) for field in ("batch_size", "n"))
            if b >= n:
                found.append(f"full batch of expert {expert.name!r}")
    if problem.target is not None:
        found.append("target")
    return tuple(dict.fromkeys(found))


def _prices(problem: Problem, point: FloatArray, step: float = 0.02) -> tuple[ShadowPrice, ...]:
    """Every limit moved by a few per cent both ways and the relaxed problem solved again from the design."""

    def solved(changed: Problem) -> float:
        start = repaired(changed, point[:, None])[:, 0]
        if not np.isfinite(changed.objective(start[:, None])[0]) and changed.target is not None:
            start, _ = descend(replace(changed, target=None), start, relaxed=True)
        return descend(changed, start, relaxed=True)[1]

    made = []
    for place, budget in enumerate(problem.budgets):
        ends = []
        for sign in (1, -1):
            moved = list(problem.budgets)
            moved[place] = replace(budget, limit=budget.limit * (1 + sign * step))
            ends.append(solved(replace(problem, budgets=tuple(moved))))
        made.append(_price(f"budget of {budget.kind}", ends, budget.limit, step))
    if problem.target is not None:
        ends = [solved(replace(problem, target=problem.target * (1 + sign * step))) for sign in (1, -1)]
        made.append(_price("target", ends, problem.target, step))
    return tuple(made)


def _price(name: str, ends: list[float], limit: float, step: float) -> ShadowPrice:
    more, less = ends
    if not (np.isfinite(more) and np.isfinite(less)):
        return ShadowPrice(name, -np.inf, -np.inf, step)
    price = (more - less) / (2 * step * limit)
    ratio = np.log(more / less) / np.log((1 + step) / (1 - step)) if more > 0 and less > 0 else 0.0
    return ShadowPrice(name, float(price), float(ratio), step)


def _sensitivities(problem: Problem, point: FloatArray, step: float = 1e-4) -> tuple[Sensitivity, ...]:
    base = problem.candidate(point)
    here = {(item.field, index) for item in problem.variables for index in item.experts}
    made = []
    for index, expert in enumerate(base.experts):
        for field in SENSITIVE:
            value = getattr(expert, field)
            if value is None or isinstance(value, Schedule) or np.ndim(value) != 0 or float(value) == 0:
                continue
            ends = []
            for sign in (1, -1):
                changed = unchecked(expert, **{field: np.asarray(float(value) * (1 + sign * step))})
                experts = (*base.experts[:index], changed, *base.experts[index + 1 :])
                try:
                    ends.append(float(master_bound(replace(base, experts=experts), recursion=False).value))
                except RecipeError:  # the end of the domain, for example a learning rate of 1/L
                    ends.append(float(master_bound(base, recursion=False).value))
            if not (np.isfinite(ends).all() and min(ends) > 0):
                continue
            both = 2 if ends[0] != ends[1] else 1
            slope = float(np.log(ends[0] / ends[1]) / np.log((1 + step) / (1 - step))) if both == 2 else 0.0
            role = "free" if (field, index) in here else "fixed"
            made.append(Sensitivity(expert.name, field, slope, role))
    return tuple(made)
