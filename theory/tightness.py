"""How tight every statement is: random heterogeneous recipes with exact values, from the quadratics of section 9.

The labels (tight, limit, upper) with their instances are in :mod:`theory.statement_labels`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.clocks import clock
from theory.dispersion import centred_bound, triangle_bound
from theory.drift import drift_base, drift_energy, drift_noise
from theory.errors import AssumptionError, RecipeError
from theory.expert_terms import expert_drift, expert_epsilon
from theory.generalization import theorem_1
from theory.quadratic import (
    ExpertMoments,
    MergeMoments,
    QuadraticTask,
    expert_moments,
    merge_moments,
    with_true_constants,
)
from theory.recipe import Expert, Merge, Schedule
from theory.risk import master_bound
from theory.stability import epsilon_cap, epsilon_floor, epsilon_recursion, epsilon_rms, epsilon_sup, gamma
from theory.symbolic import FloatArray, vacuous
from theory.training import pl_training_risk


@dataclass(frozen=True, eq=False)
class Batch:
    """Many merges of quadratic experts at once, shape ``(C,)``, with the exact values the bounds are about."""

    tasks: tuple[QuadraticTask, ...]
    base: FloatArray
    merge: Merge
    coefficients: FloatArray
    weights: FloatArray
    experts: tuple[ExpertMoments, ...]
    exact: MergeMoments
    smallest_dispersion: FloatArray


def random_tasks(rng: np.random.Generator, configurations: int, dim: int, count: int) -> tuple[QuadraticTask, ...]:
    """``count`` quadratic tasks over ``configurations`` with non-commuting Hessians; some have flat directions."""
    tasks = []
    for _ in range(count):
        basis, _ = np.linalg.qr(rng.standard_normal((configurations, dim, dim)))
        h = np.exp(rng.uniform(-3, 1, (configurations, dim)))
        if dim > 1 and rng.random() < 0.2:
            h[:, 0] = 0.0
        root = rng.standard_normal((configurations, dim, dim)) * np.exp(rng.uniform(-2, 1, (configurations, 1, 1)))
        turned = np.swapaxes(basis, -1, -2)
        theta = rng.standard_normal((configurations, dim)) * 2
        tasks.append(QuadraticTask((basis * h[:, None, :]) @ turned, theta, root @ np.swapaxes(root, -1, -2)))
    return tuple(tasks)


def random_expert(
    rng: np.random.Generator,
    name: str,
    task: QuadraticTask,
    base: FloatArray,
    samples: NDArray[np.int64] | None = None,
    **fixed: Any,
) -> Expert:
    """Any learning rate (also beyond stability), schedule, momentum, decay, sampling, batch size; true constants.

    The task has shape ``(C, d, d)``; numbers of the recipe differ between the C configurations, kinds do not.
    """
    h = np.linalg.eigvalsh(task.H)
    size = len(h)
    n = rng.integers(1, 30, size) if samples is None else samples
    steps: Any = rng.integers(1, 40, size)
    decay: Any = rng.choice([0.0, 0.01, 0.3], size) if rng.random() < 0.5 else 0.0
    gentle = rng.random() < 0.5  # at most 1/(L + omega), which 6(c) and the PL risk need
    rate: Any = np.exp(rng.uniform(np.log(0.005), np.log(0.999 if gentle else 2.4), size)) / (h[:, -1] + decay)
    batch: Any = rng.integers(1, n + 1)
    sampling = str(rng.choice(["without_replacement", "with_replacement", "reshuffle"]))
    sampling = fixed.get("sampling", sampling)
    if rng.random() < 0.3:
        steps = int(rng.integers(1, 40))
        rate = Schedule(rate[:, None] * rng.random((size, steps)))
        if sampling != "reshuffle" and rng.random() < 0.5:
            batch = Schedule(rng.integers(1, np.asarray(n)[:, None] + 1, (size, steps)).astype(np.float64))
    kinds = ["convex", "smooth"] if h.min() <= 1e-12 else ["convex", "strongly_convex", "smooth"]
    recipe: dict[str, Any] = {
        "n": n,
        "batch_size": batch,
        "steps": steps,
        "learning_rate": rate,
        "momentum": rng.choice([0.0, 0.5, 0.9], size) if rng.random() < 0.5 else 0.0,
        "nesterov": bool(rng.random() < 0.3),
        "weight_decay": decay,
        "decoupled_decay": bool(rng.random() < 0.2),
        "sampling": sampling,
        "drop_last": bool(rng.random() < 0.4),
        "curvature": str(rng.choice(kinds)),
    }
    recipe.update(fixed)
    if recipe["curvature"] == "strongly_convex":
        recipe["mu"] = h[:, 0]
    return with_true_constants(task, base, Expert(name, **recipe))


def random_batch(seed: int, configurations: int = 64, **fixed: Any) -> Batch:
    """``configurations`` random merges of one to four heterogeneous experts, with their exact values.

    Merges are averages, weighted, task arithmetic or DARE; some tasks share their samples.  ``fixed`` fields are given
    to every expert.

    >>> batch = random_batch(0, 8)
    >>> bool(np.all(batch.exact.risk <= master_bound(batch.merge).value * (1 + 1e-9)))
    True
    """
    rng = np.random.default_rng(seed)
    count, dim = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    tasks = random_tasks(rng, configurations, dim, count)
    base = rng.standard_normal((configurations, dim))
    shared = bool(rng.random() < 0.15)
    samples = rng.integers(1, 30, configurations) if shared else None
    experts = tuple(random_expert(rng, f"e{i}", task, base, samples, **fixed) for i, task in enumerate(tasks))
    p = rng.dirichlet(np.ones(count), configurations).T
    p = p / p.sum(axis=0)
    method = str(rng.choice(["average", "weighted", "task_arithmetic", "dare"]))
    alpha = rng.uniform(-0.2, 1.2, (count, configurations))
    if method == "average":
        alpha = np.full((count, configurations), 1 / count)
    elif method != "weighted":
        alpha = np.broadcast_to(alpha[:1], alpha.shape)
    masks: dict[str, Any] = {}
    if method == "dare":
        masks = {"drop_rate": rng.uniform(0, 0.9, configurations)}
        masks |= {"rescale": bool(rng.random() < 0.5), "independent_masks": bool(rng.random() < 0.5)}
    merge = Merge(
        experts,
        method=method,  # type: ignore[arg-type]
        weights=p,
        coefficients=None if method == "average" else alpha,
        shared_samples=shared,
        data_independent_choices=True,
        per_sample_loss=True,
        **masks,
    )
    return Batch(
        tasks=tasks,
        base=base,
        merge=merge,
        coefficients=alpha,
        weights=p,
        experts=tuple(expert_moments(task, base, expert) for task, expert in zip(tasks, experts, strict=True)),
        exact=merge_moments(tasks, base, experts, alpha, p, shared_samples=shared, **masks),
        smallest_dispersion=merge_moments(tasks, base, experts, p, p, shared_samples=shared).V,
    )


@vacuous
def _ratio(exact: FloatArray, upper: FloatArray) -> FloatArray:
    """exact/upper, 0 where the bound is infinite; two exact zeros are a ratio of one."""
    exact, upper = np.broadcast_arrays(np.asarray(exact), np.asarray(upper))
    both = (exact <= 0) & (upper <= 0)
    return np.where(both, 1.0, np.where(np.isinf(upper), 0.0, exact / np.where(both, 1.0, upper)))


def expert_ratios(expert: Expert, exact: ExpertMoments) -> dict[str, FloatArray]:
    """exact/upper of every statement about one expert that applies: Theorems 2 and 3, cap, PL risk; shape ``(...)``.

    ``floor: Efron-Stein`` is the opposite, floor/exact.  The recipe must hold true constants
    (:func:`with_true_constants`).
    """
    found: dict[str, FloatArray] = {}
    timing = clock(expert)
    variance = gamma(expert, timing)

    def attempt(name: str, value: Callable[[], FloatArray], truth: FloatArray) -> None:
        try:
            found[name] = _ratio(truth, value())
        except (AssumptionError, RecipeError):
            return

    assert expert.D_envelope is not None
    assert expert.D_2 is not None
    gap, rms = expert.D_envelope, expert.D_2
    attempt("Theorem 2 (sup, envelope)", lambda: epsilon_sup(gap, timing.tau, expert.n, variance), exact.epsilon)
    if expert.sampling != "reshuffle":
        attempt("Theorem 2 (rms)", lambda: epsilon_rms(rms, timing.tau, expert.n, variance), exact.epsilon)
    attempt("Theorem 2 (recursion)", lambda: epsilon_recursion(expert, rms), exact.epsilon)
    attempt("cap", lambda: epsilon_cap(exact.drift), exact.epsilon)
    attempt("smallest stability", lambda: expert_epsilon(expert, timing)[0], exact.epsilon)
    attempt("Theorem 3 (a)", lambda: drift_noise(expert, timing), exact.drift)
    attempt("Theorem 3 (b)", lambda: drift_base(expert, timing), exact.drift)
    attempt("Theorem 3 (c)", lambda: drift_energy(expert), exact.drift)
    attempt("smallest drift", lambda: expert_drift(expert, timing)[0], exact.drift)
    attempt("PL training risk", lambda: pl_training_risk(expert), np.maximum(exact.training_risk, 0.0))
    trace = np.trace(np.asarray(exact.covariance), axis1=-2, axis2=-1)
    found["floor: Efron-Stein"] = _ratio(epsilon_floor(trace, expert.n), np.asarray(exact.epsilon))
    return found


def merge_ratios(batch: Batch) -> dict[str, FloatArray]:
    """exact/upper of Theorems 1 and 4, the dispersion bounds and the master bound, shape ``(C,)``.

    Theorems 1 and 4 take exact stability, dispersion and risks.  ``floor: p-average`` is floor/exact: no merge has less
    isotropic dispersion than the p-average.  Dispersion bounds are left out for DARE (masks add to V).
    """
    exact, merge, p = batch.exact, batch.merge, batch.weights
    L = np.stack([np.asarray(expert.L) for expert in merge.experts])
    # a training risk is a difference of numbers of the size of the risk, and roots magnify its rounding
    own = np.stack([np.maximum(moment.training_risk + 1e-14 * moment.risk, 0.0) for moment in batch.experts])
    drift = np.stack([moment.drift for moment in batch.experts])
    empirical = np.maximum(exact.training_risk, 0.0)
    largest = L.max(axis=0)
    roots = np.sqrt((p * own).sum(axis=0)) + np.sqrt(largest / 2 * exact.V)
    stability = np.broadcast_to(exact.stability, p.shape) if merge.shared_samples else _per_task(batch)
    found = {
        "Theorem 1": _ratio(exact.risk, theorem_1(empirical, p, L, stability)),
        "Theorem 4": _ratio(empirical, roots**2),
        "master bound": _ratio(exact.risk, master_bound(merge).value),
        "floor: p-average": _ratio(batch.smallest_dispersion, exact.V),
    }
    if merge.method != "dare":
        # a merge that returns an expert unchanged has V = 0, computed as a difference of numbers of size drift^2
        V = np.maximum(exact.V - 1e-14 * (drift**2).sum(axis=0), 0.0)
        found["V, triangle"] = _ratio(V, triangle_bound(drift, batch.coefficients, p))
        found["V, centred"] = _ratio(V, centred_bound(drift, batch.coefficients, p))
    return found


def _per_task(batch: Batch) -> FloatArray:
    """``E ||M_i - M_i'||^2`` per task, shape ``(N, C)``."""
    drop = np.asarray(batch.merge.drop_rate, dtype=np.float64)
    factor = 1 / (1 - drop) if batch.merge.rescale else 1 - drop
    eps = np.stack([moment.epsilon for moment in batch.experts])
    return np.asarray(factor * batch.coefficients**2 * eps**2)


def all_ratios(batch: Batch) -> dict[str, FloatArray]:
    """Everything in :func:`expert_ratios` (all experts together) and :func:`merge_ratios`, flattened."""
    found = {name: [np.ravel(value)] for name, value in merge_ratios(batch).items()}
    for expert, exact in zip(batch.merge.experts, batch.experts, strict=True):
        for name, value in expert_ratios(expert, exact).items():
            found.setdefault(name, []).append(np.ravel(value))
    return {name: np.concatenate(values) for name, values in found.items()}
