"""The exact family against real minibatch SGD (Monte Carlo, fixed seeds), and theorems attained with equality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from quadratic_recipes import random_expert, random_problem, random_task

from theory import Expert, QuadraticTask, Schedule, expert_moments, merge_moments
from theory.clocks import write_out
from theory.drift import buffer_weights
from theory.quadratic import constant_gap, draw_batches, draw_data, simulate_sgd

RUNS = 6000


def z_score(samples: np.ndarray, exact: float) -> float:
    return float(
        abs(samples.mean() - exact) / (samples.std(ddof=1) / np.sqrt(len(samples)) + 1e-14 + 1e-12 * abs(exact))
    )


def stable(rng: np.random.Generator, name: str, task: QuadraticTask, base: np.ndarray, sampling: str) -> Expert:
    L = np.linalg.eigvalsh(task.H)[-1]
    return random_expert(
        rng,
        name,
        task,
        base,
        sampling=sampling,
        learning_rate=float(rng.uniform(0.05, 0.8)) / L,
        n=int(rng.integers(5, 9)),
        batch_size=int(rng.integers(1, 5)),
        steps=int(rng.integers(3, 12)),
        momentum=float(rng.choice([0.0, 0.6])),
        weight_decay=float(rng.choice([0.0, 0.1])),
        curvature="convex",
    )


@pytest.mark.parametrize("sampling", ["without_replacement", "with_replacement", "reshuffle"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_simulator_agrees_with_exact_expectations(sampling: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tasks = [random_task(rng, 2, flat=seed == 3) for _ in range(2)]  # non-commuting Hessians
    base = rng.standard_normal(2)
    experts = [stable(rng, f"e{i}", task, base, sampling) for i, task in enumerate(tasks)]
    alpha, p = np.array([0.4, 0.7]), np.array([0.3, 0.7])
    data = [draw_data(task, int(e.n), RUNS, rng) for task, e in zip(tasks, experts, strict=True)]
    batches = [draw_batches(e, RUNS, rng) for e in experts]
    runs = [simulate_sgd(t, base, e, z, batch) for t, e, z, batch in zip(tasks, experts, data, batches, strict=True)]
    scores = []
    for task, expert, x, z, batch in zip(tasks, experts, runs, data, batches, strict=True):
        exact = expert_moments(task, base, expert)
        scores += [z_score(x[:, k], exact.mean[k]) for k in range(2)]
        centred = x - exact.mean
        scores += [z_score(centred[:, a] * centred[:, b], exact.covariance[a, b]) for a, b in ((0, 0), (0, 1), (1, 1))]
        average = z.mean(axis=1) - task.theta
        scores += [z_score(centred[:, a] * average[:, b], exact.data_covariance[a, b]) for a in (0, 1) for b in (0, 1)]
        scores.append(z_score(np.sum((x - base) ** 2, axis=1), exact.drift**2))
        gaps = x[:, None, :] - z
        empirical = 0.5 * np.einsum("rna,ab,rnb->r", gaps, task.H, gaps) / z.shape[1]
        scores.append(z_score(empirical, exact.training_risk))
        twin = z.copy()
        position = rng.integers(0, z.shape[1], RUNS)
        twin[np.arange(RUNS), position] = draw_data(task, 1, RUNS, rng)[:, 0]
        moved = simulate_sgd(task, base, expert, twin, batch) - x
        scores.append(z_score(np.sum(moved**2, axis=1), exact.epsilon**2))
    merged = base + sum(a * (x - base) for a, x in zip(alpha, runs, strict=True))
    exact_merge = merge_moments(tasks, base, experts, alpha, p)
    risk = empirical_risk = dispersion = np.zeros(RUNS)
    for weight, task, x, z in zip(p, tasks, runs, data, strict=True):
        away = merged - task.theta
        noise = np.trace(task.H @ task.Omega)
        risk = risk + weight * 0.5 * (np.einsum("ra,ab,rb->r", away, task.H, away) + noise)
        gaps = merged[:, None, :] - z
        empirical_risk = empirical_risk + weight * 0.5 * np.einsum("rna,ab,rnb->r", gaps, task.H, gaps) / z.shape[1]
        dispersion = dispersion + weight * np.sum((merged - x) ** 2, axis=1)
    scores += [
        z_score(risk, exact_merge.risk),
        z_score(empirical_risk, exact_merge.training_risk),
        z_score(risk - empirical_risk, exact_merge.gap),
        z_score(dispersion, exact_merge.V),
    ]
    assert max(scores) < 4.5, scores
    assert np.mean(np.array(scores) ** 2) < 3.0, scores


def test_gap_of_plain_sgd_is_linear_in_coefficients_and_inverse_n() -> None:
    problem = random_problem(5, size=3, momentum=0.0, weight_decay=0.0, learning_rate=0.1, batch_size=1)
    p = np.array([0.2, 0.3, 0.5])
    for alpha in (np.array([1.0, 0.0, 0.0]), np.array([0.3, -0.2, 0.9])):
        exact = merge_moments(problem.tasks, problem.base, problem.experts, alpha, p)
        assert exact.gap == pytest.approx(constant_gap(problem.tasks, problem.experts, alpha, p), rel=1e-9)


def test_final_iterate_is_the_weighted_sum_of_batch_gradients() -> None:
    """Theorem 3 (d): x_K - x_0 = -sum w_hat_k g_k, exactly, with momentum, decay and a schedule."""
    rng = np.random.default_rng(3)
    task = random_task(rng, 3, flat=False)
    base = rng.standard_normal(3)
    eta = rng.uniform(0.01, 0.3, 15)
    expert = Expert("a", 12, 5, Schedule(eta), momentum=0.8, weight_decay=0.05, sampling="reshuffle", L=1.0)
    data, batches = draw_data(task, 12, 1, rng), draw_batches(expert, 1, rng)
    x, buffer, gradients = base.copy(), np.zeros(3), []
    for rate, batch in zip(eta, batches, strict=True):
        gradients.append((x - data[0, batch[0]].mean(axis=0)) @ task.H + 0.05 * x)
        buffer = 0.8 * buffer + gradients[-1]
        x = x - rate * buffer
    assert np.allclose(simulate_sgd(task, base, expert, data, batches)[0], x)
    weights = buffer_weights(write_out(expert).learning_rate, 0.8)
    assert np.allclose(x - base, -(weights[:, None] * np.array(gradients)).sum(axis=0))


def test_theorem_two_is_attained() -> None:
    """Contracting modes of one curvature: the sup form with the envelope is an equality."""
    from theory import clock, with_true_constants
    from theory.stability import epsilon_sup, gamma

    task = QuadraticTask(np.eye(2) * 0.5, np.ones(2), np.diag([1.0, 3.0]))
    for sampling in ("without_replacement", "with_replacement", "reshuffle"):
        recipe = Expert("a", 11, 4, 0.3, 17, sampling=sampling, curvature="strongly_convex", L=0.5, mu=0.5)  # type: ignore[arg-type]
        expert = with_true_constants(task, np.zeros(2), recipe)
        timing = clock(expert)
        bound = epsilon_sup(expert.D_envelope, timing.tau, 11, gamma(expert, timing))
        assert float(bound) == pytest.approx(expert_moments(task, np.zeros(2), expert).epsilon, rel=1e-10)


def test_lemma_one_is_tight() -> None:
    rng = np.random.default_rng(0)
    L, a = 3.0, rng.standard_normal(4)

    def root(x: np.ndarray) -> float:
        return float(np.sqrt(0.5 * L * np.sum((x - a) ** 2)))

    direction = rng.standard_normal(4)
    near, far = a + direction, a + 5 * direction
    assert root(far) - root(near) == pytest.approx(np.sqrt(L / 2) * np.linalg.norm(far - near))


@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_decay_with_momentum_against_simulation(nesterov: bool) -> None:
    """SGDW: x_K = carry x_0 + ..., where carry is not 1 - tau (h + omega)."""
    rng = np.random.default_rng(21)
    task = random_task(rng, 2, flat=False)
    base, L = rng.standard_normal(2) * 3, float(np.linalg.eigvalsh(task.H)[-1])
    expert = Expert(
        "a", 6, 4, Schedule(rng.uniform(0.1, 0.5, 9) / L), momentum=0.7, weight_decay=0.3 * L, L=L,
        sampling="reshuffle", nesterov=nesterov, decoupled_decay=True,
    )  # fmt: skip
    data, batches = draw_data(task, 6, RUNS, rng), draw_batches(expert, RUNS, rng)
    x = simulate_sgd(task, base, expert, data, batches)
    exact = expert_moments(task, base, expert)
    scores = [z_score(x[:, k], exact.mean[k]) for k in range(2)]
    centred = x - exact.mean
    scores += [z_score(centred[:, 0] * centred[:, 1], exact.covariance[0, 1])]
    scores += [z_score(np.sum((x - base) ** 2, axis=1), float(exact.drift) ** 2)]
    assert max(scores) < 4.5, scores
    coupled = expert_moments(task, base, replace(expert, decoupled_decay=False))
    assert np.abs(coupled.mean - exact.mean).max() > 10 * centred.std() / np.sqrt(RUNS)  # they do differ


@pytest.mark.parametrize("independent", [False, True])
def test_shared_samples_and_masks_against_simulation(independent: bool) -> None:
    """Tasks that see the same draws (A1 broken), merged by DARE: risk, gap, V and stability by Monte Carlo."""
    rng = np.random.default_rng(5)
    tasks = [random_task(rng, 2, flat=False) for _ in range(2)]
    base, n = rng.standard_normal(2), 6
    experts = [
        replace(stable(rng, f"e{i}", task, base, sampling), n=n)
        for i, (task, sampling) in enumerate(zip(tasks, ("reshuffle", "with_replacement"), strict=True))
    ]
    alpha, p, drop = np.array([0.4, 0.7]), np.array([0.3, 0.7]), 0.4
    draws, fresh = rng.standard_normal((RUNS, n, 2)), rng.standard_normal((RUNS, 2))
    exchanged, position = draws.copy(), rng.integers(0, n, RUNS)
    exchanged[np.arange(RUNS), position] = fresh
    batches = [draw_batches(expert, RUNS, rng) for expert in experts]
    kept = rng.random((RUNS, 2)) > drop
    masks = [kept, rng.random((RUNS, 2)) > drop if independent else kept]

    def merged(source: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        data = []
        for task in tasks:
            values, vectors = np.linalg.eigh(task.Omega)
            data.append(task.theta + source @ (vectors * np.sqrt(values)) @ vectors.T)
        runs = [simulate_sgd(t, base, e, z, b) for t, e, z, b in zip(tasks, experts, data, batches, strict=True)]
        parts = [a * m / (1 - drop) * (x - base) for a, m, x in zip(alpha, masks, runs, strict=True)]
        return base + sum(parts, np.zeros((RUNS, 2))), runs, data

    M, runs, data = merged(draws)
    exact = merge_moments(
        tasks, base, experts, alpha, p, shared_samples=True, drop_rate=drop, independent_masks=independent
    )
    risk = empirical = dispersion = np.zeros(RUNS)
    for weight, task, x, z in zip(p, tasks, runs, data, strict=True):
        away, gaps = M - task.theta, M[:, None] - z
        risk = risk + weight * 0.5 * (np.einsum("ra,ab,rb->r", away, task.H, away) + np.trace(task.H @ task.Omega))
        empirical = empirical + weight * 0.5 * np.einsum("rna,ab,rnb->r", gaps, task.H, gaps) / n
        dispersion = dispersion + weight * np.sum((M - x) ** 2, axis=1)
    scores = [z_score(risk, exact.risk), z_score(empirical, exact.training_risk)]
    scores += [z_score(risk - empirical, exact.gap), z_score(dispersion, exact.V)]
    scores += [z_score(np.sum((merged(exchanged)[0] - M) ** 2, axis=1), exact.stability)]
    assert max(scores) < 4.5, scores


def test_exact_family_broadcasts() -> None:
    """A million configurations are one call: arrays give, entry by entry, what single configurations give."""
    rng = np.random.default_rng(8)
    tasks = [random_task(rng, 3, flat=False) for _ in range(4)]
    stacked = QuadraticTask(*(np.stack([getattr(t, name) for t in tasks]) for name in ("H", "theta", "Omega")))
    base = rng.standard_normal((4, 3))
    n, b, steps = np.array([5, 9, 12, 7]), np.array([2, 9, 5, 3]), np.array([3, 11, 1, 6])
    common = dict(learning_rate=np.array([0.1, 0.2, 0.3, 0.4]), momentum=np.array([0.0, 0.5, 0.9, 0.2]), L=1.0)
    for sampling in ("without_replacement", "with_replacement", "reshuffle"):
        for flags in ({}, {"nesterov": True}, {"decoupled_decay": True}):
            many = Expert("a", n=n, batch_size=b, steps=steps, sampling=sampling, weight_decay=0.1, **common, **flags)  # type: ignore[arg-type]
            exact = expert_moments(stacked, base, many)
            merge = merge_moments([stacked, stacked], base, [many, many], np.full((2, 4), 0.4), np.full((2, 4), 0.5))
            for k, task in enumerate(tasks):
                one = replace(
                    many, n=int(n[k]), batch_size=int(b[k]), steps=int(steps[k]), L=1.0,
                    learning_rate=float(common["learning_rate"][k]), momentum=float(common["momentum"][k]),  # type: ignore[index]
                )  # fmt: skip
                alone = expert_moments(task, base[k], one)
                for name in ("mean", "covariance", "data_covariance", "epsilon", "drift", "risk", "training_risk"):
                    assert np.allclose(getattr(exact, name)[k], getattr(alone, name), rtol=1e-10, atol=1e-13), name
                pair = merge_moments([task, task], base[k], [one, one], [0.4, 0.4], [0.5, 0.5])
                for name in ("risk", "gap", "V", "stability"):
                    assert np.isclose(getattr(merge, name)[k], getattr(pair, name), rtol=1e-9), name


def test_long_training_with_decay_is_ridge() -> None:
    """Full-batch training with decay ends at the ridge solution (H + omega)^(-1) H z_bar."""
    rng = np.random.default_rng(2)
    task = random_task(rng, 3, flat=False)
    L, n, omega = float(np.linalg.eigvalsh(task.H)[-1]), 8, 0.2
    expert = Expert("a", n, n, 1 / (L + omega), steps=4000, weight_decay=omega, L=L)
    exact = expert_moments(task, np.ones(3), expert)
    solve = np.linalg.solve(task.H + omega * np.eye(3), task.H)
    assert np.allclose(exact.mean, solve @ task.theta, rtol=1e-8)
    assert np.allclose(exact.covariance, solve @ task.Omega @ solve.T / n, rtol=1e-8)
