"""Instances for the derivations about merging operators: the shipped closed forms on random and on extreme inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from theory.operators.elected import agreement, elected_sensitivity, trimmed
from theory.operators.linear import fisher_shares
from theory.operators.masks import l1_mask_sensitivity, mask_variance
from theory.operators.matrices import iso_c_gain, regmean_maps
from theory.operators.span import (
    karcher_coefficients,
    model_stock_coefficients,
    model_stock_sensitivity,
    multi_slerp_coefficients,
    slerp_coefficients,
    span_sensitivity,
)

Sides = tuple[float, float]


def _ties(rows: np.ndarray, density: float, lam: float = 1.0) -> np.ndarray:
    """TIES by its definition: trim, elect, mean of those that agree."""
    kept = trimmed(rows, density)
    votes = agreement(kept)
    return lam * np.asarray((kept * votes).sum(axis=0) / np.maximum(votes.sum(axis=0), 1))


def linear_merge(rng: np.random.Generator) -> Sides:
    """``||M - M'|| = |alpha_i| ||x_i - x_i'||`` when only expert i changes."""
    x, alpha, i = rng.standard_normal((3, 4)), rng.uniform(-2, 2, 3), int(rng.integers(3))
    other = x.copy()
    other[i] = rng.standard_normal(4)
    return float(np.linalg.norm(alpha @ x - alpha @ other)), float(abs(alpha[i]) * np.linalg.norm(x[i] - other[i]))


def layers_merge(rng: np.random.Generator) -> Sides:
    """With a coefficient per layer the largest one counts."""
    alpha, moved = rng.uniform(-2, 2, 3), rng.standard_normal((3, 2))
    return float(np.linalg.norm(alpha[:, None] * moved)), float(np.abs(alpha).max() * np.linalg.norm(moved))


def fisher_partition(rng: np.random.Generator) -> Sides:
    """Frozen Fisher shares are at most one and sum to one in every coordinate: a contraction per expert."""
    shares = fisher_shares(rng.exponential(size=(3, 5)), rng.uniform(0.1, 1, 3))
    moved = rng.standard_normal(5)
    assert np.allclose(shares.sum(axis=0), 1.0, rtol=1e-12)
    return float(np.linalg.norm(shares[0] * moved)), float(shares[0].max() * np.linalg.norm(moved))


def regmean_row(rng: np.random.Generator) -> Sides:
    """``||w A_i|| <= ||A_i||_op ||w||`` for a changed row of weights, Gram matrices frozen."""
    root = rng.standard_normal((2, 3, 5))
    maps = regmean_maps(root @ np.swapaxes(root, -1, -2))
    row = rng.standard_normal(3)
    return float(np.linalg.norm(row @ maps[0])), float(np.linalg.norm(maps[0], 2) * np.linalg.norm(row))


def regmean_above_one(rng: np.random.Generator) -> Sides:
    """A sensitivity above one: two experts, inputs almost parallel for one of them."""
    t = float(rng.uniform(0.05, 0.15))
    first = np.outer([1.0, t], [1.0, t])  # all inputs of the first expert along (1, t)
    second = np.diag([1e-4, 1.0])  # the second one hardly uses the first input
    maps = regmean_maps(np.stack([first + 1e-9 * np.eye(2), second]))
    return 1.0, float(np.linalg.norm(maps[0], 2))


def elected_fixed(rng: np.random.Generator) -> Sides:
    """TIES where support and signs do not change: the Jacobian is diagonal, its norm the largest entry (attained)."""
    size, lam = int(rng.integers(2, 4)), float(rng.uniform(0.1, 1.5))
    rows = rng.standard_normal((size, 8)) * 3
    kept = trimmed(rows, 0.5)
    votes = agreement(kept)
    c = elected_sensitivity(votes, coefficient=lam)
    step, places = 1e-5, np.flatnonzero(votes[0])
    largest = 0.0
    for place in places:
        moved = rows.copy()
        moved[0, place] *= 1 + step
        change = _ties(moved, 0.5, lam) - _ties(rows, 0.5, lam)
        largest = max(largest, float(np.abs(change).max() / abs(moved[0, place] - rows[0, place])))
    return largest, float(c[0])


def ties_jump(rng: np.random.Generator) -> Sides:
    """Votes that cancel: for any candidate C two inputs are closer than 1/C times the distance of their merges."""
    C = float(np.exp(rng.uniform(0, 20)))
    s = 0.5 / C
    up, down = _ties(np.array([[1 + s], [-1.0]]), 1.0), _ties(np.array([[1 - s], [-1.0]]), 1.0)
    return C * 2 * s, float(np.linalg.norm(up - down))


def trim_jump(rng: np.random.Generator) -> Sides:
    """An entry that crosses the trimming threshold: Breadcrumbs and TIES jump by a whole entry."""
    C = float(np.exp(rng.uniform(0, 20)))
    s = 0.25 / C
    one, two = trimmed([[1 + s, 1.0]], 0.5), trimmed([[1 - s, 1.0]], 0.5)
    return C * 2 * s, float(np.linalg.norm(one - two))


def fixed_mask(rng: np.random.Generator) -> Sides:
    """A mask that does not move is a contraction."""
    mask, moved = rng.random(6) < 0.5, rng.standard_normal(6)
    return float(np.linalg.norm(mask * moved)), float(np.linalg.norm(moved))


def mask_second_moment(rng: np.random.Generator) -> Sides:
    """``E ||M - E M||^2`` of independent masks with a probability per entry: all masks enumerated, rescaled."""
    rows, p, alpha = rng.standard_normal((2, 2)), rng.uniform(0.05, 0.9, (2, 2)), rng.uniform(-1, 1, 2)
    mean, second = np.zeros(2), 0.0
    outcomes = []
    for code in range(16):
        mask = np.array([(code >> k) & 1 for k in range(4)]).reshape(2, 2)
        mass = float(np.prod(np.where(mask == 1, 1 - p, p)))
        outcomes.append((mass, alpha @ (mask * rows / (1 - p))))
    mean = np.asarray(sum(mass * value for mass, value in outcomes))
    second = sum(mass * float(np.sum((value - mean) ** 2)) for mass, value in outcomes)
    return second, float(mask_variance(rows, p, alpha))


def l1_masks(rng: np.random.Generator) -> Sides:
    """Survivors rescaled to the L1 norm: the Jacobian by complex steps against its closed form."""
    x, mask = rng.standard_normal(5) + 0.1, np.array([True, True, False, True, False])
    signs = np.sign(x)

    def merge(v: Any) -> Any:
        return np.where(mask, v, 0) * (signs @ v) / (signs[mask] @ v[mask])

    jacobian = np.stack([merge(x + 1e-30j * row).imag / 1e-30 for row in np.eye(5)], axis=1)
    return float(np.linalg.norm(jacobian, 2)), l1_mask_sensitivity(x, mask)


def stock_shrinks(rng: np.random.Generator) -> Sides:
    """Model Stock's ratio minimises ``E ||t m - mu||^2`` for experts that are ``mu`` plus orthogonal noise."""
    N, signal, noise = int(rng.integers(2, 9)), float(rng.exponential()) + 0.1, float(rng.exponential()) + 0.1
    cosine = signal / (signal + noise)
    gram = np.full((N, N), cosine) + (1 - cosine) * np.eye(N)
    t = float(np.real(model_stock_coefficients(gram.astype(complex))).sum())
    other = float(rng.uniform(-1, 2))

    def error(ratio: float) -> float:
        return (1 - ratio) ** 2 * signal + ratio**2 * noise / N

    return error(t), error(other)


def _norm_by_complex_steps(vectors: np.ndarray, coefficients: Any, i: int) -> float:
    dim = vectors.shape[1]
    columns = []
    for k in range(dim):
        moved = vectors.astype(np.complex128)
        moved[i, k] += 1e-30j
        columns.append((coefficients(moved @ moved.T) @ moved).imag / 1e-30)
    return float(np.linalg.norm(np.stack(columns, axis=1), 2))


def span_jacobian(rng: np.random.Generator) -> Sides:
    """The norm from inner products alone against the full Jacobian in eight dimensions (SLERP, Model Stock, others)."""
    v, share = rng.standard_normal((3, 8)), rng.dirichlet(np.ones(3))
    forms: list[tuple[np.ndarray, Any]] = [
        (v[:2], lambda G: slerp_coefficients(G, 0.3)),
        (v, model_stock_coefficients),
        (v, lambda G: multi_slerp_coefficients(G, share)),
    ]
    vectors, make = forms[int(rng.integers(3))]
    return _norm_by_complex_steps(vectors, make, 0), float(span_sensitivity(vectors @ vectors.T, make)[0])


def karcher_of_two(rng: np.random.Generator) -> Sides:
    """The Karcher mean of two unit vectors with weights (1-t, t) is their SLERP."""
    v = rng.standard_normal((2, 4))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    t = float(rng.uniform(0.2, 0.8))
    gram = (v @ v.T).astype(np.complex128)
    mean = karcher_coefficients(gram, np.array([1 - t, t])).real @ v
    path = slerp_coefficients(gram, t).real @ v
    return float(mean @ path / np.linalg.norm(path)), float(np.linalg.norm(mean))


def stock_above_frozen(rng: np.random.Generator) -> Sides:
    """The derivative with the ratio frozen is never above the full one."""
    v = rng.standard_normal((3, 6))
    frozen, full = model_stock_sensitivity(v @ v.T)
    return float(frozen.max()), float(full.max())


def stock_unbounded(rng: np.random.Generator) -> Sides:
    """Orthogonal task vectors, one short: for any candidate C the local sensitivity exceeds it."""
    C = float(np.exp(rng.uniform(1, 12)))
    _, full = model_stock_sensitivity(np.diag([C**-2, 1.0]))
    return C, float(full[0])


def slerp_unbounded(rng: np.random.Generator) -> Sides:
    """Almost opposite vectors: for any candidate C the local sensitivity of SLERP exceeds it."""
    gap = float(np.exp(rng.uniform(-6, -1)))
    cosine = -np.cos(gap)
    found = span_sensitivity([[1.0, cosine], [cosine, 1.0]], lambda G: slerp_coefficients(G, 0.5, threshold=1.0))
    return 1 / gap, float(found.max())


def polar_turn(rng: np.random.Generator) -> Sides:
    """Iso-C along the rotation of its two weakest directions: a central difference against the closed form."""
    s = np.sort(rng.uniform(0.5, 3, 3))[::-1]
    turn = np.zeros((3, 3))
    turn[1, 2], turn[2, 1] = -1 / np.sqrt(2), 1 / np.sqrt(2)

    def iso(matrix: np.ndarray) -> np.ndarray:
        u, values, vt = np.linalg.svd(matrix)
        return np.asarray(values.mean() * u @ vt)

    step = 1e-5
    slope = (iso(np.diag(s) + step * turn) - iso(np.diag(s) - step * turn)) / (2 * step)
    return float(np.linalg.norm(slope)) * (1 - 1e-8), iso_c_gain(s, (3, 3))
