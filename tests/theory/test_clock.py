"""The clock against the formula in 50 digits, literal products, and the exact response of quadratic modes."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import AssumptionError, Expert, RecipeError, Schedule, clock
from theory.clocks import (
    geometric_sums,
    heavy_ball_curve,
    heavy_ball_log_response,
    log_response,
    nu_formula,
    sgd_times,
    signed_response,
    tau_formula,
    times_of,
    write_out,
)
from theory.symbolic import evaluate


@pytest.mark.parametrize(
    "eta_kappa",
    [1e-300, 1e-17, -1e-17, 1e-9, 1e-3, 0.5, 30.0, -1e-9, -0.3, -0.999999, -1.0, -1.5, -1.9999999, -2.0, -2.5],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_times_against_fifty_digits(eta_kappa: float, steps: int) -> None:
    """tau and nu equal the formula of section 4 (as a sum of powers, without its 0/0) to nearly double precision."""
    with mpmath.workdps(400 if eta_kappa == 1e-300 else 50):
        x = mpmath.mpf(eta_kappa)
        first = mpmath.fsum((1 + x) ** a for a in range(steps))
        second = mpmath.fsum((1 + x) ** (2 * a) for a in range(steps))
        got = geometric_sums(eta_kappa, steps)
        for value, truth in zip(got, (first, second), strict=True):
            if truth > mpmath.mpf("1e308"):
                assert np.isinf(value)
            else:
                assert abs(mpmath.mpf(float(value)) - truth) <= abs(truth) * mpmath.mpf("1e-12")


def test_numeric_form_is_the_symbolic_formula() -> None:
    rng = np.random.default_rng(0)
    eta, kappa, steps = rng.uniform(0.01, 1, 200), rng.uniform(-1.5, 1.5, 200), rng.integers(1, 40, 200)
    tau, nu = sgd_times(eta, kappa, steps)
    assert np.allclose(tau, evaluate(tau_formula, eta, kappa, steps), rtol=1e-8)
    assert np.allclose(nu, evaluate(nu_formula, eta, kappa, steps), rtol=1e-8)


def test_limits() -> None:
    assert sgd_times(0.1, 0.0, 7) == (pytest.approx(0.7), pytest.approx(0.07))
    assert float(sgd_times(0.5, -4.0, 9)[1]) == pytest.approx(0.25 * 9)
    assert float(sgd_times(0.5, -4.0, 4)[0]) == 0.0
    tau, nu = sgd_times(1.0, 10.0, 10**6)
    assert np.isinf(tau)
    assert np.isinf(nu)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_any_schedule_is_the_literal_product(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps, L, omega = int(rng.integers(1, 30)), 2.0, float(rng.choice([0.0, 0.1]))
    eta = rng.uniform(0, 1.5, steps)
    expert = Expert("a", 50, 5, Schedule(eta), weight_decay=omega, curvature="smooth", L=L)
    q = np.maximum(1 - eta * (-L + omega), eta * (L + omega) - 1)
    w = np.array([eta[k] * np.prod(q[k + 1 :]) for k in range(steps)])
    timing = clock(expert)
    assert np.allclose(timing.tau, w.sum())
    assert np.allclose(timing.nu, (w**2).sum())


def test_schedule_of_equal_rates_is_the_closed_form() -> None:
    common = dict(n=50, batch_size=5, curvature="strongly_convex", L=2.0, mu=0.3)
    closed = clock(Expert("a", learning_rate=0.2, steps=60, **common))
    written = clock(Expert("a", learning_rate=Schedule(np.full(60, 0.2)), **common))
    assert closed.log_w is None
    assert written.log_w is not None
    assert np.allclose([closed.tau, closed.nu], [written.tau, written.nu], rtol=1e-12)


def test_heavy_ball_recursion_is_the_matrix_product() -> None:
    rng = np.random.default_rng(1)
    eta, q, beta, lip = rng.uniform(0.01, 1, 12), rng.uniform(0, 2, 12), 0.7, 3.0
    for k in range(12):
        product = np.eye(2)
        for l in range(k + 1, 12):
            product = np.array([[q[l], eta[l] * beta], [lip, beta]]) @ product
        expected = (product @ np.array([eta[k], 1.0]))[0]
        got = np.exp(heavy_ball_log_response(eta, q - 1, np.full(12, beta), np.full(12, lip)))[k]
        assert got == pytest.approx(expected, rel=1e-12)
    no_momentum = heavy_ball_log_response(eta, q - 1, np.zeros(12), np.full(12, lip))
    assert np.allclose(np.exp(no_momentum), [eta[k] * np.prod(q[k + 1 :]) for k in range(12)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_certified_response_covers_every_quadratic_mode(seed: int) -> None:
    """No mode h in [0, L] answers more strongly than the certified response, with momentum and decay."""
    rng = np.random.default_rng(seed)
    L, omega, beta = 1.0, float(rng.choice([0.0, 0.2])), float(rng.uniform(0, 0.95))
    limit = 2 * (1 - beta) ** 2 / ((1 + beta) * (L + omega))
    eta, steps = float(limit * rng.uniform(0.05, 1.3)), int(rng.integers(1, 80))
    expert = Expert("a", 10, 2, eta, steps, momentum=beta, weight_decay=omega, curvature="convex", L=L)
    certified = np.exp(log_response(expert))
    response = np.abs(signed_response(eta, np.linspace(0, L, 60) + omega, beta, steps)).max(axis=0)
    assert np.all(response <= certified * (1 + 1e-9))


def convex_response(eta: float, beta: float, h: np.ndarray) -> np.ndarray:
    """|w_k| of heavy ball whose batch at step l has curvature h_l: a convex loss that differs from batch to batch."""
    first, second, w = 1.0, 0.0, np.empty(len(h))
    for k in range(len(h) - 1, -1, -1):
        w[k] = abs(first * eta + second)
        first, second = first * (1 - eta * h[k]) - second * h[k], first * eta * beta + second * beta
    return w


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_certified_response_covers_curvature_that_changes_from_batch_to_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    beta, steps = float(rng.uniform(0, 0.95)), int(rng.integers(2, 80))
    eta = float(2 * (1 - beta) ** 2 / (1 + beta) * rng.choice([1.0, rng.uniform(0.1, 1.5)]))
    expert = Expert("a", 10, 2, eta, steps, momentum=beta, curvature="convex", L=1.0)
    period = int(rng.integers(1, 5))
    h = np.tile(rng.choice([0.0, 1.0, rng.random()], period), steps)[:steps]
    assert np.all(convex_response(eta, beta, h) <= np.exp(log_response(expert)) * (1 + 1e-9))


def test_trap_convex_does_not_mean_kappa_zero_with_momentum() -> None:
    """The tempting curve eta (1 - beta^(K-k))/(1 - beta) is exact without curvature, and far too small with it.

    Convex losses, eta L = 2, curvature 0 or L in turn: the buffer resonates, which plain SGD cannot do.
    """
    eta, beta, steps = 1.0, 0.5, 30
    curve = heavy_ball_curve(eta, beta, steps)
    assert np.allclose(curve, convex_response(eta, beta, np.zeros(steps)))
    resonant = convex_response(eta, beta, np.tile([0.0, 2.0], steps // 2))
    assert np.max(resonant / curve) > 100
    expert = Expert("a", 10, 2, eta, steps, momentum=beta, curvature="convex", L=2.0)
    assert np.all(resonant <= np.exp(log_response(expert)) * (1 + 1e-9))


def test_configurations_of_different_length_are_right_aligned() -> None:
    count = np.array([3, 7, 5])
    expert = Expert("a", 10, 4, 0.2, count, momentum=0.5, curvature="smooth", L=1.0)
    together = clock(expert)
    for index, steps in enumerate(count):
        alone = clock(Expert("a", 10, 4, 0.2, int(steps), momentum=0.5, curvature="smooth", L=1.0))
        assert together.tau[index] == pytest.approx(alone.tau)
        assert together.nu[index] == pytest.approx(alone.nu)


def test_epochs_keep_the_short_batch_unless_told() -> None:
    kept = write_out(Expert("a", 10, 4, 0.1, 7, sampling="reshuffle", L=1.0))
    assert kept.batch_size.tolist() == [4, 4, 2, 4, 4, 2, 4]
    assert kept.position.tolist() == [0, 1, 2, 0, 1, 2, 0]
    dropped = write_out(Expert("a", 10, 4, 0.1, 5, sampling="reshuffle", drop_last=True, L=1.0))
    assert dropped.batch_size.tolist() == [4] * 5
    assert dropped.position.tolist() == [0, 1, 0, 1, 0]
    listed = write_out(Expert("a", 10, Schedule(np.array([6.0, 4, 5, 5, 1])), 0.1, sampling="reshuffle", L=1.0))
    assert listed.position.tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(RecipeError, match="add up to n"):
        write_out(Expert("a", 10, Schedule(np.array([6.0, 5])), 0.1, sampling="reshuffle", L=1.0))


def test_overflow_is_infinite_and_never_nan() -> None:
    for momentum in (0.0, 0.9):
        timing = clock(Expert("a", 100, 10, 0.9, 5000, momentum=momentum, curvature="smooth", L=5.0))
        assert np.isinf(timing.tau)
        assert np.isinf(timing.nu)
    tau, nu = times_of(np.full((2, 3), -np.inf))
    assert tau.tolist() == nu.tolist() == [0.0, 0.0]


def test_uncovered_optimizers_are_refused_by_name() -> None:
    with pytest.raises(AssumptionError, match=r"'a'.*'adamw'.*measured drift"):
        clock(Expert("a", 10, 2, 0.1, 5, L=1.0, optimizer="adamw"))
    with pytest.raises(AssumptionError, match="gradient_clipping"):
        clock(Expert("a", 10, 2, 0.1, 5, L=1.0, gradient_clipping=True))
    with pytest.raises(RecipeError, match="L is missing"):
        clock(Expert("a", 10, 2, 0.1, 5))


def test_measured_rate_lowers_the_tier() -> None:
    assert clock(Expert("a", 10, 2, 0.1, 5, L=1.0)).tier == "certified"
    assert clock(Expert("a", 10, 2, 0.1, 5, kappa=0.2)).tier == "estimated"
    assert clock(Expert("a", 10, 2, 0.1, 5, L=1.0, measured=frozenset({"L"}))).tier == "estimated"
