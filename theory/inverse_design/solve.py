"""The question answered: search, proof, report; and how many experts to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from theory.checks import one_number, whole_number
from theory.errors import AssumptionError, RecipeError
from theory.inverse_design.branching import Proof, branch_and_bound
from theory.inverse_design.problem import Problem
from theory.inverse_design.question import (
    Budget,
    CostKind,
    RiskModel,
    check_budget,
    checked_budgets,
    read_variables,
    refuse_what_cannot_follow,
)
from theory.inverse_design.report import as_design
from theory.inverse_design.result import Design
from theory.inverse_design.search import best_found, descend, starting_points
from theory.recipe import Expert, Merge
from theory.risk import master_bound
from theory.symbolic import FloatArray


def design(
    merge: Merge,
    free: Mapping[str, tuple[float, float]],
    *,
    budgets: Sequence[Budget] = (),
    target: float | None = None,
    minimal_risk: float = 0.0,
    cost: Budget | CostKind = "samples",
    risk_models: Mapping[str, RiskModel] | None = None,
    tolerance: float = 0.01,
    boxes: int = 60_000,
    starts: int = 4096,
    seed: int = 0,
) -> Design:
    """Hyperparameters, coefficients or data shares that minimise the master bound, or the cheapest that meet a target.

    ``free`` maps a field to its limits (module docstring); ``budgets`` limit the total cost.  Without ``target`` the
    bound is minimised; with it, ``cost`` (a kind, or a :class:`Budget` whose limit is ignored) is minimised subject to
    ``bound - minimal_risk <= target``.  The training risk must follow the hyperparameters: by a bound of section 8
    (``initial_risk``, ``sigma``, ``minimal_risk`` with ``pl_constant``, ``mu`` or ``minimizer_distance``), or by
    ``risk_models``, a function of the expert (fields are arrays over candidates) per name; the tier is then estimated.
    ``"steps"`` or ``"all.steps"`` is one number common to all experts, ``"each.steps"`` or ``"*.steps"`` one per
    expert.  ``boxes`` limits branch and bound, which stops at a relative gap of ``tolerance``; ``starts`` and ``seed``
    fix the random sample.  Where the answer is only to train as little as allowed, ``least_training`` says why.

    Raises :class:`RecipeError` for a malformed question, a fixed field that would not follow, or a target that cannot
    be met (saying whether that is proven).  Source: theory section 11.

    >>> from theory import Expert, Merge
    >>> known = dict(n=1000, batch_size=10, learning_rate=0.1, steps=100, L=1.0, mu=0.9, D_inf=2.0,
    ...              curvature="strongly_convex", initial_gradient_norm=1.4, sigma=0.3, initial_risk=1.0,
    ...              minimal_risk=0.0)
    >>> merge = Merge((Expert("a", **known), Expert("b", **known)), orthogonal_task_vectors=True)
    >>> best = design(merge, {"learning_rate": (1e-3, 1.0), "steps": (1, 1000)}, budgets=[Budget("samples", 4000)])
    >>> best.cost["samples"] <= 4000 and best.gap <= 0.02
    True
    >>> best = design(replace(merge, orthogonal_task_vectors=False), {"all.steps": (1, 1000)})  # norms alone
    >>> best.choices["all.steps"], best.least_training.cause
    (1.0, 'norms')
    """
    if risk_models is not None and not isinstance(risk_models, Mapping):
        raise RecipeError(f"design: risk_models is {risk_models!r}; give a mapping from names of experts to functions")
    models = dict(risk_models or {})
    starts, seed = whole_number("design", "starts", starts, least=1), whole_number("design", "seed", seed)
    boxes, tolerance = whole_number("design", "boxes", boxes), one_number("design", "tolerance", tolerance, below=1)
    variables = read_variables(merge, free)
    refuse_what_cannot_follow(merge, variables, models)
    limits = checked_budgets(merge, budgets, target, minimal_risk)
    unit = cost if isinstance(cost, Budget) else Budget(cost, np.inf)
    check_budget(merge, unit, "cost")
    aim = None if target is None else target + minimal_risk
    problem = Problem(merge, variables, limits, aim, unit, models)
    rng = np.random.default_rng(seed)
    _first_answer(problem, starting_points(problem, rng, 64))
    best, value, agree = best_found(problem, rng, starts)
    proof: Proof | None = None
    reason = ""
    try:
        if models:
            raise AssumptionError("a risk model is not known to be monotone")
        proof = branch_and_bound(problem, value, tolerance, boxes)
        if proof.better is not None:
            moved, other = descend(problem, problem.snapped(proof.better[:, None])[:, 0], relaxed=False)
            if other < value:
                best, value = moved, other
    except AssumptionError as error:
        reason = str(error)
    if not np.isfinite(value):
        smallest = float(np.min(replace(problem, target=None).objective(starting_points(problem, rng, starts))))
        proven = proof is not None and proof.closed
        raise RecipeError(
            f"design: no recipe within limits and budgets {'can meet' if proven else 'was found that meets'} the "
            f"question (smallest bound seen: {smallest:g}); raise target or budgets, or widen the limits"
        )
    return as_design(problem, best, value, proof, reason, agree, starts)


def _first_answer(problem: Problem, sample: FloatArray) -> None:
    """One bound, so that what is missing in the recipe is said before anything is searched."""
    good = sample[:, problem.allowed(sample)]
    if good.shape[1] and not np.isfinite(problem.bounds(good)).any():
        master_bound(problem.candidate(good[:, 0]), recursion=False)


def design_number(
    expert: Expert,
    numbers: Sequence[int],
    free: Mapping[str, tuple[float, float]],
    **options: Any,
) -> dict[int, Design]:
    """How many experts to train: for every N, N copies of a recipe share the budgets and are averaged.

    ``options`` are those of :func:`design`; budgets are for all copies together, so more experts means less training
    (or data) for each, while the instability of the average falls with N.  The key of the smallest ``objective`` is
    the answer.  The copies have independent samples of the *same* size and constants.  Raises :class:`RecipeError`.

    >>> known = dict(n=1000, batch_size=10, learning_rate=0.1, steps=100, curvature="convex", L=1.0, D_inf=2.0)
    >>> known |= dict(initial_gradient_norm=1.0, sigma=1.0, initial_risk=1.0, minimal_risk=0.0, pl_constant=0.1)
    >>> found = design_number(Expert("a", **known), [1, 2], {"steps": (1, 100)}, budgets=[Budget("steps", 100)])
    >>> sorted(found), found[2].merge.size
    ([1, 2], 2)
    """
    if isinstance(numbers, (str, bytes)):
        raise RecipeError(f"design: numbers of experts is {numbers!r}; give whole numbers, as in range(1, 9)")
    counts = [whole_number("design", "one of the numbers of experts", number, least=1) for number in numbers]
    if not counts:
        raise RecipeError("design: numbers of experts is empty; give whole numbers of at least 1, as in range(1, 9)")
    found = {}
    for number in counts:
        copies = tuple(replace(expert, name=f"{expert.name} {index + 1}") for index in range(number))
        found[number] = design(Merge(copies), free, **options)
    return found
