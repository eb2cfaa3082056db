"""``exact <= bound`` on the quadratic family, for every random heterogeneous recipe (property-based)."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_recipes import random_problem
from wide_recipes import count

from theory import (
    AssumptionError,
    Expert,
    Merge,
    QuadraticTask,
    clock,
    expert_drift,
    expert_epsilon,
    expert_moments,
    master_bound,
    merge_moments,
    task_stability,
)
from theory.dispersion import centred_bound, orthogonal_bound, triangle_bound
from theory.drift import drift_base, drift_energy, drift_noise
from theory.errors import RecipeError
from theory.generalization import theorem_1
from theory.stability import (
    epsilon_cap,
    epsilon_floor,
    epsilon_recursion,
    epsilon_rms,
    epsilon_sup,
    gamma,
)
from theory.tightness import all_ratios, random_batch
from theory.training import pl_training_risk

SLACK = 1 + 1e-8
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SEEDS)
def test_stability_between_floor_and_bounds(seed: int) -> None:
    problem = random_problem(seed, size=1)
    task, expert = problem.tasks[0], problem.experts[0]
    exact = expert_moments(task, problem.base, expert)
    timing = clock(expert)
    bounds = [epsilon_sup(expert.D_envelope, timing.tau, expert.n, gamma(expert, timing)), epsilon_cap(exact.drift)]
    if expert.sampling != "reshuffle":
        bounds.append(epsilon_rms(expert.D_2, timing.tau, expert.n, gamma(expert, timing)))
        if expert.momentum == 0:
            bounds.append(epsilon_recursion(expert, expert.D_2))
            assert bounds[-1] <= bounds[-2] * SLACK
    assert all(exact.epsilon <= bound * SLACK for bound in bounds), bounds
    # data enter additively, so all the variance is variance given the seeds and the floor is attained
    assert np.isclose(exact.epsilon, epsilon_floor(np.trace(exact.covariance), expert.n), rtol=1e-9)
    assert exact.epsilon <= expert_epsilon(expert)[0] * SLACK


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SEEDS)
def test_drift_below_every_form_that_applies(seed: int) -> None:
    problem = random_problem(seed, size=1)
    task, expert = problem.tasks[0], problem.experts[0]
    exact = expert_moments(task, problem.base, expert).drift
    timing = clock(expert)
    forms = {"a": lambda: drift_noise(expert, timing), "b": lambda: drift_base(expert, timing)}
    forms["c"] = lambda: drift_energy(expert)
    applied = 0
    for name, form in forms.items():
        try:
            value = form()
        except RecipeError:
            continue
        applied += 1
        assert exact <= value * SLACK, name
    assert applied >= 1
    assert exact <= expert_drift(expert)[0] * SLACK


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS)
def test_training_risk_below_the_pl_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(
        seed, size=1, momentum=0.0, sampling=str(rng.choice(["without_replacement", "with_replacement"]))
    )
    task, expert = problem.tasks[0], problem.experts[0]
    if np.linalg.eigvalsh(task.H)[0] <= 1e-12 or expert.curvature != "strongly_convex":
        return
    exact = expert_moments(task, problem.base, expert).training_risk
    try:
        bound = pl_training_risk(expert)
    except RecipeError:
        return
    assert exact <= bound * SLACK


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SEEDS)
def test_master_bound_and_dispersion(seed: int) -> None:
    rng = np.random.default_rng(seed + 1)
    problem = random_problem(seed)
    size = len(problem.experts)
    p = rng.dirichlet(np.ones(size))
    p /= p.sum()
    alpha = rng.uniform(-0.2, 1.2, size)
    method = str(rng.choice(["average", "weighted", "task_arithmetic"]))
    if method == "average":
        alpha, given_alpha = np.full(size, 1 / size), None
    elif method == "task_arithmetic":
        alpha, given_alpha = np.full(size, alpha[0]), alpha[0]
    else:
        given_alpha = alpha
    merge = Merge(
        problem.experts,
        method=method,  # type: ignore[arg-type]
        weights=p,
        coefficients=given_alpha,
        shared_samples=False,
        data_independent_choices=True,
        per_sample_loss=True,
    )
    exact = merge_moments(problem.tasks, problem.base, problem.experts, alpha, p)
    bound = master_bound(merge)
    assert bound.tier == "certified"
    assert not np.isnan(bound.value)
    assert exact.risk <= bound.value * SLACK
    root = [float(term.value) for term in bound.terms]
    assert np.isclose(sum(root) ** 2, bound.value, rtol=1e-12) or np.isinf(bound.value)
    largest = max(float(expert.L) for expert in problem.experts)  # type: ignore[arg-type]
    moments = [
        expert_moments(task, problem.base, expert) for task, expert in zip(problem.tasks, problem.experts, strict=True)
    ]
    d = np.array([moment.drift for moment in moments])
    for form in (triangle_bound, centred_bound):
        assert form(d, alpha, p) * SLACK + 1e-14 * float(d @ d) >= exact.V
    # Theorem 1 with exact stability, Theorem 4 with exact dispersion
    assert (
        np.sqrt(exact.risk) <= (np.sqrt(max(exact.training_risk, 0)) + np.sqrt(largest / 2 * exact.stability)) * SLACK
    )
    own = np.sqrt(sum(p * np.array([max(moment.training_risk, 0) for moment in moments])))
    assert np.sqrt(max(exact.training_risk, 0)) <= (own + np.sqrt(largest / 2 * exact.V)) * SLACK + 1e-9


def test_orthogonal_form_needs_its_assumption() -> None:
    """Trap: independent data do not make task vectors orthogonal; two experts of one task move the same way."""
    d, alpha, p = np.array([1.0, 1.0]), np.array([1.0, 1.0]), np.array([0.5, 0.5])
    together = 0.5 * 1.0 + 0.5 * 1.0  # M - x_j = Delta_i with equal unit task vectors
    assert np.isclose(orthogonal_bound(d, alpha, p), together)
    alpha = np.array([2.0, 2.0])  # M - x_j = 3 Delta, so V = 9
    assert orthogonal_bound(d, alpha, p) < 9.0 <= triangle_bound(d, alpha, p)
    uniform = orthogonal_bound(np.array([1.0, 2.0, 3.0]), np.full(3, 1 / 3), np.full(3, 1 / 3))
    assert np.isclose(uniform, np.mean([1, 4, 9]) * (1 - 1 / 3))


def test_forms_refuse_what_they_do_not_cover() -> None:
    """Trap: 6(a) and 6(c) need conditionally unbiased batches and no momentum; both are refused by name."""
    problem = random_problem(11, size=1, sampling="reshuffle", momentum=0.0, learning_rate=1e-3, batch_size=1)
    expert = problem.experts[0]
    for form in (lambda: drift_noise(expert, clock(expert)), lambda: drift_energy(expert)):
        with pytest.raises(AssumptionError, match="reshuffle"):
            form()
    heavy = replace(expert, sampling="with_replacement", momentum=0.5)
    for form in (lambda: drift_noise(heavy, clock(heavy)), lambda: drift_energy(heavy)):
        with pytest.raises(AssumptionError, match="momentum"):
            form()
    with pytest.raises(AssumptionError, match="momentum"):
        pl_training_risk(heavy)
    with pytest.raises(AssumptionError, match="1/"):
        drift_energy(replace(expert, sampling="with_replacement", learning_rate=2.0 / float(expert.L)))  # type: ignore[arg-type]


def test_thousands_of_heterogeneous_recipes() -> None:
    """exact <= upper and floor <= exact: 2,560 merges and their experts, every sampling, momentum, decay, DARE, shared
    samples; all at tier certified, every statement that applies, zero violations."""
    count: dict[str, int] = {}
    for seed in range(40):
        batch = random_batch(10_000 + seed, 64)
        bound = master_bound(batch.merge)
        assert bound.tier == "certified"
        assert not np.isnan(bound.value).any()
        for name, ratio in all_ratios(batch).items():
            assert not np.isnan(ratio).any(), name
            assert ratio.max() <= SLACK, (name, seed, ratio.max())
            count[name] = count.get(name, 0) + ratio.size
    assert count["master bound"] == 2560
    assert min(count.values()) >= 300, count  # every statement was put to the test


def test_every_form_of_every_constant_over_random_recipes() -> None:
    """4,800 merges that leave the bound one form of gap, drift and training risk per expert: zero violations.

    Every sampling x momentum x decay x schedule; envelope, rms, sup and logged gaps; 6(a) to 6(d) and measured drift;
    given, PL, convex, distance and descent training risks; frozen and trained heads (split or not), shared samples,
    nonuniform weights, every linear method and DARE.
    """
    found, wrong = count(range(120), 40)
    assert wrong == []
    assert found["all"] + found["refused"] == 4800
    assert found["all"] >= 4500
    assert found["tier: certified"] >= 3000
    assert found["finite"] >= 0.8 * found["all"]
    runs = [
        f"run: {sampling}, momentum {momentum}, decay {decay}, schedule {schedule}"
        for sampling in ("without_replacement", "with_replacement", "reshuffle")
        for momentum, decay, schedule in product((False, True), repeat=3)
    ]
    gaps = ("envelope", "sup", "rms", "rms recursion")
    wanted = {
        **dict.fromkeys(runs, 40),
        **{f"stability: Theorem 2 ({gap})": 1000 for gap in gaps},
        "stability: Theorem 2, gap from the loss log": 40,
        "stability: recursion, gap from the loss log": 40,
        "stability: cap sqrt(2) d": 1000,
        **{f"drift: {form}": 1000 for form in ("6(a)", "6(b)", "6(c)", "measured")},
        "drift: 6(d), gradient log": 100,
        "drift: 6(d), loss log": 100,
        **{f"training risk: {form} bound": 120 for form in ("PL", "convex", "distance", "descent")},
        "training risk: given": 4000,
        **{f"head: {head}": 400 for head in ("none", "frozen", "trained", "trained, split")},
        **{f"merge: {method}": 800 for method in ("average", "weighted", "task_arithmetic", "dare")},
        "shared samples: True": 500,
    }
    assert {name: found[name] for name in wanted if found[name] < wanted[name]} == {}


def test_shared_samples_break_the_independent_form() -> None:
    """Trap A1: four experts on the same data; the independent form is violated, the sum is attained."""
    n, size = 1, 4
    task = QuadraticTask(np.eye(1), np.zeros(1), np.eye(1))
    run = Expert("a", n, n, 1.0, 1, curvature="strongly_convex", L=1.0, mu=1.0)
    experts = [replace(run, name=f"e{i}") for i in range(size)]
    alpha = np.full(size, 1 / size)
    exact = merge_moments([task] * size, [0.0], experts, alpha, alpha, shared_samples=True)
    epsilon = expert_moments(task, [0.0], run).epsilon
    ones, empirical = np.ones(size), max(float(exact.training_risk), 0.0)
    naive = theorem_1(empirical, alpha, ones, task_stability(alpha, epsilon * ones))
    summed = theorem_1(empirical, alpha, ones, task_stability(alpha, epsilon * ones, shared_samples=True))
    assert exact.risk > 2 * naive
    assert exact.risk == pytest.approx(float(summed), rel=1e-12)
