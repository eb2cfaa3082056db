"""What-if queries against brute force: subsets by enumeration, lines by grids, credit by all orders."""

from __future__ import annotations

from itertools import combinations, pairwise, permutations
from math import inf

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.constrained import coefficient_box, coefficient_simplex
from theory.curvature import CurvatureModel, minimise_curvature, predict_curvature
from theory.errors import MergeboundError
from theory.function_space import (
    LogitField,
    QuadraticField,
    cross_entropy,
    minimise_risk,
    predict_risk,
    risk_gradient,
    tangent,
)
from theory.subsets import best_subset, best_subsets, greedy_subset, shapley
from theory.surfaces import (
    MergingRule,
    Surface,
    averaging,
    minimise_on,
    optimal_coefficients,
    predicted_merge,
    risk_surface,
    task_arithmetic,
)
from theory.what_if import (
    add_expert,
    additions,
    best_coefficient,
    best_on_line,
    lambda_curve,
    layer_curve,
    leave_one_out,
    pair_curve,
)

SEEDS = st.integers(0, 2**32 - 1)
RULES = [averaging(), task_arithmetic(0.4), optimal_coefficients((-0.5, 1.0)), optimal_coefficients(on_simplex=True)]


def fields(seed: int, experts: int = 4, tasks: int | None = None, n: int = 6, classes: int = 3) -> list[LogitField]:
    """Tasks that their own expert helps and the others disturb."""
    rng, found = np.random.default_rng(seed), []
    for j in range(experts if tasks is None else tasks):
        labels = rng.integers(0, classes, n)
        slopes = rng.standard_normal((experts, n, classes))
        slopes[j % experts] += 2.0 * np.eye(classes)[labels]
        found.append(LogitField(0.5 * rng.standard_normal((n, classes)), slopes, labels, "secant"))
    return found


def curved(seed: int, experts: int = 4, layers: int = 1) -> list[CurvatureModel]:
    rng, size = np.random.default_rng(seed), experts * layers
    factors = rng.standard_normal((experts, 2, size + 1, size))
    centres = np.repeat(np.eye(experts), layers, axis=1)
    return [
        CurvatureModel(float(rng.gamma(1.0)), np.einsum("sri,srk->sik", f, f), c)
        for f, c in zip(factors, centres, strict=True)
    ]


# --- the surface -----------------------------------------------------------------------------------------------------


def test_surface_is_the_prediction_for_fields_and_for_curvature() -> None:
    rng = np.random.default_rng(0)
    alphas, weights = rng.standard_normal((3, 5, 4)), np.array([0.1, 0.2, 0.3, 0.4])
    logits, models = risk_surface(fields(1), weights), risk_surface(curved(1), weights)
    np.testing.assert_allclose(logits.risk(alphas), predict_risk(fields(1), alphas, weights).risk, rtol=1e-12)
    np.testing.assert_allclose(logits.per_task(alphas), predict_risk(fields(1), alphas).per_task, rtol=1e-12)
    np.testing.assert_allclose(models.risk(alphas), predict_curvature(curved(1), alphas, weights), rtol=1e-12)
    for one in (logits, models):
        a = alphas[0, 0]
        value, slope = one.gradient(a)
        assert value == pytest.approx(float(one.risk(a)), rel=1e-12)
        numeric = scipy.optimize.approx_fprime(a, lambda x, s=one: float(s.risk(x)), 1e-7)
        np.testing.assert_allclose(slope, numeric, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits.gradient(alphas[0, 0])[1], risk_gradient(fields(1), alphas[0, 0], weights)[1])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS)
def test_subgradient_of_the_curvature_model_supports_it_from_below_also_at_its_kinks(seed: int) -> None:
    rng, one = np.random.default_rng(seed), risk_surface(curved(seed))
    points = np.vstack([rng.uniform(-1, 2, (30, 4)), np.eye(4)])
    for a in (rng.uniform(-1, 2, 4), np.eye(4)[1]):
        value, slope = one.gradient(a)
        assert (one.risk(points) >= value + (points - a) @ slope - 1e-9).all()


@settings(max_examples=5, deadline=None, derandomize=True)
@given(SEEDS, st.booleans())
def test_minima_agree_with_the_methods_own_solvers(seed: int, on_simplex: bool) -> None:
    domain = coefficient_simplex(4) if on_simplex else coefficient_box(4)
    ours = minimise_on(risk_surface(fields(seed)), domain)
    theirs = minimise_risk(fields(seed), simplex=on_simplex)
    assert abs(ours.value - theirs.risk) <= max(ours.gap, theirs.gap) + 1e-9
    kinks = minimise_on(risk_surface(curved(seed)), domain, max_iterations=400)
    other = minimise_curvature(curved(seed), simplex=on_simplex)
    assert kinks.value - kinks.gap <= other.risk + 1e-12
    assert other.risk - other.gap <= kinks.value + 1e-12
    assert kinks.gap <= 1e-3


def test_weights_on_some_tasks_are_rescaled() -> None:
    one = risk_surface(fields(2), [0.1, 0.2, 0.3, 0.4])
    alpha = np.full(4, 0.3)
    expected = one.per_task(alpha)[[1, 3]] @ [0.2 / 0.6, 0.4 / 0.6]
    assert float(one.on_tasks([3, 1]).risk(alpha)) == pytest.approx(float(expected), rel=1e-12)


# --- one expert more or less -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_dropping_an_expert(rule: MergingRule) -> None:
    parts, weights = fields(3), np.array([0.1, 0.2, 0.3, 0.4])
    one = risk_surface(parts, weights)
    found = leave_one_out(one, rule)
    assert found.experts == (0, 1, 2, 3)
    for i, choice in zip(found.experts, found.after, strict=True):
        assert choice.alpha[i] == 0.0
        assert choice.risk == pytest.approx(float(predict_risk(parts, choice.alpha, weights).risk), rel=1e-9)
        if rule.kind == "average":
            assert sorted(choice.alpha) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
        smaller = [
            LogitField(f.constant, np.delete(f.slopes, i, axis=0), f.labels, f.kind) for f in parts
        ]  # literally without it
        if rule.kind == "optimal":
            literal = minimise_risk(smaller, weights, bounds=rule.bounds, simplex=rule.on_simplex)
            assert choice.risk == pytest.approx(literal.risk, abs=literal.gap + choice.gap + 1e-9)
    np.testing.assert_allclose(found.change, [c.risk - found.before.risk for c in found.after])
    if rule.kind == "optimal":
        assert (found.change >= -found.gap).all()  # an option less is never better
    with_task = leave_one_out(one, rule, with_task=True)
    for i, (choice, change) in enumerate(zip(with_task.after, with_task.change, strict=True)):
        rest = [j for j in range(4) if j != i]
        p = weights[rest] / weights[rest].sum()
        then = predict_risk([parts[j] for j in rest], choice.alpha, p).risk
        now = predict_risk([parts[j] for j in rest], found.before.alpha, p).risk
        assert change == pytest.approx(float(then - now), rel=1e-6, abs=1e-9)


def test_trap_dropping_an_expert_is_not_dropping_its_task() -> None:
    """An expert that only its own task needs looks useless if its task is dropped with it."""
    labels = np.array([0])
    helped = LogitField(np.zeros((1, 2)), np.array([[[4.0, 0.0]], [[0.0, 0.0]]]), labels, "secant")
    other = LogitField(np.zeros((1, 2)), np.array([[[0.0, 1.0]], [[4.0, 0.0]]]), labels, "secant")
    one = risk_surface([helped, other])
    assert leave_one_out(one, task_arithmetic(1.0)).change[0] > 0.1
    assert leave_one_out(one, task_arithmetic(1.0), with_task=True).change[0] < 0.0


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_adding_an_expert(rule: MergingRule) -> None:
    one = risk_surface(fields(4))
    found = additions(one, rule, [0, 2])
    assert found.experts == (1, 3)
    for i, choice in zip(found.experts, found.after, strict=True):
        assert choice.experts == tuple(sorted((0, 2, i)))
        assert choice.risk == pytest.approx(predicted_merge(one, rule, (0, 2, i)).risk, abs=1e-9)


def test_a_newcomer_is_appended_to_the_statistics() -> None:
    whole = fields(5)
    before = [LogitField(f.constant, f.slopes[:3], f.labels, f.kind) for f in whole[:3]]
    wider = add_expert(before, [f.slopes[3] for f in whole[:3]], whole[3])
    alphas = np.random.default_rng(0).standard_normal((6, 4))
    np.testing.assert_allclose(predict_risk(wider, alphas).risk, predict_risk(whole, alphas).risk, rtol=1e-12)
    assert len(add_expert(before, [f.slopes[3] for f in whole[:3]])) == 3


def test_nobody_is_the_base() -> None:
    for rule in RULES:
        nothing = predicted_merge(risk_surface(fields(6)), rule, ())
        assert nothing.risk == pytest.approx(np.mean([cross_entropy(f.constant, f.labels).mean() for f in fields(6)]))
        assert nothing.experts == ()


# --- subsets ---------------------------------------------------------------------------------------------------------


def literal_best(one: Surface, rule: MergingRule, size: int) -> float:
    return min(predicted_merge(one, rule, s).risk for s in combinations(range(one.experts), size))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("size", [2])
def test_branch_and_bound_finds_what_enumeration_finds(rule: MergingRule, size: int) -> None:
    for seed in range(1 if rule.kind == "optimal" else 2):
        one = risk_surface(fields(seed, experts=5, tasks=4))
        found = best_subset(one, rule, size, enumerate_up_to=0)
        listed = best_subset(one, rule, size)
        assert found.method == "branch and bound"
        assert listed.method == "enumeration"
        assert listed.risk == pytest.approx(literal_best(one, rule, size), abs=1e-9)
        assert found.risk == pytest.approx(listed.risk, abs=1e-6)
        assert 0 <= found.gap <= 1e-5
        assert found.risk - found.gap <= listed.risk + 1e-12
        assert len(found.experts) == size


def test_branch_and_bound_over_curvature_models() -> None:
    one = risk_surface(curved(1, experts=5))
    for rule in (averaging(), optimal_coefficients()):
        found = best_subset(one, rule, 2, enumerate_up_to=0)
        exact = literal_best(one, rule, 2)
        assert exact - 1e-9 <= found.risk <= exact + found.gap + 1e-9
        assert found.gap < 1e-2


@pytest.mark.parametrize("rule", [averaging(), optimal_coefficients()], ids=str)
def test_stopping_early_keeps_the_gap_honest(rule: MergingRule) -> None:
    for seed in range(2):
        one = risk_surface(fields(seed, experts=5, tasks=5))
        exact = literal_best(one, rule, 3)
        for nodes in (1, 2):
            found = best_subset(one, rule, 3, enumerate_up_to=0, max_nodes=nodes)
            assert found.risk >= exact - 1e-9
            assert found.risk - found.gap <= exact + 1e-9
        quick = greedy_subset(one, rule, 3)
        assert quick.risk >= exact - 1e-9
        assert quick.risk - quick.gap <= exact + 1e-9


def test_more_experts_are_never_worse_when_their_coefficients_are_chosen() -> None:
    found = best_subsets(risk_surface(fields(7)), optimal_coefficients())
    assert [len(choice.experts) for choice in found] == [0, 1, 2, 3, 4]
    risks = [choice.risk for choice in found]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(risks))


def test_greedy_can_miss_the_best_pair() -> None:
    """Two experts that only help together: the greedy choice is worse and says so by its gap."""
    labels = np.array([0, 0])
    slopes = np.array([[[6.0, 0.0], [-2.0, 0.0]], [[-2.0, 0.0], [6.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    one = risk_surface([LogitField(np.zeros((2, 2)), slopes, labels, "secant")])
    greedy, best = greedy_subset(one, task_arithmetic(1.0), 2), best_subset(one, task_arithmetic(1.0), 2)
    assert best.experts == (0, 1)
    assert greedy.experts != best.experts
    assert greedy.risk - greedy.gap <= best.risk + 1e-9


def test_layers_go_together_in_subsets() -> None:
    layered = fields(8, experts=6, tasks=2)
    one = risk_surface(layered, layers=2)
    assert one.experts == 3
    for rule in RULES:
        found = best_subset(one, rule, 2, enumerate_up_to=0)
        assert found.risk == pytest.approx(literal_best(one, rule, 2), abs=1e-6)
        assert set(np.nonzero(found.alpha.reshape(3, 2).any(axis=1))[0]) <= set(found.experts)


# --- credit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_shapley_values_by_all_orders(rule: MergingRule) -> None:
    one, count = risk_surface(fields(9, experts=3)), 3
    risks = {s: predicted_merge(one, rule, s).risk for k in range(4) for s in combinations(range(3), k)}
    literal = np.zeros(count)
    orders = list(permutations(range(count)))
    for order in orders:
        for place, i in enumerate(order):
            literal[i] += risks[tuple(sorted(order[:place]))] - risks[tuple(sorted(order[: place + 1]))]
    found = shapley(one, rule)
    np.testing.assert_allclose(found.value, literal / len(orders), atol=1e-9)
    assert found.value.sum() == pytest.approx(found.total, abs=1e-12)
    assert found.exact
    sampled = shapley(one, rule, orders=30, seed=1)
    assert not sampled.exact
    assert sampled.value.sum() == pytest.approx(found.total, abs=1e-9)
    assert (np.abs(sampled.value - found.value) <= 4 * sampled.error + 1e-9).all()


def test_shapley_axioms() -> None:
    """Experts that are alike share alike, one that does nothing gets nothing."""
    (task,) = fields(10, experts=3, tasks=1)
    slopes = np.concatenate([task.slopes, task.slopes[:1], np.zeros_like(task.slopes[:1])])
    found = shapley(risk_surface([LogitField(task.constant, slopes, task.labels, "secant")]), task_arithmetic(0.5))
    assert found.value[0] == pytest.approx(found.value[3], abs=1e-12)
    assert found.value[4] == pytest.approx(0.0, abs=1e-12)
    assert (found.error == 0).all()


# --- lines -----------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None, derandomize=True)
@given(SEEDS, st.booleans())
def test_best_coefficient_beats_a_grid_and_brackets_the_minimum(seed: int, curvature: bool) -> None:
    one = risk_surface(curved(seed)) if curvature else risk_surface(fields(seed))
    found = best_coefficient(one, 0.0, 1.5)
    t = np.linspace(0, 1.5, 3001)
    curve = lambda_curve(one, t)
    lowest = float(curve.risk.min())
    assert found.risk <= lowest + 1e-9
    assert found.risk - found.gap <= lowest + 1e-12
    assert found.gap <= 1e-5
    assert found.bracket[1] - found.bracket[0] <= 1e-6
    assert found.risk == pytest.approx(float(one.risk(np.full(4, found.t))), rel=1e-12)
    at = float(t[int(np.argmin(curve.risk))])
    assert found.bracket[0] - 6e-4 <= at <= found.bracket[1] + 6e-4


def test_best_coefficient_in_closed_form() -> None:
    """n images of two classes, a share q of them wrong about by the expert: softmax of the slope equals 1 - q."""
    n, wrong = 10, 3
    slopes = np.tile([1.0, 0.0], (1, n, 1))
    labels = np.array([1] * wrong + [0] * (n - wrong))
    one = risk_surface([LogitField(np.zeros((n, 2)), slopes, labels, "secant")])
    found = best_coefficient(one, 0.0, 5.0, tolerance=1e-9)
    assert found.t == pytest.approx(np.log(7 / 3), abs=1e-6)
    assert best_coefficient(one, 1.0, 5.0).t == 1.0
    assert best_coefficient(one, 0.0, 0.5).t == 0.5
    assert best_coefficient(one, 0.0, 0.5).gap == 0.0


def test_lambda_law_on_a_line() -> None:
    """theory.md section 7: equal own curvature 1, cross-to-own ratio rho: lambda* = 1 / (1 + (N - 1) rho)."""
    n, rho = 8, 1 / 3
    models = [
        CurvatureModel(0.0, np.diag([1.0 if i == j else rho for i in range(n)])[None], np.eye(n)[j]) for j in range(n)
    ]
    assert best_coefficient(risk_surface(models), tolerance=1e-9).t == pytest.approx(0.3, abs=1e-6)


def test_curves_are_the_prediction_along_the_line() -> None:
    parts = fields(11)
    one, t = risk_surface(parts), np.linspace(-0.2, 1.4, 9)
    some = lambda_curve(one, t, experts=[1, 3])
    np.testing.assert_allclose(some.risk, [predict_risk(parts, [0, v, 0, v]).risk for v in t], rtol=1e-12)
    pair = pair_curve(one, 3, 0, t)
    np.testing.assert_allclose(pair.risk, [predict_risk(parts, [v, 0, 0, 1 - v]).risk for v in t], rtol=1e-12)
    assert pair.per_task.shape == (9, 4)
    layered, alpha = risk_surface(parts, layers=2), np.array([0.3, 0.5, 0.7, 0.9])
    second = layer_curve(layered, 1, alpha, t)
    np.testing.assert_allclose(second.risk, [one.risk([0.3, 0.5 * v, 0.7, 0.9 * v]) for v in t], rtol=1e-12)
    doubled = pair_curve(layered, 0, 1, [0.25])
    np.testing.assert_allclose(doubled.alpha, [[0.75, 0.75, 0.25, 0.25]])
    line = best_on_line(one, [0, 0, 0, 1.0], [1.0, 0, 0, -1.0])
    assert line.risk <= pair_curve(one, 3, 0, np.linspace(0, 1, 101)).risk.min() + 1e-9


@settings(max_examples=20, deadline=None, derandomize=True)
@given(SEEDS)
def test_trap_affine_predictions_show_no_barrier(seed: int) -> None:
    t = np.linspace(0, 1, 21)
    for one in (risk_surface(fields(seed)), risk_surface(curved(seed))):
        assert pair_curve(one, 0, 1, t).barrier() <= 1e-9
        assert pair_curve(one, 0, 1, t).barrier(task=2) <= 1e-9


def test_a_quadratic_field_can_show_a_barrier_and_is_refused_where_convexity_is_needed() -> None:
    labels = np.array([0])
    field = QuadraticField(
        np.zeros((1, 2)), -4 * np.ones((2, 1, 2)) * [1, 0], 4 * np.ones((2, 1, 2)) * [1, 0], labels, "q"
    )
    one = risk_surface([field])
    assert not one.convex
    assert pair_curve(one, 0, 1, np.linspace(0, 1, 11)).barrier() > 0.5
    assert predicted_merge(one, averaging(), [0, 1]).risk > 0
    assert best_subset(one, averaging(), 1).experts == (0,)
    assert greedy_subset(one, averaging(), 1).gap == inf
    for query in (
        lambda: best_coefficient(one),
        lambda: predicted_merge(one, optimal_coefficients(), [0]),
        lambda: best_subset(one, averaging(), 1, enumerate_up_to=0),
        lambda: minimise_on(one, coefficient_box(2)),
    ):
        with pytest.raises(MergeboundError, match="convex"):
            query()


def test_linear_models_where_the_prediction_is_the_truth() -> None:
    """Affine networks: the predicted best subset, coefficient and values are those of the merged models themselves."""
    rng = np.random.default_rng(12)
    images, labels = rng.standard_normal((12, 5)), rng.integers(0, 3, 12)
    x_0, deltas = rng.standard_normal((3, 5)), rng.standard_normal((4, 3, 5))

    def measured(alpha: np.ndarray) -> float:
        return float(cross_entropy(images @ (x_0 + np.tensordot(alpha, deltas, 1)).T, labels).mean())

    field = tangent(images @ x_0.T, np.stack([images @ d.T for d in deltas]), labels)
    one = risk_surface([field])
    found = best_subset(one, averaging(), 2)
    exact = {s: measured(np.isin(np.arange(4), s) / 2) for s in combinations(range(4), 2)}
    assert found.experts == min(exact, key=exact.__getitem__)
    assert found.risk == pytest.approx(min(exact.values()), rel=1e-12)
    line = scipy.optimize.minimize_scalar(lambda v: measured(np.full(4, v)), bounds=(0, 1), method="bounded")
    assert best_coefficient(one).risk <= line.fun + 1e-9


# --- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused_by_name() -> None:
    one, eleven = risk_surface(fields(0)), risk_surface(fields(0, experts=11, tasks=1))
    with pytest.raises(MergeboundError, match="parts"):
        risk_surface([])
    with pytest.raises(MergeboundError, match="parts"):
        risk_surface([*fields(0), *fields(0, experts=3)])
    with pytest.raises(MergeboundError, match="parts"):
        risk_surface([*fields(0), *curved(0)])
    with pytest.raises(MergeboundError, match="weights"):
        risk_surface(fields(0), [0.5, 0.5])
    with pytest.raises(MergeboundError, match="weights"):
        risk_surface(fields(0), [0.5, -0.5, 0.5, np.nan])
    with pytest.raises(MergeboundError, match="layers"):
        risk_surface(fields(0), layers=3)
    with pytest.raises(MergeboundError, match="alpha"):
        one.risk([0.1, 0.2])
    with pytest.raises(MergeboundError, match="alpha"):
        one.risk([0.1, 0.2, np.nan, 0.0])
    with pytest.raises(MergeboundError, match="expert"):
        predicted_merge(one, averaging(), [4])
    with pytest.raises(MergeboundError, match="task"):
        one.on_tasks([])
    with pytest.raises(MergeboundError, match="with_task"):
        leave_one_out(risk_surface(fields(0, tasks=2)), averaging(), with_task=True)
    with pytest.raises(MergeboundError, match="size"):
        best_subset(one, averaging(), 5)
    with pytest.raises(MergeboundError, match="orders"):
        shapley(one, averaging(), orders=1)
    with pytest.raises(MergeboundError, match="11 experts"):
        shapley(eleven, averaging())
    with pytest.raises(MergeboundError, match="bounds"):
        optimal_coefficients((0.1, 1.0))
    with pytest.raises(MergeboundError, match="coefficient"):
        task_arithmetic(np.nan)
    with pytest.raises(MergeboundError, match="low"):
        best_coefficient(one, 1.0, 0.0)
    with pytest.raises(MergeboundError, match="tolerance"):
        best_coefficient(one, tolerance=0.0)
    with pytest.raises(MergeboundError, match="direction"):
        best_on_line(one, np.zeros(4), np.ones(3))
    with pytest.raises(MergeboundError, match="values"):
        lambda_curve(one, [0.0, np.nan])
    with pytest.raises(MergeboundError, match="layer"):
        layer_curve(one, 1, np.ones(4), [1.0])
    with pytest.raises(MergeboundError, match="alpha"):
        layer_curve(one, 0, np.ones(3), [1.0])
