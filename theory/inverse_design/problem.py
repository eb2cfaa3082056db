"""The minimisation behind a design: costs, candidates and their bounds, over columns of variables."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from theory.chunks import one_recipe
from theory.enclosure import unchecked
from theory.errors import AssumptionError
from theory.inverse_design.question import Budget, RiskModel, Variable
from theory.recipe import Expert, Merge, Schedule
from theory.risk import master_bound
from theory.symbolic import FloatArray


@dataclass(frozen=True, eq=False)
class Problem:
    """What is minimised, over columns of variables: arrays ``x`` have shape ``(variables, candidates)``."""

    merge: Merge
    variables: tuple[Variable, ...]
    budgets: tuple[Budget, ...]
    target: float | None
    cost: Budget
    models: Mapping[str, RiskModel]

    def __post_init__(self) -> None:
        """Refuse a merge over several configurations: candidates and configurations would share an axis."""
        one_recipe(self.merge, "design")

    @property
    def lower(self) -> FloatArray:
        """Lower limits, shape ``(variables,)``."""
        return np.array([item.lower for item in self.variables])

    @property
    def upper(self) -> FloatArray:
        """Upper limits, shape ``(variables,)``."""
        return np.array([item.upper for item in self.variables])

    def snapped(self, x: FloatArray) -> FloatArray:
        """Candidates with whole numbers where the field asks for them."""
        whole = np.array([item.whole for item in self.variables])[:, None]
        return np.where(whole, np.round(x), x)

    def column(self, x: FloatArray, field: str, index: int) -> FloatArray:
        """A field of an expert at every candidate; coefficients of the merge with field ``coefficients``."""
        for row, item in enumerate(self.variables):
            if item.field == field and index in item.experts:
                return np.asarray(x[row])
        if field == "coefficients":
            given = self.merge.coefficients if self.merge.coefficients is not None else self.merge.weights
            alpha = np.full(self.merge.size, 1 / self.merge.size) if given is None else np.asarray(given)
            return np.broadcast_to(np.broadcast_to(alpha, (self.merge.size,))[index], x.shape[1:]).astype(np.float64)
        expert = self.merge.experts[index]
        value: Any = getattr(expert, field)
        if field == "steps" and value is None:
            lengths = [item.steps for item in (expert.learning_rate, expert.batch_size) if isinstance(item, Schedule)]
            value = lengths[0]
        if isinstance(value, Schedule):
            value = value.values.mean() if field == "batch_size" else value.values.max()
        return np.broadcast_to(np.asarray(value, dtype=np.float64), x.shape[1:])

    def spent(self, x: FloatArray, budget: Budget) -> FloatArray:
        """Cost of every candidate in the unit of the budget, shape ``(candidates,)``."""
        total = np.zeros(x.shape[1:])
        for index, expert in enumerate(self.merge.experts):
            steps, batch = self.column(x, "steps", index), self.column(x, "batch_size", index)
            if budget.kind == "steps":
                total = total + steps
            elif budget.kind == "data":
                total = total + self.column(x, "n", index)
            else:
                price = budget.per_sample if budget.kind == "flops" else 1.0
                each = price[expert.name] if isinstance(price, Mapping) else price
                total = total + each * steps * batch
        return total

    def allowed(self, x: FloatArray) -> np.ndarray:
        """Candidates inside limits, budgets and the domain of the bound."""
        slack = 1 + 1e-12
        good = np.all((x >= self.lower[:, None] / slack) & (x <= self.upper[:, None] * slack), axis=0)
        for budget in self.budgets:
            good &= self.spent(x, budget) <= budget.limit * slack
        for index, expert in enumerate(self.merge.experts):
            if expert.sampling != "with_replacement":
                good &= self.column(x, "batch_size", index) <= self.column(x, "n", index)
            if expert.kappa is not None:
                rate = self.column(x, "learning_rate", index)
                good &= 1 + rate * np.asarray(expert.kappa, dtype=np.float64) >= 0
        return np.asarray(good)

    def candidate(self, x: FloatArray) -> Merge:
        """The merge with every free field set; fields have the shape of the candidates, and are not checked again."""
        made: list[Expert] = []
        for index, expert in enumerate(self.merge.experts):
            changes: dict[str, Any] = {}
            for row, item in enumerate(self.variables):
                if index not in item.experts or item.field == "coefficients":
                    continue
                value: Any = x[row]
                if item.field == "learning_rate" and isinstance(expert.learning_rate, Schedule):
                    shape = expert.learning_rate.values
                    value = Schedule(np.asarray(value)[..., None] * (shape / shape.max()))
                changes[item.field] = value
            new = unchecked(expert, **changes)
            if expert.name in self.models:
                new = unchecked(new, training_risk=np.asarray(self.models[expert.name](new), dtype=np.float64))
                new = unchecked(new, measured=new.measured | {"training_risk"})
            made.append(new)
        extra: dict[str, Any] = {}
        if any(item.field == "coefficients" for item in self.variables):
            extra["coefficients"] = np.stack([self.column(x, "coefficients", i) for i in range(self.merge.size)])
        return replace(self.merge, experts=tuple(made), **extra)

    def bounds(self, x: FloatArray) -> FloatArray:
        """Master bound of every candidate, without the recursions; ``inf`` outside the domain."""
        value = np.full(x.shape[1], np.inf)
        good = self.allowed(x)
        if not good.any():
            return value
        with contextlib.suppress(AssumptionError):  # no candidate is in the domain of any form
            value[good] = master_bound(self.candidate(x[:, good]), recursion=False).value
        return np.where(np.isnan(value), np.inf, value)

    def objective(self, x: FloatArray) -> FloatArray:
        """What is minimised: the bound, or the cost where the bound meets the target and ``inf`` elsewhere."""
        value = self.bounds(x)
        if self.target is None:
            return value
        return np.where(value <= self.target, self.spent(x, self.cost), np.inf)
