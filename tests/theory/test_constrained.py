"""Minima over polytopes: closed forms, grids, other solvers' minima, and a lower bound that is never wrong."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.constrained import (
    Array,
    Polytope,
    coefficient_box,
    coefficient_domain,
    coefficient_simplex,
    coefficients_summing_to,
)
from theory.convex import minimise_over
from theory.errors import MergeboundError

SEEDS = st.integers(0, 2**32 - 1)


def nearest(goal: Array):  # type: ignore[no-untyped-def]
    """Squared distance to a point: its minimum over a polytope is a projection."""
    return lambda a: (float((a - goal) @ (a - goal)), 2.0 * (a - goal))


def steepest(planes: Array, heights: Array):  # type: ignore[no-untyped-def]
    """Largest of affine functions: convex, kinks everywhere."""

    def objective(a: Array) -> tuple[float, Array]:
        values = planes @ a + heights
        k = int(np.argmax(values))
        return float(values[k]), planes[k]

    return objective


@settings(max_examples=5, deadline=None, derandomize=True)
@given(SEEDS, st.integers(2, 6))
def test_projection_onto_the_simplex_in_closed_form(seed: int, size: int) -> None:
    goal = np.random.default_rng(seed).standard_normal(size)
    ordered = np.sort(goal)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, size + 1)
    exact = np.maximum(goal - excess[np.nonzero(ordered > excess)[0][-1]], 0.0)
    found = minimise_over(nearest(goal), coefficient_simplex(size))
    np.testing.assert_allclose(found.point, exact, atol=1e-3)
    best = float(((exact - goal) ** 2).sum())
    assert found.value - found.gap - 1e-12 <= best <= found.value + 1e-12
    assert found.gap <= 1e-6 * max(1, found.value)


def lowest_of_all_faces(form: Array, goal: Array, domain: Polytope) -> float:
    """Minimum of a positive definite quadratic over 0 <= a <= 1 and sums: the best stationary point of any face."""
    best = np.inf
    sums = np.vstack([domain.equal.reshape(-1, domain.size), domain.at_most.reshape(-1, domain.size)])
    for states in itertools.product((0.0, 1.0, None), repeat=domain.size):
        free = np.array([state is None for state in states])
        held = np.array([state or 0.0 for state in states])
        for tight in itertools.product((False, True), repeat=len(sums)):
            rows = sums[list(tight)]
            k, m = int(free.sum()), len(rows)
            system = np.zeros((k + m, k + m))
            system[:k, :k] = form[np.ix_(free, free)]
            system[k:, :k] = rows[:, free]
            system[:k, k:] = rows[:, free].T
            right = np.concatenate([form[free] @ goal - form[np.ix_(free, ~free)] @ held[~free], 1.0 - rows @ held])
            point = held.copy()
            point[free] = np.linalg.lstsq(system, right, rcond=None)[0][:k]
            if domain.violation(point) <= 1e-12:
                best = min(best, float((point - goal) @ form @ (point - goal)))
    return best


@pytest.mark.parametrize("planes", [0, None])
@pytest.mark.parametrize(("size", "layers"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("kind", [{}, {"simplex": True}, {"hull": True}])
def test_box_simplex_and_hull_against_every_face(
    kind: dict[str, bool], size: int, layers: int, planes: int | None
) -> None:
    rng = np.random.default_rng([size, layers])
    factor, goal = rng.standard_normal((8, size)), 0.5 + rng.standard_normal(size)
    form = factor.T @ factor
    domain = coefficient_domain(size, (0.0, 1.0), layers=layers, **kind)

    def objective(a: Array) -> tuple[float, Array]:
        return float((a - goal) @ form @ (a - goal)), 2 * form @ (a - goal)

    found = minimise_over(objective, domain, tolerance=1e-10, planes=planes)
    exact = lowest_of_all_faces(form, goal, domain)
    assert abs(found.value - exact) <= 1e-10
    assert found.value - found.gap <= exact + 1e-12
    assert found.gap <= (1e-5 if planes == 0 else 1e-10 * max(1.0, exact))
    assert domain.violation(found.point) <= 1e-14


def test_a_corner_in_closed_form_is_the_linear_program() -> None:
    """Sums over disjoint groups, with bounds of their own: linprog finds the same lowest value."""
    linprog: Any = scipy.optimize.linprog
    for seed in range(6):
        rng = np.random.default_rng(seed)
        lower = rng.uniform(-1.0, 0.0, 7)
        domain = Polytope(lower, lower + rng.uniform(0.1, 1.5, 7))
        rows = np.repeat(np.eye(3), [3, 2, 2], axis=0).T
        middle = rows @ (0.5 * (domain.lower + domain.upper))
        domain = domain.with_equal(rows[:1], middle[:1] + 0.2).with_at_most(rows[1:], middle[1:] - 0.1)
        slope, bounds = rng.standard_normal(7), np.column_stack([domain.lower, domain.upper])
        right = {"A_ub": domain.at_most, "b_ub": domain.limit, "A_eq": domain.equal, "b_eq": domain.equal_to}
        theirs = linprog(slope, bounds=bounds, **right).fun
        found = minimise_over(steepest(slope[None], np.zeros(1)), domain, planes=0)
        assert found.value - found.gap == pytest.approx(theirs, abs=1e-12)
        assert found.value == pytest.approx(theirs, abs=1e-7)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(SEEDS, st.integers(0, 4))
def test_lower_bound_is_never_above_random_feasible_points_even_when_stopped(seed: int, iterations: int) -> None:
    rng = np.random.default_rng(seed)
    objective = steepest(rng.standard_normal((9, 3)), rng.standard_normal(9))
    domain = coefficient_box(3, -1, 1).with_at_most([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]], [0.4, 0.3])
    found = minimise_over(objective, domain, max_iterations=iterations)
    assert domain.violation(found.point) <= 1e-8
    points = rng.uniform(-1, 1, (4000, 3))
    points = points[(points @ domain.at_most.T <= domain.limit).all(axis=1)]
    lowest = min(objective(p)[0] for p in points)
    assert found.value - found.gap <= lowest
    full = minimise_over(objective, domain)
    assert full.gap <= 1e-7 * max(1.0, abs(full.value))
    assert full.value <= lowest + 1e-7


def test_minimum_of_affine_pieces_is_the_linear_program() -> None:
    """|x - 1/3| + |y + 1/4| on x + y = 1/2, 0 <= x, y <= 1: at (1/2, 0), value 5/12."""
    signs = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    heights = signs @ np.array([-1 / 3, 1 / 4])
    found = minimise_over(steepest(signs, heights), coefficients_summing_to(0.5, 2))
    assert found.value == pytest.approx(5 / 12, abs=1e-7)
    assert found.gap <= 1e-7


def test_held_coefficients_and_redundant_constraints() -> None:
    goal = np.array([0.9, -0.2, 0.4])
    domain = coefficient_simplex(3).holding([1], 0.0)
    found = minimise_over(nearest(goal), domain)
    np.testing.assert_allclose(found.point, [0.75, 0.0, 0.25], atol=1e-3)
    pinned = minimise_over(nearest(goal), domain.holding([0, 2], [0.6, 0.4]))
    np.testing.assert_array_equal(pinned.point, [0.6, 0.0, 0.4])
    assert pinned.gap == 0.0
    doubled = domain.with_equal([2.0, 2.0, 2.0], 2.0).with_at_most([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [0.7, 0.5])
    np.testing.assert_allclose(minimise_over(nearest(goal), doubled).point, [0.7, 0.0, 0.3], atol=1e-3)


def test_impossible_and_malformed_domains_are_refused_by_name() -> None:
    goal = nearest(np.zeros(2))
    with pytest.raises(MergeboundError, match="satisfy"):
        minimise_over(goal, coefficients_summing_to(3.0, 2))
    with pytest.raises(MergeboundError, match="satisfy"):
        minimise_over(goal, coefficient_simplex(2).holding([0, 1], 0.0))
    with pytest.raises(MergeboundError, match="satisfy"):
        minimise_over(goal, coefficient_box(2).with_at_most([1.0, 1.0], -1.0))
    for low, high in ((1.0, 0.0), (np.nan, 1.0), (0.0, np.inf)):
        with pytest.raises(MergeboundError, match="bounds"):
            coefficient_box(2, low, high)
    with pytest.raises(MergeboundError, match="equal"):
        Polytope(np.zeros(2), np.ones(2), np.ones((1, 3)), np.ones(1))
    with pytest.raises(MergeboundError, match="at_most"):
        coefficient_box(2).with_at_most([np.nan, 1.0], 1.0)
    with pytest.raises(MergeboundError, match="layers"):
        coefficient_simplex(5, layers=2)
    with pytest.raises(MergeboundError, match="start"):
        minimise_over(goal, coefficient_box(2), [0.0])
    with pytest.raises(MergeboundError, match="finite"):
        minimise_over(lambda a: (np.inf, a), coefficient_box(2))
