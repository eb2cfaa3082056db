"""Boxes of recipes: the enclosure holds every recipe of the box, and shrinks to the bound on a point."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from quadratic_recipes import random_problem

from theory import AssumptionError, Expert, Merge, RecipeError, Schedule, master_bound
from theory.enclosure import drift_range, enclose
from theory.ties import CONSTANTS

WHOLE = ("steps", "batch_size", "n")


def random_plain(rng: np.random.Generator, name: str) -> tuple[Expert, dict[str, tuple[float, float]]]:
    """A plain SGD expert with a random set of constants, and a random box around it (for each field, or a point)."""
    curvature = str(rng.choice(["convex", "strongly_convex", "smooth"]))
    decay = float(rng.choice([0.0, 0.05]))
    n = int(rng.integers(4, 200))
    values: dict[str, float] = {
        "n": n,
        "batch_size": int(rng.integers(1, n // 2 + 1)),
        "steps": int(rng.integers(1, 60)),
        "learning_rate": float(np.exp(rng.uniform(-4, -0.8))),
        "L": float(np.exp(rng.uniform(-1, 0.4))),
    }
    if curvature == "strongly_convex":
        values["mu"] = values["L"] * float(rng.uniform(0.05, 0.4))
    for field in ("initial_gradient_norm", "sigma0", "D_inf"):
        values[field] = float(np.exp(rng.normal()))
    for field in ("sigma", "D_2", "D_envelope"):
        if rng.random() < 0.6:
            values[field] = float(np.exp(rng.normal()))
    values["initial_risk"], values["base_norm"] = float(rng.uniform(1, 3)), 1.0
    if rng.random() < 0.6 and "sigma" in values:
        if rng.random() < 0.5:
            values["minimizer_distance"] = float(rng.uniform(0.3, 2))
        values |= {
            "minimal_risk": float(rng.uniform(0, 0.3)),
            "pl_constant": values["L"] * float(rng.uniform(0.1, 0.5)),
        }
    else:
        values["training_risk"] = float(rng.uniform(0, 0.5))
    box = {}
    for field, value in values.items():
        if rng.random() < 0.5:
            low, high = value * rng.uniform(0.5, 1), value * rng.uniform(1, 1.6)
            if field in WHOLE:
                low, high = max(1, np.floor(low)), np.ceil(high)
            box[field] = (float(low), float(high))
    if decay and rng.random() < 0.5:
        box["weight_decay"] = (0.0, 2 * decay)
    sampling = str(rng.choice(["without_replacement", "with_replacement"]))
    measured = frozenset(CONSTANTS)  # no common loss
    expert = Expert(name, curvature=curvature, weight_decay=decay, sampling=sampling, measured=measured, **values)  # type: ignore[arg-type]
    return expert, box


def draw(rng: np.random.Generator, box: dict[str, tuple[float, float]]) -> dict[str, float]:
    """A point of the box, often on its boundary."""
    point = {}
    for field, (low, high) in box.items():
        value = float(rng.choice([low, high])) if rng.random() < 0.6 else float(rng.uniform(low, high))
        point[field] = float(np.clip(np.round(value), low, high)) if field in WHOLE else value
    return point


def test_point_box_is_the_bound() -> None:
    checked = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        experts = tuple(
            replace(expert, training_risk=0.3, minimal_risk=None) for expert in random_problem(seed).experts
        )
        merge = Merge(experts, orthogonal_task_vectors=bool(rng.random() < 0.3))
        found, exact = enclose(merge, {}), float(master_bound(merge).value)
        np.testing.assert_allclose([found.lower, found.upper], [exact, exact], rtol=1e-10)
        checked += 1
    assert checked == 40


def test_enclosure_holds_every_recipe_of_the_box() -> None:
    """Over random boxes in up to 15 fields per expert, coefficients included; corners are drawn often."""
    checked, inside, widest, reasons = 0, 0, [], []
    for seed in range(70):
        rng = np.random.default_rng(seed)
        made = [random_plain(rng, f"e{i}") for i in range(int(rng.integers(1, 4)))]
        size = len(made)
        experts, boxes = tuple(item[0] for item in made), {item[0].name: item[1] for item in made}
        alpha = rng.uniform(0, 0.6, size)
        span = (alpha - rng.uniform(0, 0.3, size), alpha + rng.uniform(0, 0.3, size)) if rng.random() < 0.5 else None
        merge = Merge(experts, method="weighted", coefficients=alpha, orthogonal_task_vectors=bool(rng.random() < 0.3))
        recursion = bool(rng.random() < 0.5)
        try:
            found = enclose(merge, boxes, coefficient_range=span, recursion=recursion)
        except RecipeError as error:  # a box that reaches out of the domain of the PL bound, or of the proofs
            reasons.append(str(error))
            continue
        checked += 1
        for _ in range(12):
            try:
                point = tuple(replace(expert, **draw(rng, boxes[expert.name])) for expert in experts)
                chosen = alpha if span is None else span[0] + (span[1] - span[0]) * rng.random(size).round(1)
                value = float(
                    master_bound(replace(merge, experts=point, coefficients=chosen), recursion=recursion).value
                )
            except RecipeError:
                continue
            inside += 1
            assert found.lower <= value * (1 + 1e-10)
            assert value <= found.upper * (1 + 1e-10)
        widest.append(float(found.upper / found.lower))
    assert all("learning_rate" in reason or "mu reaches" in reason for reason in reasons)
    assert checked >= 50
    assert inside >= 500
    assert np.median(widest) < 30


def test_boxes_broadcast() -> None:
    expert, _ = random_plain(np.random.default_rng(3), "a")
    merge = Merge((replace(expert, training_risk=0.2),))
    low, high = np.array([5.0, 10.0, 20.0]), np.array([10.0, 20.0, 40.0])
    together = enclose(merge, {"a": {"steps": (low, high)}})
    for index in range(3):
        single = enclose(merge, {"a": {"steps": (low[index], high[index])}})
        np.testing.assert_allclose(together.lower[index], single.lower, rtol=1e-12)
        np.testing.assert_allclose(together.upper[index], single.upper, rtol=1e-12)


def test_energy_form_of_one_box_does_not_depend_on_the_others() -> None:
    """Drift 6(c) needs eta <= 1/L; one box beyond it must neither refuse nor loosen the others."""
    expert = Expert(
        *("a", 100, 5, 0.1, 50), L=1.0, sigma=0.1, initial_risk=0.2, D_inf=0.2, training_risk=0.1, drift=None
    )
    both = drift_range(expert, {"learning_rate": (np.array([0.1, 0.1]), np.array([0.5, 1.5])), "sigma": (0.1, 0.2)})
    alone = drift_range(expert, {"learning_rate": (0.1, 0.5), "sigma": (0.1, 0.2)})
    np.testing.assert_allclose([both[0][0], both[1][0]], [alone[0], alone[1]], rtol=1e-12)
    assert np.isinf(both[1][1])


def test_rms_stability_is_not_monotone_in_n() -> None:
    """Trap: the smallest n is not the worst case of the rms form (at n = b every batch is the whole sample)."""
    known = dict(batch_size=10, learning_rate=0.1, steps=1, curvature="convex", L=1.0, training_risk=0.0)
    known |= dict(initial_gradient_norm=1.0, sigma0=0.05, D_2=0.1)

    def value(n: int) -> float:
        merge = Merge((Expert("a", n=n, **known),))  # type: ignore[arg-type]
        return float(master_bound(merge, recursion=False).value)

    assert value(12) > value(10) > value(40)
    found = enclose(Merge((Expert("a", n=10, **known),)), {"a": {"n": (10, 40)}}, recursion=False)  # type: ignore[arg-type]
    assert max(value(n) for n in range(10, 41)) <= found.upper


@pytest.mark.parametrize(
    ("change", "ranges", "words"),
    [
        ({"momentum": 0.9}, {"learning_rate": (0.1, 0.2)}, "learning_rate"),
        ({"sampling": "reshuffle"}, {"batch_size": (1, 2)}, "batch_size"),
        ({"learning_rate": Schedule(np.full(20, 0.1)), "steps": None}, {"n": (10, 20)}, "n for its kind"),
        ({}, {"momentum": (0.0, 0.9)}, "momentum"),
        ({}, {"steps": (20, 10)}, "steps is empty"),
        ({}, {"colour": (20, 10)}, "colour is not a field"),
        ({"curvature": "strongly_convex", "mu": 0.1}, {"mu": (0.1, 2.0)}, "mu reaches above L"),
        ({"kappa": -1.0}, {"learning_rate": (0.1, 2.0)}, "kappa is negative"),
        ({}, {"weight_decay": (0.0, 0.1)}, "base_norm"),
        ({"base_norm": 1.0}, {"weight_decay": (0.0, 50.0)}, "not monotone in weight_decay"),
    ],
)
def test_what_is_not_proven_is_refused(change: dict, ranges: dict, words: str) -> None:
    known = dict(n=100, batch_size=5, learning_rate=0.1, steps=20, curvature="convex", L=1.0, training_risk=0.1)
    known |= dict(initial_gradient_norm=1.0, sigma0=1.0, D_inf=2.0)
    merge = Merge((Expert("a", **(known | change)),))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=words):
        enclose(merge, {"a": ranges})


def test_merge_level_refusals() -> None:
    known = dict(n=100, batch_size=5, learning_rate=0.1, steps=20, curvature="convex", L=1.0, training_risk=0.1)
    experts = (Expert("a", **known, drift=1.0, D_inf=1.0),)  # type: ignore[arg-type]
    with pytest.raises(AssumptionError, match="average"):
        enclose(Merge(experts), {}, coefficient_range=(0.1, 0.2))
    merge = Merge(experts, method="task_arithmetic", coefficients=0.1, dispersion=1.0)
    with pytest.raises(AssumptionError, match="dispersion"):
        enclose(merge, {}, coefficient_range=(0.1, 0.2))
    with pytest.raises(AssumptionError, match="n has a range"):
        enclose(Merge(experts, shared_samples=True), {"a": {"n": (10, 20)}})
    with pytest.raises(RecipeError, match="no expert 'b'"):
        enclose(Merge(experts), {"b": {"n": (10, 20)}})
