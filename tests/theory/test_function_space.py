"""Function-space prediction: the loss, the affine logit fields, convexity, and the proof that a minimum was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.errors import MergeboundError
from theory.function_space import (
    Array,
    Field,
    LogitField,
    Optimum,
    combine,
    cross_entropy,
    log_softmax,
    minimise_risk,
    predict_from_logits,
    predict_risk,
    risk_gradient,
    secant,
    second_order,
    second_order_field,
    tangent,
    uniform_weights,
)

SEEDS = st.integers(0, 2**32 - 1)


def random_fields(
    rng: np.random.Generator, experts: int = 2, tasks: int = 2, n: int = 6, classes: int = 3, scale: float = 2.0
) -> list[LogitField]:
    return [
        LogitField(
            scale * rng.standard_normal((n, classes)),
            scale * rng.standard_normal((experts, n, classes)),
            rng.integers(0, classes, n),
            "random",
        )
        for _ in range(tasks)
    ]


def risk(fields: Sequence[Field], alpha: Array, weights: Array) -> float:
    return float(predict_risk(fields, alpha, weights).risk)


def random_weights(rng: np.random.Generator, tasks: int) -> Array:
    return rng.dirichlet(np.ones(tasks))


# --- the loss --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([1.0, 30.0, 1e4]))
def test_cross_entropy_agrees_with_torch_and_scipy(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = scale * rng.standard_normal((3, 5, 4)), rng.integers(0, 4, 5)
    ours = cross_entropy(logits, labels)
    for part, expected in zip(logits, ours, strict=True):
        theirs = torch.nn.functional.cross_entropy(torch.tensor(part), torch.tensor(labels), reduction="none")
        np.testing.assert_allclose(expected, theirs.numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(log_softmax(logits), scipy.special.log_softmax(logits, axis=-1), rtol=1e-12, atol=1e-12)


def test_equal_logits_cost_the_logarithm_of_the_classes() -> None:
    np.testing.assert_allclose(cross_entropy(np.full((4, 10), 7.0), np.arange(4)), np.log(10.0), rtol=1e-14)


def test_joint_risk_weighs_tasks_and_its_error_is_that_of_independent_tasks() -> None:
    rng = np.random.default_rng(3)
    sizes, weights = (5, 9), np.array([0.3, 0.7])
    logits = [rng.standard_normal((n, 4)) for n in sizes]
    labels = [rng.integers(0, 4, n) for n in sizes]
    found = predict_from_logits(logits, labels, weights)
    losses = [
        torch.nn.functional.cross_entropy(torch.tensor(h), torch.tensor(y), reduction="none").numpy()
        for h, y in zip(logits, labels, strict=True)
    ]
    np.testing.assert_allclose(found.per_task, [loss.mean() for loss in losses], rtol=1e-12)
    np.testing.assert_allclose(found.risk, 0.3 * losses[0].mean() + 0.7 * losses[1].mean(), rtol=1e-12)
    errors = [loss.std(ddof=1) / np.sqrt(len(loss)) for loss in losses]
    np.testing.assert_allclose(found.standard_error, np.hypot(0.3 * errors[0], 0.7 * errors[1]), rtol=1e-12)
    assert found.tier == "estimated"


# --- the fields ------------------------------------------------------------------------------------------------------


def test_secant_is_exact_at_the_base_and_at_every_expert() -> None:
    rng = np.random.default_rng(0)
    base, experts, labels = rng.standard_normal((5, 3)), rng.standard_normal((4, 5, 3)), rng.integers(0, 3, 5)
    field = secant(base, experts, labels)
    np.testing.assert_array_equal(field.at(np.zeros(4)), base)
    for unit, logits in zip(np.eye(4), experts, strict=True):
        np.testing.assert_allclose(field.at(unit), logits, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(field.at(np.full(4, 0.25)), experts.mean(axis=0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("anchor", [None, "expert", "somewhere"])
def test_tangent_is_exact_where_logits_are_affine_in_the_parameters(anchor: str | None) -> None:
    rng = np.random.default_rng(1)
    images, classes, size, experts = 6, 3, 11, 4
    jacobian, origin = rng.standard_normal((images, classes, size)), rng.standard_normal((images, classes))
    x_0, deltas = rng.standard_normal(size), rng.standard_normal((experts, size))

    def logits(x: Array) -> Array:
        return origin + jacobian @ x

    at = {None: None, "expert": np.eye(experts)[2], "somewhere": rng.standard_normal(experts)}[anchor]
    point = x_0 if at is None else x_0 + at @ deltas
    products = np.stack([jacobian @ delta for delta in deltas])
    field = tangent(logits(point), products, rng.integers(0, classes, images), at)
    for alpha in rng.standard_normal((5, experts)):
        np.testing.assert_allclose(field.at(alpha), logits(x_0 + alpha @ deltas), rtol=1e-10, atol=1e-10)


def test_second_order_is_exact_for_quadratic_logits_without_mixed_derivatives() -> None:
    rng = np.random.default_rng(2)
    base, labels = rng.standard_normal((5, 3)), rng.integers(0, 3, 5)
    linear, quadratic = rng.standard_normal((2, 4, 5, 3))

    def logits(alpha: Array) -> Array:
        return base + np.tensordot(alpha, linear, 1) + np.tensordot(alpha**2, quadratic, 1)

    chords = secant(base, np.stack([logits(unit) for unit in np.eye(4)]), labels)
    slopes = tangent(base, linear, labels)
    alphas = rng.standard_normal((6, 4))
    np.testing.assert_allclose(
        second_order(chords, slopes, alphas), [logits(a) for a in alphas], rtol=1e-11, atol=1e-11
    )


def test_second_order_field_passes_through_base_and_experts_with_the_tangents_slope_at_the_base() -> None:
    rng = np.random.default_rng(8)
    base, experts, products = rng.standard_normal((5, 3)), *rng.standard_normal((2, 4, 5, 3))
    labels = rng.integers(0, 3, 5)
    field = second_order_field(secant(base, experts, labels), tangent(base, products, labels))
    np.testing.assert_allclose(field.at(np.zeros(4)), base, rtol=1e-12)
    np.testing.assert_allclose(field.at(np.eye(4)), experts, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(field.slopes_at(np.zeros(4)), products, rtol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.0, 1.0))
def test_combine_averages_logits_at_every_coefficient(seed: int, weight: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_fields(rng, experts=3)
    second = LogitField(second.constant, second.slopes, first.labels, "other")
    alpha = rng.standard_normal(3)
    expected = (1 - weight) * first.at(alpha) + weight * second.at(alpha)
    np.testing.assert_allclose(combine(first, second, weight).at(alpha), expected, rtol=1e-11, atol=1e-11)
    assert combine(first, second).kind == "random+other"


def test_many_coefficients_at_once_equal_a_loop() -> None:
    rng = np.random.default_rng(4)
    fields, alphas = random_fields(rng, experts=3, tasks=2), rng.standard_normal((2, 7, 3))
    together = predict_risk(fields, alphas, [0.2, 0.8])
    assert together.risk.shape == (2, 7)
    assert together.per_task.shape == (2, 7, 2)
    for index in product(range(2), range(7)):
        alone = predict_risk(fields, alphas[index], [0.2, 0.8])
        np.testing.assert_allclose(together.risk[index], alone.risk, rtol=1e-12)
        np.testing.assert_allclose(together.per_task[index], alone.per_task, rtol=1e-12)
        np.testing.assert_allclose(together.standard_error[index], alone.standard_error, rtol=1e-12)


# --- convexity and gradient ------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([0.1, 2.0, 50.0]))
def test_predicted_risk_is_convex_in_the_coefficients(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    experts, tasks = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    fields, weights = random_fields(rng, experts, tasks, scale=scale), random_weights(rng, tasks)
    a, b = 3 * rng.standard_normal((2, experts))
    ends = 0.5 * risk(fields, a, weights) + 0.5 * risk(fields, b, weights)
    assert risk(fields, (a + b) / 2, weights) <= ends * (1 + 1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.booleans())
def test_gradient_agrees_with_central_differences(seed: int, quadratic: bool) -> None:
    rng = np.random.default_rng(seed)
    fields: list[Any] = random_fields(rng, 3, 2)
    if quadratic:
        fields = [second_order_field(field, replace(field, slopes=field.slopes[::-1])) for field in fields]
    weights, alpha = random_weights(rng, 2), rng.standard_normal(3)
    value, gradient = risk_gradient(fields, alpha, weights)
    step = 1e-5
    slopes = [
        (risk(fields, alpha + step * unit, weights) - risk(fields, alpha - step * unit, weights)) / (2 * step)
        for unit in np.eye(3)
    ]
    np.testing.assert_allclose(value, risk(fields, alpha, weights), rtol=1e-12)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-7)


# --- the minimiser and its proof -------------------------------------------------------------------------------------


def grid(low: float, high: float, simplex: bool) -> Array:
    """A dense grid of two coefficients."""
    t = np.linspace(low, high, 101 if not simplex else 4001)
    if simplex:
        return np.stack([t, 1 - t], axis=1)
    return np.stack(np.meshgrid(t, t, indexing="ij"), axis=-1).reshape(-1, 2)


def check_optimum(found: Optimum, fields: list[LogitField], weights: Array, points: Array) -> None:
    """The claim is an upper bound on suboptimality, and the optimum is good."""
    best = float(predict_risk(fields, points, weights).risk.min())
    np.testing.assert_allclose(found.risk, risk(fields, found.alpha, weights), rtol=1e-12)
    assert found.risk - found.gap <= best + 1e-12
    assert found.risk <= best + 1e-6
    assert 0 <= found.gap < 1e-3


@settings(max_examples=5, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([(0.0, 1.0), (-0.5, 2.0)]))
def test_box_minimum_beats_a_dense_grid_and_proves_it(seed: int, bounds: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    fields, weights = random_fields(rng, scale=1.0), random_weights(rng, 2)
    found = minimise_risk(fields, weights, bounds=bounds)
    assert ((found.alpha >= bounds[0]) & (found.alpha <= bounds[1])).all()
    check_optimum(found, fields, weights, grid(*bounds, simplex=False))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(SEEDS)
def test_simplex_minimum_beats_a_dense_grid_and_proves_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fields, weights = random_fields(rng, scale=1.0), random_weights(rng, 2)
    found = minimise_risk(fields, weights, simplex=True)
    assert (found.alpha >= 0).all()
    np.testing.assert_allclose(found.alpha.sum(), 1.0, atol=1e-12)
    check_optimum(found, fields, weights, grid(0.0, 1.0, simplex=True))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([0.3, 3.0]))
def test_hull_minimum_beats_a_dense_grid_and_proves_it(seed: int, scale: float) -> None:
    """Both kinds of minima: where the sum of the coefficients is 1, and inside."""
    rng = np.random.default_rng(seed)
    fields, weights = random_fields(rng, scale=scale), random_weights(rng, 2)
    found = minimise_risk(fields, weights, hull=True)
    assert (found.alpha >= 0).all()
    assert found.alpha.sum() <= 1.0 + 1e-12
    points = grid(0.0, 1.0, simplex=False)
    check_optimum(found, fields, weights, points[points.sum(axis=1) <= 1.0 + 1e-12])


def test_hull_holds_in_every_layer_and_lies_between_box_and_simplex() -> None:
    fields = random_fields(np.random.default_rng(3), 4, 2, scale=2.0)  # two experts, two layers
    hull = minimise_risk(fields, hull=True, layers=2)
    assert (hull.alpha.reshape(2, 2).sum(axis=0) <= 1.0 + 1e-12).all()
    box, simplex = minimise_risk(fields, layers=2), minimise_risk(fields, simplex=True, layers=2)
    assert box.risk - box.gap <= hull.risk + 1e-12
    assert hull.risk - hull.gap <= simplex.risk + 1e-12


@settings(max_examples=12, deadline=None, derandomize=True)
@given(SEEDS, st.integers(1, 3), st.booleans())
def test_gap_bounds_suboptimality_even_when_the_solver_is_stopped_early(seed: int, steps: int, simplex: bool) -> None:
    rng = np.random.default_rng(seed)
    fields = random_fields(rng, scale=2.0)
    early = minimise_risk(fields, simplex=simplex, max_iterations=steps)
    best = float(predict_risk(fields, grid(0.0, 1.0, simplex)).risk.min())
    assert early.risk - early.gap <= best + 1e-12
    inside = minimise_risk(fields, hull=True, max_iterations=steps)
    points = grid(0.0, 1.0, False)
    best = float(predict_risk(fields, points[points.sum(axis=1) <= 1.0]).risk.min())
    assert inside.risk - inside.gap <= best + 1e-12


def test_corner_solutions_are_found() -> None:
    labels = np.array([0, 1])
    right = 5.0 * np.eye(2)
    field = LogitField(np.zeros((2, 2)), np.stack([right, -right]), labels, "one helps, one hurts")
    np.testing.assert_allclose(minimise_risk([field]).alpha, [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(minimise_risk([field], simplex=True).alpha, [1.0, 0.0], atol=1e-6)


def test_default_weights_are_uniform() -> None:
    fields = random_fields(np.random.default_rng(5), tasks=3)
    np.testing.assert_allclose(uniform_weights(3), [1 / 3] * 3)
    alpha = np.array([0.2, 0.7])
    np.testing.assert_allclose(predict_risk(fields, alpha).risk, predict_risk(fields, alpha, [1 / 3] * 3).risk)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constant", "slopes", "labels", "named"),
    [
        ((4, 3), (2, 5, 3), (4,), "slopes"),
        ((4, 3), (2, 4, 2), (4,), "slopes"),
        ((4, 3), (4, 3), (4,), "slopes"),
        ((4, 3), (2, 4, 3), (5,), "labels"),
        ((4, 3), (2, 4, 3), (4, 1), "labels"),
        ((4,), (2, 4, 3), (4,), "constant"),
    ],
)
def test_fields_of_wrong_shape_are_refused_by_name(
    constant: tuple[int, ...], slopes: tuple[int, ...], labels: tuple[int, ...], named: str
) -> None:
    with pytest.raises(MergeboundError, match=named):
        LogitField(np.zeros(constant), np.zeros(slopes), np.zeros(labels, dtype=np.int64), "secant")


def test_logits_of_other_images_than_the_base_are_refused_by_name() -> None:
    labels = np.zeros(4, dtype=np.int64)
    with pytest.raises(MergeboundError, match=r"expert_logits|slopes"):
        secant(np.zeros((4, 3)), np.zeros((2, 5, 3)), labels)


def test_a_class_that_does_not_exist_is_refused_by_name() -> None:
    for wrong in (3, -1):
        with pytest.raises(MergeboundError, match="labels"):
            LogitField(np.zeros((2, 3)), np.zeros((1, 2, 3)), np.array([0, wrong]), "secant")


def test_wrong_number_of_coefficients_is_refused_by_name() -> None:
    (field,) = random_fields(np.random.default_rng(6), experts=3, tasks=1)
    for either in (field, second_order_field(field, field)):
        for alpha in (np.zeros(2), np.zeros((5, 4)), np.float64(0.5)):
            with pytest.raises(MergeboundError, match="alpha"):
                either.at(alpha)


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (1.0, 0.0)])
def test_empty_bounds_are_refused_by_name(bounds: tuple[float, float]) -> None:
    with pytest.raises(MergeboundError, match="bounds"):
        minimise_risk(random_fields(np.random.default_rng(7)), bounds=bounds)


@pytest.mark.parametrize("join", [combine, second_order_field])
def test_fields_of_other_images_are_not_joined(join: Any) -> None:
    base, slopes = np.zeros((2, 2)), np.ones((3, 2, 2))
    field = LogitField(base, slopes, np.array([0, 1]), "secant")
    for other in (replace(field, labels=np.array([1, 0])), replace(field, slopes=slopes[:1])):
        with pytest.raises(MergeboundError, match="same images"):
            join(field, other)
