"""The answer of a design as an object that explains itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from theory.addressing import is_common, scope_of
from theory.bound import Bound, _table
from theory.inverse_design.least_training import LeastTraining
from theory.recipe import Merge


@dataclass(frozen=True)
class ShadowPrice:
    """What one more unit is worth at the optimum: ``d objective / d limit``, and the elasticity of the two.

    ``step`` is the relative change of the limit over which the problem was solved again (relaxed to real numbers).
    """

    name: str
    price: float
    elasticity: float
    step: float


@dataclass(frozen=True)
class Sensitivity:
    """``d log(bound) / d log(field)`` of one expert at the design, everything else fixed; ``role`` free or fixed.

    For a fixed field this is also the sensitivity of the *optimal* bound (envelope theorem).
    """

    expert: str
    field: str
    elasticity: float
    role: str


@dataclass(frozen=True, eq=False)
class Design:
    """A recipe chosen by :func:`design`, with the evidence that it is (nearly) the best.

    ``merge`` is the recipe with every field set, ``bound`` its master bound; ``objective`` the minimised number (the
    bound without the step-by-step recursions, or the cost); ``choices`` the value of every free variable; ``cost`` all
    kinds of cost; ``active_term`` the largest term; ``limits`` which limits and budgets are reached.  ``lower_bound``:
    no recipe of the design range has a smaller objective (None where not proven); ``gap`` the relative difference.
    ``least_training`` is set where the answer is only "train as little as allowed", with the reason and the remedy.
    """

    merge: Merge
    bound: Bound
    objective: float
    choices: Mapping[str, float]
    cost: Mapping[str, float]
    active_term: str
    limits: tuple[str, ...]
    shadow_prices: tuple[ShadowPrice, ...]
    sensitivities: tuple[Sensitivity, ...]
    lower_bound: float | None
    gap: float | None
    evidence: str
    least_training: LeastTraining | None = None

    def explain(self) -> str:
        """Readable report: choices, costs, active term and limits, shadow prices, sensitivities, evidence."""
        lines = [f"E F(M) <= {float(self.bound.value):.4g}   (tier: {self.bound.tier})", ""]
        size = self.merge.size
        rows = [
            (name, f"{value:.6g}", scope_of(range(size) if is_common(name) else (0,), size, name))
            for name, value in self.choices.items()
        ]
        lines += _table([("free", "value", "is"), *rows])
        if self.least_training is not None:
            lines += ["", self.least_training.explain()]
        lines += ["", *_table([("cost", "used"), *((name, f"{value:.6g}") for name, value in self.cost.items())])]
        lines += ["", f"active term: {self.active_term}", "limits reached: " + (", ".join(self.limits) or "none")]
        if self.shadow_prices:
            rows = [(item.name, f"{item.price:.4g}", f"{item.elasticity:.3f}") for item in self.shadow_prices]
            lines += ["", *_table([("limit", "price per unit", "elasticity"), *rows])]
        table = [(item.expert, item.field, f"{item.elasticity:+.3f}", item.role) for item in self.sensitivities]
        lines += ["", *_table([("expert", "field", "elasticity of the bound", "role"), *table])]
        lines += ["", self.evidence]
        lines.append("constants of the loss are taken to hold on the whole design range")
        return "\n".join(lines)
