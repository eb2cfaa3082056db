"""The training clock (theory section 4): impulse response w_k, training time tau, noise time nu.

``w_k`` says how far the final iterate can move per unit of gradient perturbation at step k.  Everything a schedule, a
momentum or a weight decay does to a bound, it does through ``w``.  Evaluation is in log space: a vacuous clock is
``inf``, never NaN.

Steps are *right-aligned*: arrays over steps have shape ``(..., K_max)``, their last entry is the last step, and steps
that a configuration does not have carry ``w = 0``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.assumptions import Tier
from theory.errors import AssumptionError, RecipeError
from theory.recipe import LOGS, Expert, Schedule
from theory.symbolic import FloatArray, Formula, vacuous
from theory.symbols import symbol

LARGEST_GRID = 50_000_000


@dataclass(frozen=True, eq=False)
class Clock:
    """Training time ``tau`` (param^2/loss) and noise time ``nu`` (its square) of one expert, shape ``(...)``.

    ``log_w`` (shape ``(..., K_max)``, right-aligned) is present where the response was computed step by step and absent
    where the closed form was used.  ``form`` names the statement; ``tier`` is *estimated* when a measured rate or an
    uncertified curve was used.
    """

    tau: FloatArray
    nu: FloatArray
    log_w: FloatArray | None
    form: str
    tier: Tier


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of an expert written out, right-aligned: all fields have shape ``(..., K_max)``.

    ``present`` marks real steps; ``position`` and ``epoch_steps`` place a step in its epoch (reshuffling only, else
    zero and one).
    """

    learning_rate: FloatArray
    batch_size: FloatArray
    present: NDArray[np.bool_]
    position: NDArray[np.int64]


def tau_formula() -> Formula:
    """Training time of SGD at a constant learning rate, kappa != 0 (theory section 4)."""
    eta, kappa, steps = symbol("eta"), symbol("kappa"), symbol("K")
    return Formula("tau", ("eta", "kappa", "K"), ((1 + eta * kappa) ** steps - 1) / kappa, "section 4")


def nu_formula() -> Formula:
    """Noise time of SGD at a constant learning rate, kappa != 0 and eta*kappa != -2 (theory section 4)."""
    eta, kappa, steps = symbol("eta"), symbol("kappa"), symbol("K")
    expression = eta * ((1 + eta * kappa) ** (2 * steps) - 1) / (kappa * (2 + eta * kappa))
    return Formula("nu", ("eta", "kappa", "K"), expression, "section 4")


@np.errstate(all="ignore")
def geometric_sums(excess: ArrayLike, steps: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """``sum r^a`` and ``sum r^(2a)`` over ``a = 0..K-1`` for ``r = 1 + excess``, any real r, broadcast.

    Exact limits at ``excess = 0`` (K, K) and ``excess = -2`` (second sum K); overflow gives ``inf``; never NaN.  These
    are ``tau/eta`` and ``nu/eta^2`` of section 4 in a form that neither cancels nor overflows early.
    """
    x, k = np.broadcast_arrays(np.asarray(excess, dtype=np.float64), np.asarray(steps, dtype=np.float64))
    if x.size and x.min() > -1 and x.max() < 1e100 and k.min() > 1:
        return _positive_sums(x, k)
    with np.errstate(all="ignore"):
        negative = x < -1
        log_r = np.where(negative, np.log1p(-(x + 2)), np.log1p(x))
        odd_negative = negative & (np.mod(k, 2) == 1)
        numerator = np.where(odd_negative, -(np.exp(k * log_r) + 1), np.expm1(k * log_r))
        first = np.where(x == 0, k, numerator / np.where(x == 0, 1.0, x))
        square = np.where((x == 0) | (x == -2), 1.0, x * (2 + x))
        second = np.where((x == 0) | (x == -2), k, np.expm1(2 * k * log_r) / square)
        single, nothing, huge = k == 1, k == 0, np.isinf(square)
    huge_ratio = np.isinf(x) & (k > 1)
    first, second = np.where(huge_ratio, np.inf, first), np.where(huge_ratio, np.inf, second)
    first = np.where(single, 1.0, np.where(nothing, 0.0, first))
    second = np.where(single, 1.0, np.where(nothing, 0.0, np.where(huge, np.inf, second)))
    # r = 0: only the last step counts
    return np.where((x == -1) & (k > 0), 1.0, first), np.where((x == -1) & (k > 0), 1.0, second)


def _positive_sums(x: FloatArray, k: FloatArray) -> tuple[FloatArray, FloatArray]:
    """:func:`geometric_sums` for a positive ratio and at least two steps: ``r^2k - 1 = (r^k - 1)(r^k + 1)``."""
    with np.errstate(all="ignore"):
        grown = np.log1p(x)
        grown *= k
        grown = np.asarray(np.expm1(grown))
        still = x == 0
        if still.any():
            safe = np.where(still, 1.0, x)
            first = np.where(still, k, grown / safe)
        else:
            safe, first = x, grown / x
        second = (grown + 2.0) * first
        second /= 2.0 + safe
        if still.any():
            second = np.where(still, k, second)
    return np.asarray(first), np.asarray(second)


@np.errstate(all="ignore")
def sgd_times(learning_rate: ArrayLike, kappa: ArrayLike, steps: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """``(tau, nu)`` of SGD at constant learning rate; kappa -> 0 and eta*kappa = -2 exact (theory section 4)."""
    eta = np.asarray(learning_rate, dtype=np.float64)
    with np.errstate(over="ignore"):
        first, second = geometric_sums(eta * np.asarray(kappa, dtype=np.float64), steps)
        return eta * first, eta * (eta * second)


def lowest_curvature(expert: Expert) -> FloatArray:
    """Lower Hessian bound m of the curvature class: 0, mu, or -L (theory section 1)."""
    if expert.curvature == "convex":
        return np.asarray(0.0)
    if expert.curvature == "strongly_convex":
        return np.asarray(expert.mu, dtype=np.float64)
    return -smoothness(expert)


def smoothness(expert: Expert) -> FloatArray:
    """The per-sample smoothness L; raises :class:`RecipeError` if it is not given."""
    if expert.L is None:
        raise RecipeError(
            f"expert {expert.name!r}: L is missing; give the per-sample smoothness, or a measured kappa and drift"
        )
    return np.asarray(expert.L, dtype=np.float64)


@np.errstate(all="ignore")
def step_excess(expert: Expert, learning_rate: ArrayLike, *, per_step: bool = False) -> FloatArray:
    """``q - 1`` of one step, ``max(-eta (m + omega), eta (L + omega) - 2)``, or ``eta kappa`` where kappa was measured.

    ``per_step``: the learning rate has a step axis that the expert's fields lack.  Source: theory section 1.
    """
    eta = np.asarray(learning_rate, dtype=np.float64)

    def aligned(value: ArrayLike) -> FloatArray:
        array = np.asarray(value, dtype=np.float64)
        return array[..., None] if per_step and array.ndim else array

    if expert.kappa is not None:
        return eta * aligned(expert.kappa)
    omega = aligned(expert.weight_decay)
    low, high = aligned(lowest_curvature(expert)), aligned(smoothness(expert))
    with np.errstate(over="ignore"):
        return np.maximum(-eta * (low + omega), eta * (high + omega) - 2)


def require_sgd(expert: Expert) -> None:
    """Refuse optimizers that sections 4-6 do not cover, with the estimated alternatives."""
    remedy = (
        "give its measured drift instead (the stability then follows from the cap), or its measured epsilon too; the "
        "tier is then estimated"
    )
    if expert.optimizer.lower() != "sgd":
        raise AssumptionError(
            f"expert {expert.name!r}: optimizer {expert.optimizer!r} is not covered by the stability and drift "
            f"theorems (only 'sgd', with or without momentum); {remedy}"
        )
    if expert.gradient_clipping:
        raise AssumptionError(
            f"expert {expert.name!r}: gradient_clipping is not covered by the stability and drift theorems; {remedy}"
        )


def step_count(expert: Expert) -> FloatArray:
    """Number of steps K, shape ``(...)``, from ``steps`` or from the length of a schedule."""
    if expert.steps is not None:
        return np.asarray(expert.steps, dtype=np.float64)
    for field in ("learning_rate", "batch_size", *LOGS):
        value = getattr(expert, field)
        if isinstance(value, Schedule):
            return np.asarray(value.steps, dtype=np.float64)
    raise RecipeError(f"expert {expert.name!r}: steps is missing; give the number of optimisation steps")


def is_constant(expert: Expert) -> bool:
    """Whether the closed forms apply: one learning rate, one batch size, no momentum, no epochs."""
    return (
        not isinstance(expert.learning_rate, Schedule)
        and not isinstance(expert.batch_size, Schedule)
        and expert.sampling != "reshuffle"
        and not np.any(np.asarray(expert.momentum) != 0)
    )


def _stepwise(value: float | int | NDArray[np.float64] | NDArray[np.int64] | Schedule) -> FloatArray:
    if isinstance(value, Schedule):
        return value.values
    return np.asarray(value, dtype=np.float64)[..., None]


def write_out(expert: Expert) -> Steps:
    """The steps of an expert, right-aligned, with actual batch sizes (short last batch of an epoch kept by default).

    Raises :class:`RecipeError` if the grid would not fit in memory or a batch schedule does not tile its epochs.
    """
    count = step_count(expert)
    longest = int(count.max())
    eta, batch, samples = _stepwise(expert.learning_rate), _stepwise(expert.batch_size), _stepwise(expert.n)
    shape = np.broadcast_shapes(eta.shape, batch.shape, samples.shape, (*count.shape, min(longest, LARGEST_GRID + 2)))
    if np.prod(shape, dtype=np.float64) > LARGEST_GRID:
        size = np.prod(shape[:-1], dtype=np.float64) * longest if longest > 1 else np.prod(shape, dtype=np.float64)
        raise RecipeError(
            f"expert {expert.name!r}: steps times configurations is {size:g}, too many to write out (at most "
            f"{LARGEST_GRID:g}); split the configurations"
        )
    index = np.arange(longest) - (longest - count[..., None])
    present = np.broadcast_to(index >= 0, shape)
    position = np.zeros(shape, dtype=np.int64)
    if expert.sampling == "reshuffle":
        if isinstance(expert.batch_size, Schedule):
            position = np.broadcast_to(_positions_of_schedule(expert), shape)
        else:
            whole, rest = np.divmod(samples, batch)
            kept = (rest > 0) & (not expert.drop_last)
            per_epoch = whole + kept
            position = np.broadcast_to(np.mod(np.maximum(index, 0), per_epoch), shape).astype(np.int64)
            batch = np.where(kept & (position == per_epoch - 1), rest, batch)
    return Steps(
        learning_rate=np.where(present, eta, 0.0),
        batch_size=np.broadcast_to(batch, shape).astype(np.float64),
        present=present,
        position=position,
    )


def _positions_of_schedule(expert: Expert) -> NDArray[np.int64]:
    """The place of every step in its epoch, shape ``(..., K)``: a pass ends where its batches have shown n samples."""
    assert isinstance(expert.batch_size, Schedule)
    if expert.drop_last:
        raise RecipeError(
            f"expert {expert.name!r}: drop_last with a schedule in batch_size is ambiguous; list the actual batch "
            "sizes of full passes and leave drop_last out"
        )
    sizes, n = np.broadcast_arrays(expert.batch_size.values, np.asarray(expert.n, dtype=np.float64)[..., None])
    positions = np.empty(sizes.shape, dtype=np.int64)
    position, seen = np.zeros(sizes.shape[:-1], dtype=np.int64), np.zeros(sizes.shape[:-1])
    for k in range(sizes.shape[-1]):
        positions[..., k] = position
        seen = seen + sizes[..., k]
        over = seen > n[..., k]
        if np.any(over):
            raise RecipeError(
                f"expert {expert.name!r}: batch_size schedule exceeds the {int(n[..., k][over].flat[0])} samples of an "
                "epoch; the sizes of each pass must add up to n"
            )
        ends = seen == n[..., k]
        position, seen = np.where(ends, 0, position + 1), np.where(ends, 0.0, seen)
    return positions


@vacuous
def sgd_log_response(learning_rate: ArrayLike, excess: ArrayLike) -> FloatArray:
    """``log w_k = log eta_k + sum_{l>k} log q_l`` for any schedule; arguments ``(..., K)``, ``q = 1 + excess >= 0``."""
    eta, x = np.broadcast_arrays(np.asarray(learning_rate, dtype=np.float64), np.asarray(excess, dtype=np.float64))
    with np.errstate(divide="ignore"):
        log_q, log_eta = np.log1p(x), np.log(eta)
    later = np.zeros_like(log_q)
    later[..., :-1] = np.flip(np.cumsum(np.flip(log_q[..., 1:], axis=-1), axis=-1), axis=-1)
    return np.where(np.isneginf(log_eta) | np.isneginf(later), -np.inf, log_eta + later)


@vacuous
def heavy_ball_log_response(
    learning_rate: ArrayLike,
    excess: ArrayLike,
    momentum: ArrayLike,
    lipschitz: ArrayLike,
    *,
    nesterov: bool = False,
) -> FloatArray:
    """``log w_k`` of heavy ball, ``w_k = e_0^T A_{K-1}...A_{k+1} (eta_k, 1)^T`` (theory section 4); all ``(..., K)``.

    ``A_l = [[q_l, eta_l beta], [Lambda, beta]]`` bounds the distance of two runs and of their buffers.  ``nesterov``
    (the step uses ``g + beta v``): ``A_l = [[q_l, eta_l beta^2], [Lambda, beta]]`` and kick ``(eta_k (1+beta), 1)``,
    where ``excess`` is ``q - 1`` of a step of length ``eta (1+beta)``.
    """
    eta, x, beta, lip = np.broadcast_arrays(
        *(np.asarray(value, dtype=np.float64) for value in (learning_rate, excess, momentum, lipschitz))
    )
    log_w = np.empty(eta.shape)
    row = _Row.start(eta.shape[:-1])
    for k in range(eta.shape[-1] - 1, -1, -1):
        log_w[..., k] = row.kicked(eta[..., k], beta[..., k], nesterov)
        row = row.before(eta[..., k], x[..., k], beta[..., k], lip[..., k], nesterov)
    return log_w


@dataclass(frozen=True, eq=False)
class _Row:
    """A row vector times ``exp(scale)``: what a distance and a buffer distance can still become at the end.

    Overflow and the logarithm of zero are silent in the functions that use it.
    """

    first: FloatArray
    second: FloatArray
    scale: FloatArray

    @staticmethod
    def start(shape: tuple[int, ...]) -> _Row:
        return _Row(np.ones(shape), np.zeros(shape), np.zeros(shape))

    def kicked(self, eta: FloatArray, beta: FloatArray, nesterov: bool) -> FloatArray:
        """Logarithm of the response to one unit of gradient in a step."""
        return np.asarray(self.scale + np.log(self.first * eta * (1 + beta * nesterov) + self.second))

    def before(self, eta: FloatArray, x: FloatArray, beta: FloatArray, lip: FloatArray, nesterov: bool) -> _Row:
        """The row one step earlier, rescaled."""
        coupling = eta * beta**2 if nesterov else eta * beta
        first = self.first * (1 + x) + self.second * lip
        second = self.first * coupling + self.second * beta
        size = np.maximum(first, second)
        safe = np.where(size > 0, size, 1.0)
        return _Row(first / safe, second / safe, np.asarray(self.scale + np.where(size > 0, np.log(safe), 0.0)))


@vacuous
def convex_momentum_log_response(
    learning_rate: ArrayLike,
    excess: ArrayLike,
    momentum: ArrayLike,
    stiffness: ArrayLike,
    *,
    nesterov: bool = False,
) -> FloatArray:
    """``log w_k`` of heavy ball or Nesterov for per-sample convex losses, *any schedule*; all ``(..., K)``; certified.

    ``stiffness`` is L (plus a decay that is part of the gradient), ``excess`` that of :func:`heavy_ball_log_response`.
    Statement: with ``c_K = a_K = 0`` and ``e_k = gamma_k = eta_k + c_{k+1}`` (heavy ball) or ``e_k = beta eta_k +
    c_{k+1}``, ``gamma_k = eta_k + e_k`` (Nesterov),

        ``c_k = beta e_k``,  ``w_k = sqrt(gamma_k^2 + a_{k+1})``,
        ``a_k = beta^2 [a_{k+1} + (gamma_k e_k + a_{k+1})^2 / (2 gamma_k/L - gamma_k^2 - a_{k+1})]``

    as long as every later denominator is positive.  *Proof:* ``z_k = x_k - c_k v_k`` obeys ``z_{k+1} = z_k - gamma_k
    g_k`` and ``z_K = x_K``; by cocoercivity ``<dx, dg> >= ||dg||^2/L`` the quantity ``||dz||^2 + a_k ||dv||^2`` of two
    runs on common batches never grows (a 2x2 determinant in ``(dv, dg)`` is zero), and a kick u sets it to ``(gamma_k^2
    + a_{k+1}) u^2``.  Constant learning rate: holds for all k if ``eta L <= 2(1-beta)^2/(1+beta)`` (heavy ball) or
    ``2(1-beta)^2/(1-beta+2 beta^2)`` (Nesterov), and w tends to ``eta (1-beta^(K-k))/(1-beta)`` (Nesterov: the power
    is K-k+1), the response without curvature, as ``eta L -> 0``.  Steps before the last one that breaks the condition
    continue by the matrices A_l from the row ``(1, sqrt(c^2 + a))``.  Source: theory section 4, Lyapunov argument, here
    with a schedule.

    >>> w = np.exp(convex_momentum_log_response([0.1] * 3, 0.0, 0.9, 1e-9))
    >>> w.round(6).tolist()  # 0.1 (1 + 0.9 + 0.81), 0.1 (1 + 0.9), 0.1
    [0.271, 0.19, 0.1]
    """
    eta, x, beta, high = np.broadcast_arrays(
        *(np.asarray(value, dtype=np.float64) for value in (learning_rate, excess, momentum, stiffness))
    )
    log_w = np.empty(eta.shape)
    shape = eta.shape[:-1]
    row, alive = _Row.start(shape), np.ones(shape, dtype=bool)
    c, root = np.zeros(shape), np.zeros(shape)  # c_{k+1} and sqrt(a_{k+1})
    with np.errstate(all="ignore"):
        for k in range(eta.shape[-1] - 1, -1, -1):
            rate, b, L = eta[..., k], beta[..., k], high[..., k]
            if not alive.any():
                log_w[..., k] = row.kicked(rate, b, nesterov)
                row = row.before(rate, x[..., k], b, L, nesterov)
                continue
            carried = rate * b + c if nesterov else c
            gamma = rate + carried
            ratio = np.where(root > 0, (root / gamma) ** 2, 0.0)
            response = np.log(gamma) + np.log1p(ratio) / 2
            log_w[..., k] = response if alive.all() else np.where(alive, response, row.kicked(rate, b, nesterov))
            room = np.where(gamma * L > 0, 2 / (gamma * L), np.inf) - 1 - ratio
            passes = alive & ((room > 0) | ((b == 0) & (room >= 0))) & np.isfinite(gamma)
            if not passes.all():  # the row counts only where a step has broken the condition
                stops = alive & ~passes
                row = _Row(
                    np.where(stops, 1.0, row.first),
                    np.where(stops, np.hypot(c, root), row.second),
                    np.where(stops, 0.0, row.scale),
                ).before(rate, x[..., k], b, L, nesterov)
            lead = np.where(gamma > 0, carried / gamma, 0.0) if nesterov else 1.0
            grown = gamma * b * np.sqrt(ratio + (lead + ratio) ** 2 / room)
            root = np.where(passes & (b > 0) & (gamma > 0), grown, 0.0)
            c = b * (carried if nesterov else gamma)
            alive = passes
    return log_w


def heavy_ball_convex_response(expert: Expert) -> tuple[FloatArray, NDArray[np.bool_]]:
    """The certified convex response ``eta (1+beta)/(1-beta)`` and where it holds (theory section 4), shape ``(...)``.

    Holds for a per-sample convex loss at constant ``eta <= 2(1-beta)^2/((1+beta)(L+omega))``, decay in the gradient.
    """
    eta = np.asarray(expert.learning_rate, dtype=np.float64)
    beta = np.asarray(expert.momentum, dtype=np.float64)
    stiffness = smoothness(expert) + np.asarray(expert.weight_decay, dtype=np.float64)
    holds = eta * (1 + beta) * stiffness <= 2 * (1 - beta) ** 2
    return eta * (1 + beta) / (1 - beta), np.asarray(holds)


def heavy_ball_curve(learning_rate: ArrayLike, momentum: ArrayLike, steps: int) -> FloatArray:
    """``eta (1 - beta^(K-k))/(1 - beta)``, shape ``(..., K)``: exact for x-independent gradients, else *estimated*.

    The tempting "convex implies kappa = 0" form of momentum; two runs can separate many times faster.
    """
    eta, beta = (
        np.asarray(learning_rate, dtype=np.float64)[..., None],
        np.asarray(momentum, dtype=np.float64)[..., None],
    )
    return np.asarray(eta * (1 - beta ** (steps - np.arange(steps))) / (1 - beta), dtype=np.float64)


@vacuous
def log_response(expert: Expert) -> FloatArray:
    """``log w_k`` of an expert, shape ``(..., K_max)``, right-aligned; the smaller certified response at each step.

    Momentum: the matrix recursion (any curvature), and for convex losses the Lyapunov response, for heavy ball and
    Nesterov, at any schedule.  ``decoupled_decay`` with momentum (SGDW): the decay is in q and not in Lambda, and only
    the recursion is available where the decay is not zero.
    """
    require_sgd(expert)
    steps = write_out(expert)
    if not np.any(np.asarray(expert.momentum) != 0):
        excess = step_excess(expert, steps.learning_rate, per_step=True)
        return np.where(steps.present, sgd_log_response(steps.learning_rate, excess), -np.inf)
    momentum, decay = _stepwise(expert.momentum), _stepwise(expert.weight_decay)
    length = steps.learning_rate * (1 + momentum) if expert.nesterov else steps.learning_rate
    if expert.decoupled_decay and expert.nesterov:
        # the decay acts with eta and the gradient with eta (1 + beta)
        excess = _nesterov_decoupled_excess(expert, steps.learning_rate, length)
    else:
        excess = step_excess(expert, length, per_step=True)
    excess = np.maximum(excess, -1.0)
    in_buffer = np.zeros_like(decay) if expert.decoupled_decay else decay
    stiffness = smoothness(expert)[..., None] + in_buffer
    log_w = heavy_ball_log_response(steps.learning_rate, excess, momentum, stiffness, nesterov=expert.nesterov)
    if expert.curvature in ("convex", "strongly_convex"):
        lyapunov = convex_momentum_log_response(
            steps.learning_rate, excess, momentum, stiffness, nesterov=expert.nesterov
        )
        covered = ((decay == 0) | (not expert.decoupled_decay)) & (momentum != 0)
        log_w = np.minimum(log_w, np.where(covered, lyapunov, np.inf))
    return np.where(steps.present, log_w, -np.inf)


def _nesterov_decoupled_excess(expert: Expert, learning_rate: FloatArray, length: FloatArray) -> FloatArray:
    """``q - 1`` of ``x -> (1 - eta omega) x - eta (1+beta) grad f(x)``, Hessian in [m, L]."""
    if expert.kappa is not None:
        return step_excess(expert, length, per_step=True)
    decay, high = _stepwise(expert.weight_decay), smoothness(expert)[..., None]
    low = np.asarray(lowest_curvature(expert))[..., None]
    with np.errstate(over="ignore"):
        shrink = learning_rate * decay
        return np.maximum(-length * low - shrink, length * high + shrink - 2)


@np.errstate(all="ignore")
def times_of(log_w: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``tau = sum w`` and ``nu = sum w^2`` from ``log w`` of shape ``(..., K)``; overflow gives ``inf``."""
    peak = np.max(log_w, axis=-1, keepdims=True)
    base = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(over="ignore"):
        scaled = np.exp(log_w - base)
        top = np.exp(base[..., 0])
        return top * scaled.sum(axis=-1), top * (top * (scaled**2).sum(axis=-1))


@np.errstate(all="ignore")
def clock(expert: Expert) -> Clock:
    """The training clock of an expert: closed form for constant SGD, step by step otherwise (theory section 4).

    Raises :class:`AssumptionError` for AdamW and gradient clipping, :class:`RecipeError` if L and kappa are missing.

    >>> timing = clock(Expert("a", n=100, batch_size=10, learning_rate=0.1, steps=50, curvature="convex", L=1.0))
    >>> float(timing.tau), round(float(timing.nu), 9), timing.form
    (5.0, 0.5, 'SGD, closed form')
    """
    require_sgd(expert)
    constants = ("kappa",) if expert.kappa is not None else ("L", "mu")
    used = ("learning_rate", "steps", "momentum", "weight_decay", *constants)
    tier: Tier = "estimated" if expert.is_measured(*used) else "certified"
    if is_constant(expert):
        eta = np.asarray(expert.learning_rate, dtype=np.float64)
        with np.errstate(over="ignore"):
            first, second = geometric_sums(step_excess(expert, eta), step_count(expert))
            return Clock(eta * first, eta * (eta * second), None, "SGD, closed form", tier)
    log_w = log_response(expert)
    tau, nu = times_of(log_w)
    if np.any(np.asarray(expert.momentum) != 0):
        form = "Nesterov, recursion" if expert.nesterov else "heavy ball, recursion"
        if expert.curvature != "smooth" and not (
            expert.decoupled_decay and np.all(np.asarray(expert.weight_decay) > 0)
        ):
            form = form.replace("recursion", "smaller of recursion and convex response")
    else:
        form = "SGD, step by step"
    return Clock(tau, nu, log_w, form, tier)


def signed_response(
    learning_rate: ArrayLike, curvature: ArrayLike, momentum: float, steps: int, *, nesterov: bool = False
) -> FloatArray:
    """Signed ``w_k`` of a quadratic mode: ``q_l = 1 - eta_l h``, ``Lambda = -h`` in the heavy-ball matrix (section 9).

    ``learning_rate`` is a number or shape ``(K,)``; ``curvature`` is ``h`` (plus the decay) of shape ``(modes,)``.
    Returns shape ``(modes, K)``.  ``nesterov``: ``q_l = 1 - eta_l (1+beta) h``, coupling ``eta beta^2``.
    """
    eta = np.broadcast_to(np.asarray(learning_rate, dtype=np.float64), (steps,))
    h = np.atleast_1d(np.asarray(curvature, dtype=np.float64))
    response = np.empty((h.size, steps))
    first, second = np.ones(h.size), np.zeros(h.size)
    ahead, coupling = (1 + momentum, momentum**2) if nesterov else (1.0, momentum)
    for k in range(steps - 1, -1, -1):
        response[:, k] = first * eta[k] * ahead + second
        first, second = (
            first * (1 - eta[k] * ahead * h) - second * h,
            first * eta[k] * coupling + second * momentum,
        )
    return response
