"""What every published bound shares: the object it returns, the claims it needs, and how tasks are added up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from theory.assemble import base_assumptions, measured_run
from theory.assumptions import Assumption, Tier, tier_of
from theory.clocks import _stepwise, require_sgd, smoothness, step_count
from theory.errors import AssumptionError, RecipeError
from theory.operators import operator_assumptions, sensitivity
from theory.recipe import Expert, Merge, Schedule, per_expert
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous

Quantity = Literal["gap", "instability", "training", "risk"]

MEANING: dict[Quantity, str] = {
    "gap": "E[F(M) - F_S(M)]",
    "instability": "I in sqrt(E F(M)) <= sqrt(E F_S(M)) + sqrt(I)",
    "training": "E F_S(M)",
    "risk": "E F(M)",
}


@dataclass(frozen=True, eq=False)
class PublishedBound:
    """A bound from the literature on one recipe.

    ``value`` (loss, shape ``(...)``, ``inf`` where vacuous) bounds the ``quantity`` (see :data:`MEANING`); ``formula``
    is what one expert (or the merge, for bounds that do not add up over experts) contributes; ``source`` names paper
    and statement; ``checked`` says against which text the constants were checked and what is ours.
    """

    name: str
    quantity: Quantity
    value: FloatArray
    tier: Tier
    formula: Formula
    assumptions: tuple[Assumption, ...]
    measured: tuple[str, ...]
    source: str
    checked: str

    @property
    def vacuous(self) -> np.ndarray:
        """Where the bound is infinite and says nothing."""
        return np.isinf(self.value)

    @property
    def symbolic(self) -> Any:
        """The contribution of one expert as a sympy expression in the glossary's symbols."""
        return self.formula.expression

    def latex(self) -> str:
        """LaTeX of :attr:`symbolic`."""
        return self.formula.latex()


def numbers(field: str, value: object, *, positive: bool = False) -> FloatArray:
    """A finite nonnegative (or positive) number or array given next to the recipe; :class:`RecipeError` otherwise."""
    if isinstance(value, bool) or value is None:
        raise RecipeError(f"{field} is {value!r}; give a number")
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(
            f"{field} is not a number or an array of numbers ({str(value)[:80]}); give numbers"
        ) from error
    good = np.isfinite(array) & (array > 0 if positive else array >= 0)
    if array.size == 0 or not good.all():
        raise RecipeError(f"{field} is {value!r}; give finite numbers {'above' if positive else 'of at least'} 0")
    return array


def constants(merge: Merge, field: Literal["G", "B"], bound: str) -> FloatArray:
    """``G`` or ``B`` of every expert, shape ``(N, ...)``; :class:`RecipeError` naming the expert that lacks it."""
    meaning = {"G": "the Lipschitz constant of its per-sample losses", "B": "the largest value of its losses"}[field]
    values = []
    for expert in merge.experts:
        value = getattr(expert, field)
        if value is None:
            raise RecipeError(f"expert {expert.name!r}: {field} is missing; {bound} needs {meaning}")
        values.append(np.asarray(value, dtype=np.float64))
    return stack(values)


def refuse_merge(merge: Merge, bound: str) -> None:
    """What no published bound covers: broken A1, A2, A3, and private trained heads."""
    if merge.shared_samples:
        raise AssumptionError(f"merge: shared_samples is true (A1 is broken), which {bound} does not cover")
    if merge.data_independent_choices is False:
        raise AssumptionError(f"merge: data_independent_choices is false (A2 is broken), which {bound} does not cover")
    if merge.per_sample_loss is False:
        raise AssumptionError(f"merge: per_sample_loss is false (A3 is broken), which {bound} does not cover")
    for expert in merge.experts:
        if expert.head == "trained":
            raise AssumptionError(
                f"expert {expert.name!r}: head is 'trained', which {bound} does not cover (the merge divides the "
                "sensitivity of shared parameters only); give head='frozen' if it was frozen"
            )


def require_plain_sgd(expert: Expert, bound: str) -> None:
    """No momentum, no weight decay, no clipping, no other optimizer: what the papers analyse."""
    require_sgd(expert)
    if np.any(np.asarray(expert.momentum) != 0):
        raise AssumptionError(f"expert {expert.name!r}: momentum is not 0, which {bound} does not cover")
    if np.any(np.asarray(expert.weight_decay) != 0):
        raise AssumptionError(f"expert {expert.name!r}: weight_decay is not 0, which {bound} does not cover")


def require_convex(expert: Expert, bound: str) -> None:
    """Per-sample convexity as stated by the recipe."""
    if expert.curvature not in ("convex", "strongly_convex"):
        raise AssumptionError(
            f"expert {expert.name!r}: curvature is {expert.curvature!r}, but {bound} needs convex per-sample losses"
        )


def require_rate(expert: Expert, limit: float, bound: str) -> None:
    """Every learning rate at most ``limit / L``."""
    rates, L = _stepwise(expert.learning_rate), smoothness(expert)[..., None]
    if np.any(rates * L > limit * (1 + 1e-12)):
        raise AssumptionError(
            f"expert {expert.name!r}: learning_rate exceeds {limit:g}/L, which {bound} needs; reduce it"
        )


def rate_sum(expert: Expert) -> FloatArray:
    """T, the sum of learning rates, shape ``(...)``."""
    if isinstance(expert.learning_rate, Schedule):
        return np.asarray(expert.learning_rate.values.sum(axis=-1))
    return np.asarray(np.asarray(expert.learning_rate, dtype=np.float64) * step_count(expert))


def align(*arrays: FloatArray) -> list[FloatArray]:
    """Per-expert arrays ``(N, ...)`` of different depth, broadcast over configurations."""
    depth = max(array.ndim for array in arrays)
    return list(np.broadcast_arrays(*(a.reshape(a.shape[:1] + (1,) * (depth - a.ndim) + a.shape[1:]) for a in arrays)))


def stack(values: Sequence[FloatArray]) -> FloatArray:
    """One array ``(N, ...)`` from one array per expert."""
    return np.stack(np.broadcast_arrays(*values))


@np.errstate(all="ignore")
def weighted(merge: Merge, values: FloatArray) -> FloatArray:
    """``sum_i p_i v_i`` with ``0 * inf = 0``; ``values`` has shape ``(N, ...)``."""
    p, v = align(per_expert(merge, "weights"), values)
    return np.asarray(times(p, v).sum(axis=0))


def sensitivities(merge: Merge) -> FloatArray:
    """Sensitivity c_i of the merge to expert i, shape ``(N, ...)``."""
    return sensitivity(merge)


@vacuous
def evaluated(formula: Callable[[], Formula], rows: Sequence[FloatArray]) -> FloatArray:
    """A formula on rows of arguments; what overflows or is undefined is ``inf``."""
    return evaluate(formula, *rows)


def single_samples(expert: Expert, bound: str) -> None:
    """Batches of one sample."""
    if np.any(_stepwise(expert.batch_size) != 1):
        raise AssumptionError(f"expert {expert.name!r}: batch_size is not 1, which {bound} needs")


def lipschitz_assumption(merge: Merge) -> Assumption:
    """The verdict on Lipschitz losses, from whether G was measured."""
    return stated("Lipschitz", "per-sample losses are G-Lipschitz on every reachable x", "G", merge)


def bounded_assumption(merge: Merge) -> Assumption:
    """The verdict on bounded losses, from whether B was measured."""
    return stated("bounded", "0 <= f <= B everywhere", "B", merge)


def used(merge: Merge, names: Sequence[str], extra: Collection[str] = ()) -> tuple[str, ...]:
    """Measured inputs behind a bound, for its tier: fields of experts, and arguments declared as measured."""
    found = [
        f"{expert.name}: {field}"
        for expert in merge.experts
        for field in expert.is_measured(*names)
        if getattr(expert, field) is not None
    ]
    if operator_assumptions(merge) or (merge.sensitivity is not None and "sensitivity" in merge.measured):
        found.append("merge: sensitivity")
    return tuple(dict.fromkeys([*found, *measured_run(merge), *extra]))


def published(
    merge: Merge,
    name: str,
    quantity: Quantity,
    value: FloatArray,
    formula: Formula,
    *,
    needs: Sequence[Assumption],
    measured: tuple[str, ...],
    source: str,
    checked: str,
) -> PublishedBound:
    """Put a bound together: the common assumptions A1-A4 with verdicts, its own, and the tier that follows."""
    common = base_assumptions(
        shared=merge.shared_samples,
        choices=merge.data_independent_choices,
        per_sample=merge.per_sample_loss,
        measured_smoothness=any("L" in expert.measured for expert in merge.experts),
        held_out=False,
    )
    assumptions = (*common, *needs)
    return PublishedBound(
        name=name,
        quantity=quantity,
        value=np.asarray(value, dtype=np.float64),
        tier=tier_of(assumptions, measured),
        formula=formula,
        assumptions=assumptions,
        measured=measured,
        source=source,
        checked=checked,
    )


def stated(name: str, statement: str, field: str, merge: Merge) -> Assumption:
    """An assumption that a constant of the recipe vouches for: it holds if that is known, unknown if measured."""
    if any(field in expert.measured for expert in merge.experts):
        return Assumption(name, statement, "unknown", f"{field} was measured at points, not everywhere")
    return Assumption(name, statement, "holds", f"{field} is stated as known")
