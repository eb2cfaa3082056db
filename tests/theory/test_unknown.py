"""Unknown training details: guaranteed intervals against brute force, influences, and what task vectors contradict."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from quadratic_recipes import random_problem

from theory import AssumptionError, Expert, Merge, RecipeError, Schedule, expert_moments, master_bound
from theory.unknown import OneOf, Range, bound_interval, consistency, task_vectors, with_task_vectors


def expert(name: str = "a", **changes: object) -> Expert:
    known: dict[str, object] = dict(n=500, batch_size=20, learning_rate=0.05, steps=50, curvature="convex", L=1.0)
    known |= dict(initial_gradient_norm=0.5, sigma0=0.7, D_inf=2.0, training_risk=0.1)
    return Expert(name, **(known | changes))  # type: ignore[arg-type]


def value(merge: Merge, common: dict[str, object]) -> float:
    experts = tuple(replace(item, **common) for item in merge.experts)
    return float(master_bound(replace(merge, experts=experts), recursion=False).value)


def test_guaranteed_interval_is_attained_at_corners() -> None:
    """Every unknown pushes one way here: the interval is the bound at two corners, and is certified as the bound is."""
    merge = Merge((expert("a"), expert("b")), shared_samples=False, data_independent_choices=True, per_sample_loss=True)
    stated = {"L": Range(0.5, 2.0), "steps": Range(20, 80), "batch_size": Range(5, 50), "D_inf": Range(1.0, 4.0)}
    found = bound_interval(merge, stated, samples=256)
    assert found.proven
    assert found.tier == "certified"
    low = value(merge, dict(L=0.5, steps=20, batch_size=50, D_inf=1.0))
    high = value(merge, dict(L=2.0, steps=80, batch_size=5, D_inf=4.0))
    assert found.found == pytest.approx((low, high), rel=1e-9)
    assert found.lower == pytest.approx(low, rel=1e-2)
    assert found.upper == pytest.approx(high, rel=1e-2)
    assert found.lower <= low
    assert found.upper >= high
    assert found.highest == pytest.approx({"L": 2.0, "steps": 80, "batch_size": 5, "D_inf": 4.0})


@pytest.mark.parametrize("seed", range(4))
def test_guaranteed_interval_holds_every_recipe(seed: int) -> None:
    """Not monotone as a whole: the training risk follows the PL bound, coefficients are unknown too."""
    rng = np.random.default_rng(seed)
    pl = dict(training_risk=None, initial_risk=1.0, minimal_risk=0.02, sigma=0.7, curvature="strongly_convex", mu=0.3)
    pl |= dict(initial_gradient_norm=0.8)
    merge = Merge(
        (expert("a", **pl), expert("b", **pl, sampling="with_replacement")),
        method="task_arithmetic",
        coefficients=0.5,
        orthogonal_task_vectors=bool(seed % 2),
    )
    stated = {
        "*.steps": Range(5, 200, log=True),
        "learning_rate": Range(0.02, 0.8, log=True),
        "b.n": Range(100, 900),
        "coefficients": Range(0.2, 1.2),
    }
    found = bound_interval(merge, stated, samples=256, boxes=3000, tolerance=0.05, seed=seed)
    assert found.proven
    assert found.lower <= found.found[0] <= found.found[1] <= found.upper
    for _ in range(200):
        alpha, rate = rng.uniform(0.2, 1.2), float(np.exp(rng.uniform(np.log(0.02), np.log(0.8))))
        a = replace(merge.experts[0], steps=int(rng.integers(5, 201)), learning_rate=rate)
        b = replace(
            merge.experts[1], steps=int(rng.integers(5, 201)), learning_rate=rate, n=int(rng.integers(100, 901))
        )
        exact = float(master_bound(replace(merge, experts=(a, b), coefficients=alpha), recursion=False).value)
        assert found.lower <= exact <= found.upper
        assert found.found[0] * (1 - 1e-3) <= exact <= found.found[1] * (1 + 1e-3)  # the extremes were found


def test_unproven_fields_are_searched_and_said_so() -> None:
    """Momentum and reshuffling: the interval found agrees with a grid, is called not guaranteed and names the field."""
    merge = Merge((expert("a", steps=12), expert("b", steps=12)))
    stated = {
        "a.momentum": Range(0.0, 0.9),
        "sampling": OneOf(("without_replacement", "reshuffle")),
        "n": Range(60, 90),
    }
    found = bound_interval(merge, stated, samples=128)
    assert not found.proven
    assert found.tier == "estimated"
    assert "momentum" in found.how
    assert "seed 0" in found.how
    seen = []
    for beta, kind, n in itertools.product((0.0, 0.45, 0.9), ("without_replacement", "reshuffle"), range(60, 91)):
        a = replace(merge.experts[0], momentum=float(beta), sampling=kind, n=n)  # type: ignore[arg-type]
        b = replace(merge.experts[1], sampling=kind, n=n)  # type: ignore[arg-type]
        seen.append(float(master_bound(Merge((a, b)), recursion=False).value))
    assert found.lower <= min(seen) * (1 + 2e-3)
    assert found.upper >= max(seen) * (1 - 2e-3)
    assert found.upper <= max(seen) * 1.05
    assert found.highest["a.momentum"] == pytest.approx(0.9)


def test_shapley_shares_against_a_grid() -> None:
    """Two unknowns: shares from conditional means on a 60 x 60 grid of midpoints; an irrelevant unknown has none."""
    merge = Merge((expert("a"), expert("b")))
    stated = {"steps": Range(10, 300), "a.D_inf": Range(1.0, 60.0), "b.base_norm": Range(0.0, 5.0)}
    found = bound_interval(merge, stated, samples=256)
    steps = np.unique(np.round(10 + 290 * (np.arange(400) + 0.5) / 400)).astype(int)[:, None]
    gap = 1.0 + 59.0 * (np.arange(60) + 0.5)[None] / 60
    a, b = (replace(item, steps=np.broadcast_to(steps, (len(steps), 60))) for item in merge.experts)
    logs = np.log(master_bound(Merge((replace(a, D_inf=np.broadcast_to(gap, (len(steps), 60))), b))).value)
    first, second, total = logs.mean(axis=1).var(), logs.mean(axis=0).var(), logs.var()
    share = (first + total - second) / 2 / total
    shares = {item.name: item.share for item in found.influences}
    assert shares["steps"] == pytest.approx(share, abs=0.08)
    assert shares["a.D_inf"] == pytest.approx(1 - share, abs=0.08)
    assert shares["b.base_norm"] == pytest.approx(0, abs=1e-12)
    assert sum(shares.values()) == pytest.approx(1)
    alone = {item.name: item.alone for item in found.influences}
    assert alone["b.base_norm"] == 1
    assert alone["steps"] == pytest.approx(
        value(merge, dict(steps=300, D_inf=30.25)) / value(merge, dict(steps=10, D_inf=30.25)), rel=0.5
    )
    assert found.widest == max(shares, key=lambda name: shares[name])


def test_symmetric_unknowns_share_alike_and_six_are_allowed() -> None:
    merge = Merge(tuple(expert(name) for name in "abcdef"))
    found = bound_interval(merge, {"*.learning_rate": Range(0.01, 0.2, log=True)}, samples=256, boxes=500)
    assert len(found.influences) == 6
    assert max(item.share for item in found.influences) < 0.35
    assert found.proven


def test_domain_and_infinite_bounds_are_counted() -> None:
    merge = Merge((expert("a", curvature="smooth"),))
    found = bound_interval(merge, {"n": Range(10, 40), "steps": Range(10, 10**7, log=True)}, samples=512)
    assert 0.05 < found.refused < 0.6
    assert found.infinite > 0.3
    assert found.upper == np.inf
    assert np.isfinite(found.lower)
    assert "no finite bound" in found.explain()
    with pytest.raises(RecipeError, match="batch larger"):
        bound_interval(merge, {"n": Range(5, 10)}, samples=16)


def test_exact_drift_never_contradicts_true_constants() -> None:
    """On quadratics with true constants the rms task vector is within the drift bound of the true recipe."""
    seen = 0
    for seed in range(25):
        problem = random_problem(seed)
        pairs = zip(problem.tasks, problem.experts, strict=True)
        moments = [expert_moments(task, problem.base, item) for task, item in pairs]
        exact = [float(item.drift) for item in moments]
        names = [item.name for item in problem.experts]
        merge = Merge(
            tuple(
                replace(item, training_risk=float(row.training_risk))
                for item, row in zip(problem.experts, moments, strict=True)
            )
        )
        around = {"*.D_inf": Range(1e3, 2e3)}
        for row in consistency(merge, around, task_vectors(names, norms=exact), samples=8):
            assert row.verdict == "consistent", row
            assert row.probability == pytest.approx(1.0)
            seen += 1
    assert seen >= 40


def test_contradiction_strain_and_narrowed_ranges() -> None:
    merge = Merge((expert("a"), expert("b")))
    stated = {"*.steps": Range(10, 100), "b.L": Range(0.5, 2.0)}
    scale = float(np.sqrt(0.5**2 + 0.7**2 * (500 - 20) / 499 / 20))  # d = eta K sqrt(g^2 + sigma0^2 factor/b)
    longest = 0.05 * 100 * scale
    rows = consistency(merge, stated, task_vectors("ab", norms=[1.5 * longest, 0.5 * longest]))
    assert [row.verdict for row in rows] == ["strained", "consistent"]
    assert all(row.proven for row in rows)
    assert rows[0].drift == pytest.approx(longest)
    assert rows[0].probability == pytest.approx(1 / 1.5**2)
    assert rows[0].narrowed["a.steps"][0] == pytest.approx(150 * np.sqrt(0.05), abs=1.5)
    assert rows[1].narrowed["b.steps"] == (pytest.approx(50 * np.sqrt(0.05), abs=1.5), 100)
    (bad,) = consistency(Merge((expert("a"),)), {"steps": Range(10, 100)}, task_vectors("a", norms=[10 * longest]))
    assert bad.verdict == "contradicted"
    assert bad.narrowed == {}
    (heavy,) = consistency(
        Merge((expert("a", momentum=0.9),)), {"steps": Range(10, 40)}, task_vectors("a", norms=[1e-6]), samples=64
    )
    assert heavy.verdict == "consistent"
    assert not heavy.proven
    with pytest.raises(AssumptionError, match="adamw"):
        consistency(Merge((expert("a", optimizer="adamw"),)), {"steps": Range(1, 9)}, task_vectors("a", norms=[1.0]))


def test_task_vectors_give_drift_and_dispersion() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3, 40))
    norms = np.linalg.norm(vectors, axis=1)
    cosines = vectors @ vectors.T / np.outer(norms, norms)
    layers = np.linalg.norm(vectors.reshape(3, 4, 10), axis=2)
    seen = task_vectors("abc", cosines=cosines, layer_norms=layers)
    np.testing.assert_allclose(seen.norms, norms)
    assert seen.effective_layers is not None
    assert np.all((seen.effective_layers >= 1) & (seen.effective_layers <= 4))
    merge = Merge(tuple(expert(name) for name in "abc"), method="task_arithmetic", coefficients=0.4)
    measured = with_task_vectors(merge, seen)
    V = np.mean(np.sum((0.4 * vectors.sum(axis=0) - vectors) ** 2, axis=1))
    assert measured.dispersion == pytest.approx(V)
    assert measured.experts[1].drift == pytest.approx(norms[1])
    assert master_bound(measured).tier == "estimated"
    ties = with_task_vectors(Merge(merge.experts, method="ties"), seen)
    assert ties.dispersion is None
    plain = with_task_vectors(merge, task_vectors("abc", norms=norms))
    assert plain.dispersion is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "norms is missing"),
        ({"norms": [1.0]}, "2 finite numbers"),
        ({"norms": [1.0, -1.0]}, "2 finite numbers"),
        ({"norms": [1.0, 1.0], "cosines": [[1.0, 2.0], [2.0, 1.0]]}, "not those of any vectors"),
        ({"norms": [1.0, 1.0], "cosines": [[1.0, 0.5], [0.1, 1.0]]}, "symmetric"),
        ({"layer_norms": [[1.0, 1.0]]}, "layer_norms needs"),
        ({"norms": [1.0, 1.0], "layer_norms": [[3.0, 4.0], [1.0, 0.0]]}, "add up"),
    ],
)
def test_impossible_task_vectors(options: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        task_vectors("ab", **options)


@pytest.mark.parametrize(
    ("changes", "stated", "words"),
    [
        ({}, {}, "nothing is unknown"),
        ({}, {"colour": Range(0, 1)}, "colour"),
        ({}, {"z.steps": Range(1, 2)}, "names no expert"),
        ({}, {"steps": Range(1, 2), "*.steps": Range(1, 2)}, "stated twice"),
        ({}, {"steps": Range(0, 2)}, "lower > 0"),
        ({}, {"steps": Range(1.2, 1.7)}, "no whole number"),
        ({}, {"D_inf": Range(-1, 2)}, "cannot be negative"),
        ({}, {"D_inf": Range(0, 2, log=True)}, "logarithmic"),
        ({}, {"D_inf": Range(2, 1)}, "lower <= upper"),
        ({}, {"D_inf": Range(1, np.inf)}, "finite"),
        ({}, {"D_inf": (1, 2)}, "Range or OneOf"),
        ({}, {"sampling": OneOf(())}, "no values"),
        ({}, {"sampling": OneOf(("sorted",))}, "sampling"),
        ({}, {"coefficients": Range(0.1, 1)}, "no coefficients"),
        ({}, {"D_inf": OneOf(tuple(range(1, 300)))}, "combinations"),
        ({"learning_rate": Schedule(np.full(50, 0.1))}, {"learning_rate": Range(0.1, 0.2)}, "is a schedule"),
        ({"optimizer": "adamw"}, {"steps": Range(1, 9)}, "adamw"),
    ],
)
def test_malformed_questions(changes: dict, stated: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        bound_interval(Merge((expert("a", **changes),)), stated, samples=16)


def test_extreme_ranges_never_give_nan() -> None:
    """Ranges over hundreds of orders of magnitude: numbers or inf, shares that are numbers, no warning."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        span = [float(10.0 ** rng.uniform(-200, 0)), float(10.0 ** rng.uniform(0, 200))]
        merge = Merge((expert("a", curvature=str(rng.choice(["convex", "smooth"]))), expert("b")))
        stated = {
            "a.L": Range(span[0], span[1], log=True),
            "*.D_inf": Range(0.0, span[1]),
            "learning_rate": Range(1e-9, 1e9, log=True),
        }
        if rng.random() < 0.5:
            stated["a.steps"] = Range(1, 1e12, log=True)
        found = bound_interval(merge, stated, samples=64, boxes=400, seed=seed)
        numbers = [found.lower, found.upper, *found.found, *(item.share for item in found.influences)]
        numbers += [item.alone for item in found.influences]
        assert not np.isnan(numbers).any()
        assert found.lower <= found.found[0] <= found.found[1] <= found.upper
