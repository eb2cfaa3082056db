"""Questions about recipes (design, intervals, comparison, laws) asked with junk: typed refusals, never NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from theory import (
    Budget,
    Expert,
    Merge,
    MergeboundError,
    OneOf,
    Range,
    RecipeError,
    bound_interval,
    compare,
    consistency,
    design,
    design_number,
    fit_merging_law,
    master_bound,
    task_vectors,
)

JUNK: tuple[Any, ...] = (
    *(None, True, "ten", "", b"1", float("nan"), float("inf"), -float("inf"), -1, 1.5, 1 + 2j, 10**400, 5e-324),
    *([], [[]], [1, "x"], {}, {"a": 1}, object(), np.array([]), np.array([1.0, np.nan]), np.ones((2, 3)), type),
)
KNOWN: dict[str, Any] = dict(
    n=1000, batch_size=10, learning_rate=0.1, steps=5, curvature="convex", L=1.0, D_inf=2.0, initial_gradient_norm=1.0,
    sigma=0.5, initial_risk=1.0, minimal_risk=0.0, pl_constant=0.1, G=2.0, B=4.0,
)  # fmt: skip
PAIR = Merge((Expert("a", **KNOWN), Expert("b", **KNOWN)), method="weighted")
SEEN = task_vectors(["a", "b"], norms=[0.1, 0.1])


def interval(unknown: Any, **options: Any) -> Any:
    return bound_interval(PAIR, unknown, **({"samples": 4, "boxes": 10} | options))


def plan(free: Any = None, **options: Any) -> Any:
    return design(PAIR, free or {"steps": (1, 2)}, **({"starts": 8, "boxes": 10} | options))


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "range, lower": lambda junk: interval({"L": Range(junk, 1.5)}),
    "range, upper": lambda junk: interval({"steps": Range(2, junk)}),
    "range, log": lambda junk: interval({"L": Range(0.5, 1.5, junk)}),
    "set": lambda junk: interval({"sampling": OneOf(junk)}),
    "value of a set": lambda junk: interval({"sampling": OneOf((junk,))}),
    "number of a set": lambda junk: interval({"steps": OneOf((5, junk))}),
    "samples": lambda junk: interval({"L": Range(0.5, 1)}, samples=junk),
    "tolerance of an interval": lambda junk: interval({"L": Range(0.5, 1)}, tolerance=junk),
    "seed of an interval": lambda junk: interval({"L": Range(0.5, 1)}, seed=junk),
    "level": lambda junk: consistency(PAIR, {"steps": Range(2, 9)}, SEEN, level=junk, samples=4),
    "limits": lambda junk: plan({"learning_rate": (junk, 0.1)}),
    "budget": lambda junk: plan(budgets=[junk]),
    "kind of a budget": lambda junk: plan(budgets=[Budget(junk, 1e5)]),
    "limit of a budget": lambda junk: plan(budgets=[Budget("samples", junk)]),
    "price": lambda junk: plan(budgets=[Budget("flops", 1e5, junk)]),
    "price of an expert": lambda junk: plan(budgets=[Budget("flops", 1e5, {"a": junk, "b": 1.0})]),
    "cost": lambda junk: plan(target=3.0, cost=junk),
    "target": lambda junk: plan(target=junk),
    "tolerance of a design": lambda junk: plan(tolerance=junk),
    "seed of a design": lambda junk: plan(seed=junk),
    "risk models": lambda junk: plan(risk_models=junk),
    "numbers of experts": lambda junk: design_number(PAIR.experts[0], junk, {"steps": (1, 2)}, starts=8, boxes=10),
    "dimension": lambda junk: compare(PAIR, dimension=junk),
    "distance": lambda junk: compare(PAIR, merge_distance=junk),
    "measured arguments": lambda junk: compare(PAIR, measured=junk),
    "losses of the law": lambda junk: fit_merging_law([1, 2, 3], junk, seed=1, bootstrap=0),
    "seed of the law": lambda junk: fit_merging_law([1, 2, 3], [1.0, 0.9, 0.8], seed=junk, bootstrap=2),
    "largest shift": lambda junk: fit_merging_law([1, 2, 3], [1.0, 0.9, 0.8], seed=1, largest_shift=junk, bootstrap=0),
    "field of an elasticity": lambda junk: master_bound(PAIR).elasticity(junk),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_junk_in_questions(question: str) -> None:
    for junk in JUNK:
        found, message = None, ""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                found = QUESTIONS[question](junk)
            except MergeboundError as refusal:
                message = str(refusal)
        assert not message or len(message) > 15
        for name in ("lower", "upper", "objective", "gap", "lower_bound"):
            value = getattr(found, name, None)
            assert value is None or not np.isnan(value), (question, junk, name)


def test_what_the_refusals_say() -> None:
    for ask, words in (
        (lambda: plan(tolerance=float("nan")), "tolerance is nan; give one finite number of at least 0 and below 1"),
        (lambda: plan(budgets=[Budget("flops", 1.0, {"a": 1.0, "b": 1.0, "c": 1.0})]), "per_sample names 'c'"),
        (lambda: plan(budgets=[Budget("flops", 1.0, -1.0)]), "per_sample is -1"),
        (lambda: interval({"L": Range("x", 1.0)}), "an end of the range of 'L' is not a number"),  # type: ignore[arg-type]
        (lambda: interval({"L": Range(0.5, 1)}, samples=0), "samples is 0; give one finite number of at least 1"),
        (lambda: consistency(PAIR, {"steps": Range(2, 9)}, SEEN, level=-1), "level is -1"),
    ):
        with pytest.raises(RecipeError, match=words):
            ask()
