"""Instances for the derivations of further forms: matrix, layers, trained heads, shared samples, gaps from losses."""

from __future__ import annotations

import numpy as np

from theory.lemma import directional_risk, first_derivative_curvature, layered_risk, matrix_risk
from theory.master import sharpest_side

Sides = tuple[float, float]


def _hessian(rng: np.random.Generator, dim: int, low: float, high: float) -> np.ndarray:
    basis, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    return np.asarray((basis * rng.uniform(low, high, dim)) @ basis.T)


def matrix_form(rng: np.random.Generator) -> Sides:
    """Lemma 1 in the metric of P: ``f = sum a_i (1 - cos(k_i'x + phi_i))`` has ``Hessian <= sum a_i k_i k_i'``."""
    a, k, phi = rng.random(3), rng.standard_normal((3, 2)) * 2, rng.uniform(0, 7, 3)
    x, u = rng.standard_normal(2), rng.standard_normal(2) * rng.choice([0.1, 1.0, 3.0])

    def f(point: np.ndarray) -> float:
        return float(a @ (1 - np.cos(k @ point + phi)))

    return f(x + u), float(matrix_risk(f(x), (k.T * a) @ k, u))


def layers_form(rng: np.random.Generator) -> Sides:
    """Lemma 1 block by block, blocks bounded over all of space, no convexity."""
    a, k, phi = rng.random(3), rng.standard_normal((3, 3)), rng.uniform(0, 7, 3)
    x, u = rng.standard_normal(3), rng.standard_normal(3) * rng.choice([0.1, 1.0, 3.0])

    def f(point: np.ndarray) -> float:
        return float(a @ (1 - np.cos(k @ point + phi)))

    return f(x + u), float(layered_risk(f(x), a @ k**2, np.abs(u)))


def first_derivatives(rng: np.random.Generator) -> Sides:
    """First derivatives only: the supremum of ``phi'_+^2/(2 phi)`` over the segment, on a fine grid with its slack."""
    a, c, phase = rng.random(2), rng.standard_normal(2) * 3, rng.uniform(0, 7, 2)
    t = np.linspace(0, 1, 2001)
    values = 0.05 + (a * (1 - np.cos(np.outer(t, c) + phase))).sum(axis=1)
    slopes = (a * c * np.sin(np.outer(t, c) + phase)).sum(axis=1)
    bend = float(first_derivative_curvature(slopes, values))
    slack = 2e-3 * float(np.abs(c).max() ** 2) * (1 + bend)  # what a grid can miss
    return float(values[-1]), float(directional_risk(values[0], bend + slack))


def head_step(rng: np.random.Generator) -> Sides:
    """Shared block after one common step: at most ``q ||d_s|| + eta ||H_sp|| ||d_p||``, eigenvalues in [m, L]."""
    m, L, eta = float(rng.uniform(-1, 0.3)), 1.0, float(rng.uniform(0.1, 2.5))
    H = _hessian(rng, 4, m, L)
    d = rng.standard_normal(4)
    q = max(1 - eta * m, eta * L - 1)
    after = np.linalg.norm((d - eta * H @ d)[:2])
    cross = np.linalg.norm(H[:2, 2:], 2)
    return float(after), float(q * np.linalg.norm(d[:2]) + eta * cross * np.linalg.norm(d[2:]))


def cross_block(rng: np.random.Generator) -> Sides:
    """An off-diagonal block of a symmetric matrix with eigenvalues in [m, L] has norm at most (L - m)/2."""
    m, L = float(rng.uniform(-1, 0.3)), 1.0
    H = _hessian(rng, 4, m, L)
    values = np.linalg.eigvalsh(H)
    return float(np.linalg.norm(H[:2, 2:], 2)), float((values[-1] - values[0]) / 2)


def shared_sum(rng: np.random.Generator) -> Sides:
    """All copies of a shared sample at once, equal n: distances add up (Minkowski over the exchanged sample)."""
    c, moved = rng.uniform(0, 1, 3), rng.standard_normal((3, 5, 2))
    eps = np.sqrt((moved**2).sum(axis=2).mean(axis=1))
    merged = np.einsum("i,ijd->jd", c, moved)
    return float((merged**2).sum(axis=1).mean()), float((c @ eps) ** 2)


def loss_gap(rng: np.random.Generator) -> Sides:
    """``rms ||grad f(x'; z) - grad f(x'; z')|| <= 2 sqrt(2 L E f)`` for smooth nonnegative losses, equal means."""
    L, size = 1.0, 6
    centre, mass = rng.standard_normal((size, 2)), rng.dirichlet(np.ones(size))
    point = rng.standard_normal(2)
    gradients = L * (point - centre)
    risk = float(mass @ (0.5 * L * ((point - centre) ** 2).sum(axis=1)))
    gap = np.einsum("i,j,ijd->", mass, mass, (gradients[:, None] - gradients[None]) ** 2)
    return float(np.sqrt(gap)), float(2 * np.sqrt(2 * L * risk))


def recursion_step(rng: np.random.Generator) -> Sides:
    """``E ||q d + s eta I u/b||^2 <= (q e + eta D/n)^2 + eta^2 D^2 Var(I)/b^2``: I independent of d and u."""
    n, size = int(rng.integers(2, 8)), 5
    b = int(rng.integers(1, n + 1))
    q, eta = float(rng.uniform(0.2, 1.5)), float(rng.uniform(0.1, 1))
    mass, d, u = rng.dirichlet(np.ones(size)), rng.standard_normal((size, 2)), rng.standard_normal((size, 2))
    e, D = (float(np.sqrt(mass @ (v**2).sum(axis=1))) for v in (d, u))
    left = 0.0
    for drawn, chance in ((0.0, 1 - b / n), (1.0, b / n)):
        left += chance * float(mass @ ((q * d + eta * drawn / b * u) ** 2).sum(axis=1))
    variance = (b / n) * (1 - b / n)
    return left, (q * e + eta * D / n) ** 2 + eta**2 * D**2 * variance / b**2


def minimiser_step(rng: np.random.Generator) -> Sides:
    """``E ||x+ - x*||^2 <= q^2 ||x - x*||^2 + eta^2 E ||noise||^2`` for eigenvalues in [m, L]."""
    H, eta = _hessian(rng, 2, -0.5, 1.0), float(rng.uniform(0.1, 2.5))
    values = np.linalg.eigvalsh(H)
    q = float(np.abs(1 - eta * values).max())
    away, noise = rng.standard_normal(2), rng.standard_normal(2)
    left = sum(float(np.sum((away - eta * (H @ away + sign * noise)) ** 2)) for sign in (-1, 1)) / 2
    return left, float(q**2 * away @ away + eta**2 * noise @ noise)


def above_minimum(rng: np.random.Generator) -> Sides:
    """``F(x) - F* <= L/2 ||x - x*||^2`` for a smooth nonconvex F with a known minimiser."""
    a, k = rng.random(3), rng.standard_normal((3, 2)) * 2
    x, L = rng.standard_normal(2) * 2, float(a @ (k * k).sum(axis=1))
    return float(a @ (1 - np.cos(k @ x))), float(L / 2 * x @ x)


def strongly_convex_distance(rng: np.random.Generator) -> Sides:
    """``mu/2 ||x - x*||^2 <= F(x) - F*`` for eigenvalues of at least mu."""
    H, x = _hessian(rng, 3, 0.2, 2.0), rng.standard_normal(3)
    mu = float(np.linalg.eigvalsh(H)[0])
    return float(mu / 2 * x @ x), float(0.5 * x @ H @ x)


def noisy_descent(rng: np.random.Generator) -> Sides:
    """``E F(x+) <= F(x) - eta (1 - L eta/2) ||g||^2 + L eta^2 s^2/2`` for a smooth nonconvex F, two-point noise."""
    a, k, phi = rng.random(3), rng.standard_normal((3, 2)) * 2, rng.uniform(0, 7, 3)
    L = float(a @ (k * k).sum(axis=1))
    x, noise, eta = rng.standard_normal(2), rng.standard_normal(2), float(rng.uniform(0.05, 2)) / L

    def F(point: np.ndarray) -> float:
        return float(a @ (1 - np.cos(k @ point + phi)))

    g = (a * np.sin(k @ x + phi)) @ k
    left = (F(x - eta * (g + noise)) + F(x - eta * (g - noise))) / 2
    return left, F(x) - eta * (1 - L * eta / 2) * float(g @ g) + L * eta**2 * float(noise @ noise) / 2


def sharper_aggregation(rng: np.random.Generator) -> Sides:
    """Task by task with the nearer anchor: never above the roots of sums."""
    p, risks, L, V, base = rng.dirichlet(np.ones(3)), *(rng.exponential(size=3) for _ in range(4))
    far = float(rng.exponential())
    bound, _, _ = sharpest_side(risks, p, L, V, base, far)
    return float(bound), float(np.sqrt(p @ risks) + np.sqrt(p @ (L / 2 * V)))
