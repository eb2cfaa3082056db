"""Traps of sections 4 to 6 (clock, stability, drift): the naive formula fails on an instance, ours holds there.

The table of all traps, and of the tests of other files, is docs/theory-traps.md.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest

from theory import AssumptionError, Expert, QuadraticTask, RecipeError, Schedule, clock, expert_epsilon, expert_moments
from theory.clocks import heavy_ball_convex_response, log_response, sgd_times, signed_response
from theory.drift import (
    drift_base,
    drift_energy,
    drift_log,
    drift_losses,
    drift_noise,
    drift_saturation,
    finite_batch_factor,
)
from theory.quadratic import mode_response
from theory.stability import (
    epsilon_cap,
    epsilon_floor,
    epsilon_from_losses,
    epsilon_recursion,
    epsilon_rms,
    epsilon_sup,
    gamma,
    gamma_of_weights,
    gamma_with_replacement,
    gamma_without_replacement,
)

SLACK = 1 + 1e-9
ONE_MODE = QuadraticTask(np.eye(1), np.zeros(1), np.eye(1))
"""f = (x - z)^2/2 with z of variance 1: the gap of two samples' gradients is z - z' everywhere, rms sqrt(2)."""


def bowl(n: int, b: Any, eta: Any, steps: int | None = None, **more: Any) -> Expert:
    """An expert on :data:`ONE_MODE`, where Theorem 2 with the envelope is an equality."""
    known: dict[str, Any] = dict(curvature="strongly_convex", L=1.0, mu=1.0, D_envelope=float(np.sqrt(2)))
    return Expert("a", n, b, eta, steps, **{**known, **more})


def exact_epsilon(run: Expert) -> float:
    return float(expert_moments(ONE_MODE, [0.0], run).epsilon)


def ours(run: Expert) -> float:
    timing = clock(run)
    return float(epsilon_sup(np.sqrt(2), timing.tau, run.n, gamma(run, timing)))


# --- section 4: the clock ---------------------------------------------------------------------------------------------


def heavy_ball_answer(eta: np.ndarray, beta: float, h: np.ndarray) -> np.ndarray:
    """|w_k| of heavy ball whose batch at step l has curvature h_l, straight from the recursion."""
    first, second, w = 1.0, 0.0, np.empty(len(h))
    for k in range(len(h) - 1, -1, -1):
        w[k] = abs(first * eta[k] + second)
        first, second = first * (1 - eta[k] * h[k]) - second * h[k], first * eta[k] * beta + second * beta
    return w


def test_convex_momentum_constant_beyond_its_step_size() -> None:
    """eta (1+beta)/(1-beta) is a theorem for eta L <= 2 (1-beta)^2/(1+beta); at six times that the buffer resonates."""
    eta, beta, steps = 1.0, 0.5, 30
    run = Expert("a", 10, 2, eta, steps, momentum=beta, curvature="convex", L=2.0)
    naive, holds = heavy_ball_convex_response(run)
    exact = heavy_ball_answer(np.full(steps, eta), beta, np.tile([0.0, 2.0], steps // 2))
    assert not holds
    assert exact.max() > 50 * float(naive)
    assert np.all(exact <= np.exp(log_response(run)) * SLACK)


def test_convex_momentum_constant_under_warm_up() -> None:
    """With a schedule eta_k (1+beta)/(1-beta) forgets that the buffer is spent at the later, larger rates."""
    beta, eta = 0.5, np.array([1e-3, 0.1, 0.1, 0.1, 0.1, 0.1])
    exact = heavy_ball_answer(eta, beta, np.zeros(6))
    naive = eta * (1 + beta) / (1 - beta)
    assert naive[0] < 0.1 * exact[0]
    run = Expert("a", 10, 2, Schedule(eta), momentum=beta, curvature="convex", L=1.0)
    assert np.all(exact <= np.exp(log_response(run)) * SLACK)


def test_convex_momentum_constant_is_not_sharp() -> None:
    """For small eta L the constant of section 4 is (1 + beta) too large: the certified response tends to 1/(1-beta)."""
    eta, beta, steps = 1e-6, 0.9, 400
    run = Expert("a", 10, 2, eta, steps, momentum=beta, curvature="convex", L=1.0)
    stated, holds = heavy_ball_convex_response(run)
    certified = float(np.exp(log_response(run))[0])
    exact = float(np.abs(signed_response(eta, np.linspace(0, 1, 20), beta, steps)).max(axis=0)[0])
    assert holds
    assert float(stated) > 1.89 * exact  # as an equality it is false
    assert exact <= certified * SLACK
    assert certified == pytest.approx(float(stated) / (1 + beta), rel=1e-3)


def test_decoupled_decay_is_not_decay_in_the_buffer() -> None:
    """SGDW with momentum: the decay acts with eta, not with eta/(1-beta), so a kick is forgotten more slowly."""
    eta, beta, omega, steps = 0.1, 0.9, 0.2, 60
    here = np.ones(steps, dtype=bool)
    arrays = (np.full(steps, eta), np.zeros(1), np.asarray(beta), np.asarray(omega), here)
    exact = np.abs(mode_response(*arrays, decoupled=True)[0][0])
    naive = np.abs(mode_response(*arrays)[0][0])
    assert naive.sum() < 0.7 * exact.sum()
    assert np.all(naive[:20] < exact[:20])
    run = Expert(
        "a", 10, 2, eta, steps, momentum=beta, weight_decay=omega, decoupled_decay=True, curvature="convex", L=1.0
    )
    assert np.all(exact <= np.exp(log_response(run)) * SLACK)


def test_closed_forms_at_their_singular_points() -> None:
    """The literal formulas lose every digit at kappa -> 0 and are 0/0 at kappa = 0 and at eta kappa = -2."""
    eta, steps = 0.1, 50

    def literal(kappa: np.float64) -> tuple[Any, Any]:
        tau = ((1 + eta * kappa) ** steps - 1) / kappa
        return tau, eta * ((1 + eta * kappa) ** (2 * steps) - 1) / (kappa * (2 + eta * kappa))

    assert literal(np.float64(1e-17))[0] == 0.0  # the exact value is eta K = 5
    with np.errstate(all="ignore"):
        assert np.isnan(literal(np.float64(0.0))).all()
        assert np.isnan(literal(np.float64(-20.0))[1])
        assert np.isnan(steps * np.log1p(np.float64(-2.0)))  # and log1p needs 1 + eta kappa > 0
    for kappa in (0.0, 1e-17):
        np.testing.assert_allclose(sgd_times(eta, kappa, steps), (eta * steps, eta**2 * steps), rtol=1e-12)
    np.testing.assert_allclose(sgd_times(eta, -20.0, steps), (0.0, eta**2 * steps), atol=1e-12)


def test_overflow_times_zero() -> None:
    """A vacuous clock and a full batch: infinity times zero is no number, the variance is zero."""
    nu, n = np.float64(np.inf), 8
    with np.errstate(invalid="ignore", over="ignore"):
        assert np.isnan(nu * (1 / (n * n) - 1 / n**2))
        assert np.isnan(np.exp(np.float64(800.0)) * np.exp(np.float64(-800.0)) - 1)  # inf * 0: the exact value is 0
    assert float(gamma_without_replacement(nu, n, n)) == 0.0
    rates = np.r_[np.full(400, 10.0), np.full(800, 0.9)]  # grows by 9 per step, then shrinks by 10
    timing = clock(bowl(4, 4, Schedule(rates), L=1.0))
    assert timing.log_w is not None
    assert np.isfinite(timing.tau)
    assert 0 < float(timing.tau) < 3


def test_a_schedule_is_not_its_mean() -> None:
    """Contraction and warm-up: the late, large steps are the ones that are remembered."""
    rates = Schedule(np.r_[np.full(19, 0.05), 0.9])
    run = bowl(5, 2, rates, sampling="with_replacement")
    mean = bowl(5, 2, float(rates.values.mean()), 20, sampling="with_replacement")
    assert ours(mean) < 0.8 * exact_epsilon(run)
    assert exact_epsilon(run) == pytest.approx(ours(run), rel=1e-10)


# --- section 5: stability ---------------------------------------------------------------------------------------------


def test_reshuffling_is_not_free_of_variance() -> None:
    """Gamma = 0 needs equal pushes and no sample left out; a contracting run forgets the samples it saw first."""
    for run in (
        bowl(4, 2, 0.9, 2, sampling="reshuffle"),  # w_k differs
        bowl(3, 2, 0.5, 1, sampling="reshuffle", drop_last=True),  # one sample is left out
    ):
        naive = np.sqrt(2) * float(clock(run).tau) / float(run.n)  # type: ignore[arg-type]
        assert naive < 0.85 * exact_epsilon(run)
        assert exact_epsilon(run) == pytest.approx(ours(run), rel=1e-10)


def test_the_rms_form_is_refused_under_reshuffling() -> None:
    """Two samples, two steps, weights 1: the gap of step 1 is sqrt(2) where the sample was not drawn yet, else 0."""
    gaps = {(1, 0): (1.0, 0.0), (0, 1): (1.0, np.sqrt(2.0))}  # multiplicities of the sample -> gaps
    rms = np.sqrt([np.mean([row[k] ** 2 for row in gaps.values()]) for k in range(2)])
    exact = float(np.sqrt(np.mean([np.dot(I, u) ** 2 for I, u in gaps.items()])))
    variance = float(gamma_of_weights(np.ones(2), 1, 2, "reshuffle", np.arange(2)))
    naive = float(epsilon_rms(rms.max(), 2.0, 2, variance))
    assert naive < 0.9 * exact
    # the reshuffling line takes the gap where the sample is in the batch, E[u_k^2 | I_k = 1], not its rms over all runs
    given_drawn = np.sqrt([np.mean([u[k] ** 2 for I, u in gaps.items() if I[k]]) for k in range(2)])
    assert np.sqrt(np.sum(rms**2) / 2) < 0.9 * exact
    assert exact == pytest.approx(np.sqrt(np.sum(given_drawn**2) / 2))
    run = Expert("a", 2, 1, 1.0, 2, sampling="reshuffle", curvature="convex", L=1.0, D_2=float(rms.max()))
    with pytest.raises(RecipeError, match="not under reshuffling"):
        expert_epsilon(run)
    with pytest.raises(AssumptionError, match="epsilon_sup"):
        epsilon_recursion(run, float(rms.max()))
    value, _ = expert_epsilon(replace(run, D_inf=float(np.sqrt(2.0))))
    assert exact <= float(value)


def test_the_sup_form_does_not_take_the_rms_gap() -> None:
    """Independent draws; the gap of step 1 is sqrt(2) where the sample was drawn at step 0, else 0: rms 1 each."""
    exact = 0.0
    for first, second in product((0, 1), repeat=2):  # n = 2, b = 1: each draw is the sample with probability 1/2
        exact += (first * 1.0 + second * np.sqrt(2.0) * first) ** 2 / 4
    variance = float(gamma_with_replacement(2.0, 2, 1))
    naive = float(epsilon_sup(1.0, 2.0, 2, variance))
    assert naive < 0.95 * np.sqrt(exact)
    assert np.sqrt(exact) <= float(epsilon_rms(1.0, 2.0, 2, variance))
    assert np.sqrt(exact) <= float(epsilon_sup(np.sqrt(2.0), 2.0, 2, variance))


def test_gap_from_the_loss_needs_no_contraction_for_independent_batches() -> None:
    """One sample, f = (x - z)^2/2 from x_0 = E z: training loss and memory go to 0, the twins do not.

    With the population risk for the fresh sample, sqrt(2L F_S) + sqrt(2L F), the contracting clock may be kept.
    """
    eta, steps = 0.3, 40
    left = (1 - eta) ** np.arange(steps)
    losses, risks = left**2 / 2, ((1 - left) ** 2 + 1) / 2
    w = eta * (1 - eta) ** (steps - 1 - np.arange(steps))
    exact = np.sqrt(2) * (1 - (1 - eta) ** steps)
    naive = float(w @ (2 * np.sqrt(2 * losses)))
    assert naive < 1e-3 * exact
    assert exact <= float(w @ (np.sqrt(2 * losses) + np.sqrt(2 * risks)))
    for sampling in ("without_replacement", "with_replacement"):
        run = bowl(1, 1, eta, steps, sampling=sampling, batch_losses=Schedule(losses), D_envelope=None)
        timing = clock(run)
        with pytest.raises(AssumptionError, match="population risk"):
            epsilon_from_losses(run, timing, log_response(run))
        convex = replace(run, curvature="convex", mu=None)
        assert exact <= float(epsilon_from_losses(convex, clock(convex), log_response(convex)))


def test_gap_from_the_loss_under_reshuffling_needs_the_batch_loss() -> None:
    """Every sample has a coordinate of its own, f = (x_c - 1)^2/2; four steps of rate 1 fit theirs, one of rate 2.

    Before the last step the training loss is small, because only the last sample is left: not its own loss.
    """
    n, eta = 5, np.array([1.0, 1.0, 1.0, 1.0, 2.0])
    total = 0.0
    for order in permutations(range(n)):
        x, twin = np.zeros(n + 1), np.zeros(n + 1)
        for rate, j in zip(eta, order, strict=True):
            x[j] -= rate * (x[j] - 1)
            there = n if j == 0 else j  # sample 0 is exchanged for one with another coordinate
            twin[there] -= rate * (twin[there] - 1)
        total += float(np.sum((x - twin) ** 2)) / 120
    exact = np.sqrt(total)
    training = 0.5 * (n - np.arange(n)) / n  # E F_S(x_k): the samples that are not fitted yet
    batch = np.full(n, 0.5)
    naive = float(np.sqrt(np.sum(eta**2 * 8 * training) / n))
    assert naive < 0.96 * exact
    run = Expert(
        "a", n, 1, Schedule(eta), sampling="reshuffle", curvature="convex", L=1.0, batch_losses=Schedule(batch)
    )
    assert exact <= float(epsilon_from_losses(run, clock(run), log_response(run)))


def test_drawing_n_of_n_with_replacement_is_not_a_full_batch() -> None:
    run = bowl(6, 6, 0.5, 4, sampling="with_replacement")
    naive = ours(replace(run, sampling="without_replacement"))  # Gamma = 0
    assert naive < 0.9 * exact_epsilon(run)
    assert exact_epsilon(run) == pytest.approx(ours(run), rel=1e-10)


def test_changing_batch_sizes_are_not_their_mean() -> None:
    sizes = Schedule(np.array([30.0, 30.0, 30.0, 1.0]))
    run, mean = bowl(30, sizes, 0.5, 4), bowl(30, Schedule(np.full(4, sizes.values.mean().round())), 0.5, 4)
    assert ours(mean) < 0.6 * exact_epsilon(run)
    assert exact_epsilon(run) == pytest.approx(ours(run), rel=1e-10)


def test_the_recursion_does_not_know_momentum() -> None:
    run = bowl(10, 2, 0.02, 20, momentum=0.9, sampling="with_replacement")
    naive = float(epsilon_recursion(replace(run, momentum=0.0), np.sqrt(2)))
    assert naive < 0.5 * exact_epsilon(run)
    with pytest.raises(AssumptionError, match="plain SGD"):
        epsilon_recursion(run, np.sqrt(2))
    assert exact_epsilon(run) <= ours(run) * SLACK


def test_the_cap_needs_an_anchor_that_does_not_see_the_sample() -> None:
    """x is the mean of n signs: from its own empirical minimiser it never moves, from a fixed anchor it does."""
    n = 3
    signs = np.array(list(product((-1.0, 1.0), repeat=n + 1)))
    x, twin = signs[:, :n].mean(axis=1), signs[:, 1:].mean(axis=1)  # sample 0 exchanged for sample n
    exact = float(np.sqrt(np.mean((x - twin) ** 2)))
    naive = float(epsilon_cap(np.sqrt(np.mean((x - signs[:, :n].mean(axis=1)) ** 2))))
    assert naive == 0.0 < exact
    assert exact <= float(epsilon_cap(np.sqrt(np.mean(x**2))))


def test_the_cap_is_not_the_drift_itself() -> None:
    """One sign, fully fitted: the drift is 1 and the twins are sqrt(2) apart in rms; the factor is attained."""
    pairs = np.array(list(product((-1.0, 1.0), repeat=2)))
    exact, drift = float(np.sqrt(np.mean((pairs[:, 0] - pairs[:, 1]) ** 2))), 1.0
    assert drift < 0.75 * exact
    assert float(epsilon_cap(drift)) == pytest.approx(exact)


def test_the_floor_takes_the_variance_given_the_seeds() -> None:
    """x depends on the seed alone: no sample moves it, though it varies; with the total variance the floor is false."""
    seeds, n, epsilon = np.array([-1.0, 1.0]), 4, 0.0
    naive = float(epsilon_floor(np.var(seeds), n))
    given_seeds = float(np.mean([np.var([seed] * 5) for seed in seeds]))  # over the data, seed by seed
    assert naive > 0.5 > epsilon
    assert float(epsilon_floor(given_seeds, n)) <= epsilon


# --- section 6: drift -------------------------------------------------------------------------------------------------


def two_bowls(eta: float, steps: int) -> tuple[float, float]:
    """S = two samples f = h x^2/2 - x with h = 0.5 and 1.5, drawn at random from x_0 = 0: rms drift, largest noise.

    The gradients are equal at the base, so the noise there is 0; further out it is 0.5 |x|.
    """
    ends, furthest = [], 0.0
    for draws in product((0.5, 1.5), repeat=steps):
        x = 0.0
        for h in draws:
            x -= eta * (h * x - 1)
            furthest = max(furthest, abs(x))
        ends.append(x)
    return float(np.sqrt(np.mean(np.square(ends)))), 0.5 * furthest


def test_drift_a_needs_the_noise_on_the_whole_path() -> None:
    exact, noise = two_bowls(0.9, 8)
    run = Expert("a", 2, 1, 0.9, 8, kappa=-1.0, sampling="with_replacement", initial_gradient_norm=1.0, sigma=noise)
    naive = float(drift_noise(replace(run, sigma=0.0), clock(run)))  # the noise at the base
    assert naive < 0.95 * exact
    assert exact <= float(drift_noise(run, clock(run)))


def test_drift_b_needs_the_rate_of_single_batches() -> None:
    """(a) may use the curvature of F_S, here 1; (b), with the noise of the base only, may not."""
    exact, _ = two_bowls(0.9, 8)
    known: dict[str, Any] = dict(sampling="with_replacement", initial_gradient_norm=1.0, sigma0=0.0)
    mean = Expert("a", 2, 1, 0.9, 8, kappa=-1.0, **known)
    naive = float(drift_base(mean, clock(mean)))
    assert naive < 0.95 * exact
    run = Expert("a", 2, 1, 0.9, 8, curvature="strongly_convex", L=1.5, mu=0.5, **known)
    assert exact <= float(drift_base(run, clock(run)))


def test_drift_b_needs_the_actual_batch_sizes() -> None:
    """Ten linear losses of slope -1 or 1, batches of nine and of one: the last sample alone makes most of the way."""
    eta, z = 0.1, np.array([1.0, -1.0] * 5)
    ends = [eta * ((z.sum() - last) / 9 + last) for last in z]
    exact = float(np.sqrt(np.mean(np.square(ends))))
    run = Expert(
        "a", 10, 9, eta, 2, sampling="reshuffle", curvature="convex", L=1.0, initial_gradient_norm=0.0, sigma0=1.0
    )
    timing = clock(run)
    naive = float(timing.tau) * np.sqrt(1.0 / 9 * (10 - 9) / (10 - 1))
    assert naive < 0.3 * exact
    assert exact <= float(drift_base(run, timing))


def test_finite_batches_lose_n_minus_b_over_n_minus_one() -> None:
    """sigma^2 has divisor n, so the factor has n - 1: a single sample has the whole variance, not half of it."""
    z = np.array([-1.0, 1.0])
    exact, sigma2, n, b = np.var(z), float(np.var(z)), 2, 1
    assert sigma2 / b * (n - b) / n == pytest.approx(0.5 * exact)
    assert sigma2 / b * float(finite_batch_factor(n, b, "without_replacement")) == pytest.approx(exact)


def test_energy_drift_needs_small_steps() -> None:
    """f = x^2/2 from 1 by one step of length 1.5: the way is longer than what the fall of the risk allows."""
    eta, start = 1.5, 1.0
    end = start - eta * start
    exact, fall = abs(end - start), (start**2 - end**2) / 2
    assert np.sqrt(2 * eta * fall) < 0.8 * exact
    run = Expert("a", 1, 1, eta, 1, curvature="convex", L=1.0, initial_risk=0.5, training_risk=end**2 / 2, sigma=0.0)
    with pytest.raises(AssumptionError, match="exceeds 1/"):
        drift_energy(run)
    gentle = replace(run, learning_rate=0.9, training_risk=0.1**2 / 2)
    moved = 1 - 0.1
    assert moved <= float(drift_energy(gentle)) * SLACK


def test_energy_drift_does_not_know_momentum() -> None:
    """The same bowl with a heavy ball: half a swing ends as high as it began, and two units away."""
    eta, beta, x, v = 0.1, 0.9, 1.0, 0.0
    for _ in range(9):
        v = beta * v + x
        x -= eta * v
    exact, fall = abs(x - 1), (1 - x**2) / 2
    naive = np.sqrt(2 * 9 * eta * fall)
    assert naive < 0.9 * exact
    run = Expert(
        "a", 1, 1, eta, 9, momentum=beta, curvature="convex", L=1.0, initial_risk=0.5, training_risk=x**2 / 2, sigma=0.0
    )
    with pytest.raises(AssumptionError, match="momentum"):
        drift_energy(run)


def test_weight_decay_moves_a_model_without_any_loss() -> None:
    """f = 0: the decay alone carries x from 1 to 0.  (c) and (d) with the bare losses say that nothing moves."""
    eta, omega, steps = 0.4, 1.0, 50
    exact = 1 - (1 - eta * omega) ** steps
    known: dict[str, Any] = dict(curvature="convex", L=1.0, initial_risk=0.0, training_risk=0.0, sigma=0.0)
    bare = Expert("a", 1, 1, eta, steps, batch_losses=Schedule(np.zeros(steps)), **known)
    assert float(drift_energy(bare)) == float(drift_losses(bare)) == 0.0 < exact
    run = replace(bare, weight_decay=omega)
    with pytest.raises(RecipeError, match="base_norm"):
        drift_energy(run)
    assert exact <= float(drift_energy(replace(run, base_norm=1.0)))
    with pytest.raises(AssumptionError, match="weight_decay"):
        drift_losses(run)
    norms = Schedule(omega * (1 - eta * omega) ** np.arange(steps))  # of the gradient with decay
    assert exact == pytest.approx(float(drift_log(replace(run, batch_gradient_norms=norms))))


def test_drift_from_the_log_reads_batches_before_their_step() -> None:
    """Samples z = -1 and 1, one step of rate 1 from 0: then its batch is fitted; the full gradient at 0 is 0."""
    z, eta = np.array([1.0]), 1.0
    exact = abs(eta * z[0])
    before, after, full = (0.0 - z[0]) ** 2 / 2, 0.0, 0.0
    known: dict[str, Any] = dict(curvature="convex", L=1.0)
    run = Expert("a", 2, 1, eta, 1, batch_losses=Schedule(np.array([before])), **known)
    assert float(drift_losses(replace(run, batch_losses=Schedule(np.array([after]))))) == 0.0 < exact
    assert float(drift_log(replace(run, batch_gradient_norms=Schedule(np.array([full]))))) == 0.0 < exact
    assert exact <= float(drift_losses(run)) * SLACK
    assert exact <= float(drift_log(replace(run, batch_gradient_norms=Schedule(np.array([1.0])))))


def test_drift_by_noise_is_false_under_reshuffling() -> None:
    """6(a): f = (x - z)^2/2 with z = -1, 1, eta = 1.8, from x_0 = 0: an epoch is two opposite steps that add up.

    The step factor is negative, so noise that must change sign within the epoch is coherent, not independent.
    """
    eta, data = 1.8, np.array([-1.0, 1.0])
    ends = []
    for order in permutations(range(2)):
        x = 0.0
        for index in order:
            x -= eta * (x - data[index])
        ends.append(x)
    exact = float(np.sqrt(np.mean(np.square(ends))))
    run = Expert(
        "a",
        2,
        1,
        eta,
        2,
        sampling="reshuffle",
        curvature="strongly_convex",
        L=1.0,
        mu=1.0,
        initial_gradient_norm=0.0,
        sigma=1.0,
        sigma0=1.0,
    )
    timing = clock(run)
    naive = float(drift_noise(replace(run, sampling="without_replacement"), timing))
    assert naive < 0.8 * exact
    with pytest.raises(AssumptionError, match="reshuffle"):
        drift_noise(run, timing)
    assert exact <= float(drift_base(run, timing)) * (1 + 1e-12)


def twins_with_equal_start_gradients(steps: int, eta: float) -> tuple[float, np.ndarray]:
    """n = 1, f(x; z) = h_z x^2/2 - x with h in {0.5, 1}: equal gradients at x_0 = 0, different ones everywhere else.

    Returns the exact stability (rms over all pairs) and the rms gap of every step (between the training sample and a
    fresh one, along the training sample's run), whose largest is D_2.
    """
    curvatures = (0.5, 1.0)

    def path(h: float) -> list[float]:
        x, found = 0.0, [0.0]
        for _ in range(steps):
            x -= eta * (h * x - 1)
            found.append(x)
        return found

    pairs = list(product(curvatures, repeat=2))
    exact = float(np.sqrt(np.mean([(path(a)[-1] - path(b)[-1]) ** 2 for a, b in pairs])))
    gaps = [np.sqrt(np.mean([((a - b) * path(a)[k]) ** 2 for a, b in pairs])) for k in range(steps)]
    return exact, np.array(gaps)


def test_gap_at_the_base_or_between_training_samples_is_not_enough() -> None:
    """D_2 measured at x_0 only (here 0), or between two training samples (n = 1: none differ), is far too small."""
    exact, gaps = twins_with_equal_start_gradients(12, 0.3)
    at_base, everywhere = float(gaps[0]), float(gaps.max())
    run = Expert("a", 1, 1, 0.3, 12, curvature="convex", L=1.0)
    timing = clock(run)
    between_training_samples = 0.0
    for naive in (at_base, between_training_samples):
        assert float(epsilon_rms(naive, timing.tau, 1, gamma(run, timing))) == 0.0 < exact
    assert exact <= float(epsilon_rms(everywhere, timing.tau, 1, gamma(run, timing)))
    with_strong = replace(run, curvature="strongly_convex", mu=0.5)
    strong = clock(with_strong)
    assert exact <= float(epsilon_rms(everywhere, strong.tau, 1, gamma(with_strong, strong)))
    furthest = 0.5 * 2.0  # |h - h'| times the largest |x| ever visited, 1/h
    assert exact <= float(epsilon_sup(furthest, strong.tau, 1, gamma(with_strong, strong)))


def test_the_gap_is_the_largest_of_all_steps_and_not_their_mean() -> None:
    """A contracting run remembers its last steps, where the gap is largest here; or the gaps stay inside the sum."""
    eta, steps = 0.9, 2
    exact, gaps = twins_with_equal_start_gradients(steps, eta)
    run = Expert("a", 1, 1, eta, steps, curvature="strongly_convex", L=1.0, mu=0.5)
    timing, variance = clock(run), gamma(run, clock(run))
    assert float(epsilon_rms(gaps.mean(), timing.tau, 1, variance)) < 0.8 * exact
    assert exact <= float(epsilon_rms(gaps.max(), timing.tau, 1, variance))
    assert exact <= float(epsilon_recursion(run, Schedule(gaps))) * SLACK


def test_saturation_is_the_limit_of_the_noise_form() -> None:
    run = Expert("a", 500, 10, 0.2, 20_000, sampling="with_replacement", curvature="strongly_convex", L=2.0, mu=0.1)
    run = replace(run, initial_gradient_norm=0.3, sigma=0.8)
    limit = float(drift_saturation(0.3, 0.1, 0.2, 0.8, 10))
    assert float(drift_noise(run, clock(run))) == pytest.approx(limit, rel=1e-12)
    assert float(drift_noise(replace(run, steps=30), clock(replace(run, steps=30)))) < limit
