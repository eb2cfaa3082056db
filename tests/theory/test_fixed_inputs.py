"""Ridge, least squares and full-batch descent given the inputs: against real fits, one-pass SGD and Wishart moments."""

from __future__ import annotations

import numpy as np
import pytest

from theory import (
    AssumptionError,
    Expert,
    RecipeError,
    RegressionTask,
    Schedule,
    descent_fit,
    given_inputs,
    least_squares_merge,
    least_squares_stability,
    one_pass_merge,
    ridge_fit,
)
from theory.regression import draw_regression, simulate_regression


def random_task(rng: np.random.Generator, dim: int) -> RegressionTask:
    root = rng.standard_normal((dim, dim))
    return RegressionTask(root @ root.T / dim + 0.2 * np.eye(dim), rng.standard_normal(dim), float(rng.uniform(0.2, 1)))


def within(values: np.ndarray, exact: float, limit: float = 4.0) -> bool:
    return bool(abs(values.mean() - exact) < limit * values.std(ddof=1) / np.sqrt(len(values)) + 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_merge_of_a_ridge_and_a_descent_against_drawn_labels(seed: int) -> None:
    """Fixed inputs, real ridge solutions and real descent (momentum, decay, schedule) on drawn labels."""
    rng, runs = np.random.default_rng(seed), 40_000
    tasks, base = [random_task(rng, 3) for _ in range(2)], rng.standard_normal(3)
    inputs = [rng.standard_normal((n, 3)) @ np.linalg.cholesky(t.Sigma).T for n, t in zip((6, 9), tasks, strict=True)]
    labels = [a @ t.w + t.noise * rng.standard_normal((runs, len(a))) for a, t in zip(inputs, tasks, strict=True)]
    expert = Expert(
        *("b", 9, 9, Schedule(rng.uniform(0.05, 0.3, 6))),
        momentum=0.6,
        weight_decay=0.1,
        nesterov=seed == 1,
        decoupled_decay=seed == 2,
    )
    ridge, count = 0.3, len(inputs[0])
    system = inputs[0].T @ inputs[0] / count + ridge * np.eye(3)
    x = [np.linalg.solve(system, (labels[0] @ inputs[0] / count + ridge * base).T).T]
    batches = [np.tile(np.arange(9), (runs, 1))] * 6
    x.append(simulate_regression(base, expert, np.broadcast_to(inputs[1], (runs, 9, 3)), labels[1], batches))
    alpha, p = np.array([0.6, 0.8]), np.array([0.3, 0.7])
    exact = given_inputs(tasks, base, [ridge_fit(inputs[0], ridge), descent_fit(inputs[1], expert)], alpha, p)
    merged = base + alpha[0] * (x[0] - base) + alpha[1] * (x[1] - base)
    risk = training = dispersion = np.zeros(runs)
    for weight, task, a, y, own in zip(p, tasks, inputs, labels, x, strict=True):
        away = merged - task.w
        risk = risk + weight * 0.5 * (np.einsum("ra,ab,rb->r", away, task.Sigma, away) + task.noise**2)
        training = training + weight * 0.5 * ((merged @ a.T - y) ** 2).mean(axis=1)
        dispersion = dispersion + weight * np.sum((merged - own) ** 2, axis=1)
    assert within(risk, float(exact.risk))
    assert within(training, float(exact.training_risk))
    assert within(dispersion, float(exact.V))
    for i, own in enumerate(x):
        assert within(np.sum((own - base) ** 2, axis=1), float(exact.drift[i]) ** 2)
    assert float(exact.gap) == pytest.approx(float(exact.risk - exact.training_risk))


def test_one_full_batch_step_is_one_pass_with_one_batch() -> None:
    """Averaged over Gaussian inputs, one step of full-batch descent is what the moment recursion gives."""
    rng = np.random.default_rng(5)
    task, base = random_task(rng, 2), rng.standard_normal(2)
    expert = Expert("a", 5, 5, 0.3, 1, weight_decay=0.2, sampling="reshuffle")
    inputs = rng.standard_normal((60_000, 5, 2)) @ np.linalg.cholesky(task.Sigma).T
    averaged = given_inputs([task], base, [descent_fit(inputs, expert)], [0.8], [1.0])
    exact = one_pass_merge([task], base, [expert], [0.8], [1.0])
    for field in ("risk", "training_risk", "gap", "V"):
        assert within(getattr(averaged, field), float(getattr(exact, field))), field


def test_no_ridge_averages_to_the_wishart_moments() -> None:
    rng = np.random.default_rng(6)
    tasks, base = [random_task(rng, 2) for _ in range(2)], rng.standard_normal(2)
    fits = [
        ridge_fit(rng.standard_normal((30_000, n, 2)) @ np.linalg.cholesky(task.Sigma).T, 0.0)
        for n, task in zip((12, 15), tasks, strict=True)
    ]
    alpha, p = np.array([0.5, 0.9]), np.array([0.6, 0.4])
    averaged = given_inputs(tasks, base, fits, alpha, p)
    exact = least_squares_merge(tasks, base, [12, 15], alpha, p)
    for field in ("risk", "training_risk", "gap", "V"):
        assert within(getattr(averaged, field), float(getattr(exact, field))), field


def test_limits_of_ridge_and_of_descent() -> None:
    rng = np.random.default_rng(7)
    task, base, inputs = random_task(rng, 3), rng.standard_normal(3), rng.standard_normal((8, 3))
    least = given_inputs([task], base, [ridge_fit(inputs, 0.0)], [1.0], [1.0])
    long = descent_fit(inputs, Expert("a", 8, 8, 0.2, 20_000))
    assert float(given_inputs([task], base, [long], [1.0], [1.0]).risk) == pytest.approx(float(least.risk))
    freedom = float(task.noise) ** 2 * 3 / 8 / 2  # degrees of freedom d of a fit that interpolates the mean
    assert float(least.training_risk) == pytest.approx(float(task.noise) ** 2 / 2 - freedom)
    stiff = given_inputs([task], base, [ridge_fit(inputs, 1e12)], [1.0], [1.0])
    away = base - task.w
    assert float(stiff.risk) == pytest.approx(0.5 * (away @ task.Sigma @ away + float(task.noise) ** 2))
    curve = given_inputs([task], base, [ridge_fit(inputs, np.geomspace(1e-3, 1e3, 50))], [1.0], [1.0])
    assert curve.risk.shape == (50,)
    assert np.all(np.diff(curve.training_risk) > 0)  # a stiffer fit never trains better
    assert np.all(np.diff(curve.drift[0]) < 0)


@pytest.mark.parametrize(("dim", "n"), [(1, 12), (2, 12), (3, 15)])
def test_least_squares_stability_against_refits(dim: int, n: int) -> None:
    """Leave one out: equal within the standard error; exchange one: between floor and ceiling."""
    rng, runs = np.random.default_rng(dim), 60_000
    task = random_task(rng, dim)
    a, y = draw_regression(task, n + 1, runs, rng)

    def fit(keep: slice | list[int]) -> np.ndarray:
        gram = np.einsum("rni,rnj->rij", a[:, keep], a[:, keep])
        return np.asarray(np.linalg.solve(gram, np.einsum("rni,rn->ri", a[:, keep], y[:, keep])[..., None])[..., 0])

    full, without, exchanged = fit(slice(0, n)), fit(slice(1, n)), fit(slice(1, n + 1))
    found = least_squares_stability(task, n)
    assert within(np.sum((full - without) ** 2, axis=1), float(found.removal))
    moved = np.sum((full - exchanged) ** 2, axis=1)
    error = 4 * moved.std() / np.sqrt(runs)
    assert float(found.floor) - error <= moved.mean() <= float(found.ceiling) + error
    assert float(found.ceiling / found.floor) == pytest.approx(n / (n - dim - 2))
    naive = 2 * float(task.noise) ** 2 * np.trace(np.linalg.inv(task.Sigma)) / n**2  # the asymptotic value
    assert moved.mean() - error > naive  # trap: too small at finite n


def test_refusals_and_overflow() -> None:
    task, inputs = RegressionTask(np.eye(2), np.ones(2), 1.0), np.random.default_rng(0).standard_normal((5, 2))
    for call, word in (
        (lambda: ridge_fit(inputs[:1], 0.0), "do not span"),
        (lambda: ridge_fit(inputs, -1.0), "ridge is negative"),
        (lambda: ridge_fit(inputs[0], 1.0), "inputs has shape"),
        (lambda: least_squares_stability(task, 3), "n is 3"),
        (lambda: least_squares_stability(RegressionTask(np.zeros((2, 2)), np.ones(2), 1.0), 9), "singular"),
    ):
        with pytest.raises(RecipeError, match=word):
            call()
    for bad in (Expert("a", 5, 2, 0.1, 3), Expert("a", 6, 6, 0.1, 3), Expert("a", 5, 5, 0.1, 3, optimizer="adamw")):
        with pytest.raises(AssumptionError, match=r"batch_size|adamw"):
            descent_fit(inputs, bad)
    wild = descent_fit(inputs, Expert("a", 5, 5, 1e6, 500))
    found = given_inputs([task], np.zeros(2), [wild], [0.5], [1.0])
    assert found.risk == found.training_risk == found.gap == found.V == np.inf
    assert np.isinf(least_squares_stability(task, 4).ceiling)
