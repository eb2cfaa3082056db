"""Which experts a free number speaks of; and the answer "train as little as allowed": detected, explained, undone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from theory import Budget, Expert, Merge, Range, RecipeError, bound_interval, design, master_bound
from theory.addressing import groups_of
from theory.inverse_design import LeastTraining


def expert(name: str = "a", **changes: object) -> Expert:
    """A strongly convex expert that training takes from risk 1 to nearly 0."""
    known: dict[str, Any] = dict(n=2_000, batch_size=32, learning_rate=0.1, steps=100, curvature="strongly_convex")
    known |= dict(L=1.0, mu=0.9, initial_gradient_norm=1.4, sigma=0.3, D_inf=2.0, initial_risk=1.0, minimal_risk=0.0)
    return Expert(name, **(known | changes))


def group(size: int = 2, *, orthogonal: bool = False, **changes: object) -> Merge:
    return Merge(tuple(expert(name, **changes) for name in "abcdefgh"[:size]), orthogonal_task_vectors=orthogonal)


# --- whose number it is -----------------------------------------------------------------------------------------------


def test_all_is_one_number_and_each_is_one_per_expert() -> None:
    names = ["a", "b", "v1.5"]
    everyone = (0, 1, 2)
    assert groups_of("steps", names, "x") == [("steps", everyone)]
    assert groups_of("all.steps", names, "x") == [("all.steps", everyone)]
    apart = [("a.steps", (0,)), ("b.steps", (1,)), ("v1.5.steps", (2,))]
    assert groups_of("each.steps", names, "x") == groups_of("*.steps", names, "x") == apart
    assert groups_of("v1.5.steps", names, "x") == [("v1.5.steps", (2,))]
    for key in (".steps", "c.steps", "All.steps", "**.steps"):
        with pytest.raises(RecipeError, match=r"names no expert.*'all\.steps' is one number.*'each\.steps' one per"):
            groups_of(key, names, "x")
    for word in ("all", "each"):
        with pytest.raises(RecipeError, match=r"could mean.*rename"):
            groups_of(f"{word}.steps", ["a", word], "x")


def test_both_spellings_ask_the_same_question() -> None:
    merge = Merge((expert("a"), expert("b", sigma=0.6, n=200)), orthogonal_task_vectors=True)
    limits, options = (1, 60), {"starts": 32, "boxes": 200}
    found = {key: design(merge, {key: limits}, **options) for key in ("steps", "all.steps", "each.steps", "*.steps")}
    assert found["steps"].objective == found["all.steps"].objective
    assert found["steps"].choices["steps"] == found["all.steps"].choices["all.steps"]
    assert dict(found["each.steps"].choices) == dict(found["*.steps"].choices)
    assert sorted(found["each.steps"].choices) == ["a.steps", "b.steps"]
    assert found["each.steps"].objective <= found["steps"].objective
    assert "one for all 2 experts ('each.steps': one per expert)" in found["all.steps"].explain()
    assert "this expert alone" in found["each.steps"].explain()
    assert "one for all" not in design(group(1), {"steps": (1, 9)}, starts=16).explain()
    with pytest.raises(RecipeError, match="free twice"):
        design(merge, {"all.steps": limits, "a.steps": limits}, starts=16)


def test_unknown_fields_use_the_same_words() -> None:
    merge = group(orthogonal=True, training_risk=0.1)
    one, other = (
        bound_interval(merge, {key: Range(0.1, 0.3)}, samples=32, boxes=200) for key in ("all.sigma", "each.sigma")
    )
    assert [item.name for item in one.influences] == ["all.sigma"]
    assert sorted(item.name for item in other.influences) == ["a.sigma", "b.sigma"]
    assert one.upper == pytest.approx(other.upper, rel=1e-9)


# --- train as little as allowed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_norms_alone_cannot_beat_the_base(size: int) -> None:
    """The theorem behind the diagnosis, on a grid of all recipes: no bound below the training risk of the base."""
    eta, steps = np.meshgrid(np.geomspace(1e-4, 1.0, 40), np.unique(np.geomspace(1, 5000, 60).astype(int)))
    run = dict(learning_rate=eta, steps=steps.astype(np.float64), initial_risk=0.8, initial_gradient_norm=1.23)
    for method in ({"method": "average"}, {"method": "task_arithmetic", "coefficients": 0.6}):
        value = master_bound(replace(group(size, **run), **method), recursion=False).value  # type: ignore[arg-type]
        assert np.min(value) >= 0.8 * (1 - 1e-12)
    orthogonal = master_bound(group(size, orthogonal=True, **run), recursion=False).value
    assert np.min(orthogonal) < 0.8


@pytest.mark.parametrize("size", [2, 4])
def test_least_training_is_said_and_what_would_change_it(size: int) -> None:
    free = {"learning_rate": (1e-3, 1.0), "steps": (1, 2_000)}
    budgets = [Budget("samples", 20_000)]
    best = design(group(size), free, budgets=budgets, starts=128, boxes=300)
    assert best.choices == {"learning_rate": pytest.approx(1e-3), "steps": 1}
    found = best.least_training
    assert isinstance(found, LeastTraining)
    assert found.cause == "norms"
    assert found.reach == pytest.approx(2 * (1 - 1 / size))
    assert 0 < found.gained < found.lost
    better = design(group(size, orthogonal=True), free, budgets=budgets, starts=128, boxes=300)
    assert better.least_training is None
    assert found.unlocked_objective == pytest.approx(better.objective, rel=1e-2)
    assert found.unlocked is not None
    assert found.unlocked["steps"] > 100
    run = {"learning_rate": found.unlocked["learning_rate"], "steps": int(found.unlocked["steps"])}
    claimed = master_bound(group(size, orthogonal=True, **run), recursion=False)
    assert float(claimed.value) == pytest.approx(found.unlocked_objective, rel=1e-12)
    for words in ("as little as the limits allow", "known by its norm alone", "Gram matrix", "orthogonal_task_vectors"):
        assert words in best.explain()


def test_the_exchange_is_what_the_bound_does() -> None:
    best = design(group(), {"all.steps": (20, 400)}, starts=64, boxes=300)
    found = best.least_training
    assert found is not None
    assert best.choices["all.steps"] == 20
    here, there = (master_bound(group(steps=count), recursion=False).terms for count in (20, 22))
    assert found.gained == pytest.approx(float(here[0].value - there[0].value), rel=1e-9)
    lost = sum(float(after.value - before.value) for before, after in zip(here[1:], there[1:], strict=True))
    assert found.lost == pytest.approx(lost, rel=1e-9)


def test_one_expert_whose_instability_outweighs_training() -> None:
    """No angle is involved: constants are the cause, and orthogonality is not offered."""
    alone = group(1, n=20, batch_size=20, D_inf=40.0)
    found = design(alone, {"steps": (1, 500)}, starts=64, boxes=300).least_training
    assert found is not None
    assert (found.cause, found.unlocked, found.unlocked_objective) == ("constants", None, None)
    assert "smaller constants" in found.explain()


def test_silent_where_training_pays_or_is_not_the_question() -> None:
    paying = group(orthogonal=True)
    assert design(paying, {"steps": (1, 400)}, starts=64, boxes=300).least_training is None
    # a budget that allows no more than the lower limit is not advice to train little
    held = design(paying, {"steps": (10, 400)}, budgets=[Budget("steps", 20)], starts=64, boxes=300)
    assert held.choices["steps"] == 10
    assert held.least_training is None
    assert design(group(), {"batch_size": (1, 64)}, starts=64, boxes=300).least_training is None
    # the cheapest recipe that meets a lax target is cheap on purpose
    assert design(group(), {"steps": (1, 400)}, target=3.0, starts=64, boxes=300).least_training is None
    fixed = design(group(), {"steps": (7, 7), "batch_size": (1, 64)}, starts=64, boxes=300)
    assert fixed.least_training is None
