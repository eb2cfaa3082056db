"""Exact ground truth: linear regression with Gaussian inputs, where the Hessian is random (theory section 9).

A sample is ``z = (a, y)`` with ``a ~ N(0, Sigma)`` and ``y = a'w + noise``, ``noise ~ N(0, s^2)`` independent of a; the
loss is ``f(x; z) = (a'x - y)^2/2``, so ``F(x) = (x-w)' Sigma (x-w)/2 + s^2/2``.  Unlike the additive family the
gradient noise grows with the distance from w.  Two algorithms are closed form:

* one pass of minibatch SGD or heavy ball over fresh samples: the second moment closes by Isserlis' theorem,
  ``E[a a' S a a'] = 2 Sigma S Sigma + Sigma tr(Sigma S)``;
* ordinary least squares, by the moments of the inverse Wishart distribution.

No per-sample smoothness exists (``||a||^2`` is unbounded), so the theorems with L do not certify anything here: this
family tests what needs no L (cap, floor, dispersion) and shows what the additive family cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import require_sgd, write_out
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert
from theory.symbolic import FloatArray


@dataclass(frozen=True, eq=False)
class RegressionTask:
    """``Sigma`` (d, d) positive definite, ``w`` (d,), ``noise`` s >= 0 (standard deviation of y given a)."""

    Sigma: FloatArray
    w: FloatArray
    noise: float


@dataclass(frozen=True, eq=False)
class RegressionMoments:
    """``mean`` E x (d,), ``covariance`` (d, d), and ``risk`` E F(x), ``drift``, ``epsilon`` of one expert."""

    mean: FloatArray
    covariance: FloatArray
    risk: float
    drift: float
    epsilon: float


@dataclass(frozen=True, eq=False)
class RegressionMerge:
    """Joint ``risk`` E F(M), dispersion ``V`` and ``stability`` E_bar of a linear merge of independent experts."""

    risk: float
    V: float
    stability: float


def _one_pass_steps(expert: Expert) -> tuple[FloatArray, FloatArray]:
    require_sgd(expert)
    steps = write_out(expert)
    if steps.present.ndim != 1:
        raise RecipeError(f"expert {expert.name!r}: fields are arrays; one-pass moments take one configuration")
    if expert.nesterov or (expert.decoupled_decay and float(expert.momentum) * float(expert.weight_decay) != 0):
        raise AssumptionError(
            f"expert {expert.name!r}: nesterov or decoupled decay with momentum; one-pass moments are written for "
            "SGD and heavy ball with coupled decay"
        )
    used = float(steps.batch_size.sum())
    fresh = expert.sampling == "reshuffle" and np.count_nonzero(steps.position == 0) == 1
    if not fresh or used > float(expert.n):
        raise AssumptionError(
            f"expert {expert.name!r}: {int(used)} draws from {int(expert.n)} samples are not one pass; the second "
            "moment closes for fresh samples only: choose sampling 'reshuffle' and at most one epoch"
        )
    return steps.learning_rate, steps.batch_size


def _isserlis(Sigma: FloatArray, S: FloatArray, b: float) -> FloatArray:
    """``E[A S A] - Sigma S Sigma`` for A the mean of b matrices ``a a'``: ``(Sigma S Sigma + Sigma tr(Sigma S))/b``."""
    return np.asarray((Sigma @ S @ Sigma + Sigma * np.trace(Sigma @ S)) / b)


def one_pass_moments(task: RegressionTask, base: ArrayLike, expert: Expert) -> RegressionMoments:
    """Exact moments of one pass of SGD or heavy ball with coupled decay over fresh Gaussian samples.

    *Statement:* with ``e = x - w`` and buffer v, one step is ``v <- beta v + G``, ``e <- e - eta v``, ``G = A e - xi +
    omega (e + w)``, A and xi fresh.  First moments are linear; second moments close because
    ``E[A S A] = Sigma S Sigma + (Sigma S Sigma + Sigma tr(Sigma S))/b`` and
    ``E xi xi' = s^2 Sigma/b``.  Twins differ by ``delta``, which starts as
    ``-(eta_k/b)(g - g')`` with ``E (g-g')(g-g')' = 2 [Sigma S_k Sigma + Sigma tr(Sigma S_k) + s^2 Sigma]`` and then
    follows the same recursion without noise; ``epsilon^2 = (1/n) sum_k b_k E ||delta||^2``.

    ``expert``: ``reshuffle``, at most one epoch (every sample is used at most once).  Raises :class:`AssumptionError`.

    >>> task = RegressionTask(np.eye(1), np.zeros(1), 0.0)
    >>> expert = Expert("a", n=4, batch_size=1, learning_rate=0.5, steps=1, sampling="reshuffle")
    >>> exact = one_pass_moments(task, [1.0], expert)  # x = 1 - a^2/2: mean 1/2, second moment 1 - 1 + 3/4
    >>> exact.mean.tolist(), exact.risk
    ([0.5], 0.375)
    """
    x0, Sigma = np.asarray(base, dtype=np.float64), np.asarray(task.Sigma, dtype=np.float64)
    rates, sizes = _one_pass_steps(expert)
    beta, omega, n = float(expert.momentum), float(expert.weight_decay), int(expert.n)
    dim = x0.size
    zero = np.zeros((dim, dim))
    first = np.concatenate([x0 - task.w, np.zeros(dim)])
    state = np.block([[np.outer(x0 - task.w, x0 - task.w), zero], [zero, zero]])
    twins = np.zeros((2 * dim, 2 * dim))  # summed over the samples drawn so far
    pull = Sigma + omega * np.eye(dim)
    for eta, b in zip(rates, sizes, strict=True):
        step = np.block([[np.eye(dim) - eta * pull, -eta * beta * np.eye(dim)], [pull, beta * np.eye(dim)]])
        kick = np.block([[-eta * np.eye(dim)], [np.eye(dim)]])
        S = state[:dim, :dim]
        noise = _isserlis(Sigma, S, b) + task.noise**2 * Sigma / b
        constant = kick @ (omega * task.w)
        moved = step @ first
        kicked = kick @ (2 * b * noise) @ kick.T / b**2
        spread = kick @ _isserlis(Sigma, twins[:dim, :dim], b) @ kick.T
        twins = step @ twins @ step.T + spread + b * kicked
        state = step @ state @ step.T + np.outer(moved, constant) + np.outer(constant, moved)
        state += np.outer(constant, constant) + kick @ noise @ kick.T
        first = moved + constant
    mean = first[:dim]
    second = state[:dim, :dim]
    covariance = second - np.outer(mean, mean)
    shift = mean + task.w - x0
    return RegressionMoments(
        mean=mean + task.w,
        covariance=covariance,
        risk=0.5 * float(np.trace(Sigma @ second)) + 0.5 * task.noise**2,
        drift=float(np.sqrt(shift @ shift + np.trace(covariance))),
        epsilon=float(np.sqrt(max(float(np.trace(twins[:dim, :dim])), 0.0) / n)),
    )


def regression_merge(
    tasks: Sequence[RegressionTask],
    base: ArrayLike,
    moments: Sequence[RegressionMoments],
    coefficients: ArrayLike,
    weights: ArrayLike,
) -> RegressionMerge:
    """Exact joint risk, dispersion and stability of ``x_0 + sum alpha_i (x_i - x_0)``, experts independent.

    ``coefficients`` and ``weights`` have shape ``(N,)``; ``base`` x_0 (d,).

    >>> task = RegressionTask(np.eye(1), np.zeros(1), 1.0)
    >>> one = RegressionMoments(np.zeros(1), np.eye(1), 1.0, 1.0, 0.2)
    >>> regression_merge([task] * 2, [0.0], [one] * 2, [0.5, 0.5], [0.5, 0.5]).risk  # half the variance
    0.75
    """
    x0 = np.asarray(base, dtype=np.float64)
    alpha, p = np.asarray(coefficients, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    mean = x0 + sum((a * (m.mean - x0) for a, m in zip(alpha, moments, strict=True)), np.zeros(()))
    covariance = sum((a**2 * m.covariance for a, m in zip(alpha, moments, strict=True)), np.zeros(()))
    risk = V = 0.0
    for weight, a, task, moment in zip(p, alpha, tasks, moments, strict=True):
        away, apart = mean - task.w, mean - moment.mean
        second = np.outer(away, away) + covariance
        risk += weight * (0.5 * float(np.trace(task.Sigma @ second)) + 0.5 * task.noise**2)
        V += weight * float(apart @ apart + np.trace(covariance) + (1 - 2 * a) * np.trace(moment.covariance))
    stability = float(np.sum(p * alpha**2 * np.array([moment.epsilon**2 for moment in moments])))
    return RegressionMerge(risk=float(risk), V=float(V), stability=stability)


@dataclass(frozen=True, eq=False)
class LeastSquaresMerge:
    """Merged least-squares fits: joint ``risk`` E F(M), ``training_risk`` E F_S(M), ``gap``, dispersion ``V``."""

    risk: float
    training_risk: float
    gap: float
    V: float


def least_squares_merge(
    tasks: Sequence[RegressionTask],
    base: ArrayLike,
    samples: Sequence[int],
    coefficients: ArrayLike,
    weights: ArrayLike,
) -> LeastSquaresMerge:
    """Exact expectations for ``x_0 + sum alpha_i (x_i - x_0)``, x_i the least-squares fit to ``n_i > d + 1`` samples.

    *Statement:* ``E x_i = w_i``, ``Cov x_i = s_i^2 Sigma_i^(-1)/(n_i-d-1)``, and the gap is ``sum_i p_i s_i^2 (d/2)
    [2 alpha_i/n_i + alpha_i^2 (1/(n_i-d-1) - 1/n_i)]``.  *Proof:* with ``M - w_i = alpha_i (x_i - w_i) + c``, c
    independent of S_i, the residuals are ``alpha_i P xi + A c - xi`` with the hat matrix P of trace d; the cross terms
    with c vanish given A.  Unlike the additive family, where the gap is linear in alpha_i, it has a quadratic part: the
    Hessian of the sample is random.  The gap is a difference of expectations and holds for any x_0.

    Raises :class:`RecipeError` for ``n_i <= d + 1``, where the covariance is infinite.

    >>> task = RegressionTask(np.eye(2), np.zeros(2), 1.0)
    >>> fit = least_squares_merge([task], [0.0, 0.0], [13], [1.0], [1.0])
    >>> fit.risk, round(fit.training_risk, 9)  # (1 + 2/10)/2 and (1 - 2/13)/2
    (0.6, 0.423076923)
    """
    dim = np.asarray(base).size
    moments, gap = [], 0.0
    alpha, p = np.asarray(coefficients, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    for index, (task, n) in enumerate(zip(tasks, samples, strict=True)):
        if n <= dim + 1:
            raise RecipeError(
                f"least squares: n is {n} for task {index}; the covariance is infinite unless n > d + 1 = {dim + 1}"
            )
        covariance = task.noise**2 * np.linalg.inv(task.Sigma) / (n - dim - 1)
        moments.append(RegressionMoments(np.asarray(task.w, dtype=np.float64), covariance, 0.0, 0.0, 0.0))
        a = float(alpha[index])
        bracket = 2 * a / n + a**2 * (1 / (n - dim - 1) - 1 / n)
        gap += float(p[index]) * task.noise**2 * dim / 2 * bracket
    merged = regression_merge(tasks, base, moments, alpha, p)
    return LeastSquaresMerge(risk=merged.risk, training_risk=merged.risk - float(gap), gap=float(gap), V=merged.V)


def draw_regression(
    task: RegressionTask, n: int, replicates: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Gaussian inputs ``(replicates, n, d)`` and targets ``(replicates, n)``."""
    root = np.linalg.cholesky(task.Sigma)
    inputs = rng.standard_normal((replicates, n, len(task.w))) @ root.T
    return inputs, np.asarray(inputs @ task.w + task.noise * rng.standard_normal((replicates, n)))


def simulate_regression(
    base: ArrayLike, expert: Expert, inputs: FloatArray, targets: FloatArray, batches: Sequence[np.ndarray]
) -> FloatArray:
    """Real minibatch SGD or heavy ball with coupled decay on regression data; returns x_K, ``(replicates, d)``.

    ``batches`` as from :func:`theory.quadratic.draw_batches`.
    """
    steps = write_out(expert)
    x = np.broadcast_to(np.asarray(base, dtype=np.float64), (inputs.shape[0], inputs.shape[2])).copy()
    buffer, rows = np.zeros_like(x), np.arange(inputs.shape[0])[:, None]
    for eta, batch in zip(steps.learning_rate, batches, strict=True):
        a, y = inputs[rows, batch], targets[rows, batch]
        residual = np.einsum("rbd,rd->rb", a, x) - y
        pull = np.einsum("rb,rbd->rd", residual, a) / batch.shape[1] + float(expert.weight_decay) * x
        buffer = float(expert.momentum) * buffer + pull
        x = x - eta * buffer
    return x
