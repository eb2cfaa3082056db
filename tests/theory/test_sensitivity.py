"""Power iteration from products: against singular values, with its bracket, residual and adjoint check."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.errors import RecipeError
from theory.sensitivity import LocalSensitivity, local_sensitivity


def of(J: np.ndarray, **more: float) -> LocalSensitivity:
    return local_sensitivity(lambda v: J @ v, lambda u: J.T @ u, J.shape[1], **more)  # type: ignore[arg-type]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_bracket_residual_and_history(rows: int, columns: int, seed: int) -> None:
    J = np.random.default_rng(seed).standard_normal((rows, columns))
    singular = np.linalg.svd(J, compute_uv=False)
    found = of(J, seed=seed, iterations=25, delta=1e-6)
    assert found.value <= singular[0] * (1 + 1e-12)
    assert singular[0] <= found.upper * (1 + 1e-12)
    assert np.all(np.diff(found.history) >= -1e-12 * singular[0])
    np.testing.assert_allclose(np.linalg.norm(J @ found.direction), found.value, rtol=1e-12)
    padded = np.append(singular, 0.0) if columns > rows else singular
    assert np.min(np.abs(padded**2 / found.value**2 - 1)) <= found.residual + 1e-9
    assert found.adjoint_gap < 1e-12
    assert found.tier == "estimated"


def test_converges_to_the_largest_singular_value_and_says_so() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        J = rng.standard_normal((12, 9))
        found = of(J, iterations=2000, tolerance=1e-9)
        assert found.converged
        np.testing.assert_allclose(found.value, np.linalg.norm(J, 2), rtol=1e-9)
        short = of(J, iterations=1)
        assert not short.converged
        assert short.value < np.linalg.norm(J, 2)


@pytest.mark.parametrize("delta", [0.5, 0.1])
def test_upper_bound_fails_as_rarely_as_stated(delta: float) -> None:
    """A needle: one direction is much longer than all others, and a random start may miss it."""
    J = np.diag([1.0, *[1e-3] * 30])
    misses = sum(of(J, seed=seed, iterations=1, delta=delta).upper < 1.0 for seed in range(2000))
    assert misses / 2000 <= delta + 4 * np.sqrt(delta * (1 - delta) / 2000)
    assert misses > 0 or delta < 0.5  # the statement is about probability: it does fail


def test_the_bracket_closes_with_iterations_also_without_a_gap() -> None:
    J = np.eye(50)
    widths = [of(J, iterations=k, tolerance=-0.0).upper for k in (1,)]
    many = local_sensitivity(lambda v: 2 * v, lambda u: 2 * u, (5, 10), iterations=3)
    assert many.value == pytest.approx(2.0)
    assert many.converged
    assert many.iterations == 1
    assert widths[0] >= 1.0
    D = np.diag(np.linspace(0.9, 1.0, 50))
    uppers = [of(D, iterations=k, tolerance=0.0).upper for k in (2, 20, 200)]
    assert uppers[0] > uppers[1] > uppers[2] >= 1.0
    assert uppers[2] < 1.05


def test_trap_products_that_do_not_belong_together_are_flagged() -> None:
    """A transposed product that misses half of the matrix gives a confident wrong number; the adjoint gap shows it."""
    J = np.array([[1.0, 5.0], [0.0, 1.0]])
    found = local_sensitivity(lambda v: J @ v, lambda u: u, 2, iterations=200)
    assert found.adjoint_gap > 0.1


def test_restarts_zero_maps_and_shapes() -> None:
    J = np.random.default_rng(1).standard_normal((6, 6))
    several = local_sensitivity(lambda v: J @ v, lambda u: J.T @ u, 6, iterations=5, restarts=8)
    assert several.value >= of(J, iterations=5).value
    assert several.iterations == 40
    nothing = local_sensitivity(lambda v: 0 * v, lambda u: 0 * u, (2, 2))
    assert (nothing.value, nothing.upper, nothing.converged) == (0.0, 0.0, True)
    wide = local_sensitivity(lambda v: v.sum(axis=0), lambda u: np.stack([u] * 4), (4, 3))
    assert wide.value == pytest.approx(2.0)
    assert wide.direction.shape == (4, 3)
    huge = local_sensitivity(lambda v: 1e150 * v, lambda u: 1e150 * u, 3)
    assert huge.value == pytest.approx(1e150)
    assert huge.upper < np.inf


def test_refusals_name_the_remedy() -> None:
    same = lambda v: v  # noqa: E731
    for call, words in (
        (lambda: local_sensitivity(same, same, ()), None),
        (lambda: local_sensitivity(same, same, (0, 3)), "shape"),
        (lambda: local_sensitivity(same, same, 3, iterations=0), "iterations"),
        (lambda: local_sensitivity(same, same, 3, restarts=0), "restarts"),
        (lambda: local_sensitivity(same, same, 3, delta=1.0), "delta"),
        (lambda: local_sensitivity(same, same, 3, tolerance=-1.0), "tolerance"),
        (lambda: local_sensitivity(same, lambda u: u[:1], 3), "vjp returned shape"),
        (lambda: local_sensitivity(lambda v: v * np.nan, same, 3), "not finite"),
    ):
        if words is None:
            assert call().value == pytest.approx(1.0)
            continue
        with pytest.raises(RecipeError, match=words):
            call()
