"""The high-probability form against the quantiles of real runs, on logistic tasks with known constants."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest

from theory import (
    Expert,
    LogisticTask,
    Merge,
    RecipeError,
    Schedule,
    confidence_coverage,
    high_probability,
    l1_gap,
    simulate_logistic_gap,
    with_logistic_constants,
)

STATED = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
DELTAS = np.array([0.5, 0.1, 0.01, 0.001])
COIN = LogisticTask(np.array([[1.0], [-1.0]]), np.array([0.5, 0.5]))


def cloud(seed: int, chance: float = 0.8, size: int = 12, dim: int = 3) -> LogisticTask:
    z = np.random.default_rng(seed).standard_normal((size, dim))
    z /= np.maximum(1.0, np.linalg.norm(z, axis=1, keepdims=True))
    chances = np.repeat([chance / size, (1 - chance) / size], size)
    return LogisticTask(np.concatenate([z, -z]), chances)


def run(name: str, n: int, b: int, eta: float | Schedule, steps: int | None) -> Expert:
    return Expert(name, n, b, eta, steps, sampling="reshuffle")


TASKS = [cloud(seed) for seed in range(3)]
HEAVY = (run("a", 60, 10, 0.5, 30), run("b", 100, 8, 0.3, 26), run("c", 40, 40, 1.0, 5))
LIGHT = (run("a", 60, 10, 0.05, 30), run("b", 100, 8, 0.03, 26), run("c", 40, 40, 0.1, 5))
INDEPENDENT = (replace(HEAVY[0], sampling="without_replacement"),)
ONE = np.array([0.0])
CASES = {  # tasks, base, merge, largest ratio of deviations (bound over simulation) at delta = 0.1 and 0.001
    "hardly trained, far from 0": ([COIN], np.array([2.0]), (run("a", 100, 10, 1e-4, 10),), {}, 2.0, 1.4),
    "one epoch": ([cloud(9)], np.zeros(3), (run("a", 100, 10, 1.0, 10),), {}, 350, 140),
    "five epochs": ([cloud(9)], np.zeros(3), (run("a", 100, 10, 1.0, 50),), {}, 950, 450),
    "average of three": (TASKS, np.zeros(3), HEAVY, {}, 620, 270),
    "independent batches": (TASKS[:1], np.zeros(3), INDEPENDENT, {}, 750, 280),
    "task arithmetic": (TASKS, np.ones(3), LIGHT, dict(method="task_arithmetic", coefficients=0.3), 14.5, 11.5),
}


@pytest.mark.parametrize("name", CASES)
def test_bound_covers_the_simulated_quantiles(name: str) -> None:
    tasks, base, experts, how, at_tenth, at_thousandth = CASES[name]
    merge = Merge(experts, **how, **STATED)  # type: ignore[arg-type]
    assert high_probability(with_logistic_constants(tasks, base, merge), 0.1, 0.1).tier == "certified"
    found = confidence_coverage(tasks, base, merge, DELTAS, replicates=5_000, seed=1)
    assert np.all(found.violations <= found.delta)
    assert np.all(found.bound >= found.quantile)
    assert np.all(found.ratio >= 1)
    assert np.all(np.diff(found.quantile) > 0)
    assert 1 <= found.deviation_ratio[1] <= at_tenth  # how loose, so that a change for the worse is seen
    assert 1 <= found.deviation_ratio[3] <= at_thousandth
    assert found.mean - 4 * found.standard_error <= float(l1_gap(with_logistic_constants(tasks, base, merge)).value)


def test_trap_the_influence_of_a_sample_on_the_empirical_risk_counts() -> None:
    """Hardly trained, the gap fluctuates because F_S does: a deviation from the twins' distance alone fails."""
    tasks, base, experts, how, *_ = CASES["hardly trained, far from 0"]
    merge = with_logistic_constants(tasks, base, Merge(experts, **how, **STATED))  # type: ignore[arg-type]
    naive = Merge(tuple(replace(expert, B=0.0) for expert in merge.experts), **STATED)  # type: ignore[arg-type]
    gap = simulate_logistic_gap(tasks, base, merge, replicates=4000, seed=2).gap
    assert np.mean(gap > float(high_probability(naive, 0.0, 0.1).value)) > 0.3
    assert np.mean(gap > float(high_probability(merge, 0.0, 0.1).value)) <= 0.1


def test_constants_against_search() -> None:
    """No x shows a larger gradient gap, gradient, curvature or loss; each constant is nearly attained."""
    rng = np.random.default_rng(0)
    skew = LogisticTask(np.array([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8], [-0.3, 0.9]]), np.full(4, 0.25))
    merge = with_logistic_constants([skew], [0.5, -0.5], Merge((run("a", 8, 2, 0.3, 4),), **STATED))  # type: ignore[arg-type]
    known, z = merge.experts[0], skew.points
    x = rng.standard_normal((30_000, 2)) * 30
    share = 1 / (1 + np.exp(np.clip(x @ z.T, -700, 700)))
    gradient = -share[..., None] * z
    apart = np.linalg.norm(gradient[:, :, None] - gradient[:, None], axis=-1).max()
    assert 0.99 * known.D_inf <= apart <= known.D_inf * (1 + 1e-12)  # type: ignore[operator]
    assert np.linalg.norm(gradient, axis=-1).max() <= known.G <= 1.001 * np.linalg.norm(gradient, axis=-1).max()  # type: ignore[operator]
    assert pytest.approx(np.max(np.sum(z**2, axis=1)) / 4) == known.L  # at x = 0
    sphere = x / np.linalg.norm(x, axis=1, keepdims=True)
    reached = np.array([0.5, -0.5]) + 0.3 * 4 * known.G * sphere  # type: ignore[operator]
    assert np.logaddexp(0.0, -reached @ z.T).max() <= known.B  # type: ignore[operator]
    pair = LogisticTask(np.array([[1.0], [-1.0]]), np.array([0.8, 0.2]))
    flipped = with_logistic_constants([pair], ONE, Merge((run("a", 8, 2, 0.3, 4),)))
    assert flipped.experts[0].D_inf == 1.0  # the gradients of opposite labels differ by exactly |z|


def test_simulator_against_enumeration() -> None:
    """Every data set and every order of three samples: the exact law of the gap of an average of two experts."""
    task = LogisticTask(np.array([[1.0], [-0.5]]), np.array([0.7, 0.3]))
    merge = Merge((run("a", 3, 2, 1.5, 3), run("b", 2, 1, 0.7, 2)), **STATED)  # type: ignore[arg-type]
    z, chances = task.points[:, 0], task.chances

    def law(n: int, b: int, eta: float, epochs: list[list[int]]) -> list[tuple[float, float, tuple[int, ...]]]:
        found = []
        every = list(product(permutations(range(n)), repeat=len(epochs)))
        for orders in every:
            for data in product(range(2), repeat=n):
                x = 0.4
                for order, sizes in zip(orders, epochs, strict=True):
                    used = 0
                    for size in sizes:
                        seen = z[[data[j] for j in order[used : used + size]]]
                        x += eta * float(np.mean(seen / (1 + np.exp(seen * x))))
                        used += size
                found.append((float(np.prod(chances[list(data)])) / len(every), x, data))
        return found

    sides = law(3, 2, 1.5, [[2, 1], [2]]), law(2, 1, 0.7, [[1, 1]])
    mean = second = 0.0
    for p, x, data in sides[0]:
        for q, y, other in sides[1]:
            losses = np.logaddexp(0.0, -z * (x + y) / 2)
            gap = losses @ chances - (losses[list(data)].mean() + losses[list(other)].mean()) / 2
            mean, second = mean + p * q * gap, second + p * q * gap**2
    gap = simulate_logistic_gap([task, task], [0.4], merge, replicates=100_000, seed=3).gap
    for values, exact in ((gap, mean), (gap**2, second)):
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(len(values))


def test_refusals_name_the_field() -> None:
    good = Merge((run("a", 8, 2, 0.3, 4),))
    for tasks, merge, word in (
        ([LogisticTask(np.ones((2, 1)), np.array([0.5, 0.6]))], good, "chances"),
        ([LogisticTask(np.ones(2), np.array([0.5, 0.5]))], good, "points"),
        ([LogisticTask(np.array([[np.inf], [1.0]]), np.array([0.5, 0.5]))], good, "points"),
        ([COIN], Merge((replace(good.experts[0], momentum=0.5),)), "momentum"),
        ([COIN], Merge((replace(good.experts[0], weight_decay=0.5),)), "weight_decay"),
        ([COIN], Merge((replace(good.experts[0], optimizer="adamw"),)), "adamw"),
        ([COIN], Merge(good.experts, method="dare", coefficients=1.0), "method"),
    ):
        with pytest.raises(RecipeError, match=word):
            confidence_coverage(tasks, ONE, merge, 0.1, replicates=10, seed=0)
    with pytest.raises(RecipeError, match="delta"):
        confidence_coverage([COIN], ONE, good, 1.5, replicates=10, seed=0)
