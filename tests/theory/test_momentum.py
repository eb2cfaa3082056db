"""Heavy ball, Nesterov and decoupled decay: no convex (or smooth) problem answers more strongly than the clock says."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import Expert, Schedule, clock
from theory.clocks import (
    convex_momentum_log_response,
    heavy_ball_curve,
    heavy_ball_log_response,
    log_response,
    signed_response,
)
from theory.drift import buffer_weights

SEEDS = st.integers(0, 2**32 - 1)


def responses(eta: np.ndarray, beta: float, hessians: np.ndarray, nesterov: bool, decoupled: float = 0.0) -> np.ndarray:
    """||d x_K / d g_k|| of x+ = (1 - eta w) x - eta (g + beta v+) or - eta v+, for given matrices (K, d, d)."""
    steps, dim = len(eta), hessians.shape[-1]
    eye, zero = np.eye(dim), np.zeros((dim, dim))
    row, out = np.hstack([eye, zero]), np.empty(steps)
    for k in range(steps - 1, -1, -1):
        ahead, coupling = (1 + beta, beta**2) if nesterov else (1.0, beta)
        kick = np.vstack([-eta[k] * ahead * eye, eye])
        out[k] = np.linalg.norm(row @ kick, 2)
        step = np.block(
            [
                [eye * (1 - eta[k] * decoupled) - eta[k] * ahead * hessians[k], -eta[k] * coupling * eye],
                [hessians[k], beta * eye],
            ]
        )
        row = row @ step
    return out


def random_schedule(rng: np.random.Generator, steps: int, size: float) -> np.ndarray:
    kind = rng.integers(0, 4)
    if kind == 0:
        return np.full(steps, size)
    if kind == 1:
        return size * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    if kind == 2:
        return size * np.minimum(1, (1 + np.arange(steps)) / (1 + steps // 3))
    return size * rng.random(steps) * rng.choice([0.0, 1.0, 3.0], steps, p=[0.1, 0.8, 0.1])


def random_hessians(rng: np.random.Generator, steps: int, low: float, high: float) -> np.ndarray:
    """Symmetric matrices with eigenvalues in [low, high], changing from step to step, often at the ends."""
    dim = int(rng.integers(1, 4))
    period = int(rng.integers(1, 6))
    found = []
    for _ in range(period):
        basis, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
        ends = rng.choice([low, high, rng.uniform(low, high)], dim)
        found.append(basis @ np.diag(ends) @ basis.T)
    return np.stack([found[k % period] for k in range(steps)])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(SEEDS)
def test_no_sequence_of_hessians_answers_more_strongly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    beta, steps = float(rng.choice([0.0, 0.5, 0.9, rng.uniform(0, 0.97)])), int(rng.integers(1, 50))
    nesterov, decoupled = bool(rng.random() < 0.5), bool(rng.random() < 0.3)
    omega = float(rng.choice([0.0, 0.2]))
    curvature = str(rng.choice(["convex", "smooth"]))
    size = float(2 * (1 - beta) ** 2 / (1 + beta) * np.exp(rng.uniform(-4, 1)))
    eta = random_schedule(rng, steps, size)
    expert = Expert(
        "a",
        10,
        2,
        Schedule(eta),
        momentum=beta,
        weight_decay=omega,
        curvature=curvature,  # type: ignore[arg-type]
        L=1.0,
        nesterov=nesterov,
        decoupled_decay=decoupled,
    )
    hessians = random_hessians(rng, steps, 0.0 if curvature == "convex" else -1.0, 1.0)
    if decoupled:
        got = responses(eta, beta, hessians, nesterov, omega)
    else:
        got = responses(eta, beta, hessians + omega * np.eye(hessians.shape[-1]), nesterov)
    certified = np.exp(log_response(expert))
    assert np.all(got <= certified * (1 + 1e-9) + 1e-300)


def worst_curvatures(eta: np.ndarray, beta: float, nesterov: bool, rounds: int = 2) -> float:
    """Largest |d x_K / d g_0| over curvatures in [0, 1] per step, by coordinate search (the response is multi-affine
    in them, so each coordinate's optimum is at an end)."""
    rng, best = np.random.default_rng(0), 0.0
    for trial in range(4):
        h = rng.integers(0, 2, len(eta)).astype(float) * (trial > 0)
        for _ in range(rounds):
            for k in range(1, len(eta)):
                values = []
                for end in (0.0, 1.0):
                    h[k] = end
                    values.append(float(responses(eta, beta, h[:, None, None], nesterov)[0]))
                h[k] = float(np.argmax(values))
        best = max(best, max(values))
    return best


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_worst_sequence_found_by_search_stays_below(beta: float, nesterov: bool) -> None:
    limit = 2 * (1 - beta) ** 2 / ((1 - beta + 2 * beta**2) if nesterov else (1 + beta))
    for share in (1.0, 0.3):
        eta = np.full(16, limit * share)
        worst = worst_curvatures(eta, beta, nesterov)
        certified = float(np.exp(convex_momentum_log_response(eta, 0.0, beta, 1.0, nesterov=nesterov))[0])
        assert worst <= certified * (1 + 1e-9)
        assert worst >= 0.8 * certified  # an upper bound, but not a loose one


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS)
def test_closed_forms_at_constant_rates(seed: int) -> None:
    """At most eta (1+beta)/(1-beta) (heavy ball) and eta (1+beta^2)/(1-beta) (Nesterov) under their conditions."""
    rng = np.random.default_rng(seed)
    beta, L, steps = float(rng.uniform(0, 0.99)), float(np.exp(rng.uniform(-5, 5))), 200
    for nesterov in (False, True):
        limit = 2 * (1 - beta) ** 2 / (L * ((1 - beta + 2 * beta**2) if nesterov else (1 + beta)))
        eta = limit * float(rng.choice([1.0, rng.random()])) * (1 - 1e-12)
        w = np.exp(convex_momentum_log_response(np.full(steps, eta), 0.0, beta, L, nesterov=nesterov))
        flat = eta * ((1 + beta**2) if nesterov else (1 + beta)) / (1 - beta)
        assert np.all(w <= flat * (1 + 1e-9))


def test_without_curvature_the_response_is_the_curve() -> None:
    for beta in (0.0, 0.6, 0.95):
        w = np.exp(convex_momentum_log_response(np.full(30, 0.2), 0.0, beta, 0.0))
        assert np.allclose(w, heavy_ball_curve(0.2, beta, 30), rtol=1e-12)
        eta = np.random.default_rng(0).random(30)
        for nesterov in (False, True):
            w = np.exp(convex_momentum_log_response(eta, 0.0, beta, 0.0, nesterov=nesterov))
            assert np.allclose(w, buffer_weights(eta, beta, nesterov=nesterov), rtol=1e-12)


def test_without_momentum_it_is_convex_sgd() -> None:
    eta = np.array([0.3, 2.0, 0.0, 1.1])
    w = np.exp(convex_momentum_log_response(eta, 0.0, 0.0, 1.0))
    assert np.allclose(w, eta)


@pytest.mark.parametrize("nesterov", [False, True])
def test_recursion_against_fifty_digits(nesterov: bool) -> None:
    rng = np.random.default_rng(3)
    eta, beta, L = 0.01 * rng.random(40), 0.9, 1.3
    got = np.exp(convex_momentum_log_response(eta, 0.0, beta, L, nesterov=nesterov))
    with mpmath.workdps(50):
        c = a = mpmath.mpf(0)
        for k in range(39, -1, -1):
            rate, b = mpmath.mpf(float(eta[k])), mpmath.mpf(beta)
            carried = b * rate + c if nesterov else c
            gamma = rate + carried
            assert float(mpmath.sqrt(gamma**2 + a)) == pytest.approx(got[k], rel=1e-12)
            last = carried if nesterov else gamma
            a = b**2 * (a + (gamma * last + a) ** 2 / (2 * gamma / mpmath.mpf(L) - gamma**2 - a))
            c = b * last


def test_a_peak_of_the_schedule_does_not_spoil_the_rest() -> None:
    """One step beyond the condition costs a factor, not an exponential of everything before it."""
    eta = np.full(200, 0.02)
    eta[150] = 0.5
    w = np.exp(convex_momentum_log_response(eta, 0.0, 0.5, 1.0))
    recursion = np.exp(heavy_ball_log_response(eta, 0.0, 0.5, 1.0))
    assert np.all(np.isfinite(w))
    assert w[151:].max() < 0.05
    assert w[100] < 0.2 * recursion[100]


def test_trap_lambda_zero_with_momentum() -> None:
    """Convex means kappa = 0, and with Lambda = 0 the recursion would be the curve; the buffer sees the curvature."""
    eta, beta = np.full(30, 1.0), 0.5
    naive = np.exp(heavy_ball_log_response(eta, 0.0, beta, 0.0))
    assert np.allclose(naive, heavy_ball_curve(1.0, beta, 30))
    hessians = np.tile([0.0, 2.0], 15)[:, None, None]
    truth = responses(eta, beta, hessians, False)
    assert np.max(truth / naive) > 100
    assert np.all(truth <= np.exp(heavy_ball_log_response(eta, 0.0, beta, 2.0)) * (1 + 1e-9))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_the_steps_are_those_of_torch(nesterov: bool, coupled: bool) -> None:
    """The signed response is the derivative of a torch.optim.SGD run with respect to a gradient kick."""
    eta, beta, steps, omega = 0.17, 0.8, 9, 0.3 if coupled else 0.0
    h = torch.tensor([0.4, 1.9], dtype=torch.float64)
    expected = signed_response(eta, h.numpy() + omega, beta, steps, nesterov=nesterov)
    for kicked in range(steps):
        ends = []
        for kick in (0.0, 1.0):
            x = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
            optimizer = torch.optim.SGD([x], lr=eta, momentum=beta, nesterov=nesterov, weight_decay=omega)
            for k in range(steps):
                x.grad = h * x.detach() + (kick if k == kicked else 0.0)
                optimizer.step()
            ends.append(x.detach().numpy().copy())
        assert np.allclose(ends[0] - ends[1], expected[:, kicked], rtol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS)
def test_twins_of_nonlinear_convex_problems(seed: int) -> None:
    """Logistic losses: two runs that differ by one gradient kick end no further apart than w_k says."""
    rng = np.random.default_rng(seed)
    dim, n, steps = 2, 6, 25
    beta, nesterov = float(rng.uniform(0, 0.95)), bool(rng.random() < 0.5)
    rows = rng.standard_normal((n, dim))
    L = float(np.max(np.sum(rows**2, axis=1)) / 4)
    eta = random_schedule(rng, steps, 2 * (1 - beta) ** 2 / ((1 + beta) * L) * float(np.exp(rng.uniform(-2, 0.5))))
    batches = rng.integers(0, n, (steps, 2))
    kicked, kick = int(rng.integers(0, steps)), rng.standard_normal(dim) * np.exp(rng.uniform(-3, 3))

    def run(push: np.ndarray) -> np.ndarray:
        x, v = np.zeros(dim), np.zeros(dim)
        for k in range(steps):
            a = rows[batches[k]]
            g = -(a / (1 + np.exp(a @ x))[:, None]).mean(axis=0) + (push if k == kicked else 0.0)
            v = beta * v + g
            x = x - eta[k] * (g + beta * v if nesterov else v)
        return x

    expert = Expert("a", n, 2, Schedule(eta), momentum=beta, nesterov=nesterov, curvature="convex", L=L)
    w = np.exp(log_response(expert))[kicked]
    distance = np.linalg.norm(run(kick) - run(np.zeros(dim)))
    assert distance <= w * np.linalg.norm(kick) * (1 + 1e-9) + 1e-12


def test_the_certified_clock_is_far_below_the_recursion() -> None:
    expert = Expert("a", 1000, 50, 0.002, 500, momentum=0.9, curvature="convex", L=1.0)
    recursion = float(clock(Expert("a", 1000, 50, 0.002, 500, momentum=0.9, curvature="smooth", L=1.0)).tau)
    tau, curve = float(clock(expert).tau), float(heavy_ball_curve(0.002, 0.9, 500).sum())
    assert curve <= tau <= 1.05 * curve
    assert recursion > 10 * tau


def test_decoupled_decay_without_momentum_is_coupled_decay() -> None:
    common = dict(n=10, batch_size=2, learning_rate=0.3, steps=9, weight_decay=0.4, curvature="convex", L=1.0)
    coupled, decoupled = clock(Expert("a", **common)), clock(Expert("a", decoupled_decay=True, **common))
    assert float(coupled.tau) == float(decoupled.tau)
    heavy = dict(common, momentum=0.5)
    assert clock(Expert("a", decoupled_decay=True, **heavy)).form == "heavy ball, recursion"
