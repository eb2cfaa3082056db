"""Regression with Gaussian inputs: exact one-pass and least-squares moments against real runs."""

from __future__ import annotations

import numpy as np
import pytest

from theory import Expert, Schedule
from theory.dispersion import centred_bound, triangle_bound
from theory.errors import AssumptionError, RecipeError
from theory.one_pass import isserlis, one_pass_moments
from theory.quadratic import draw_batches
from theory.regression import (
    RegressionTask,
    draw_regression,
    least_squares_merge,
    regression_merge,
    simulate_regression,
)
from theory.stability import epsilon_cap, epsilon_floor

RUNS = 40_000


def z_score(values: np.ndarray, exact: float) -> float:
    return float(abs(values.mean() - exact) / (values.std(ddof=1) / np.sqrt(len(values)) + 1e-14))


def random_task(rng: np.random.Generator, dim: int) -> RegressionTask:
    root = rng.standard_normal((dim, dim))
    return RegressionTask(root @ root.T / dim + 0.2 * np.eye(dim), rng.standard_normal(dim), float(rng.uniform(0.2, 1)))


def random_expert(rng: np.random.Generator, name: str, momentum: float, decay: float) -> Expert:
    """Two or three short steps of one pass: the moments of Gaussian products stay light-tailed enough to average."""
    n, b = int(rng.integers(8, 12)), int(rng.integers(3, 5))
    steps = int(rng.integers(2, n // b + 1))
    return Expert(
        name, n, b, Schedule(rng.uniform(0.05, 0.2, steps)), momentum=momentum, weight_decay=decay, sampling="reshuffle"
    )


@pytest.mark.parametrize(("seed", "momentum", "decay"), [(0, 0.0, 0.0), (1, 0.6, 0.0), (2, 0.0, 0.3), (3, 0.8, 0.2)])
def test_one_pass_and_merge_against_simulation(seed: int, momentum: float, decay: float) -> None:
    rng = np.random.default_rng(seed)
    tasks = [random_task(rng, 2) for _ in range(2)]
    base = rng.standard_normal(2)
    experts = [random_expert(rng, f"e{i}", momentum, decay) for i in range(2)]
    alpha, p = np.array([0.4, 0.8]), np.array([0.7, 0.3])
    exact = [one_pass_moments(task, base, expert) for task, expert in zip(tasks, experts, strict=True)]
    runs, scores = [], []
    for task, expert, moments in zip(tasks, experts, exact, strict=True):
        n = int(expert.n)
        inputs, targets = draw_regression(task, n, RUNS, rng)
        batches = draw_batches(expert, RUNS, rng)
        x = simulate_regression(base, expert, inputs, targets, batches)
        runs.append(x)
        away = x - task.w
        risk = 0.5 * np.einsum("ra,ab,rb->r", away, task.Sigma, away) + 0.5 * task.noise**2
        scores += [z_score(risk, moments.risk), z_score(np.sum((x - base) ** 2, axis=1), moments.drift**2)]
        scores += [z_score(x[:, k], moments.mean[k]) for k in range(2)]
        centred = x - moments.mean
        scores += [z_score(centred[:, 0] * centred[:, 1], moments.covariance[0, 1])]
        rows, place = np.arange(RUNS), rng.integers(0, n, RUNS)
        other_inputs, other_targets = inputs.copy(), targets.copy()
        fresh = draw_regression(task, 1, RUNS, rng)
        other_inputs[rows, place], other_targets[rows, place] = fresh[0][:, 0], fresh[1][:, 0]
        twin = simulate_regression(base, expert, other_inputs, other_targets, batches)
        scores += [z_score(np.sum((twin - x) ** 2, axis=1), moments.epsilon**2)]
        # what needs no smoothness: cap and Efron-Stein floor (variance given the seeds, here by simulation: seeds only
        # permute exchangeable samples, so all variance is variance given the seeds)
        assert moments.epsilon <= epsilon_cap(moments.drift)
        assert epsilon_floor(np.trace(moments.covariance), n) <= moments.epsilon * (1 + 1e-12)
    merged = base + sum((a * (x - base) for a, x in zip(alpha, runs, strict=True)), np.zeros((RUNS, 2)))
    joint = regression_merge(tasks, base, exact, alpha, p)
    risk = dispersion = np.zeros(RUNS)
    for weight, task, x in zip(p, tasks, runs, strict=True):
        away = merged - task.w
        risk = risk + weight * (0.5 * np.einsum("ra,ab,rb->r", away, task.Sigma, away) + 0.5 * task.noise**2)
        dispersion = dispersion + weight * np.sum((merged - x) ** 2, axis=1)
    scores += [z_score(risk, joint.risk), z_score(dispersion, joint.V)]
    assert max(scores) < 4.5, scores
    assert np.mean(np.array(scores) ** 2) < 3.0, scores
    d = np.array([moments.drift for moments in exact])
    assert min(triangle_bound(d, alpha, p), centred_bound(d, alpha, p)) >= joint.V


def test_isserlis_against_enumeration_of_pairings() -> None:
    """E[a a' S a a'] from the three pairings of Gaussian moments, summed index by index."""
    rng = np.random.default_rng(4)
    task = random_task(rng, 3)
    C, root = task.Sigma, rng.standard_normal((3, 3))
    S = root @ root.T
    fourth = (
        np.einsum("ij,kl->ijkl", C, C) + np.einsum("ik,jl->ijkl", C, C) + np.einsum("il,jk->ijkl", C, C)
    )  # E a_i a_j a_k a_l
    assert np.allclose(np.einsum("ijkl,jk->il", fourth, S), C @ S @ C + isserlis(C, S))


def test_gradient_noise_grows_with_the_distance() -> None:
    """What the additive family cannot show: with noiseless labels the noise vanishes at w and SGD converges there."""
    task = RegressionTask(np.eye(2), np.ones(2), 0.0)
    risks = [
        one_pass_moments(task, np.zeros(2), Expert("a", 400, 1, 0.2, steps, sampling="reshuffle")).risk
        for steps in (50, 100, 200)
    ]
    rate = 1 - 2 * 0.2 + 0.2**2 * (2 + 2)  # d = 2, b = 1: 1 - 2 eta + eta^2 (d + 2)
    assert risks[1] / risks[0] == pytest.approx(rate**50, rel=1e-9)
    assert risks[2] / risks[1] == pytest.approx(rate**100, rel=1e-9)


def test_least_squares_merge_against_simulation() -> None:
    rng = np.random.default_rng(9)
    tasks, samples = [random_task(rng, 2) for _ in range(2)], [12, 15]
    base, alpha, p = rng.standard_normal(2), np.array([0.5, 0.9]), np.array([0.6, 0.4])
    runs = 20_000
    data = [draw_regression(task, n, runs, rng) for task, n in zip(tasks, samples, strict=True)]
    fits = []
    for a, y in data:
        gram, moment = np.einsum("rni,rnj->rij", a, a), np.einsum("rni,rn->ri", a, y)
        fits.append(np.linalg.solve(gram, moment[..., None])[..., 0])
    merged = base + sum((c * (x - base) for c, x in zip(alpha, fits, strict=True)), np.zeros((runs, 2)))
    risk = empirical = dispersion = np.zeros(runs)
    for weight, task, (a, y), x in zip(p, tasks, data, fits, strict=True):
        away = merged - task.w
        risk = risk + weight * (0.5 * np.einsum("ra,ab,rb->r", away, task.Sigma, away) + 0.5 * task.noise**2)
        empirical = empirical + weight * 0.5 * ((np.einsum("rnd,rd->rn", a, merged) - y) ** 2).mean(axis=1)
        dispersion = dispersion + weight * np.sum((merged - x) ** 2, axis=1)
    exact = least_squares_merge(tasks, base, samples, alpha, p)
    scores = [z_score(risk, exact.risk), z_score(empirical, exact.training_risk), z_score(dispersion, exact.V)]
    scores.append(z_score(risk - empirical, exact.gap))
    assert max(scores) < 4.5, scores


def test_regression_refuses_by_name() -> None:
    task = RegressionTask(np.eye(1), np.zeros(1), 1.0)
    for bad, word in (
        (Expert("a", 10, 2, 0.1, 6, sampling="reshuffle"), "one pass"),
        (Expert("a", 10, 2, 0.1, 2, sampling="with_replacement"), "one pass"),
        (Expert("a", 10, 2, 0.1, 2, sampling="reshuffle", optimizer="adamw"), "adamw"),
    ):
        with pytest.raises(AssumptionError, match=word):
            one_pass_moments(task, [0.0], bad)
    with pytest.raises(RecipeError, match="n is 2"):
        least_squares_merge([task], [0.0], [2], [1.0], [1.0])
