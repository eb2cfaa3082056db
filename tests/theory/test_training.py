"""Training risk of an expert: every bound against the exact family, nonlinear losses, and gradient descent."""

from __future__ import annotations

from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_recipes import random_problem

from theory import AssumptionError, Expert, QuadraticTask, RecipeError, Schedule, expert_moments, schedules
from theory.symbolic import evaluate
from theory.symbols import symbol
from theory.training import (
    convex_risk_formula,
    convex_training_risk,
    descent_training_risk,
    distance_training_risk,
    harmonic,
    pl_training_risk,
    training_risk,
)

SLACK = 1 + 1e-8
FORMS = {
    "PL": pl_training_risk,
    "convex": convex_training_risk,
    "distance": distance_training_risk,
    "descent": descent_training_risk,
}


def with_distance(task: QuadraticTask, base: np.ndarray, expert: Expert) -> Expert:
    """The rms distance of x_0 from the nearest minimiser of F_S + omega/2 ||x||^2, exact on quadratics."""
    n, omega = int(expert.n), float(expert.weight_decay)  # type: ignore[arg-type]
    h, basis = np.linalg.eigh(task.H)
    start, centre, noise = basis.T @ base, basis.T @ task.theta, np.diag(basis.T @ task.Omega @ basis)
    curved = h > 1e-12
    shrink = np.where(curved, h / np.where(curved, h + omega, 1.0), 0.0)
    away = np.where(curved | (omega > 0), start - shrink * centre, 0.0)
    square = np.sum(away**2) + np.sum(shrink**2 * noise / n)
    return replace(expert, minimizer_distance=float(np.sqrt(square)), training_risk=None)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_exact_training_risk_below_every_form(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sampling = str(rng.choice(["without_replacement", "with_replacement"]))
    problem = random_problem(seed, size=1, momentum=0.0, sampling=sampling)
    task, run = problem.tasks[0], problem.experts[0]
    if rng.random() < 0.5:  # within the range of every form
        limit = float(rng.choice([1.0, 1.9])) / (float(run.L) + float(run.weight_decay))  # type: ignore[arg-type]
        steps = int(rng.integers(1, 60))
        shape = rng.random(steps) if rng.random() < 0.5 else np.ones(steps)
        batch = run.batch_size if not isinstance(run.batch_size, Schedule) else 1
        rate = Schedule(limit * shape) if rng.random() < 0.7 else limit
        run = replace(run, steps=steps, learning_rate=rate, batch_size=batch)
    expert = with_distance(task, problem.base, run)
    exact = expert_moments(task, problem.base, run).training_risk
    floor = 1e-12 * float(expert.initial_risk)  # type: ignore[arg-type]
    applied = 0
    for name, form in FORMS.items():
        try:
            value = float(form(expert))
        except RecipeError:
            continue
        applied += 1
        assert exact <= value * SLACK + floor, name
    if applied:
        smallest, _ = training_risk(expert)
        assert exact <= float(smallest) * SLACK + floor


@pytest.mark.parametrize("seed", range(6))
def test_nonlinear_convex_losses(seed: int) -> None:
    """Logistic regression, full enumeration of batches of one: E F_S(x_K) below the last-iterate bound."""
    rng = np.random.default_rng(seed)
    n, steps = 3, 6
    rows = rng.standard_normal((n, 2)) * 2
    L = float(np.max(np.sum(rows**2, axis=1)) / 4)
    eta = np.minimum(1.0, rng.random(steps) + 0.2) / L

    def gradients(x: np.ndarray) -> np.ndarray:
        return -rows / (1 + np.exp(rows @ x))[..., None] + 0.05 * x

    def risk(x: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, -(rows @ x))) + 0.025 * x @ x)

    L += 0.05
    eta = eta * (L - 0.05) / L
    x = np.zeros(2)
    for _ in range(4000):
        x = x - gradients(x).mean(axis=0) / L
    best, points = risk(x), [(np.ones(2), 1.0)]
    noise = 0.0
    for rate in eta:
        following = []
        for point, weight in points:
            steps_of = gradients(point)
            spread = steps_of - steps_of.mean(axis=0)
            noise = max(noise, float(np.mean(np.sum(spread**2, axis=1))))
            following += [(point - rate * g, weight / n) for g in steps_of]
        points = following
    exact = sum(weight * risk(point) for point, weight in points)
    expert = Expert(
        "a",
        n,
        1,
        Schedule(eta),
        sampling="with_replacement",
        curvature="convex",
        L=L,
        sigma=float(np.sqrt(noise)),
        initial_risk=risk(np.ones(2)),
        minimal_risk=best,
        minimizer_distance=float(np.linalg.norm(np.ones(2) - x)),
    )
    assert exact <= float(convex_training_risk(expert))
    assert exact <= float(distance_training_risk(expert))
    assert exact <= float(descent_training_risk(expert))


def test_the_two_writings_of_the_convex_bound_agree() -> None:
    run = dict(n=50, batch_size=5, curvature="convex", L=2.0, sigma=0.7, minimal_risk=0.1, minimizer_distance=1.5)
    for steps in (1, 2, 7, 40):
        flat = float(convex_training_risk(Expert("a", learning_rate=0.3, steps=steps, **run)))  # type: ignore[arg-type]
        written = Expert("a", learning_rate=Schedule(np.full(steps, 0.3)), **run)  # type: ignore[arg-type]
        assert float(convex_training_risk(written)) == pytest.approx(flat, rel=1e-12)


def test_annealing_helps_the_last_iterate() -> None:
    run = dict(n=5000, batch_size=5, curvature="convex", L=1.0, sigma=1.0, minimal_risk=0.0, minimizer_distance=3.0)
    constant = float(convex_training_risk(Expert("a", learning_rate=0.3, steps=400, **run)))  # type: ignore[arg-type]
    down = Expert("a", learning_rate=schedules.linear(0.3, 400), **run)  # type: ignore[arg-type]
    assert float(convex_training_risk(down)) < 0.6 * constant


def test_against_fifty_digits() -> None:
    made, rng = convex_risk_formula(), np.random.default_rng(0)
    for _ in range(20):
        numbers = rng.uniform(0.1, 2.0, len(made.keys))
        with mpmath.workdps(50):
            exact = made.expression.evalf(50, subs=dict(zip((symbol(k) for k in made.keys), numbers, strict=True)))
        assert float(evaluate(convex_risk_formula, *numbers)) == pytest.approx(float(exact), rel=1e-12)
    with mpmath.workdps(50):
        for count in (1, 2, 31, 32, 33, 64, 1000, 10**7):
            assert float(harmonic(count)) == pytest.approx(float(mpmath.harmonic(count)), rel=1e-14)


def test_attained_by_gradient_descent_where_it_can_be() -> None:
    """PL without noise: one mode of curvature mu = L, every step; the bound is exact."""
    task = QuadraticTask(np.eye(1), np.zeros(1), np.zeros((1, 1)))
    run = Expert("a", 4, 4, 0.25, 3, curvature="strongly_convex", L=1.0, mu=1.0, sigma=0.0, initial_risk=0.5)
    run = replace(run, minimal_risk=0.0, minimizer_distance=1.0)
    exact = expert_moments(task, np.ones(1), run).training_risk
    assert float(distance_training_risk(run)) == pytest.approx(exact)
    assert exact <= float(pl_training_risk(run)) == pytest.approx(0.5 * 0.75**3)


def test_trap_pl_bound_is_false_with_momentum() -> None:
    """Heavy ball overshoots: after a few steps the objective is above what the PL rate allows, so it is refused."""
    task = QuadraticTask(np.eye(1), np.zeros(1), np.zeros((1, 1)))
    run = Expert("a", 4, 4, 0.5, 4, curvature="strongly_convex", L=1.0, mu=1.0, sigma=0.0, initial_risk=0.5)
    run = replace(run, minimal_risk=0.0, momentum=0.95)
    exact = expert_moments(task, np.ones(1), run).training_risk
    assert exact > 2 * float(pl_training_risk(replace(run, momentum=0.0)))
    with pytest.raises(AssumptionError, match="momentum"):
        training_risk(run)


def test_array_of_configurations_is_judged_one_by_one() -> None:
    """A configuration outside a form's range is infinite there and does not spoil its neighbours."""
    run = Expert(
        "a",
        100,
        10,
        np.array([0.1, 0.1, 3.0]),
        20,
        momentum=np.array([0.0, 0.9, 0.0]),
        curvature="strongly_convex",
        L=1.0,
        mu=0.1,
        sigma=1.0,
        initial_risk=1.0,
        minimal_risk=0.0,
    )
    value = pl_training_risk(run)
    assert np.isfinite(value).tolist() == [True, False, False]
    assert np.isfinite(training_risk(run)[0]).tolist() == [True, False, True]  # the distance form takes eta > 2/L too


def test_missing_constants_and_uncovered_recipes() -> None:
    run = Expert("a", 100, 10, 0.1, 20, curvature="convex", L=1.0, sigma=1.0)
    with pytest.raises(RecipeError, match="is missing"):
        training_risk(run)
    with pytest.raises(AssumptionError, match="reshuffle"):
        training_risk(replace(run, initial_risk=1.0, sampling="reshuffle"))
    with pytest.raises(AssumptionError, match="convex losses"):
        convex_training_risk(replace(run, curvature="smooth", minimal_risk=0.0, minimizer_distance=1.0))
    smooth = replace(run, curvature="smooth", initial_risk=1.0, minimal_risk=0.0)
    assert training_risk(smooth)[1] == "descent bound"
    assert np.isinf(training_risk(replace(smooth, learning_rate=np.array([0.1, 5.0])))[0]).tolist() == [False, True]
