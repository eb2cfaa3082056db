"""Logistic tasks with finitely many samples: bounded, Lipschitz, convex losses whose population risk is an exact sum.

The l1 and high-probability forms of Theorem 1 need losses that the quadratic families do not have.  Here every constant
is known (G, L, D_inf, B), so both forms are *certified*, and real runs show how far they are from the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import require_sgd, write_out
from theory.errors import RecipeError
from theory.generalization import ConfidentRisk, high_probability
from theory.quadratic import draw_batches
from theory.recipe import Expert, Merge, _numbers, per_expert
from theory.simulation import named_generator
from theory.symbolic import FloatArray

LINEAR = ("average", "weighted", "task_arithmetic", "uniform_soup")


@dataclass(frozen=True, eq=False)
class LogisticTask:
    """``f(x; z) = log(1 + exp(-z'x))``, z one of ``points`` (m, d), label times input, with ``chances`` (m,)."""

    points: FloatArray
    chances: FloatArray


def _support(task: LogisticTask) -> tuple[FloatArray, FloatArray]:
    z, chances = (_numbers("logistic task", key, getattr(task, key)) for key in ("points", "chances"))
    if z.ndim != 2 or chances.shape != z.shape[:1]:
        raise RecipeError(f"logistic task: points {z.shape} and chances {chances.shape} must be (m, d) and (m,)")
    if not np.all(np.isfinite(z)):
        raise RecipeError("logistic task: points holds a number that is not finite; give finite inputs")
    if not (np.all(chances >= 0) and abs(float(chances.sum()) - 1) <= 1e-9):
        raise RecipeError("logistic task: chances are no probabilities; give nonnegative numbers with sum one")
    return z, chances


def with_logistic_constants(tasks: Sequence[LogisticTask], base: ArrayLike, merge: Merge) -> Merge:
    """The merge with the true constants ``L``, ``G``, ``D_inf``, ``B`` of its logistic tasks: known, nothing measured.

    *Statement:* ``L = max |z|^2/4``, ``G = max |z|``.  Two gradients ``-s z`` and ``-s' z'`` with s, s' in (0, 1)
    differ by at most ``max(|z|, |z'|, |z - z'|)`` (convex in (s, s'), so largest at a vertex), and by ``|z|`` if ``z' =
    -z`` (then ``s + s' = 1``); ``D_inf`` is the largest of these.  Neither the experts nor the merge leave the ball of
    radius ``|x_0| + max(sum alpha_i t_i, max t_i)``, ``t_i = G_i sum_k eta_k``, where the loss is at most ``B``.

    Linear merges of SGD without decay and momentum, one configuration.  Raises :class:`RecipeError`.

    >>> task = LogisticTask(np.array([[1.0], [-1.0]]), np.array([0.8, 0.2]))
    >>> run = Expert("a", n=10, batch_size=2, learning_rate=0.1, steps=5, sampling="reshuffle")
    >>> known = with_logistic_constants([task], [0.0], Merge((run,))).experts[0]
    >>> known.L, known.G, known.D_inf, round(known.B, 6)  # log(1 + exp(1/2))
    (0.25, 1.0, 1.0, 0.974077)
    """
    if merge.method not in LINEAR:
        raise RecipeError(f"logistic merge: method is {merge.method!r}; choose one of {', '.join(LINEAR)}")
    alpha = np.abs(_coefficients(merge))
    supports = [_support(task)[0] for task in tasks]
    radius = float(np.linalg.norm(np.asarray(base, dtype=np.float64)))
    travel = []
    for z, expert in zip(supports, merge.experts, strict=True):
        require_sgd(expert)
        if np.any(np.asarray(expert.momentum) != 0) or np.any(np.asarray(expert.weight_decay) != 0):
            raise RecipeError(f"expert {expert.name!r}: momentum or weight_decay is not 0; the reach is known for SGD")
        travel.append(float(np.linalg.norm(z, axis=1).max()) * float(write_out(expert).learning_rate.sum()))
    furthest = radius + max(float(alpha @ travel), *travel)  # the merge, and every expert on its way
    known = []
    for z, expert in zip(supports, merge.experts, strict=True):
        sizes = np.linalg.norm(z, axis=1)
        apart = np.where(np.all(z[:, None] == -z[None], axis=2), 0.0, np.linalg.norm(z[:, None] - z[None], axis=2))
        G = float(sizes.max())
        D, B = max(G, float(apart.max())), float(np.logaddexp(0.0, G * furthest))
        known.append(replace(expert, curvature="convex", mu=None, L=G**2 / 4, G=G, D_inf=D, B=B))
    return replace(merge, experts=tuple(known))


def _coefficients(merge: Merge) -> FloatArray:
    if merge.method in ("average", "uniform_soup"):
        return np.full(merge.size, 1.0 / merge.size)
    return np.asarray(per_expert(merge, "coefficients" if merge.coefficients is not None else "weights"))


@dataclass(frozen=True, eq=False)
class SimulatedGap:
    """One value per run, shape ``(replicates,)``: ``risk`` F(M), exact, and ``training_risk`` F_S(M)."""

    risk: FloatArray
    training_risk: FloatArray

    @property
    def gap(self) -> FloatArray:
        """``F(M) - F_S(M)`` of every run."""
        return self.risk - self.training_risk


def simulate_logistic_gap(
    tasks: Sequence[LogisticTask], base: ArrayLike, merge: Merge, *, replicates: int, seed: int
) -> SimulatedGap:
    """Train, merge and measure real logistic regressions; SGD of any sampling and schedule, linear merges.

    ``base`` (d,).  Seeds are named after the experts.  Raises as :func:`with_logistic_constants`.

    >>> task = LogisticTask(np.array([[1.0], [-1.0]]), np.array([0.8, 0.2]))
    >>> run = Expert("a", n=10, batch_size=2, learning_rate=0.1, steps=5, sampling="reshuffle")
    >>> seen = simulate_logistic_gap([task], [0.0], Merge((run,)), replicates=1000, seed=0)
    >>> seen.gap.shape, bool(seen.gap.mean() > 0)
    ((1000,), True)
    """
    if merge.method not in LINEAR:
        raise RecipeError(f"logistic merge: method is {merge.method!r}; choose one of {', '.join(LINEAR)}")
    x0 = np.asarray(base, dtype=np.float64)
    alpha, p = _coefficients(merge), per_expert(merge, "weights")
    merged = np.broadcast_to(x0, (replicates, x0.size))
    drawn = []
    for a, task, expert in zip(alpha, tasks, merge.experts, strict=True):
        require_sgd(expert)
        z, chances = _support(task)
        rng = named_generator(seed, expert.name, "data")
        data = rng.choice(len(z), size=(replicates, int(expert.n)), p=chances)
        batches = draw_batches(expert, replicates, named_generator(seed, expert.name, "batches"))
        merged = merged + a * (_descend(z, x0, expert, data, batches) - x0)
        drawn.append(data)
    risk = training = np.zeros(replicates)
    for weight, task, data in zip(p, tasks, drawn, strict=True):
        z, chances = _support(task)
        losses = np.logaddexp(0.0, -merged @ z.T)
        risk = risk + weight * (losses @ chances)
        training = training + weight * np.take_along_axis(losses, data, axis=1).mean(axis=1)
    return SimulatedGap(risk, training)


def _descend(
    z: FloatArray, x0: FloatArray, expert: Expert, data: np.ndarray, batches: Sequence[np.ndarray]
) -> FloatArray:
    x = np.broadcast_to(x0, (len(data), x0.size)).copy()
    rows = np.arange(len(data))[:, None]
    for eta, batch in zip(write_out(expert).learning_rate, batches, strict=True):
        seen = z[data[rows, batch]]
        share = 1 / (1 + np.exp(np.einsum("rbd,rd->rb", seen, x)))
        x = x + eta * np.einsum("rb,rbd->rd", share, seen) / batch.shape[1]
    return x


@dataclass(frozen=True, eq=False)
class Coverage:
    """The high-probability form against real runs, one value per ``delta``: ``bound`` on F(M) - F_S(M), the
    ``quantile`` of the simulated gap at ``1 - delta``, the ``violations`` (fraction of runs above the bound), and
    ``deviation_ratio``: the bound's deviation over that of the simulation (quantile minus mean); and the simulated
    ``mean`` of the gap with its ``standard_error``."""

    delta: FloatArray
    bound: FloatArray
    quantile: FloatArray
    violations: FloatArray
    deviation_ratio: FloatArray
    mean: float
    standard_error: float

    @property
    def ratio(self) -> FloatArray:
        """Bound over quantile: how loose the form is (1 would be tight); ``inf`` where the quantile is not positive."""
        return np.where(self.quantile > 0, self.bound / np.where(self.quantile > 0, self.quantile, 1.0), np.inf)


def confidence_coverage(
    tasks: Sequence[LogisticTask],
    base: ArrayLike,
    merge: Merge,
    delta: ArrayLike,
    *,
    replicates: int,
    seed: int,
) -> Coverage:
    """How often, and by how much, :func:`theory.high_probability` covers the gap of real runs.

    ``delta`` (m,).  The statement promises ``violations <= delta`` (up to a sampling error ``sqrt(delta/replicates)``).
    Fills in the true constants itself.  Raises as :func:`theory.high_probability` and
    :func:`with_logistic_constants`.

    >>> task = LogisticTask(np.array([[1.0], [-1.0]]), np.array([0.8, 0.2]))
    >>> run = Expert("a", n=100, batch_size=10, learning_rate=0.1, steps=10, sampling="reshuffle")
    >>> found = confidence_coverage([task], [0.0], Merge((run,)), [0.1, 0.01], replicates=1000, seed=0)
    >>> bool(np.all(found.violations <= found.delta)), bool(np.all(found.bound > found.quantile))
    (True, True)
    """
    level = np.atleast_1d(_numbers("high probability", "delta", delta))
    sure: ConfidentRisk = high_probability(with_logistic_constants(tasks, base, merge), 0.0, level)
    gap = simulate_logistic_gap(tasks, base, merge, replicates=replicates, seed=seed).gap
    quantile = np.quantile(gap, 1 - level)
    spread = quantile - gap.mean()
    ratio = np.where(spread > 0, sure.deviation / np.where(spread > 0, spread, 1.0), np.inf)
    return Coverage(
        delta=level,
        bound=sure.value,
        quantile=quantile,
        violations=(gap[:, None] > sure.value).mean(axis=0),
        deviation_ratio=ratio,
        mean=float(gap.mean()),
        standard_error=float(gap.std(ddof=1) / np.sqrt(replicates)),
    )
