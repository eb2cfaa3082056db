"""Lemma 1 in all its forms: random smooth nonnegative functions, instances that attain it, and its traps."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import AssumptionError, RecipeError
from theory.lemma import (
    curvature_on_segment,
    directional_risk,
    first_derivative_curvature,
    layered_risk,
    lemma_formula,
    matrix_risk,
    moved_risk,
)
from theory.symbolic import evaluate
from theory.symbols import symbol

SLACK = 1 + 1e-9


class Waves:
    """A nonnegative nonconvex function with known derivatives: a sum of ``a (1 + sin(v.x + s))``."""

    def __init__(self, rng: np.random.Generator, dim: int) -> None:
        count = int(rng.integers(1, 4))
        self.a, self.v = rng.random(count), rng.standard_normal((count, dim))
        self.s = rng.uniform(0, 2 * np.pi, count)

    def __call__(self, x: np.ndarray) -> float:
        return float(self.a @ (1 + np.sin(self.v @ x + self.s)))

    def hessian_limit(self) -> np.ndarray:
        """P with Hessian <= P everywhere: every wave bends by at most a along v."""
        return np.einsum("c,ci,ck->ik", self.a, self.v, self.v)

    def along(self, x: np.ndarray, u: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        phase = (self.v @ x + self.s)[:, None] + np.outer(self.v @ u, t)
        speed = self.v @ u
        value = self.a @ (1 + np.sin(phase))
        return value, (self.a * speed) @ np.cos(phase), (self.a * speed**2) @ -np.sin(phase)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_every_form_bounds_a_nonconvex_function(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dim = int(rng.integers(1, 5))
    f = Waves(rng, dim)
    x, u = rng.standard_normal(dim) * 3, rng.standard_normal(dim) * np.exp(rng.uniform(-4, 1))
    if rng.random() < 0.3:  # start in a minimum, where the constants are tested hardest
        x = np.linalg.lstsq(f.v, -np.pi / 2 - f.s, rcond=None)[0]
    truth, start, P = f(x + u), f(x), f.hessian_limit()
    L = float(np.linalg.eigvalsh(P)[-1])
    floor = 1e-13
    assert truth <= float(moved_risk(start, L, np.linalg.norm(u))) * SLACK + floor
    assert truth <= float(matrix_risk(start, P, u)) * SLACK + floor
    cut = int(rng.integers(0, dim + 1))
    blocks = [P[:cut, :cut], P[cut:, cut:]]
    highs = [float(np.linalg.eigvalsh(block)[-1]) if block.size else 0.0 for block in blocks]
    assert (
        truth <= float(layered_risk(start, highs, [np.linalg.norm(u[:cut]), np.linalg.norm(u[cut:])])) * SLACK + floor
    )
    t = np.linspace(0, 1, 2001)
    value, slope, bend = f.along(x, u, t)
    size = float((f.a * (f.v @ u) ** 2).sum())  # also bounds what the grid of t misses
    gap = size * float(np.abs(f.v @ u).max()) * (t[1] - t[0])
    segment = curvature_on_segment(bend.max() + gap, slope[0], value[0])
    assert truth <= float(directional_risk(start, segment)) * SLACK + floor
    if value.min() > 1e-3 * size:
        first = float(first_derivative_curvature(slope, value))
        assert truth <= float(directional_risk(start, first)) * (1 + 1e-4) + floor


def test_attained_by_a_parabola_moved_away_from_its_minimum() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        L, at, further = np.exp(rng.uniform(-3, 3)), rng.random() * 4, rng.random() * 4
        truth = L / 2 * (at + further) ** 2
        assert float(moved_risk(L / 2 * at**2, L, further)) == pytest.approx(truth, rel=1e-12)
        assert float(moved_risk(L / 2 * (at + further) ** 2, L, further)) >= L / 2 * at**2  # and towards it: upper


def test_against_fifty_digits() -> None:
    rng = np.random.default_rng(1)
    made = lemma_formula()
    for _ in range(30):
        numbers = np.exp(rng.uniform(-20, 20, 3))
        with mpmath.workdps(50):
            exact = made.expression.evalf(50, subs=dict(zip((symbol(k) for k in made.keys), numbers, strict=True)))
        assert float(evaluate(lemma_formula, *numbers)) == pytest.approx(float(exact), rel=1e-12)
        assert float(moved_risk(numbers[0], numbers[1], np.sqrt(numbers[2]))) == pytest.approx(float(exact), rel=1e-12)


def test_trap_curvature_on_the_segment_alone_is_not_enough() -> None:
    """phi = (1 + 4 t)... a straight steep line: phi'' = 0 on [0, 1], but the risk does rise."""
    value, slope = 1.0, 4.0
    truth = value + slope
    assert float(directional_risk(value, 0.0)) < truth
    assert float(directional_risk(value, curvature_on_segment(0.0, slope, value))) >= truth


def test_trap_only_upper_curvature_and_zero_over_zero() -> None:
    assert float(curvature_on_segment(-3.0, -1.0, 2.0)) == 0.0  # falling and concave: free
    assert float(curvature_on_segment(0.0, 0.0, 0.0)) == 0.0
    assert np.isinf(curvature_on_segment(0.0, 1.0, 0.0))  # cannot happen to a nonnegative function


def test_trap_blocks_measured_at_points_need_a_semidefinite_hessian() -> None:
    """1 + sin(x y) along x = y: no diagonal block bends upwards at any point of the way, yet the risk rises by 0.84."""
    truth = 0.5 * (1.0 + 1.0) ** 2  # f = (x + y)^2/2 moved by (1, 1) from 0: blocks are 1, the bound is attained
    assert float(layered_risk(0.0, [1.0, 1.0], [1.0, 1.0])) == pytest.approx(truth)
    t = np.linspace(0, 1, 50)
    measured = np.maximum(-(t**2) * np.sin(t**2), 0.0).max()  # both blocks of the (indefinite) Hessian
    assert float(layered_risk(1.0, [measured] * 2, [1.0, 1.0])) < 1 + np.sin(1.0)


def test_broadcasts_overflows_and_refuses() -> None:
    grid = moved_risk(np.ones((3, 1)), 2.0, np.linspace(0, 1, 5))
    assert grid.shape == (3, 5)
    assert np.isinf(moved_risk(1.0, 1e300, 1e300))
    assert float(moved_risk(1.0, 0.0, np.inf)) == pytest.approx(1.0)
    assert layered_risk(np.ones(4), np.ones(3), np.ones((4, 3))).shape == (4,)
    with pytest.raises(RecipeError, match="risk"):
        moved_risk(-1.0, 1.0, 1.0)
    with pytest.raises(RecipeError, match="distance"):
        moved_risk(1.0, 1.0, float("nan"))
    with pytest.raises(RecipeError, match="number"):
        moved_risk("low", 1.0, 1.0)
    with pytest.raises(AssumptionError, match="semidefinite"):
        matrix_risk(1.0, -np.eye(2), np.ones(2))
