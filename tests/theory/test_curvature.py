"""The curvature model's minimiser against grids, closed forms and its own certificate."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.curvature import CurvatureModel, minimise_curvature, positive_part, predict_curvature
from theory.errors import MergeboundError


def models(seed: int, tasks: int, size: int, anchors: int) -> list[CurvatureModel]:
    rng = np.random.default_rng(seed)
    found = []
    for j in range(tasks):
        factors = rng.normal(size=(anchors, size + 2, size))
        forms = np.einsum("sri,srk->sik", factors, factors)
        found.append(CurvatureModel(float(rng.gamma(1.0)), forms, np.eye(size)[j % size]))
    return found


def literal(parts: list[CurvatureModel], alpha: np.ndarray) -> float:
    total = 0.0
    for part in parts:
        d = alpha - part.centre
        total += (np.sqrt(part.own_risk) + np.sqrt(max(d @ Q @ d for Q in part.forms) / 2)) ** 2
    return total / len(parts)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tasks=st.integers(1, 3), anchors=st.integers(1, 3))
def test_minimum_against_a_grid(seed: int, tasks: int, anchors: int) -> None:
    parts = models(seed, tasks, 2, anchors)
    found = minimise_curvature(parts, bounds=(-0.5, 1.5))
    assert found.risk == pytest.approx(literal(parts, found.alpha))
    assert found.gap <= 2e-3 * max(found.risk, 0.1)
    grid = min(literal(parts, np.array(a)) for a in product(np.linspace(-0.5, 1.5, 41), repeat=2))
    assert found.risk <= grid + min(found.gap, 1e-6 * max(found.risk, 1.0)) + 1e-12
    assert found.risk - found.gap <= grid + 1e-12


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_simplex_against_a_grid(seed: int) -> None:
    parts = models(seed, 2, 2, 2)
    found = minimise_curvature(parts, simplex=True)
    assert found.alpha.sum() == pytest.approx(1.0)
    assert found.alpha.min() >= 0.0
    grid = min(literal(parts, np.array([t, 1 - t])) for t in np.linspace(0.0, 1.0, 401))
    assert found.risk <= grid + min(found.gap, 1e-5) + 1e-12
    assert found.risk - found.gap <= grid + 1e-12


def test_a_task_alone_is_left_alone() -> None:
    """The minimum is a kink: at the expert itself, where the curvature term is the norm of zero."""
    parts = models(3, 1, 3, 2)
    found = minimise_curvature(parts)
    np.testing.assert_allclose(found.alpha, parts[0].centre, atol=1e-4)
    assert found.risk == pytest.approx(parts[0].own_risk, rel=1e-4)


def test_lambda_law_of_equal_experts_without_own_risk() -> None:
    """theory.md section 7: own curvature 1, cross curvature rho, no cross terms: lambda = 1 / (1 + (N - 1) rho)."""
    n, rho = 4, 0.4
    forms = [np.diag([1.0 if i == j else rho for i in range(n)]) for j in range(n)]
    parts = [CurvatureModel(0.0, form[None], np.eye(n)[j]) for j, form in enumerate(forms)]
    found = minimise_curvature(parts)
    np.testing.assert_allclose(found.alpha, 1 / (1 + (n - 1) * rho), atol=2e-3)
    d = 1 / (1 + (n - 1) * rho)
    assert found.risk == pytest.approx(0.5 * ((1 - d) ** 2 + (n - 1) * rho * d**2), rel=1e-5)


def test_layers_are_never_worse_and_simplices_hold_layer_by_layer() -> None:
    rng = np.random.default_rng(0)
    n, layers = 3, 4
    parts, coarse = [], []
    for j in range(n):
        factors = rng.normal(size=(20, n * layers))
        form = factors.T @ factors
        centre = np.repeat(np.eye(n)[j], layers)
        together = np.kron(np.eye(n), np.ones((layers, 1)))
        parts.append(CurvatureModel(0.3, form[None], centre))
        coarse.append(CurvatureModel(0.3, (together.T @ form @ together)[None], np.eye(n)[j]))
    for simplex in (False, True):
        one = minimise_curvature(coarse, simplex=simplex)
        many = minimise_curvature(parts, simplex=simplex, layers=layers)
        assert many.risk <= one.risk + one.gap
        assert many.gap < 0.05 * many.risk
        assert predict_curvature(parts, np.repeat(one.alpha, layers)) == pytest.approx(one.risk)
    np.testing.assert_allclose(many.alpha.reshape(n, layers).sum(axis=0), 1.0)


def test_positive_part() -> None:
    matrix = np.random.default_rng(1).normal(size=(5, 5))
    matrix = matrix + matrix.T
    clipped = positive_part(matrix)
    assert np.linalg.eigvalsh(clipped).min() > -1e-12
    np.testing.assert_allclose(positive_part(clipped), clipped, atol=1e-12)
    np.testing.assert_allclose(np.sort(np.linalg.eigvalsh(clipped)), np.linalg.eigvalsh(matrix).clip(0), atol=1e-12)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: CurvatureModel(0.1, np.eye(2), np.zeros(2)),
        lambda: CurvatureModel(0.1, np.eye(2)[None], np.zeros(3)),
        lambda: CurvatureModel(-0.1, np.eye(2)[None], np.zeros(2)),
        lambda: CurvatureModel(np.inf, np.eye(2)[None], np.zeros(2)),
        lambda: CurvatureModel(0.1, np.full((1, 2, 2), np.nan), np.zeros(2)),
        lambda: CurvatureModel(0.1, np.array([[[1.0, 2.0], [0.0, 1.0]]]), np.zeros(2)),
        lambda: CurvatureModel(0.1, np.diag([1.0, -1.0])[None], np.zeros(2)),
        lambda: minimise_curvature([*models(0, 1, 2, 1), *models(0, 1, 3, 1)]),
        lambda: minimise_curvature(models(0, 1, 2, 1), bounds=(1.0, 1.0)),
        lambda: minimise_curvature(models(0, 1, 3, 1), layers=2),
    ],
)
def test_refuses(bad: object) -> None:
    with pytest.raises(MergeboundError):
        bad()  # type: ignore[operator]
