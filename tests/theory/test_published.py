"""Published bounds against exact expectations (listed completely, or quadratic), 50-digit arithmetic, and traps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_recipes import random_problem
from tiny_worlds import KNOWN, Loss, all_runs, cosine, merge_of_two, pseudo_huber, stability, steep_bowl, world

from theory import AssumptionError, Expert, Merge, RecipeError, Schedule, expert_moments, merge_moments
from theory.published import (
    epsilon_l1,
    epsilon_l2,
    fedavg_one_round,
    hardt_convex,
    hardt_nonconvex,
    hardt_strongly_convex,
    lei_ying_l1,
    lei_ying_l2,
    pac_bayes_expectation,
    pac_bayes_penalty,
)
from theory.published.fedavg import one_round, one_round_formula
from theory.published.hardt import _stated, _whole, best_burn_in, burn_in_formula, nonconvex_formula, stated_nonconvex
from theory.published.lei_ying import l1_step_formula, l2_step_formula
from theory.published.pac_bayes import (
    best_expectation_formula,
    expectation_formula,
    high_probability_formula,
)
from theory.symbolic import Formula, evaluate
from theory.symbols import symbol

SLACK = 1 + 1e-9
SEEDS = st.integers(0, 2**32 - 1)
mp = mpmath.mp.clone()
mp.dps = 50


# --- worlds that can be listed ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS)
def test_convex_bounds_hold_where_everything_is_listed(seed: int) -> None:
    merge, exact = world(seed, lambda rng: pseudo_huber(float(rng.uniform(0.3, 3))), 2.0)
    for bound in (hardt_convex(merge), lei_ying_l1(merge)):
        assert bound.quantity == "gap"
        assert exact.gap <= bound.value * SLACK, bound.name
    instability = lei_ying_l2(merge)
    assert np.sqrt(exact.risk) <= (np.sqrt(exact.training_risk) + np.sqrt(instability.value)) * SLACK
    # the l1 form is never above the form with the gap 2G: sqrt(2L f) <= G fails in general, so only validity is claimed
    assert hardt_convex(merge).tier == "certified"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS)
def test_strongly_convex_bound_holds_and_does_not_grow(seed: int) -> None:
    def make(rng: np.random.Generator) -> Loss:
        return steep_bowl(float(rng.uniform(0.2, 2)), float(rng.uniform(0, 2)), 1.0)

    merge, exact = world(seed, make, 1.0)
    bound = hardt_strongly_convex(merge)
    assert exact.gap <= bound.value * SLACK
    assert exact.gap <= hardt_convex(merge).value * SLACK


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS)
def test_bounded_nonconvex_bounds_hold(seed: int) -> None:
    merge, exact = world(seed, lambda rng: cosine(float(rng.uniform(0.3, 6))), 3.0)
    stated = hardt_nonconvex(merge)
    whole = hardt_nonconvex(merge, whole_burn_in=True)
    assert exact.gap <= whole.value * SLACK
    assert whole.value <= stated.value * SLACK
    for distance in (exact.distance, None):
        assert exact.gap <= pac_bayes_expectation(merge, 1, merge_distance=distance).value * SLACK


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_lei_ying_bounds_the_distance_of_listed_twins(power: int, scale: float) -> None:
    loss, rates = pseudo_huber(scale), [1.9 / scale, 0.4 / scale, 1.2 / scale]
    runs = all_runs(loss, [-0.9, 1.3], [0.3, 0.7], 2, rates)
    expert = Expert(
        "a",
        n=2,
        batch_size=1,
        learning_rate=Schedule(np.array(rates)),
        curvature="convex",
        L=scale,
        batch_losses=Schedule(runs.risks_before_steps()),
    )
    exact = stability(runs, 2, rates, power)
    bound = epsilon_l1(expert) if power == 1 else epsilon_l2(expert) ** 2
    assert 0 < exact <= bound


def test_trap_the_sensitivity_enters_inside_the_power() -> None:
    """One step of a steep cosine: the merge moves by c = 1/10 of the expert's move, the gap does not shrink by 10."""
    c, w = 0.1, 20.0
    zeta = math.pi / (2 * w)
    eta = 2 * zeta / (c * w)
    loss = cosine(w)
    runs = all_runs(loss, [zeta, -zeta], [0.5, 0.5], 2, [eta])
    still = all_runs(loss, [0.0], [1.0], 1, [1e-12])
    exact = merge_of_two(runs, still, [c, 0.0], [1.0, 0.0])
    arguments = (1.0, loss.L, eta, 2.0)
    naive = c * stated_nonconvex(*arguments, 1.0, loss.G, 1.0)
    assert exact.gap == pytest.approx(0.25)
    assert naive < exact.gap
    assert exact.gap <= best_burn_in(*arguments, c, loss.G, 1.0) <= stated_nonconvex(*arguments, c, loss.G, 1.0)


def test_how_tight_the_upper_bounds_can_be() -> None:
    """Worst known ratios: 1/2 (convex: linear losses), 1/8 (strongly convex: bowls trained to the end)."""
    G, rates = 0.7, [0.3, 0.9]
    linear = Loss(lambda x, z: G * z * x, lambda x, z: G * z + 0 * x, L=1e-3, G=G, curvature="convex")
    runs, still = all_runs(linear, [-1.0, 1.0], [0.5, 0.5], 3, rates), all_runs(linear, [0.0], [1.0], 1, [1e-9])
    exact = merge_of_two(runs, still, [0.4, 0.0], [1.0, 0.0])
    recipe: dict[str, Any] = dict(batch_size=1, n=3, sampling="with_replacement")
    expert = Expert("a", learning_rate=Schedule(np.array(rates)), curvature="convex", L=1e-3, G=G, **recipe)
    bound = hardt_convex(Merge((expert,), method="task_arithmetic", coefficients=0.4)).value
    assert exact.gap / float(bound) == pytest.approx(0.5, rel=1e-12)
    bowl = steep_bowl(0.8, 0.0, 1.0)
    runs = all_runs(bowl, [-1.0, 1.0], [0.5, 0.5], 2, [1.0 / bowl.L])
    # a step of 1/mu goes to the sample that was drawn: as far as training to the end for the gap
    exact = merge_of_two(runs, still, [1.0, 0.0], [1.0, 0.0])
    strong = Expert(
        "a", learning_rate=1 / bowl.L, steps=1, curvature="strongly_convex", L=0.8, mu=0.8, G=bowl.G, **recipe
    )
    bound = hardt_strongly_convex(Merge((replace(strong, n=2),))).value
    assert exact.gap / float(bound) == pytest.approx(1 / 8, rel=1e-12)


# --- the quadratic family ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from(["without_replacement", "with_replacement"]), st.sampled_from(["convex", "smooth"]))
def test_one_round_is_above_the_exact_training_risk(seed: int, sampling: str, curvature: str) -> None:
    problem = random_problem(seed, momentum=0.0, weight_decay=0.0, sampling=sampling, curvature=curvature)
    rng = np.random.default_rng(seed + 1)
    size = len(problem.experts)
    alpha, p = rng.uniform(0.05, 1.5, size) / size, rng.dirichlet(np.ones(size))
    merge = Merge(problem.experts, method="weighted", coefficients=alpha, weights=p)
    exact = merge_moments(problem.tasks, problem.base, problem.experts, alpha, p)
    mean, square = np.zeros_like(problem.base), 0.0
    for weight, task, expert in zip(p, problem.tasks, problem.experts, strict=True):
        mean = mean + weight * task.H @ (problem.base - task.theta)
        square += weight**2 * float(np.trace(task.H @ task.Omega @ task.H)) / float(expert.n)  # type: ignore[arg-type]
    joint = float(np.sqrt(mean @ mean + square))
    with_descent = fedavg_one_round(merge, joint_gradient_norm=joint)
    assert exact.training_risk <= with_descent.value * SLACK
    assert with_descent.value <= fedavg_one_round(merge).value * SLACK
    assert with_descent.quantity == "training"


def test_one_round_sees_descent_and_objective_inconsistency() -> None:
    known: dict[str, Any] = dict(n=200, batch_size=200, L=1.0, curvature="convex", initial_risk=1.0, sigma=0.0)
    one = Expert("a", learning_rate=0.01, steps=10, initial_gradient_norm=1.0, **known)
    # one client, full batches, small total step: F_0 - (T/2) g^2 (1 - O(LT)), no noise, no inconsistency
    value = float(fedavg_one_round(Merge((one,)), joint_gradient_norm=1.0).value)
    assert 1 - 0.5 * 0.1 <= value <= 1 - 0.5 * 0.1 * (1 - 0.1**2)
    # twice as many steps of the other client: w = (1/3, 2/3) against p = (1/2, 1/2)
    two = replace(one, name="b", steps=20)
    plain = fedavg_one_round(Merge((one, two)), joint_gradient_norm=1.0)
    nova = Merge((one, two), method="weighted", coefficients=np.array([1.0, 0.5]) * 0.75)
    assert float(fedavg_one_round(nova, joint_gradient_norm=1.0).value) < float(plain.value)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from(["without_replacement", "with_replacement"]))
def test_lei_ying_is_above_the_exact_stability_of_quadratics(seed: int, sampling: str) -> None:
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(1, 12))
    problem = random_problem(
        seed,
        size=1,
        momentum=0.0,
        weight_decay=0.0,
        sampling=sampling,
        curvature="convex",
        batch_size=1,
        learning_rate=1.0,
        steps=steps,
    )
    task, base = problem.tasks[0], problem.base
    rates = rng.uniform(0.01, 2.0, steps) / float(np.linalg.eigvalsh(task.H)[-1])
    expert = replace(problem.experts[0], learning_rate=Schedule(rates))
    risks = [float(expert.initial_risk)]  # type: ignore[arg-type]
    for k in range(1, steps):
        part = replace(expert, steps=k, learning_rate=Schedule(rates[:k]))
        risks.append(expert_moments(task, base, part).training_risk)
    expert = replace(expert, batch_losses=Schedule(np.maximum(risks, 0.0)))
    assert expert_moments(task, base, expert).epsilon <= epsilon_l2(expert) * SLACK


# --- formulas in 50 digits --------------------------------------------------------------------------------------------


def high_precision(formula: Formula, values: tuple[float, ...]) -> Any:
    import sympy

    arguments = [symbol(key) for key in formula.keys]
    return sympy.lambdify(arguments, formula.expression, [{"gamma": mp.gamma}, mp])(*(mp.mpf(v) for v in values))


@pytest.mark.parametrize(
    "make",
    [
        nonconvex_formula,
        l1_step_formula,
        l2_step_formula,
        expectation_formula,
        best_expectation_formula,
        high_probability_formula,
    ],
)
def test_formulas_are_evaluated_to_double_precision(make: Callable[[], Formula]) -> None:
    rng = np.random.default_rng(5)
    formula = make()
    for _ in range(40):
        values = tuple(np.exp(rng.uniform(-2, 3, len(formula.keys))))
        if "delta" in formula.keys:
            values = tuple(v if key != "delta" else 0.03 for key, v in zip(formula.keys, values, strict=True))
            values = tuple(max(v, 1.0) if key in ("n", "N") else v for key, v in zip(formula.keys, values, strict=True))
        if "n" in formula.keys:
            values = tuple(v + 1 if key == "n" else v for key, v in zip(formula.keys, values, strict=True))
        assert float(evaluate(make, *values)) == pytest.approx(float(high_precision(formula, values)), rel=1e-11)


def test_burn_in_form_is_the_formula_and_the_literal_sum() -> None:
    rng = np.random.default_rng(6)
    for _ in range(60):
        B, L, a, c, G = np.exp(rng.uniform(-3, 2, 5))
        n, K = int(rng.integers(2, 50)), int(rng.integers(1, 40))
        m = int(rng.integers(0, K + 1))
        exact = high_precision(burn_in_formula(), (B, L, a, n, c, G, K, m))
        growth = mp.mpf(0)
        for k in range(m + 1, K + 1):
            product = mp.mpf(1)
            for later in range(k + 1, K + 1):
                product *= 1 + mp.mpf(L) * mp.mpf(a) / later
            growth += mp.mpf(a) / k * product
        literal = mp.mpf(B) * m / n + 2 * mp.mpf(c) * mp.mpf(G) ** 2 / n * growth
        assert abs(exact / literal - 1) < mp.mpf(10) ** -40
        arrays = [np.asarray(v, dtype=float) for v in (B, L, a, n, c, G, K)]
        computed = float(_whole(arrays, np.asarray(float(m))))
        assert float(exact) * (1 - 1e-13) <= computed <= float(exact) * (1 + 1e-10)
        every = [float(_whole(arrays, np.asarray(float(i)))) for i in range(K + 1)]
        assert float(best_burn_in(*arrays)) == pytest.approx(min(*every, B), rel=1e-12)


def test_burn_in_without_curvature_is_the_harmonic_limit() -> None:
    value = float(_whole([np.asarray(v) for v in (1.0, 0.0, 0.3, 50.0, 0.5, 1.0, 20.0)], np.asarray(4.0)))
    exact = 4 / 50 + 2 * 0.5 * 0.3 / 50 * sum(1 / k for k in range(5, 21))
    assert exact <= value <= exact * 1.01


def test_whole_burn_in_is_never_above_the_stated_form() -> None:
    """Also settles that a burn-in of a fractional number of steps, as in the closed form, does no harm."""
    rng = np.random.default_rng(7)
    count = 40_000
    L, a, c, G = (np.exp(rng.uniform(low, high, count)) for low, high in ((-6, 4), (-6, 4), (-4, 1), (-4, 3)))
    n = np.floor(np.exp(rng.uniform(np.log(2), 10, count)))
    K = np.floor(np.exp(rng.uniform(0, 10, count)))
    one = np.ones(count)
    assert np.all(best_burn_in(one, L, a, n, c, G, K) <= np.minimum(_stated(one, L, a, n, c, G, K), 1) * (1 + 1e-9))


def test_l2_recursion_unrolls_to_the_sum() -> None:
    rates, risks, n, L, r = np.array([0.3, 0.1, 0.7]), np.array([2.0, 1.0, 0.5]), 5.0, 1.3, 0.8
    square = 0.0
    for eta, risk in zip(rates, risks, strict=True):
        square = (1 + r / n) * square + 8 * (1 + 1 / r) * L * eta**2 / n * risk
    terms = evaluate(l2_step_formula, L, n, r, np.array([2.0, 1.0, 0.0]), rates, risks)
    assert terms.sum() == pytest.approx(square, rel=1e-14)


def test_one_round_value_is_the_formula() -> None:
    values = (1.3, 0.4, 0.2, 0.9, 2.0, 0.01, 0.5)
    by_hand = 1.3 + 0.2 * (0.2**2 - 0.9**2) + 2.0 * 0.01 + (2.0 - 1 / 0.8) * 0.25
    assert float(one_round(*(np.asarray(v) for v in values))) == pytest.approx(by_hand, rel=1e-14)
    assert float(high_precision(one_round_formula(), values)) == pytest.approx(by_hand, rel=1e-14)


# --- PAC-Bayes --------------------------------------------------------------------------------------------------------


def test_best_posterior_width_is_the_best() -> None:
    L, dim, B, rho, v = 0.7, 30.0, 2.0, 1.4, 0.003
    best = float(evaluate(best_expectation_formula, L, dim, B, rho, v))
    widths = np.exp(np.linspace(-9, 5, 20_001))
    assert best == pytest.approx(float(evaluate(expectation_formula, L, widths, dim, B, rho, v).min()), rel=1e-6)


def test_losses_of_different_size_enter_with_their_own_bound() -> None:
    experts = tuple(
        Expert(name, **{**KNOWN, "B": B, "drift": 0.5, "initial_risk": 0.5}) for name, B in (("a", 3.0), ("b", 0.5))
    )
    value = float(pac_bayes_expectation(Merge(experts), 2, merge_distance=0.1).value)
    spread = math.sqrt(sum(0.25 * B**2 / 100 for B in (3.0, 0.5)))
    assert value == pytest.approx(3 * 2 ** (1 / 3) * (0.1 * spread / 4) ** (2 / 3), rel=1e-12)


def test_maurer_constant_for_small_samples() -> None:
    """``sum_k C(n,k) (k/n)^k (1-k/n)^(n-k) <= 2 sqrt(n)``: the constant used is right for every n, also below 8."""
    for n in range(1, 80):
        total = sum(
            math.comb(n, k) * (Fraction(k, n) ** k) * (Fraction(n - k, n) ** (n - k)) if 0 < k < n else Fraction(1)
            for k in range(n + 1)
        )
        assert total**2 <= 4 * n


def test_pac_bayes_fails_rarely_where_all_data_sets_are_listed() -> None:
    """Randomised merge of a cosine world: the share of data sets that violate the bound is below delta."""
    w, s, delta = 1.5, 0.7, 0.2
    runs = all_runs(cosine(w), [0.4, -1.0, 2.0], [0.2, 0.5, 0.3], 4, [2.0, 1.0])
    ends = runs.path[:, -1]

    def blurred(x: np.ndarray, z: np.ndarray) -> np.ndarray:
        return (1 - np.exp(-(w**2) * s**2 / 2) * np.cos(w * (x - z))) / 2

    risk = blurred(ends[:, None], runs.support) @ runs.chance
    empirical = blurred(ends[:, None], runs.data).mean(axis=1)
    penalty = np.array([float(pac_bayes_penalty([4], [1.0], abs(x), s, delta)) for x in ends])
    assert runs.probability @ (risk > empirical + penalty) <= delta
    # the penalty is what the formula says, and grows with distance
    exact = math.sqrt((ends[0] ** 2 / (2 * s**2) + math.log(2 * 2 / delta)) / 8)
    assert penalty[0] == pytest.approx(exact, rel=1e-12)


def test_divergence_of_the_gaussians() -> None:
    rho, s = 0.8, 0.6
    x = np.linspace(-8, 8, 200_001)
    density = np.exp(-((x - rho) ** 2) / (2 * s**2)) / (s * np.sqrt(2 * np.pi))
    log_ratio = (x**2 - (x - rho) ** 2) / (2 * s**2)
    assert np.trapezoid(density * log_ratio, x) == pytest.approx(rho**2 / (2 * s**2), rel=1e-9)


# --- domains ----------------------------------------------------------------------------------------------------------

BOUNDS: dict[str, Callable[[Merge], Any]] = {
    "hrs_convex": hardt_convex,
    "hrs_strong": hardt_strongly_convex,
    "hrs_nonconvex": hardt_nonconvex,
    "lei_ying_l1": lei_ying_l1,
    "lei_ying_l2": lei_ying_l2,
    "fedavg": fedavg_one_round,
    "pac_bayes": lambda m: pac_bayes_expectation(m, 10),
}


def merge_with(**changes: Any) -> Merge:
    claims = {
        key: changes.pop(key)
        for key in ("shared_samples", "data_independent_choices", "per_sample_loss")
        if key in changes
    }
    return Merge((Expert("a", **{**KNOWN, **changes}),), **claims)


@pytest.mark.parametrize(
    ("bound", "changes", "named"),
    [
        ("hrs_convex", dict(momentum=0.9), "momentum"),
        ("hrs_convex", dict(weight_decay=0.1), "weight_decay"),
        ("hrs_convex", dict(optimizer="adamw"), "optimizer"),
        ("hrs_convex", dict(gradient_clipping=True), "gradient_clipping"),
        ("hrs_convex", dict(curvature="smooth"), "curvature"),
        ("hrs_convex", dict(learning_rate=2.1), "learning_rate"),
        ("hrs_convex", dict(head="trained"), "head"),
        ("hrs_convex", dict(shared_samples=True), "shared_samples"),
        ("hrs_convex", dict(data_independent_choices=False), "data_independent_choices"),
        ("hrs_convex", dict(per_sample_loss=False), "per_sample_loss"),
        ("hrs_convex", dict(L=None), "L is missing"),
        ("hrs_convex", dict(G=None), "G is missing"),
        ("hrs_nonconvex", dict(B=None), "B is missing"),
        ("lei_ying_l1", dict(G=None), "G is missing"),
        ("pac_bayes", dict(B=None), "B is missing"),
        ("hrs_strong", {}, "curvature"),
        ("hrs_strong", dict(curvature="strongly_convex", mu=0.5, learning_rate=1.5), "learning_rate"),
        (
            "hrs_strong",
            dict(curvature="strongly_convex", mu=0.5, learning_rate=Schedule(np.linspace(0.1, 0.2, 50))),
            "learning_rate",
        ),
        ("hrs_nonconvex", dict(batch_size=2), "batch_size"),
        ("lei_ying_l1", dict(batch_size=2), "batch_size"),
        ("lei_ying_l2", dict(sampling="reshuffle"), "sampling"),
        ("lei_ying_l2", dict(batch_losses=None), "batch_losses"),
        ("fedavg", dict(sampling="reshuffle"), "sampling"),
        ("fedavg", dict(sigma=None), "sigma"),
        ("fedavg", dict(initial_risk=None), "initial_risk"),
        ("pac_bayes", dict(L=None, optimizer="adamw", drift=1.0, batch_losses=None), "L is missing"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(bound: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        BOUNDS[bound](merge_with(**changes))


def test_missing_and_malformed_arguments_are_refused_by_name() -> None:
    merge = merge_with()
    with pytest.raises(RecipeError, match="dimension"):
        pac_bayes_expectation(merge)
    with pytest.raises(RecipeError, match="joint_gradient_norm"):
        fedavg_one_round(merge, joint_gradient_norm=-1.0)
    with pytest.raises(RecipeError, match="delta"):
        pac_bayes_penalty([10], [1.0], 1.0, 1.0, 1.5)
    with pytest.raises(RecipeError, match="weights"):
        pac_bayes_penalty([10, 10], [1.0, 1.0], 1.0, 1.0, 0.1)
    with pytest.raises(AssumptionError, match="coefficients"):
        fedavg_one_round(replace(merge, method="task_arithmetic", coefficients=-0.5))


def test_adamw_with_measured_drift_still_has_a_pac_bayes_bound() -> None:
    merge = merge_with(optimizer="adamw", drift=0.5, batch_losses=None)
    bound = pac_bayes_expectation(merge, 10)
    assert np.isfinite(bound.value)
    assert bound.tier == "estimated"
    assert "a: drift" in bound.measured


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_bounds_broadcast_over_configurations(name: str) -> None:
    rates, samples = np.array([0.02, 0.05, 0.9]), np.array([30, 1000, 77])
    extra = dict(curvature="strongly_convex", mu=0.5) if name == "hrs_strong" else {}
    together = BOUNDS[name](merge_with(learning_rate=rates, n=samples, **extra)).value
    for i in range(3):
        alone = BOUNDS[name](merge_with(learning_rate=float(rates[i]), n=int(samples[i]), **extra)).value
        assert np.broadcast_to(together, (3,))[i] == pytest.approx(float(alone), rel=1e-12)


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_extreme_recipes_never_give_nan(name: str) -> None:
    for changes in (
        dict(L=1e-300, learning_rate=1e-300),
        dict(L=0.0),
        dict(n=1, learning_rate=1e-8),
        dict(curvature="smooth", L=1e12, learning_rate=1e3),
        dict(initial_gradient_norm=1e308, sigma=1e308, initial_risk=1e308, drift=1e308),
        dict(initial_gradient_norm=0.0, sigma=0.0, drift=0.0),
    ):
        try:
            value = BOUNDS[name](merge_with(**changes)).value
        except RecipeError:
            continue
        assert not np.isnan(value).any(), changes
        assert np.all(value >= 0), changes


def test_measured_constants_lower_the_tier() -> None:
    merge = replace(merge_with(), shared_samples=False, data_independent_choices=True, per_sample_loss=True)
    assert hardt_convex(merge).tier == "certified"
    soft = hardt_convex(replace(merge, experts=(replace(merge.experts[0], measured=frozenset({"G"})),)))
    assert soft.tier == "estimated"
    assert [item.verdict for item in soft.assumptions if item.name == "Lipschitz"] == ["unknown"]
    assert lei_ying_l2(merge).tier == "estimated"  # risks of the iterates come from a log
    assert hardt_convex(merge_with()).tier == "estimated"  # claims were not stated
    assert r"\frac" in hardt_convex(merge).latex()
