"""The 2x2 recursion of trained heads: brute force over Hessians, exact quadratics, and the trap it avoids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import AssumptionError, Expert, Merge, QuadraticTask, RecipeError, expert_moments, master_bound
from theory.heads import head_responses, head_split

STATED = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)


def blocks_of(rng: np.random.Generator, low: float, high: float, dim: int) -> np.ndarray:
    basis, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    return basis @ np.diag(rng.choice([low, high, rng.uniform(low, high)], dim)) @ basis.T


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_no_sequence_of_hessians_answers_more_strongly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, steps, cut, dim = float(rng.choice([0.0, -1.0])), int(rng.integers(1, 12)), int(rng.integers(1, 3)), 4
    omega, eta = float(rng.choice([0.0, 0.3])), float(rng.uniform(0.01, 2.5))
    hessians = [blocks_of(rng, low, 1.0, dim) for _ in range(steps)]
    cross = max(float(np.linalg.norm(H[:cut, cut:], 2)) for H in hessians)
    assert cross <= (1.0 - low) / 2 + 1e-12
    expert = Expert(
        "a",
        10,
        2,
        eta,
        steps,
        weight_decay=omega,
        curvature="convex" if low == 0 else "smooth",
        L=1.0,
        cross_smoothness=cross if rng.random() < 0.5 else None,
    )
    response = head_responses(expert)
    product = np.eye(dim)
    for k in range(steps - 1, -1, -1):
        for r, rows in enumerate((slice(0, cut), slice(cut, dim))):
            for c, columns in enumerate((slice(0, cut), slice(cut, dim))):
                exact = np.linalg.norm(eta * product[rows, columns], 2)
                assert exact <= response[r, c, k] * (1 + 1e-9)
        product = product @ (np.eye(dim) * (1 - eta * omega) - eta * hessians[k])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_split_covers_exact_quadratics(seed: int) -> None:
    """Two-point noise z = theta +- s: gaps are known exactly, and the stability of each block is closed form."""
    rng = np.random.default_rng(seed)
    dim, cut = 3, 2
    H = blocks_of(rng, 0.05, 1.0, dim)
    s = rng.standard_normal(dim)
    task = QuadraticTask(H, rng.standard_normal(dim), np.outer(s, s))
    n, sampling = int(rng.integers(1, 9)), str(rng.choice(["without_replacement", "with_replacement", "reshuffle"]))
    push = 2 * H @ s
    expert = Expert(
        "a",
        n,
        int(rng.integers(1, n + 1)),
        float(rng.uniform(0.02, 1.9)),
        int(rng.integers(1, 15)),
        sampling=sampling,  # type: ignore[arg-type]
        curvature="convex",
        L=1.0,
        head="trained",
        D_inf_shared=float(np.linalg.norm(push[:cut])),
        D_inf_private=float(np.linalg.norm(push[cut:])),
        cross_smoothness=float(np.linalg.norm(H[:cut, cut:], 2)),
    )
    covariance = expert_moments(task, np.zeros(dim), expert).covariance
    shared, private = head_split(expert)
    assert np.sqrt(2 / n * np.trace(covariance[:cut, :cut])) <= shared * (1 + 1e-9)
    assert np.sqrt(2 / n * np.trace(covariance[cut:, cut:])) <= private * (1 + 1e-9)


def test_separated_heads_recover_the_gain_of_averaging() -> None:
    run = dict(n=200, batch_size=20, learning_rate=0.1, steps=50, curvature="convex", L=1.0, training_risk=0.05)
    run |= dict(initial_gradient_norm=0.5, sigma=1.0, D_inf=2.0, head="trained")
    known = dict(D_inf_shared=2.0, D_inf_private=0.05, cross_smoothness=0.01)
    plain = Merge(tuple(Expert(name, **run) for name in "abcd"), **STATED)  # type: ignore[arg-type]
    split = Merge(tuple(Expert(name, **run, **known) for name in "abcd"), **STATED)  # type: ignore[arg-type]
    left, right = (float(master_bound(merge).terms[2].value) for merge in (plain, split))
    assert right < 0.4 * left
    measured = replace(split.experts[0], measured=frozenset({"D_inf_private"}))
    assert "a: D_inf_private" in master_bound(replace(split, experts=(measured, *split.experts[1:]))).measured


def test_trap_hyperparameters_alone_do_not_separate_a_trained_head() -> None:
    """All the movement may be in the head: c^2 eps^2 is then below the truth by 1/c^2."""
    run = dict(n=50, batch_size=50, learning_rate=0.1, steps=30, curvature="convex", L=1.0, head="trained")
    shared, private = head_split(Expert("a", D_inf_shared=0.0, D_inf_private=2.0, cross_smoothness=0.0, **run))  # type: ignore[arg-type]
    assert float(shared) == 0.0
    naive = 0.25 * float(private)
    assert naive < float(private) == pytest.approx(2.0 * 3.0 / 50)


def test_refusals() -> None:
    run = Expert("a", 10, 2, 0.1, 5, L=1.0, head="trained", D_inf=1.0)
    with pytest.raises(RecipeError, match="D_inf_private"):
        head_split(run)
    with pytest.raises(AssumptionError, match="momentum"):
        head_split(replace(run, D_inf_private=0.1, momentum=0.9))
    vacuous = head_split(replace(run, D_inf_private=0.1, steps=100_000, n=10**6, batch_size=10**5))
    assert np.isinf(vacuous).all()
    assert not np.isnan(vacuous).any()
