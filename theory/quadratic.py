"""Exact ground truth: additive-noise quadratics (theory section 9), and a simulator of real minibatch SGD.

Task i has ``f(x; z) = (x-z)' H (x-z)/2`` with ``z ~ (theta, Omega)``.  Every expectation that the bounds are about is
closed form for SGD, heavy ball and Nesterov with any schedule, coupled or decoupled decay and sampling, and for linear
merges and DARE of heterogeneous experts whose Hessians need not commute.  Norms are replaced by the *signed* clock of
each eigenmode of H.  Everything but the simulator broadcasts over configurations: H ``(..., d, d)``, theta and base
``(..., d)``, fields of the experts ``(...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.clocks import Steps, require_sgd, write_out
from theory.errors import AssumptionError, RecipeError
from theory.master import lifted
from theory.recipe import Expert, Schedule
from theory.symbolic import FloatArray


@dataclass(frozen=True, eq=False)
class QuadraticTask:
    """A quadratic task: Hessian ``H`` (..., d, d) symmetric PSD, mean ``theta`` (..., d), covariance ``Omega``."""

    H: FloatArray
    theta: FloatArray
    Omega: FloatArray


@dataclass(frozen=True, eq=False)
class ExpertMoments:
    """Exact moments of one expert over data and batches.

    ``mean`` E x_K (..., d), ``covariance`` (..., d, d), ``data_covariance`` Cov(x_K, z_bar) (..., d, d), ``response``
    (..., d, d): ``E[x_K | data] = constant + response z_bar``; and, shape ``(...)``, ``epsilon`` (stability), ``drift``
    rms ``||x_K - x_0||``, ``risk`` E F(x_K), ``training_risk`` E F_S(x_K).
    """

    mean: FloatArray
    covariance: FloatArray
    data_covariance: FloatArray
    response: FloatArray
    epsilon: FloatArray
    drift: FloatArray
    risk: FloatArray
    training_risk: FloatArray


@dataclass(frozen=True, eq=False)
class MergeMoments:
    """Exact expectations of a merge: joint ``risk`` E F(M), ``training_risk`` E F_S(M), their ``gap``, dispersion
    ``V``, and ``stability`` E_bar; shape ``(...)``."""

    risk: FloatArray
    training_risk: FloatArray
    gap: FloatArray
    V: FloatArray
    stability: FloatArray


def _plain(value: ArrayLike) -> FloatArray:
    """A numpy float for one configuration, an array for many."""
    number: FloatArray = np.asarray(value, dtype=np.float64)[()]
    return number


def _trace(matrix: FloatArray) -> FloatArray:
    return np.asarray(np.trace(matrix, axis1=-2, axis2=-1))


def _form(matrix: FloatArray, left: FloatArray, right: FloatArray | None = None) -> FloatArray:
    return np.asarray(np.einsum("...a,...ab,...b->...", left, matrix, left if right is None else right))


def _turned(basis: FloatArray, matrix: FloatArray) -> FloatArray:
    """``basis matrix basis'``."""
    return np.asarray(basis @ matrix @ np.swapaxes(basis, -1, -2))


def mode_response(
    learning_rate: FloatArray,
    curvature: FloatArray,
    momentum: FloatArray,
    decay: FloatArray,
    present: NDArray[np.bool_],
    *,
    nesterov: bool = False,
    decoupled: bool = False,
) -> tuple[FloatArray, FloatArray]:
    """Signed response w_k and carry of quadratic modes: ``x_K = carry x_0 + sum_k w_k h z_k``.

    ``learning_rate`` and ``present`` (..., K) are right-aligned steps, ``curvature`` h (..., d), ``momentum`` and
    ``decay`` (...).  Returns shapes ``(..., d, K)`` and ``(..., d)``.  Coupled decay has ``carry = 1 - tau (h +
    omega)``; *decoupled* decay with momentum does not.  Source: theory sections 4 and 9, signed matrices.

    >>> w, carry = mode_response(np.full(2, 0.5), np.ones(1), np.zeros(()), np.zeros(()), np.ones(2, dtype=bool))
    >>> w.tolist(), carry.tolist()  # 0.5 (1 - 0.5), 0.5; and (1 - 0.5)^2
    ([[0.25, 0.5]], [0.25])
    """
    count = learning_rate.shape[-1]
    beta, omega = momentum[..., None], decay[..., None]
    pull = curvature if decoupled else curvature + omega
    ahead, coupling = (1 + beta, beta**2) if nesterov else (np.ones_like(beta), beta)
    steps = np.broadcast_shapes(learning_rate.shape, present.shape)
    shape = np.broadcast_shapes((*steps[:-1], 1), pull.shape, beta.shape, omega.shape)
    response = np.zeros((*shape, count))
    first, second = np.ones(shape), np.zeros(shape)
    for k in range(count - 1, -1, -1):
        eta, here = learning_rate[..., None, k], present[..., None, k]
        response[..., k] = np.where(here, first * eta * ahead + second, 0.0)
        kept = 1 - eta * omega if decoupled else 1.0
        first, second = (
            np.where(here, first * (kept - eta * ahead * pull) - second * pull, first),
            np.where(here, first * eta * coupling + second * beta, second),
        )
    return response, first


def _modes(task: QuadraticTask, expert: Expert) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, Steps]:
    """Eigenvalues (..., d), eigenvectors (..., d, d), signed response (..., d, K), carry (..., d), steps."""
    require_sgd(expert)
    steps = write_out(expert)
    h, basis = np.linalg.eigh(np.asarray(task.H, dtype=np.float64))
    response, carry = mode_response(
        steps.learning_rate,
        h,
        np.asarray(expert.momentum, dtype=np.float64),
        np.asarray(expert.weight_decay, dtype=np.float64),
        steps.present,
        nesterov=expert.nesterov,
        decoupled=expert.decoupled_decay,
    )
    return h, basis, response, carry, steps


def gamma_matrix(response: FloatArray, steps: Steps, n: ArrayLike, sampling: str) -> FloatArray:
    """Covariance over batches of the impulse one sample gives to two modes, shape ``(..., d, d)``; diagonal Gamma.

    ``response`` has shape ``(..., d, K)``, signed, zero where a step is absent; ``n`` has shape ``(...)``.  Source:
    theory sections 5 and 9, bilinear form.
    """
    b = np.broadcast_to(steps.batch_size, (*response.shape[:-2], response.shape[-1]))[..., None, None, :]
    samples = np.asarray(n, dtype=np.float64)[..., None, None]
    pairs = response[..., :, None, :] * response[..., None, :, :]
    if sampling == "without_replacement":
        return np.asarray((pairs * (1 / (b * samples[..., None]) - 1 / samples[..., None] ** 2)).sum(axis=-1))
    if sampling == "with_replacement":
        return np.asarray((pairs / b).sum(axis=-1) * (1 - 1 / samples) / samples)
    total = (pairs / b).sum(axis=-1) / samples
    mean = np.zeros(response.shape[:-1])
    for k in range(response.shape[-1]):
        starts = (steps.position[..., k] == 0)[..., None]
        total = total - np.where(starts[..., None], mean[..., :, None] * mean[..., None, :], 0.0)
        mean = np.where(starts, 0.0, mean) + response[..., k] / samples[..., 0]
    return np.asarray(total - mean[..., :, None] * mean[..., None, :])


def expert_moments(task: QuadraticTask, base: ArrayLike, expert: Expert) -> ExpertMoments:
    """Exact moments of one expert started at ``base`` (..., d): any schedule, momentum, decay, sampling (section 9).

    *Statement:* per mode, ``x_K = carry x_0 + h sum_k w_k z_k`` with ``z_k`` the batch mean, so ``E x_K = carry x_0 +
    h tau theta``, ``Cov = n h h' [tau tau'/n^2 + Gamma] Omega``, ``Cov(x_K, z_bar) = h tau Omega/n`` and ``epsilon^2 =
    2 tr Cov / n``.  Raises :class:`AssumptionError` for optimizers other than SGD.

    >>> task = QuadraticTask(np.eye(1), np.zeros(1), np.eye(1))
    >>> exact = expert_moments(task, [0.0], Expert("a", n=10, batch_size=10, learning_rate=1.0, steps=1, L=1.0))
    >>> round(float(exact.risk), 9), round(float(exact.epsilon), 9)  # x is the mean of ten: 1/2 + 1/20, sqrt(2)/10
    (0.55, 0.141421356)
    """
    x0 = np.asarray(base, dtype=np.float64)
    n = np.asarray(expert.n, dtype=np.float64)
    h, basis, response, carry, steps = _modes(task, expert)
    tau = response.sum(axis=-1)
    back = np.swapaxes(basis, -1, -2)
    start, centre = (back @ x0[..., None])[..., 0], (back @ np.asarray(task.theta)[..., None])[..., 0]
    noise = _turned(back, np.asarray(task.Omega))
    mean = carry * start + tau * h * centre
    size = n[..., None, None]
    spread = tau[..., :, None] * tau[..., None, :] / size**2 + gamma_matrix(response, steps, n, expert.sampling)
    covariance = size * (h[..., :, None] * h[..., None, :]) * spread * noise
    mean_x = (basis @ mean[..., None])[..., 0]
    cov_x = _turned(basis, covariance)
    map_x = (basis * (h * tau)[..., None, :]) @ back
    data_cov = map_x @ np.asarray(task.Omega) / size
    risk = _risk(task, mean_x, cov_x)
    return ExpertMoments(
        mean=mean_x,
        covariance=cov_x,
        data_covariance=data_cov,
        response=map_x,
        epsilon=_plain(np.sqrt(np.maximum(2 * _trace(covariance) / n, 0.0))),
        drift=_plain(np.sqrt(np.sum((mean_x - x0) ** 2, axis=-1) + _trace(cov_x))),
        risk=_plain(risk),
        training_risk=_plain(risk - _trace(np.asarray(task.H) @ data_cov)),
    )


def _risk(task: QuadraticTask, mean: FloatArray, covariance: FloatArray) -> FloatArray:
    away = mean - task.theta
    return np.asarray(0.5 * (_form(task.H, away) + _trace(task.H @ (covariance + task.Omega))))


def merge_moments(
    tasks: Sequence[QuadraticTask],
    base: ArrayLike,
    experts: Sequence[Expert],
    coefficients: ArrayLike,
    weights: ArrayLike,
    *,
    shared_samples: bool = False,
    drop_rate: ArrayLike = 0.0,
    rescale: bool = True,
    independent_masks: bool = True,
) -> MergeMoments:
    """Exact expectations of ``x_0 + sum alpha_i mask_i (x_i - x_0)``; Hessians need not commute.

    ``coefficients`` and ``weights`` have shape ``(N, ...)``.  Experts are independent, unless ``shared_samples``: then
    all tasks see the same draws, ``z_ij = theta_i + Omega_i^(1/2) y_j`` (equal n, independent batches), and the
    stability exchanges all copies of a sample at once.  ``drop_rate`` > 0 is DARE: masks drop coordinates with that
    probability, survivors are divided by ``1 - drop_rate`` with ``rescale``, and ``independent_masks`` differ between
    experts.  Raises :class:`RecipeError` for shared samples with unequal n.

    *Statement:* as :func:`expert_moments`; masks of mean m and variance v per coordinate turn alpha into ``m alpha``,
    add ``v diag(sum alpha_i^2 E Delta_i^2)`` (one mask for all: ``v diag(E (sum alpha_i Delta_i)^2)``) to the
    covariance of the merge, and turn ``alpha_i^2 eps_i^2`` into ``(m^2 + v) alpha_i^2 eps_i^2``.
    """
    x0 = np.asarray(base, dtype=np.float64)
    drop = np.asarray(drop_rate, dtype=np.float64)
    level, variance = (np.ones_like(drop), drop / (1 - drop)) if rescale else (1 - drop, drop * (1 - drop))
    given, p, kept = lifted(coefficients, weights, level[None])
    alpha = given * kept
    moments = [expert_moments(task, x0, expert) for task, expert in zip(tasks, experts, strict=True)]
    cross = _cross_terms(tasks, experts, moments) if shared_samples else {}
    shifts = [moment.mean - x0 for moment in moments]
    mean = x0 + sum((a[..., None] * s for a, s in zip(alpha, shifts, strict=True)), np.zeros(()))
    linear = sum((a[..., None, None] ** 2 * m.covariance for a, m in zip(alpha, moments, strict=True)), np.zeros(()))
    for (i, l), (between, _) in cross.items():
        linear = linear + (alpha[i] * alpha[l])[..., None, None] * between
    unscaled = linear / level[..., None, None] ** 2
    masked = _mask_variance(given, shifts, moments, unscaled, independent=independent_masks)
    covariance = linear + variance[..., None, None] * masked
    risk = gap = dispersion = np.zeros(())
    for j, (task, moment) in enumerate(zip(tasks, moments, strict=True)):
        risk = risk + p[j] * _risk(task, mean, covariance)
        link = alpha[j][..., None, None] * moment.data_covariance
        along = alpha[j] * _trace(moment.covariance)
        for (i, l), (between, with_data) in cross.items():
            if l == j:
                link = link + alpha[i][..., None, None] * with_data
                along = along + alpha[i] * _trace(between)
        gap = gap + p[j] * _trace(task.H @ link)
        away = mean - moment.mean
        spread = _trace(covariance) + _trace(moment.covariance) - 2 * along
        dispersion = dispersion + p[j] * (np.sum(away * away, axis=-1) + spread)
    eps = [np.asarray(moment.epsilon) ** 2 for moment in moments]
    if shared_samples:
        n = np.asarray(experts[0].n, dtype=np.float64)
        total = sum((a**2 * e for a, e in zip(alpha, eps, strict=True)), np.zeros(()))
        for (i, l), (between, _) in cross.items():
            total = total + alpha[i] * alpha[l] * 2 * _trace(between) / n
        pushes = sum((a**2 * e for a, e in zip(given, eps, strict=True)), np.zeros(()))
        if not independent_masks:
            pushes = total / level**2
        stability = total + variance * pushes
    else:
        own = [w * (level**2 + variance) * a**2 * e for w, a, e in zip(p, given, eps, strict=True)]
        stability = sum(own, np.zeros(()))
    return MergeMoments(
        risk=_plain(risk),
        training_risk=_plain(risk - gap),
        gap=_plain(gap),
        V=_plain(dispersion),
        stability=_plain(stability),
    )


def _mask_variance(
    alpha: FloatArray, shifts: list[FloatArray], moments: list[ExpertMoments], linear: FloatArray, *, independent: bool
) -> FloatArray:
    """Diagonal of the second moment of what masks multiply, as a matrix ``(..., d, d)``."""
    if independent:
        parts = [
            a[..., None] ** 2 * (s**2 + np.diagonal(m.covariance, axis1=-2, axis2=-1))
            for a, s, m in zip(alpha, shifts, moments, strict=True)
        ]
        square: FloatArray = np.asarray(sum(parts, np.zeros(())))
    else:
        moved = sum((a[..., None] * s for a, s in zip(alpha, shifts, strict=True)), np.zeros(()))
        square = moved**2 + np.diagonal(linear, axis1=-2, axis2=-1)
    return np.asarray(square[..., None] * np.eye(linear.shape[-1]))


def _cross_terms(
    tasks: Sequence[QuadraticTask], experts: Sequence[Expert], moments: list[ExpertMoments]
) -> dict[tuple[int, int], tuple[FloatArray, FloatArray]]:
    """``Cov(x_i, x_l)`` and ``Cov(x_i, z_bar_l)`` for i != l when all tasks see the same draws."""
    n = np.asarray(experts[0].n, dtype=np.float64)
    if any(np.any(np.asarray(expert.n) != n) for expert in experts):
        raise RecipeError("shared samples: n differs between experts; give all of them the same number of samples")
    roots = []
    for task in tasks:
        values, vectors = np.linalg.eigh(np.asarray(task.Omega, dtype=np.float64))
        roots.append(_turned(vectors, np.sqrt(np.maximum(values, 0.0))[..., None] * np.eye(values.shape[-1])))
    found = {}
    for i, left in enumerate(moments):
        for l, right in enumerate(moments):
            if i != l:
                with_data = left.response @ roots[i] @ roots[l] / n[..., None, None]
                found[i, l] = (with_data @ np.swapaxes(right.response, -1, -2), with_data)
    return found


def constant_gap(
    tasks: Sequence[QuadraticTask], experts: Sequence[Expert], coefficients: ArrayLike, weights: ArrayLike
) -> float:
    """Gap of a linear merge of plain SGD experts, ``sum p_i alpha_i tr(H (I-(I-eta H)^K) Omega)/n`` (section 9).

    Constant learning rates without momentum and decay; everything else is refused by :class:`AssumptionError`.
    """
    alpha, p = np.asarray(coefficients, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    total = 0.0
    for a, weight, task, expert in zip(alpha, p, tasks, experts, strict=True):
        require_sgd(expert)
        if isinstance(expert.learning_rate, Schedule) or np.any(expert.momentum) or np.any(expert.weight_decay):
            raise AssumptionError(
                f"expert {expert.name!r}: learning_rate changes, or momentum or weight_decay is not 0, which "
                "constant_gap does not cover; use merge_moments"
            )
        identity = np.eye(len(task.theta))
        step = identity - float(np.asarray(expert.learning_rate)) * task.H
        progress = identity - np.linalg.matrix_power(step, int(np.asarray(expert.steps)))
        total += weight * a * float(np.trace(task.H @ progress @ task.Omega)) / int(expert.n)
    return total


def with_true_constants(task: QuadraticTask, base: ArrayLike, expert: Expert) -> Expert:
    """The recipe with the true constants of the quadratic task filled in (all known exactly, nothing measured).

    The gradient gap of two samples is ``H(z - z')`` at every x, so its rms is an envelope (``D_envelope``) and equals
    ``D_2``; ``D_inf`` does not exist for unbounded noise.
    """
    x0, n = np.asarray(base, dtype=np.float64), np.asarray(expert.n, dtype=np.float64)
    H, decay = np.asarray(task.H, dtype=np.float64), np.asarray(expert.weight_decay, dtype=np.float64)
    h = np.linalg.eigvalsh(H)
    noise = _trace(H @ task.Omega @ H)
    away = x0 - task.theta
    pull = (H @ away[..., None])[..., 0] + decay[..., None] * x0
    inside = _plain(np.sqrt(np.maximum(noise * (1 - 1 / n), 0.0)))
    moments = expert_moments(task, x0, expert)
    scatter = _trace(H @ task.Omega)
    least = 0.5 * scatter * (1 - 1 / n)
    decayed = np.where(decay > 0, decay, 1.0)[..., None, None]
    left = np.where(decay[..., None, None] > 0, H - H @ np.linalg.solve(H + decayed * np.eye(h.shape[-1]), H), 0.0)
    theta = np.asarray(task.theta, dtype=np.float64)
    least = least + 0.5 * (_form(left, theta) + _trace(left @ task.Omega) / n)
    gap = _plain(np.sqrt(2 * noise))
    return replace(
        expert,
        L=_plain(h[..., -1]),
        mu=_plain(h[..., 0]) if expert.curvature == "strongly_convex" else None,
        initial_gradient_norm=_plain(np.sqrt(np.sum(pull * pull, axis=-1) + noise / n)),
        sigma=inside,
        sigma0=inside,
        D_2=gap,
        D_envelope=gap,
        initial_risk=_plain(0.5 * (_form(H, away) + scatter)),
        training_risk=_plain(np.maximum(moments.training_risk, 0.0)),
        minimal_risk=_plain(np.maximum(least, 0.0)),
        base_norm=_plain(np.linalg.norm(x0, axis=-1)),
    )


def draw_data(task: QuadraticTask, n: int, replicates: int, rng: np.random.Generator) -> FloatArray:
    """Gaussian samples of a task, shape ``(replicates, n, d)``."""
    values, vectors = np.linalg.eigh(task.Omega)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.asarray(task.theta + rng.standard_normal((replicates, n, len(task.theta))) @ root.T)


def draw_batches(expert: Expert, replicates: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Sample indices of every batch, a list over steps of arrays ``(replicates, b_k)``: literal sampling."""
    n, steps = int(expert.n), write_out(expert)
    batches: list[np.ndarray] = []
    order = np.empty((replicates, 0), dtype=np.int64)
    used = 0
    for position, size in zip(steps.position, steps.batch_size.astype(np.int64), strict=True):
        if expert.sampling == "with_replacement":
            batches.append(rng.integers(0, n, size=(replicates, size)))
            continue
        if expert.sampling == "without_replacement" or position == 0:
            order, used = np.argsort(rng.random((replicates, n)), axis=1), 0
        batches.append(order[:, used : used + size])
        used += int(size)
    return batches


def simulate_sgd(
    task: QuadraticTask,
    base: ArrayLike,
    expert: Expert,
    data: FloatArray,
    batches: Sequence[np.ndarray],
) -> FloatArray:
    """Real minibatch SGD (heavy ball, Nesterov, decay) on given data and batches; returns x_K, ``(replicates, d)``.

    ``data`` comes from :func:`draw_data` (or is any array ``(replicates, n, d)``), ``batches`` from
    :func:`draw_batches`; giving both makes coupled runs (twins that share seeds and batches) possible.
    """
    steps = write_out(expert)
    x = np.broadcast_to(np.asarray(base, dtype=np.float64), (data.shape[0], data.shape[2])).copy()
    buffer = np.zeros_like(x)
    rows = np.arange(data.shape[0])[:, None]
    momentum, decay = float(expert.momentum), float(expert.weight_decay)
    for eta, batch in zip(steps.learning_rate, batches, strict=True):
        gradients = (x[:, None, :] - data[rows, batch]) @ task.H
        pull = gradients.mean(axis=1) + (0.0 if expert.decoupled_decay else decay * x)
        buffer = momentum * buffer + pull
        kept = x * (1 - eta * decay) if expert.decoupled_decay else x
        x = kept - eta * (pull + momentum * buffer if expert.nesterov else buffer)
    return x
