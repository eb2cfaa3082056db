"""One pass of SGD on Gaussian regression: exact training gap, risk, stability of merges against real runs."""

from __future__ import annotations

from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import (
    AssumptionError,
    Expert,
    RecipeError,
    RegressionTask,
    Schedule,
    one_pass_merge,
    one_pass_moments,
    one_pass_overlap,
)
from theory.one_pass import _fourth, _sixth, isserlis, seen_noise
from theory.simulation import simulate_merge
from theory.stability import epsilon_cap, epsilon_floor


def random_task(rng: np.random.Generator, dim: int) -> RegressionTask:
    root = rng.standard_normal((dim, dim))
    return RegressionTask(root @ root.T / dim + 0.2 * np.eye(dim), rng.standard_normal(dim), float(rng.uniform(0.2, 1)))


CASES = [
    dict(),
    dict(momentum=0.6),
    dict(momentum=0.7, nesterov=True, weight_decay=0.2),
    dict(momentum=0.5, decoupled_decay=True, weight_decay=0.4),
    dict(weight_decay=0.3, momentum=0.8),
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_merge_of_heterogeneous_experts_against_simulation(index: int) -> None:
    """Different w, non-commuting Sigma, n, batch sizes, schedules; n not exhausted; a short last batch."""
    rng = np.random.default_rng(index)
    tasks, base = [random_task(rng, 2) for _ in range(2)], rng.standard_normal(2)
    assert np.abs(tasks[0].Sigma @ tasks[1].Sigma - tasks[1].Sigma @ tasks[0].Sigma).max() > 1e-3
    experts = [
        Expert("a", 7, 3, Schedule(rng.uniform(0.05, 0.2, 3)), sampling="reshuffle", **CASES[index]),  # 3, 3, 1
        Expert(
            "b", 9, 2, Schedule(rng.uniform(0.05, 0.2, 3)), sampling="reshuffle", **CASES[(index + 2) % 5]
        ),  # 6 of 9
    ]
    alpha, p = np.array([0.9, 0.6]), np.array([0.7, 0.3])
    exact = one_pass_merge(tasks, base, experts, alpha, p)
    seen = simulate_merge(tasks, base, experts, alpha, p, replicates=60_000, seed=index)
    scores = seen.standard_scores(exact)
    assert max(abs(score) for score in scores.values()) < 4, scores
    for task, expert, x in zip(tasks, experts, seen.experts, strict=True):
        moments = one_pass_moments(task, base, expert)
        centred = x - moments.mean
        for values, expected in (
            (np.sum((x - base) ** 2, axis=1), moments.drift**2),
            (centred[:, 0] * centred[:, 1], moments.covariance[0, 1]),
            (x[:, 0], moments.mean[0]),
        ):
            assert abs(values.mean() - expected) < 4 * values.std() / np.sqrt(len(values))
        assert moments.epsilon <= epsilon_cap(moments.drift)
        assert epsilon_floor(np.trace(moments.covariance), int(expert.n)) <= moments.epsilon * (1 + 1e-12)


def wick(indices: tuple[int, ...], Sigma: np.ndarray) -> float:
    """``E a_i a_j ...`` of Gaussian a by the recursive definition of the pairings."""
    if not indices:
        return 1.0
    rest = indices[1:]
    return sum(float(Sigma[indices[0], rest[m]]) * wick(rest[:m] + rest[m + 1 :], Sigma) for m in range(len(rest)))


def test_moments_of_gaussians_by_pairings() -> None:
    rng = np.random.default_rng(3)
    task, root = random_task(rng, 2), rng.standard_normal((2, 2))
    C, S, variance = task.Sigma, root @ root.T, 0.3
    axes = [(p, q, r, s) for p in range(2) for q in range(2) for r in range(2) for s in range(2)]
    for i in axes:
        six = sum(S[k, m] * wick((*i, k, m), C) for k in range(2) for m in range(2))
        assert _fourth(C)[i] == pytest.approx(wick(i, C))
        assert _sixth(C, S)[i] == pytest.approx(six)
        p, q, r, s = i
        by_hand = six + variance * wick(i, C) + C[p, q] * (C @ S @ C)[r, s]
        by_hand -= sum(wick((p, q, r, k), C) * (S @ C)[k, s] + (C @ S)[r, k] * wick((p, q, k, s), C) for k in range(2))
        assert seen_noise(C, S, np.asarray(variance))[i] == pytest.approx(by_hand)
    assert np.allclose(isserlis(C, S), C @ S @ C + C * np.trace(C @ S))


def polynomial_gap(task: tuple[str, str, str], x0: str, eta: str, decay: str, n: int, b: int) -> tuple[float, float]:
    """E F and E F_S of one-dimensional SGD, b of n samples per step, one pass: polynomials in Gaussians, 50 digits."""
    import sympy

    s2, w, s = (sympy.Rational(value) for value in task)
    a, xi = sympy.symbols(f"a0:{n}"), sympy.symbols(f"xi0:{n}")
    x = sympy.Rational(x0)
    for start in range(0, n, b):
        batch = range(start, min(start + b, n))
        gradient = sum(a[j] * (a[j] * (x - w) - xi[j]) for j in batch) / len(batch)
        x = sympy.expand(x - sympy.Rational(eta) * (gradient + sympy.Rational(decay) * x))

    def expectation(expression: object) -> float:
        total = sympy.Integer(0)
        for powers, coefficient in sympy.Poly(expression, *a, *xi).terms():
            if all(power % 2 == 0 for power in powers):
                sizes = [s2] * n + [s**2] * n
                factors = [v ** (k // 2) * sympy.factorial2(k - 1) for k, v in zip(powers, sizes, strict=True) if k]
                total += coefficient * sympy.prod(factors)
        with mpmath.workdps(50):
            return float(total.evalf(50))

    true = expectation(sympy.expand(s2 * (x - w) ** 2 + s**2)) / 2
    seen = expectation(sympy.expand(sum((a[j] * (x - w) - xi[j]) ** 2 for j in range(n)))) / (2 * n)
    return true, seen


@pytest.mark.parametrize(("n", "b"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 1)])
def test_against_exact_polynomial_expectations(n: int, b: int) -> None:
    """Every expectation is that of a polynomial in independent Gaussians: expanded by sympy, moment by moment."""
    task = RegressionTask(np.array([[0.75]]), np.array([0.5]), 0.4)
    expert = Expert("a", n, b, 0.2, -(-n // b), sampling="reshuffle", weight_decay=0.25)
    exact = one_pass_merge([task], [-1.25], [expert], [1.0], [1.0])
    true, seen = polynomial_gap(("3/4", "1/2", "2/5"), "-5/4", "1/5", "1/4", n, b)
    assert float(exact.risk) == pytest.approx(true, rel=1e-12)
    assert float(exact.training_risk) == pytest.approx(seen, rel=1e-12)


def test_broadcasts_as_one_configuration_at_a_time() -> None:
    rng = np.random.default_rng(8)
    tasks, base = [random_task(rng, 3) for _ in range(2)], rng.standard_normal((2, 1, 3))
    rates, decay = np.array([0.05, 0.1, 0.3]), np.array([[0.0], [0.2]])
    runs = [
        Expert("a", 20, 3, rates, np.array([2, 4, 5]), weight_decay=decay, momentum=0.5, sampling="reshuffle"),
        Expert("b", 12, 5, 0.1, 3, nesterov=True, momentum=0.3, sampling="reshuffle"),
    ]
    alpha, p = np.array([0.4, 0.8]), np.array([0.5, 0.5])
    many = one_pass_merge(tasks, base, runs, alpha, p)
    assert many.gap.shape == (2, 3)
    for i in range(2):
        for j, steps in enumerate((2, 4, 5)):
            one = replace(runs[0], learning_rate=rates[j], weight_decay=decay[i, 0], steps=steps)
            single = one_pass_merge(tasks, base[i, 0], [one, runs[1]], alpha, p)
            for field in ("risk", "training_risk", "gap", "V", "stability"):
                assert getattr(many, field)[i, j] == pytest.approx(float(getattr(single, field)), rel=1e-9)


def test_a_grid_of_coefficients_and_weights() -> None:
    rng = np.random.default_rng(9)
    tasks, base = [random_task(rng, 2) for _ in range(2)], rng.standard_normal(2)
    runs = [Expert(name, 8, 4, 0.1, 2, sampling="reshuffle") for name in "ab"]
    alpha, p = rng.uniform(0, 1, (2, 5)), np.array([0.3, 0.7])
    many = one_pass_merge(tasks, base, runs, alpha, p)
    weighted = one_pass_merge(tasks, base, runs, alpha[:, 0], np.stack([[0.3, 0.5], [0.7, 0.5]]))
    for k in range(5):
        single = one_pass_merge(tasks, base, runs, alpha[:, k], p)
        for field in ("risk", "training_risk", "gap", "V", "stability"):
            assert getattr(many, field)[k] == pytest.approx(float(getattr(single, field)))
            assert getattr(weighted, field)[0] == pytest.approx(float(getattr(many, field)[0]))


def test_one_batch_without_replacement_is_one_pass() -> None:
    rng = np.random.default_rng(1)
    task, base = random_task(rng, 2), rng.standard_normal(2)
    run = Expert("a", 8, 4, 0.1, 1, sampling="reshuffle")
    same = replace(run, sampling="without_replacement")
    assert one_pass_moments(task, base, same).epsilon == one_pass_moments(task, base, run).epsilon
    with pytest.raises(AssumptionError, match="one pass"):
        one_pass_moments(task, base, replace(same, steps=2))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.floats(0.01, 0.3), scale=st.floats(0.1, 10.0))
def test_units_and_rotations(seed: int, rate: float, scale: float) -> None:
    """A rotation of the inputs changes nothing; y in other units scales losses by the square; a linear gap in match."""
    rng = np.random.default_rng(seed)
    task, base = random_task(rng, 2), rng.standard_normal(2)
    expert = Expert("a", 6, 2, rate, 3, sampling="reshuffle", momentum=0.4, weight_decay=0.1)
    turn, _ = np.linalg.qr(rng.standard_normal((2, 2)))
    other = RegressionTask(turn @ task.Sigma @ turn.T, scale * turn @ task.w, scale * float(task.noise))
    first = one_pass_merge([task], base, [expert], [0.7], [1.0])
    second = one_pass_merge([other], scale * turn @ base, [expert], [0.7], [1.0])
    for field in ("risk", "training_risk", "gap", "V", "stability"):
        assert float(getattr(second, field)) == pytest.approx(scale**2 * float(getattr(first, field)), rel=1e-7)


def test_gap_falls_as_one_over_n_and_is_not_that_of_the_additive_family() -> None:
    """b = 1, K = n, eta = c/n: the gap is of order 1/n; the naive gap with the mean Hessian misses the random part."""
    task = RegressionTask(np.eye(2), np.ones(2), 1.0)
    gaps = []
    for n in (50, 100, 200):
        expert = Expert("a", n, 1, 2.0 / n, n, sampling="reshuffle")
        gaps.append(float(one_pass_merge([task], np.zeros(2), [expert], [1.0], [1.0]).gap))
    assert np.allclose(np.diff(np.log(gaps)) / np.log(2), -1, atol=0.05)
    naive = 2 * (1 - (1 - 2.0 / 200) ** 200) / 200  # tr(Sigma H tau) s^2/n
    assert gaps[-1] > 1.02 * naive


def test_too_large_a_learning_rate_makes_training_samples_worse() -> None:
    task = RegressionTask(np.eye(1), np.zeros(1), 0.0)
    expert = Expert("a", 1, 1, np.array([0.1, 1.0]), 1, sampling="reshuffle")
    gap = one_pass_merge([task], [1.0], [expert], [1.0], [1.0]).gap  # (4 eta - 12 eta^2)/2
    assert np.allclose(gap, [0.14, -4.0])


def test_never_nan_and_refusals() -> None:
    task = RegressionTask(np.eye(2), np.ones(2), 1.0)
    wild = Expert("a", 200, 1, np.array([0.1, 1e6]), 200, sampling="reshuffle", momentum=0.9)
    exact = one_pass_merge([task], np.zeros(2), [wild], [0.5], [1.0])
    for field in ("risk", "training_risk", "gap", "V", "stability"):
        values = getattr(exact, field)
        assert np.isfinite(values[0])
        assert values[1] == np.inf
    moments = one_pass_moments(task, np.zeros(2), wild)
    assert moments.risk[1] == moments.epsilon[1] == moments.drift[1] == np.inf
    twice = Expert("a", 10, 2, 0.1, np.array([5, 6]), sampling="reshuffle")
    with pytest.raises(AssumptionError, match="one pass"):
        one_pass_overlap(task, np.zeros(2), twice)
    good = replace(twice, steps=5)
    for bad, word in (
        (RegressionTask(np.eye(3), np.ones(2), 1.0), "Sigma has shape"),
        (RegressionTask(-np.eye(2), np.ones(2), 1.0), "no covariance"),
        (RegressionTask(np.array([[1.0, 0.5], [0.0, 1.0]]), np.ones(2), 1.0), "no covariance"),
        (RegressionTask(np.eye(2), np.ones(2), -1.0), "noise is negative"),
        (RegressionTask(np.eye(2), np.array([1.0, np.nan]), 1.0), "w holds"),
    ):
        with pytest.raises(RecipeError, match=word):
            one_pass_merge([bad], np.zeros(2), [good], [1.0], [1.0])


def test_samples_of_one_batch_overlap_alike() -> None:
    """One full batch: every sample has the overlap that the calculator gives for their mean."""
    rng = np.random.default_rng(2)
    task, base = random_task(rng, 2), rng.standard_normal(2)
    expert = Expert("a", 4, 4, 0.2, 1, sampling="reshuffle")
    data = rng.standard_normal((200_000, 4, 2)) @ np.linalg.cholesky(task.Sigma).T
    noise = float(task.noise) * rng.standard_normal((200_000, 4))
    e = base - task.w
    moved = e - 0.2 * np.einsum("rn,rnd->rd", data @ e - noise, data) / 4
    exact = one_pass_overlap(task, base, expert)
    for j in range(4):
        seen = noise[:, j] * np.einsum("rd,rd->r", data[:, j], moved)
        assert abs(seen.mean() - float(exact.match)) < 4.5 * seen.std() / np.sqrt(len(seen))
