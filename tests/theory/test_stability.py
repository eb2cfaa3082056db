"""Gamma by brute force over every possible batch sequence, and the edges of the stability bounds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import Expert, RecipeError, Schedule, clock
from theory.clocks import write_out
from theory.stability import (
    epsilon_from_losses,
    epsilon_sup,
    gamma,
    gamma_of_weights,
    gamma_with_replacement,
    gamma_without_replacement,
)


def moments_by_enumeration(w: np.ndarray, sizes: list[int], n: int, sampling: str, epochs: list[list[int]]) -> tuple:
    """Mean and variance of X = sum_k (w_k/b_k) I_k for sample 0, over every outcome of the sampling."""
    if sampling == "reshuffle":
        mean = variance = 0.0
        for steps in epochs:
            values = []
            for order in permutations(range(n)):
                used, x = 0, 0.0
                for k in steps:
                    x += w[k] / sizes[k] * (0 in order[used : used + sizes[k]])
                    used += sizes[k]
                values.append(x)
            mean, variance = mean + np.mean(values), variance + np.var(values)
        return mean, variance
    mean = variance = 0.0
    for weight, b in zip(w, sizes, strict=True):
        if sampling == "without_replacement":
            counts = [int(0 in batch) for batch in combinations(range(n), b)]
        else:
            counts = [batch.count(0) for batch in product(range(n), repeat=b)]
        values = weight / b * np.array(counts)
        mean, variance = mean + values.mean(), variance + values.var()
    return mean, variance


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_gamma_is_the_variance_over_all_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 6))
    sampling = str(rng.choice(["without_replacement", "with_replacement", "reshuffle"]))
    steps = int(rng.integers(1, 7))
    b = int(rng.integers(1, n + 1))
    batch = (
        b if sampling == "reshuffle" or rng.random() < 0.5 else Schedule(rng.integers(1, n + 1, steps).astype(float))
    )
    expert = Expert(
        "a", n, batch, Schedule(rng.uniform(0, 1, steps)), sampling=sampling, drop_last=bool(rng.random() < 0.5), L=1.0
    )  # type: ignore[arg-type]
    grid, timing = write_out(expert), clock(expert)
    w = np.exp(timing.log_w)
    starts = [k for k in range(steps) if grid.position[k] == 0]
    epochs = [list(range(a, e)) for a, e in zip(starts, [*starts[1:], steps], strict=True)]
    mean, variance = moments_by_enumeration(w, [int(size) for size in grid.batch_size], n, sampling, epochs)
    assert mean == pytest.approx(float(timing.tau) / n)
    assert float(gamma(expert, timing)) == pytest.approx(variance, abs=1e-12)


def test_closed_forms_are_the_written_out_sums() -> None:
    for sampling, closed in (
        ("without_replacement", gamma_without_replacement),
        ("with_replacement", gamma_with_replacement),
    ):
        w = np.random.default_rng(0).uniform(0, 1, 9)
        assert float(closed((w**2).sum(), 7, 3)) == pytest.approx(float(gamma_of_weights(w, 3, 7, sampling)))


def test_trap_the_short_last_batch_makes_the_fixed_b_formula_too_small() -> None:
    """n = 10, b = 4 keeps a batch of two: a sample in it is pushed twice as hard, which fixed b does not see."""
    expert = Expert("a", 10, 4, 0.1, 6, sampling="reshuffle", curvature="convex", L=1.0)
    timing = clock(expert)
    grid = write_out(expert)
    naive = gamma_of_weights(np.exp(timing.log_w), 4, 10, "reshuffle", grid.position)
    assert float(naive) < 0.3 * float(gamma(expert, timing))
    dropped = Expert("a", 10, 4, 0.1, 6, sampling="reshuffle", drop_last=True, curvature="convex", L=1.0)
    assert float(gamma(dropped, clock(dropped))) > 0  # two samples are left out in every pass


def test_reshuffling_with_equal_pushes_has_no_variance() -> None:
    expert = Expert("a", 12, 4, 0.1, 9, sampling="reshuffle", curvature="convex", L=1.0)
    assert float(gamma(expert, clock(expert))) == pytest.approx(0.0, abs=1e-16)


def test_full_batch_has_no_variance_even_when_the_clock_overflows() -> None:
    for sampling in ("without_replacement", "reshuffle"):
        expert = Expert("a", 8, 8, 1.0, 4000, sampling=sampling, curvature="smooth", L=9.0)  # type: ignore[arg-type]
        timing = clock(expert)
        assert np.isinf(timing.nu)
        assert float(gamma(expert, timing)) == 0.0
    assert float(epsilon_sup(0.0, np.inf, 10, np.inf)) == 0.0


def test_log_based_gap_needs_the_right_curvature() -> None:
    losses = Schedule(np.linspace(1, 0.2, 8))
    expert = Expert("a", 20, 5, Schedule(np.full(8, 0.1)), L=1.0, curvature="convex", batch_losses=losses)
    timing = clock(expert)
    assert timing.log_w is not None
    value = epsilon_from_losses(expert, timing, timing.log_w)
    assert np.isfinite(value)
    gap = 2 * np.sqrt(2 * losses.values)
    by_hand = 0.1 * gap.sum() / 20 + np.sqrt(np.sum(0.01 * gap**2 * (1 / 100 - 1 / 400)))
    assert float(value) == pytest.approx(by_hand)
    contracting = Expert(
        "a", 20, 5, Schedule(np.full(8, 0.1)), L=1.0, mu=0.5, curvature="strongly_convex", batch_losses=losses
    )
    with pytest.raises(RecipeError, match="population risk"):
        epsilon_from_losses(contracting, timing, timing.log_w)


@pytest.mark.parametrize("seed", range(40))
def test_gap_from_held_out_losses_keeps_the_contraction(seed: int) -> None:
    """Strongly convex quadratics: sqrt(2L F_S) + sqrt(2L F) at one twin, both risks exact at every step."""
    from quadratic_recipes import random_task

    from theory import expert_epsilon, expert_moments
    from theory.clocks import log_response

    rng = np.random.default_rng(seed)
    task, base = random_task(rng, 2, flat=False), rng.standard_normal(2)
    mu, L = np.linalg.eigvalsh(task.H)
    n, steps = int(rng.integers(1, 12)), int(rng.integers(2, 20))
    run = Expert(
        "a",
        n,
        int(rng.integers(1, n + 1)),
        float(rng.uniform(0.05, 1.5)) / (L + 0.2),
        steps,
        momentum=float(rng.choice([0.0, 0.0, 0.5])),
        weight_decay=float(rng.choice([0.0, 0.2])),
        sampling=str(rng.choice(["without_replacement", "with_replacement"])),  # type: ignore[arg-type]
        curvature="strongly_convex",
        L=L,
        mu=mu,
    )
    found = [expert_moments(task, base, replace(run, steps=k)) for k in range(1, steps)]
    away = base - task.theta
    first = 0.5 * (away @ task.H @ away + np.trace(task.H @ task.Omega))
    trained = np.maximum([first, *(float(one.training_risk) for one in found)], 0.0)
    fresh = np.array([first, *(float(one.risk) for one in found)])
    logged = replace(run, batch_losses=Schedule(trained), held_out_losses=Schedule(fresh))
    timing = clock(logged)
    exact = float(expert_moments(task, base, run).epsilon)
    value = float(epsilon_from_losses(logged, timing, log_response(logged)))
    gap = np.sqrt(2 * L * trained) + np.sqrt(2 * L * fresh)
    w, b = np.exp(log_response(run)), float(run.batch_size)  # type: ignore[arg-type]
    spread = 1 / (b * n) - 1 / n**2 if run.sampling == "without_replacement" else (1 - 1 / n) / (b * n)
    by_hand = w @ gap / n + np.sqrt(np.sum(w**2 * gap**2) * max(spread, 0.0))
    assert exact <= value * (1 + 1e-12)
    assert value == pytest.approx(by_hand, rel=1e-9)
    best, form = expert_epsilon(logged)
    assert exact <= float(best) * (1 + 1e-12)
    assert "loss log" in form
    shuffled = replace(logged, sampling="reshuffle", momentum=0.0)
    timing = clock(shuffled)
    with pytest.raises(RecipeError, match="population risk"):
        epsilon_from_losses(shuffled, timing, log_response(shuffled))


def test_trap_gap_from_the_loss_under_reshuffling_needs_no_contraction_either() -> None:
    """One sample, f = (x - z)^2/2, x_0 = E z: the run forgets x_0, the loss falls to 0, and the twins end apart.

    The rms reshuffling line with the contracting clock goes to zero with K although epsilon goes to sqrt(2) s.
    """
    eta, steps = 0.3, 40
    losses = 0.5 * (1 - eta) ** (2 * np.arange(steps))  # E F_B(x_k) for unit variance
    exact = np.sqrt(2) * (1 - (1 - eta) ** steps)
    naive = sum(eta * (1 - eta) ** (steps - 1 - k) * 2 * np.sqrt(2 * losses[k]) for k in range(steps))
    assert naive < 1e-3 * exact
    common = dict(n=1, batch_size=1, learning_rate=eta, steps=steps, sampling="reshuffle", L=1.0)
    log = Schedule(losses)
    contracting = Expert("a", curvature="strongly_convex", mu=1.0, batch_losses=log, **common)  # type: ignore[arg-type]
    timing = clock(contracting)
    with pytest.raises(RecipeError, match="contract"):
        epsilon_from_losses(contracting, timing, timing.log_w)
    convex = Expert("a", curvature="convex", batch_losses=log, **common)  # type: ignore[arg-type]
    timing = clock(convex)
    assert exact <= float(epsilon_from_losses(convex, timing, timing.log_w))


@pytest.mark.parametrize("seed", range(6))
def test_gap_from_the_loss_log_covers_reshuffling(seed: int) -> None:
    """Measured batch losses (many runs) bound the exact stability of reshuffled SGD on quadratics."""
    from quadratic_recipes import random_task

    from theory import expert_moments
    from theory.quadratic import draw_batches, draw_data

    rng = np.random.default_rng(seed)
    task, base, runs = random_task(rng, 2, flat=False), rng.standard_normal(2), 400
    L = float(np.linalg.eigvalsh(task.H)[-1])
    n, steps = int(rng.integers(1, 6)), int(rng.integers(2, 14))
    expert = Expert(
        "a",
        n,
        int(rng.integers(1, n + 1)),
        float(rng.uniform(0.1, 1.5)) / L,
        steps,
        momentum=float(rng.choice([0.0, 0.5])),
        sampling="reshuffle",
        curvature="convex",
        L=L,
    )
    data, batches = draw_data(task, n, runs, rng), draw_batches(expert, runs, rng)
    x, buffer, losses = np.tile(base, (runs, 1)), np.zeros((runs, 2)), []
    for batch in batches:
        gaps = x[:, None] - data[np.arange(runs)[:, None], batch]
        losses.append(float(np.mean(0.5 * np.einsum("rba,ac,rbc->rb", gaps, task.H, gaps))))
        buffer = expert.momentum * buffer + (gaps @ task.H).mean(axis=1)
        x = x - float(expert.learning_rate) * buffer  # type: ignore[arg-type]
    logged = replace(expert, batch_losses=Schedule(np.array(losses)))
    timing = clock(logged)
    exact = expert_moments(task, base, expert).epsilon
    assert exact <= float(epsilon_from_losses(logged, timing, timing.log_w)) * 1.1
