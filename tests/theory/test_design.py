"""Inverse design against brute force: the optimum, the proven lower end, budgets, targets, prices, sensitivities."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from theory import Expert, Merge, RecipeError, Schedule, master_bound
from theory.inverse_design import Budget, Design, design, design_number
from theory.inverse_design.problem import Problem
from theory.inverse_design.question import read_variables
from theory.ties import CONSTANTS


def expert(name: str = "a", **changes: object) -> Expert:
    """A strongly convex expert whose bound has a minimum inside: training helps, noise and instability hurt."""
    known: dict[str, object] = dict(n=400, batch_size=8, learning_rate=0.1, steps=20, curvature="strongly_convex")
    known |= dict(L=1.0, mu=0.4, initial_gradient_norm=0.3, sigma=0.5, sigma0=0.5, D_inf=2.0)
    known |= dict(initial_risk=1.0, minimal_risk=0.05, measured=frozenset({"initial_gradient_norm"}))
    return Expert(name, **(known | changes))  # type: ignore[arg-type]


def pair(**changes: object) -> Merge:
    other = expert("b", n=150, sigma=0.8, sigma0=0.8, mu=0.6, L=0.8, initial_gradient_norm=0.5)
    return Merge((expert("a"), other), orthogonal_task_vectors=True, **changes)  # type: ignore[arg-type]


def priced(merge: Merge, fields: list[dict[str, object]], **changes: object) -> np.ndarray:
    """The bound of the merge with fields replaced, expert by expert (arrays over candidates)."""
    experts = tuple(replace(item, **new) for item, new in zip(merge.experts, fields, strict=True))
    value = master_bound(replace(merge, experts=experts, **changes), recursion=False).value  # type: ignore[arg-type]
    return np.asarray(value)


@pytest.mark.parametrize("seed", range(2))
def test_whole_numbers_against_every_combination(seed: int) -> None:
    """Steps of both experts and a common batch size, under a budget: all combinations are tried."""
    rng = np.random.default_rng(seed)
    merge = pair()
    experts = tuple(
        replace(item, learning_rate=float(rng.uniform(0.05, 0.4)), D_inf=float(rng.uniform(1.2, 8)))
        for item in merge.experts
    )
    merge = replace(merge, experts=experts)
    limit = float(rng.integers(60, 400))
    best = design(
        merge,
        {"*.steps": (1, 25), "batch_size": (1, 16)},
        budgets=[Budget("samples", limit)],
        starts=256,
        tolerance=0.002,
    )
    K1, K2, b = np.meshgrid(np.arange(1, 26), np.arange(1, 26), np.arange(1, 17), indexing="ij")
    value = priced(merge, [dict(steps=K1, batch_size=b), dict(steps=K2, batch_size=b)])
    value = np.where((K1 + K2) * b <= limit, value, np.inf)
    assert best.objective == pytest.approx(value.min(), rel=1e-9)
    assert best.lower_bound is not None
    assert best.lower_bound <= value.min()
    assert best.gap is not None
    assert best.gap <= 0.0021
    assert best.cost["samples"] <= limit
    assert float(best.bound.value) <= best.objective * (1 + 1e-12)


def test_learning_rate_steps_and_batch_against_a_fine_grid() -> None:
    merge = pair()
    free = {"learning_rate": (0.01, 3.0), "steps": (1, 200), "batch_size": (1, 64)}
    best = design(merge, free, budgets=[Budget("samples", 3000)], starts=512)
    eta, K, b = np.meshgrid(np.geomspace(0.01, 1, 120), np.arange(1, 201), [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
    fields = dict(learning_rate=eta, steps=K.astype(int), batch_size=b.astype(int))
    value = np.where(2 * K * b <= 3000, priced(merge, [fields, fields]), np.inf)
    assert best.objective <= value.min() * (1 + 1e-9)
    assert best.lower_bound is not None
    assert best.lower_bound <= value.min()
    assert best.gap is not None
    assert best.gap <= 0.0101
    assert best.objective < 0.9 * value[-1, -1, 0]


def test_coefficients_against_a_grid() -> None:
    merge = pair(method="task_arithmetic", coefficients=1.0)
    best = design(merge, {"coefficients": (0.01, 2.0)}, starts=256)
    grid = np.linspace(0.01, 2, 4001)
    value = priced(merge, [{}, {}], coefficients=np.stack([grid, grid]))
    assert best.objective <= value.min() * (1 + 1e-8)
    assert best.choices["coefficients"] == pytest.approx(grid[value.argmin()], abs=2e-3)
    each = design(merge, {"*.coefficients": (0.01, 2.0)}, starts=256)
    left, right = np.meshgrid(np.linspace(0.01, 1.2, 400), np.linspace(0.01, 1.2, 400))
    best_of_grid = priced(merge, [{}, {}], coefficients=np.stack([left, right])).min()
    assert each.objective <= best_of_grid * (1 + 1e-8)
    assert each.objective <= best.objective * (1 + 1e-9)
    assert each.lower_bound is not None
    assert each.lower_bound <= best_of_grid


def test_one_expert_fixed_and_flops_per_expert() -> None:
    """The fixed expert pays from the same budget; its FLOPs per sample differ."""
    merge = pair()
    budget = Budget("flops", 2000.0, {"a": 1.0, "b": 5.0})
    best = design(merge, {"a.steps": (1, 300), "a.batch_size": (1, 20)}, budgets=[budget], starts=256)
    fixed = merge.experts[1]
    K, b = np.meshgrid(np.arange(1, 301), np.arange(1, 21))
    value = priced(merge, [dict(steps=K, batch_size=b), {}])
    fits = K * b + 5.0 * int(fixed.steps) * int(fixed.batch_size) <= 2000  # type: ignore[arg-type]
    assert best.objective == pytest.approx(np.where(fits, value, np.inf).min(), rel=1e-9)
    assert best.merge.experts[1].steps == fixed.steps
    assert best.cost["flops"] <= 2000


def test_data_shares() -> None:
    """A thousand samples split over two experts: the noisier, more sensitive one gets more."""
    merge = Merge((expert("a", D_inf=0.75), expert("b", D_inf=4.0)), orthogonal_task_vectors=True)
    best = design(merge, {"*.n": (20, 900)}, budgets=[Budget("data", 1000)], starts=256)
    first = np.arange(100, 901)
    value = priced(merge, [dict(n=first), dict(n=1000 - first)])
    assert best.objective <= value.min() * (1 + 1e-9)
    assert best.choices["b.n"] > best.choices["a.n"]
    assert best.cost["data"] <= 1000


def test_cheapest_recipe_that_meets_a_target() -> None:
    merge = pair()
    K, b = np.meshgrid(np.arange(1, 61), np.arange(1, 33))
    value = priced(merge, [dict(steps=K, batch_size=b), dict(steps=K, batch_size=b)])
    target = float(np.quantile(value, 0.05)) - 0.05
    free = {"steps": (1, 60), "batch_size": (1, 32)}
    best = design(merge, free, target=target, minimal_risk=0.05, starts=256, tolerance=1e-3)
    cheapest = np.where(value <= target + 0.05, 2 * K * b, np.inf).min()
    assert best.objective == best.cost["samples"] == cheapest
    assert float(best.bound.excess(0.05)) <= target
    assert "target" in best.limits
    price = next(item for item in best.shadow_prices if item.name == "target")
    assert price.price < 0  # a laxer target is cheaper
    with pytest.raises(RecipeError, match="can meet"):
        design(merge, free, target=0.9 * float(value.min()), starts=64)
    with pytest.raises(RecipeError, match="can meet"):
        design(merge, free, budgets=[Budget("samples", 1.0)], starts=64)


def test_shadow_price_of_the_budget() -> None:
    """Against the exact minimum over a fine grid at two budgets (relaxed steps would not change it by much)."""
    merge = pair()
    free = {"learning_rate": (0.001, 1.0), "steps": (1, 4000)}

    def least(limit: float) -> float:
        K = np.arange(1, int(limit // 16) + 1)[:, None]
        eta = np.geomspace(0.001, 1, 1500)[None]
        fields = dict(learning_rate=eta, steps=K)
        return float(priced(merge, [fields, fields]).min())

    best = design(merge, free, budgets=[Budget("samples", 1600)], starts=256)
    price = best.shadow_prices[0]
    assert price.price == pytest.approx((least(1920) - least(1280)) / 640, rel=0.2)
    assert price.price < 0
    assert "budget of samples" in best.limits
    loose = design(pair(), {"steps": (1, 10)}, budgets=[Budget("samples", 1e6)], starts=64)
    assert loose.shadow_prices[0].price == 0


def test_sensitivities_agree_with_symbolic_elasticity() -> None:
    models = {name: (lambda item: 0.02 + 0.9 / (1 + 0.2 * np.asarray(item.steps))) for name in ("a", "b")}
    merge = pair()
    best = design(merge, {"steps": (2, 80)}, risk_models=models, starts=32)
    assert best.lower_bound is None
    assert "risk model" in best.evidence
    assert best.bound.tier == "estimated"
    seen = 0
    for item in best.sensitivities:
        if item.expert == "b" and item.field in ("D_inf", "sigma", "n", "batch_size", "L", "training_risk"):
            exact = best.bound.elasticity(item.field, item.expert)
            assert item.elasticity == pytest.approx(exact, abs=2e-5), item
            seen += 1
    assert seen == 6
    roles = {(item.field, item.role) for item in best.sensitivities}
    assert ("steps", "free") in roles
    assert ("n", "fixed") in roles


def test_candidates_do_not_take_forms_from_each_other() -> None:
    """Trap: drift 6(c) needs eta <= 1/L, and an array that holds one larger rate refuses it for all."""
    known = dict(n=400, batch_size=8, steps=50, L=1.0, sigma=0.1, initial_risk=0.2, sigma0=0.1, D_inf=1.0)
    merge = Merge((Expert("a", learning_rate=0.5, initial_gradient_norm=0.6, **known),))  # type: ignore[arg-type]
    merge = Merge((*merge.experts, replace(merge.experts[0], name="b")))
    free = {"learning_rate": (0.1, 3.0)}
    models = dict.fromkeys(("a", "b"), lambda item: 0.1)
    problem = Problem(merge, read_variables(merge, free), (), None, Budget("samples", np.inf), models)
    rates = np.array([[0.2, 0.9, 1.5]])
    together = problem.bounds(rates)
    alone = [float(problem.bounds(rates[:, [index]])[0]) for index in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    assert np.all(np.isfinite(together))


def test_number_of_experts() -> None:
    budgets = [Budget("samples", 3000)]
    found = design_number(expert("a"), [1, 3], {"steps": (1, 400)}, budgets=budgets, starts=16)
    for number, best in found.items():
        K = np.arange(1, 3000 // (8 * number) + 1)
        copies = tuple(replace(expert(), name=str(index), steps=np.minimum(K, 400)) for index in range(number))
        assert best.objective == pytest.approx(
            float(master_bound(Merge(copies), recursion=False).value.min()), rel=1e-9
        )
        assert best.merge.size == number
    terms = [found[number].bound.terms[2].value for number in (1, 3)]
    assert terms[1] < terms[0]  # instability falls with N
    with pytest.raises(RecipeError, match="numbers of experts"):
        design_number(expert(), [0], {"steps": (1, 400)})


def test_momentum_and_schedules_are_searched_without_a_proof() -> None:
    shape = Schedule(np.linspace(1.0, 0.1, 12))
    one = expert("a", learning_rate=shape, steps=None)
    best = design(Merge((one, expert("b"))), {"a.learning_rate": (0.01, 0.9)}, starts=64)
    assert best.gap is None
    assert "no proven gap" in best.evidence
    grid = np.geomspace(0.01, 0.9, 100)
    values = [
        float(master_bound(Merge((replace(one, learning_rate=Schedule(peak * shape.values)), expert("b")))).value)
        for peak in grid
    ]
    assert best.objective <= min(values) * (1 + 1e-6)
    heavy = expert("a", momentum=0.9, training_risk=None, minimal_risk=0.0)
    models = {"a": lambda item: 1 / (1 + np.asarray(item.steps))}
    found = design(Merge((heavy,)), {"steps": (1, 60)}, risk_models=models, starts=64)
    all_steps = [
        float(master_bound(Merge((replace(heavy, steps=k, training_risk=1 / (1 + k)),))).value) for k in range(1, 61)
    ]
    assert found.objective == pytest.approx(min(all_steps), rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "free", "options", "words"),
    [
        ({"drift": 1.0}, {"steps": (1, 9)}, {}, "drift belongs to one run"),
        ({"training_risk": 0.1}, {"steps": (1, 9)}, {}, "risk_models"),
        ({"learning_rate": Schedule(np.full(20, 0.1)), "steps": None}, {"steps": (1, 9)}, {}, "schedule"),
        ({"batch_size": Schedule(np.full(20, 4.0)), "steps": None}, {"batch_size": (1, 9)}, {}, "batch_size is a sch"),
        ({"sigma": np.array([0.5, 1.0])}, {"steps": (1, 9)}, {}, "sigma is an array"),
        ({}, {"colour": (1, 9)}, {}, "cannot be free"),
        ({}, {"z.steps": (1, 9)}, {}, "names no expert"),
        ({}, {"steps": (9, 1)}, {}, "0 < lower <= upper"),
        ({}, {"steps": (0, 1)}, {}, "0 < lower <= upper"),
        ({}, {"steps": (1.2, 1.8)}, {}, "no whole number"),
        ({}, {"steps": (1, 9), "*.steps": (1, 9)}, {}, "free twice"),
        ({}, {"steps": "few"}, {}, "two limits"),
        ({}, {}, {}, "nothing is free"),
        ({}, {"coefficients": (0.1, 1.0)}, {}, "no free coefficients"),
        ({}, {"steps": (1, 9)}, {"budgets": [Budget("joules", 1.0)]}, "joules"),  # type: ignore[arg-type]
        ({}, {"steps": (1, 9)}, {"budgets": [Budget("steps", 0.0)]}, "positive"),
        ({}, {"steps": (1, 9)}, {"budgets": [Budget("flops", 1.0, {"z": 1.0})]}, "lacks expert"),
        ({}, {"steps": (1, 9)}, {"target": -1.0}, "target"),
        ({}, {"steps": (1, 9)}, {"target": 1.0, "cost": "joules"}, "joules"),
        ({"sigma": None}, {"steps": (1, 9)}, {}, "sigma is missing"),
    ],
)
def test_malformed_questions(changes: dict, free: dict, options: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        design(Merge((expert("a", **changes),)), free, starts=16, **options)


def test_report_reads() -> None:
    best: Design = design(pair(), {"steps": (1, 40)}, budgets=[Budget("samples", 300)], starts=32)
    text = best.explain()
    for words in ("active term: ", "budget of samples", "elasticity of the bound", "branch and bound", "steps"):
        assert words in text
    assert best.active_term in ("training", "dispersion", "instability")
    assert best.choices["steps"] == 18
    assert sorted(best.choices) == sorted(itertools.chain(["steps"]))


def test_extreme_recipes_never_give_nan() -> None:
    """Constants over hundreds of orders of magnitude: a design with numbers or inf, or a refusal by name."""
    answered, refusals = 0, []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        names = ("sigma", "initial_gradient_norm", "D_inf", "initial_risk")
        wild: dict[str, object] = {name: float(10.0 ** rng.uniform(-150, 150)) for name in names}
        wild["measured"] = frozenset(CONSTANTS)  # no common loss
        merge = Merge((expert("a", **wild), expert("b", curvature="smooth", mu=None, pl_constant=1e-9)))
        free = {"learning_rate": (1e-12, 1e6), "*.steps": (1, 10**9)}
        try:
            best = design(merge, free, budgets=[Budget("samples", 1e9)], starts=64, boxes=500, seed=seed)
        except RecipeError as error:
            refusals.append(str(error))
            continue
        answered += 1
        numbers = [best.objective, best.lower_bound or 0.0, *best.cost.values(), *best.choices.values()]
        numbers += [item.elasticity for item in (*best.sensitivities, *best.shadow_prices)]
        assert not np.isnan(numbers).any()
        assert (best.lower_bound or 0.0) <= best.objective
    assert answered >= 2
    assert all("design:" in refusal for refusal in refusals)
