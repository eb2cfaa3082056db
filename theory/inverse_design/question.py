"""What is asked of a design: free fields with their limits, budgets, and what cannot be answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from theory.addressing import field_of, groups_of
from theory.checks import one_number
from theory.errors import RecipeError, nearest
from theory.recipe import LOGS, Expert, Merge, Schedule, _numbers

CostKind = Literal["samples", "steps", "flops", "data"]
RiskModel = Callable[[Expert], ArrayLike]
EXPERT_FIELDS = ("learning_rate", "steps", "batch_size", "n")
WHOLE = ("steps", "batch_size", "n")
BOUND_TO_A_RUN = ("training_risk", "drift", "private_drift", "epsilon", *LOGS)


@dataclass(frozen=True)
class Budget:
    """A limit on what all experts together may use.

    ``samples``: gradients of single samples, ``sum K_i b_i``; ``steps``: ``sum K_i``; ``flops``: ``sum c_i K_i b_i``
    with ``per_sample`` c (FLOPs per sample and step, one number or one per expert name); ``data``: ``sum n_i``.
    """

    kind: CostKind
    limit: float
    per_sample: float | Mapping[str, float] = 1.0


@dataclass(frozen=True)
class Variable:
    """One free number: its name as reported, the field, the experts that share it, and its limits."""

    name: str
    field: str
    experts: tuple[int, ...]
    lower: float
    upper: float

    @property
    def whole(self) -> bool:
        """Whether only whole numbers make sense."""
        return self.field in WHOLE


def read_variables(merge: Merge, free: Mapping[str, tuple[float, float]]) -> tuple[Variable, ...]:
    """The free fields as variables; raises :class:`RecipeError` for what names nothing or is free twice."""
    names = [expert.name for expert in merge.experts]
    made: list[Variable] = []
    for key, limits in free.items():
        field = field_of(key)
        if field not in (*EXPERT_FIELDS, "coefficients"):
            raise RecipeError(
                f"design: {key!r} cannot be free; choose {', '.join(EXPERT_FIELDS)} or coefficients, with 'all.' (one "
                "number for all experts), 'each.' (one per expert) or an expert's name in front"
            )
        groups = groups_of(key, names, "design")
        try:
            low, high = (float(limit) for limit in limits)
        except (TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"design: {key!r} needs two limits (lower, upper); give two numbers") from error
        if not (0 < low <= high < np.inf):
            raise RecipeError(f"design: the limits of {key!r} are {limits}; give 0 < lower <= upper")
        if field in WHOLE:
            low, high = float(np.ceil(low)), float(np.floor(high))
            if low > high:
                raise RecipeError(f"design: there is no whole number between the limits of {key!r}; widen them")
        made += [Variable(name, field, experts, low, high) for name, experts in groups]
    if not made:
        raise RecipeError("design: nothing is free; name at least one field with its limits")
    taken = [(item.field, index) for item in made for index in item.experts]
    twice = sorted({pair for pair in taken if taken.count(pair) > 1})
    if twice:
        raise RecipeError(f"design: {twice[0][0]} of expert {names[twice[0][1]]!r} is free twice; name it once")
    return tuple(made)


def refuse_what_cannot_follow(merge: Merge, variables: Sequence[Variable], models: Mapping[str, RiskModel]) -> None:
    """Raise :class:`RecipeError` for fixed fields that belong to one run and would not follow the free ones."""
    moved = {index for item in variables if item.field in EXPERT_FIELDS for index in item.experts}
    for index in sorted(moved):
        expert = merge.experts[index]
        for field in BOUND_TO_A_RUN:
            if getattr(expert, field) is None or (field == "training_risk" and expert.name in models):
                continue
            remedy = (
                "leave it out and give initial_risk, sigma, minimal_risk and one of pl_constant, mu and "
                "minimizer_distance, or a model in risk_models"
                if field == "training_risk"
                else "leave it out and give the constants that the theorems need"
            )
            raise RecipeError(
                f"expert {expert.name!r}: {field} belongs to one run and would not follow the free fields; {remedy}"
            )
        scheduled = isinstance(expert.learning_rate, Schedule) or isinstance(expert.batch_size, Schedule)
        fields_free = {item.field for item in variables if index in item.experts}
        if scheduled and "steps" in fields_free:
            raise RecipeError(
                f"expert {expert.name!r}: steps cannot be free with a schedule; design every length by itself, or use "
                "a constant learning rate and batch size"
            )
        if isinstance(expert.batch_size, Schedule) and "batch_size" in fields_free:
            raise RecipeError(f"expert {expert.name!r}: batch_size is a schedule; give one number to make it free")
    if merge.dispersion is not None:
        raise RecipeError("merge: dispersion was measured at one recipe and would not follow; leave it out")
    if any(item.field == "coefficients" for item in variables):
        if merge.method not in ("weighted", "task_arithmetic"):
            raise RecipeError(
                f"merge: method {merge.method!r} has no free coefficients; choose 'weighted' or 'task_arithmetic'"
            )
        if merge.sensitivity is not None:
            raise RecipeError("merge: sensitivity was given for fixed coefficients; leave it out")
    for item in merge.experts:
        for entry in fields(Expert):
            value = getattr(item, entry.name)
            if not isinstance(value, (Schedule, str, frozenset, bool)) and np.ndim(value) != 0:
                raise RecipeError(f"expert {item.name!r}: {entry.name} is an array; design takes one recipe")


def check_budget(merge: Merge, budget: Budget, role: str) -> None:
    """Raise :class:`RecipeError` for an unknown kind of cost, a limit that is not positive, or a malformed price."""
    if not isinstance(budget, Budget):
        raise RecipeError(f"design: a {role} is {str(budget)[:40]}; give Budget(kind, limit)")
    if not isinstance(budget.kind, str) or budget.kind not in get_args(CostKind):
        raise RecipeError(f"design: {role} {str(budget.kind)[:40]!r}; choose one of {', '.join(get_args(CostKind))}")
    limit = _numbers("design", f"the {budget.kind} budget", budget.limit)
    if limit.ndim or not limit > 0:
        raise RecipeError(f"design: the {budget.kind} budget is {str(budget.limit)[:40]}; give a positive number")
    if not isinstance(budget.per_sample, Mapping):
        one_number("design", "per_sample", budget.per_sample)
        return
    names = [item.name for item in merge.experts]
    missing = [name for name in names if name not in budget.per_sample]
    if missing:
        raise RecipeError(f"design: per_sample lacks expert {missing[0]!r}; give one number per expert")
    for name, price in budget.per_sample.items():
        if name not in names:
            raise RecipeError(
                f"design: per_sample names {str(name)[:40]!r}, which is no expert; {nearest(name, names)}"
            )
        one_number("design", f"per_sample of expert {name!r}", price)


def checked_budgets(
    merge: Merge, budgets: Sequence[Budget], target: float | None, minimal_risk: float
) -> tuple[Budget, ...]:
    """The finite budgets; raises :class:`RecipeError` for malformed budgets, target or minimal risk."""
    for budget in budgets:
        check_budget(merge, budget, "budget")
    for name, value in (("target", target), ("minimal_risk", minimal_risk)):
        if value is not None:
            one_number("design", name, value)
    return tuple(budget for budget in budgets if np.isfinite(budget.limit))
