"""Real minibatch SGD on the families with exact ground truth, many runs at once, from named seeds.

Nothing here is a formula: data are drawn, experts trained step by step, merged, and their risks measured.  It is what
:func:`theory.merge_moments` and :func:`theory.one_pass_merge` are tested against.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.errors import RecipeError
from theory.quadratic import MergeMoments, QuadraticTask, draw_batches, draw_data, simulate_sgd
from theory.recipe import Expert
from theory.regression import RegressionTask, draw_regression, simulate_regression
from theory.symbolic import FloatArray

FIELDS = ("risk", "training_risk", "gap", "V", "stability")


def named_generator(seed: int, *names: str) -> np.random.Generator:
    """A random generator that depends on a seed and on names only, not on the order in which others are asked for.

    >>> first, again = named_generator(0, "expert a", "data"), named_generator(0, "expert a", "data")
    >>> bool(first.random() == again.random() != named_generator(0, "expert b", "data").random())
    True
    """
    return np.random.default_rng([seed, *(zlib.crc32(name.encode()) for name in names)])


@dataclass(frozen=True, eq=False)
class SimulatedMerge:
    """One value per run, shape ``(replicates,)``: F(M), F_S(M), their difference, ``sum p_j ||M - x_j||^2``, and
    ``sum p_i alpha_i^2 ||x_i - x_i'||^2`` with one random sample of each expert exchanged; ``experts`` (N, runs, d)."""

    risk: FloatArray
    training_risk: FloatArray
    gap: FloatArray
    V: FloatArray
    stability: FloatArray
    experts: FloatArray

    def mean(self, field: str) -> tuple[float, float]:
        """Mean of a field and its standard error."""
        values = getattr(self, field)
        return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))

    def standard_scores(self, exact: MergeMoments) -> dict[str, float]:
        """``(simulated mean - exact) / standard error`` of every field; a correct formula stays within four or so."""
        scores = {}
        for field in FIELDS:
            mean, error = self.mean(field)
            expected = float(getattr(exact, field))
            scores[field] = (mean - expected) / (error + 1e-13 * (1.0 + abs(expected)))
        return scores


def simulate_merge(
    tasks: Sequence[QuadraticTask | RegressionTask],
    base: ArrayLike,
    experts: Sequence[Expert],
    coefficients: ArrayLike,
    weights: ArrayLike,
    *,
    replicates: int,
    seed: int,
) -> SimulatedMerge:
    """Train, merge and measure ``replicates`` times: ``x_0 + sum alpha_i (x_i - x_0)``, one configuration.

    ``coefficients`` and ``weights`` (N,), ``base`` (d,).  Any sampling, schedule, momentum and decay of SGD;
    independent samples.  Each expert draws from ``named_generator(seed, its name, ...)``.  Raises
    :class:`RecipeError` for two experts of one name, :class:`AssumptionError` for optimizers other than SGD.

    >>> from theory import QuadraticTask, merge_moments
    >>> task = QuadraticTask(np.eye(1), np.zeros(1), np.eye(1))
    >>> runs = [Expert(name, n=5, batch_size=2, learning_rate=0.5, steps=3) for name in "ab"]
    >>> seen = simulate_merge([task] * 2, [1.0], runs, [0.5, 0.5], [0.5, 0.5], replicates=4000, seed=0)
    >>> scores = seen.standard_scores(merge_moments([task] * 2, [1.0], runs, [0.5, 0.5], [0.5, 0.5]))
    >>> all(abs(score) < 4 for score in scores.values())
    True
    """
    x0 = np.asarray(base, dtype=np.float64)
    alpha, p = np.asarray(coefficients, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if len({expert.name for expert in experts}) < len(experts):
        raise RecipeError("simulation: two experts have the same name, hence the same seeds; give each its own name")
    runs, twins, data = [], [], []
    for task, expert in zip(tasks, experts, strict=True):
        samples = _draw(task, int(expert.n), replicates, named_generator(seed, expert.name, "data"))
        fresh = _draw(task, 1, replicates, named_generator(seed, expert.name, "exchanged sample"))
        batches = draw_batches(expert, replicates, named_generator(seed, expert.name, "batches"))
        place = named_generator(seed, expert.name, "place").integers(0, int(expert.n), replicates)
        runs.append(_train(task, x0, expert, samples, batches))
        twins.append(_train(task, x0, expert, _exchanged(samples, fresh, place), batches))
        data.append(samples)
    x = np.stack(runs)
    merged = x0 + np.tensordot(alpha, x - x0, axes=1)
    risk = training = V = stability = np.zeros(replicates)
    for weight, a, task, samples, own, twin in zip(p, alpha, tasks, data, runs, twins, strict=True):
        true, seen = _risks(task, samples, merged)
        risk, training = risk + weight * true, training + weight * seen
        V = V + weight * np.sum((merged - own) ** 2, axis=1)
        stability = stability + weight * a**2 * np.sum((own - twin) ** 2, axis=1)
    return SimulatedMerge(risk, training, risk - training, V, stability, x)


def _draw(
    task: QuadraticTask | RegressionTask, n: int, replicates: int, rng: np.random.Generator
) -> tuple[FloatArray, ...]:
    if isinstance(task, QuadraticTask):
        return (draw_data(task, n, replicates, rng),)
    return draw_regression(task, n, replicates, rng)


def _exchanged(
    samples: tuple[FloatArray, ...], fresh: tuple[FloatArray, ...], place: np.ndarray
) -> tuple[FloatArray, ...]:
    changed = tuple(part.copy() for part in samples)
    for part, new in zip(changed, fresh, strict=True):
        part[np.arange(len(place)), place] = new[:, 0]
    return changed


def _train(
    task: QuadraticTask | RegressionTask,
    x0: FloatArray,
    expert: Expert,
    samples: tuple[FloatArray, ...],
    batches: Sequence[np.ndarray],
) -> FloatArray:
    if isinstance(task, QuadraticTask):
        return simulate_sgd(task, x0, expert, samples[0], batches)
    return simulate_regression(x0, expert, samples[0], samples[1], batches)


def _risks(
    task: QuadraticTask | RegressionTask, samples: tuple[FloatArray, ...], x: FloatArray
) -> tuple[FloatArray, FloatArray]:
    if isinstance(task, QuadraticTask):
        away, apart = x - task.theta, x[:, None, :] - samples[0]
        true = 0.5 * (np.einsum("ra,ab,rb->r", away, task.H, away) + np.trace(task.H @ task.Omega))
        return true, 0.5 * np.einsum("rna,ab,rnb->rn", apart, task.H, apart).mean(axis=1)
    inputs, targets = samples
    away = x - task.w
    true = 0.5 * (np.einsum("ra,ab,rb->r", away, task.Sigma, away) + np.asarray(task.noise) ** 2)
    return true, 0.5 * ((np.einsum("rnd,rd->rn", inputs, x) - targets) ** 2).mean(axis=1)
