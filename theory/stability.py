"""Stability of one expert (theory section 5): how far one exchanged sample moves the final iterate.

``epsilon^2 = (1/n) sum_j E ||x(S) - x(S^(j))||^2``.  Two twins differ in one sample j; each time j is drawn it pushes
them apart by at most ``w_k u_k / b_k``.  The mean of those pushes is ``tau/n`` and their variance is ``Gamma``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.clocks import Clock, Steps, is_constant, require_sgd, step_count, step_excess, write_out
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert, Schedule
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous
from theory.symbols import symbol

LONGEST_RECURSION = 20_000


def gamma_without_replacement_formula() -> Formula:
    """Gamma for b distinct samples per batch, batches independent (theory section 5)."""
    nu, n, b = symbol("nu"), symbol("n"), symbol("b")
    return Formula("Gamma", ("nu", "n", "b"), nu * (1 / (b * n) - 1 / n**2), "section 5, without_replacement")


def gamma_with_replacement_formula() -> Formula:
    """Gamma for b independent draws per batch (theory section 5)."""
    nu, n, b = symbol("nu"), symbol("n"), symbol("b")
    return Formula("Gamma", ("nu", "n", "b"), nu * (1 - 1 / n) / (b * n), "section 5, with_replacement")


def epsilon_sup_formula() -> Formula:
    """Stability from the largest gradient gap (also from the rms of an x-independent envelope), any sampling."""
    import sympy

    tau, n, gamma, gap = symbol("tau"), symbol("n"), symbol("Gamma"), symbol("D_inf")
    expression = gap * sympy.sqrt((tau / n) ** 2 + gamma)
    return Formula("epsilon", ("D_inf", "tau", "n", "Gamma"), expression, "Theorem 2 (sup)")


def epsilon_rms_formula() -> Formula:
    """Stability from the rms gradient gap; first two samplings only."""
    import sympy

    tau, n, gamma, gap = symbol("tau"), symbol("n"), symbol("Gamma"), symbol("D_2")
    return Formula("epsilon", ("D_2", "tau", "n", "Gamma"), gap * (tau / n + sympy.sqrt(gamma)), "Theorem 2 (rms)")


@vacuous
def gamma_without_replacement(nu: ArrayLike, n: ArrayLike, b: ArrayLike) -> FloatArray:
    """``nu (1/(bn) - 1/n^2)``: constant b distinct samples; exactly 0 for a full batch."""
    value = evaluate(gamma_without_replacement_formula, nu, n, b)
    return np.where(np.asarray(b) == np.asarray(n), 0.0, np.maximum(value, 0.0))


@vacuous
def gamma_with_replacement(nu: ArrayLike, n: ArrayLike, b: ArrayLike) -> FloatArray:
    """``nu (1 - 1/n)/(bn)``: constant b independent draws; exactly 0 for a single sample."""
    value = evaluate(gamma_with_replacement_formula, nu, n, b)
    return np.where(np.asarray(n) == 1, 0.0, value)


@vacuous
def gamma_of_steps(log_w: FloatArray, steps: Steps, n: ArrayLike, sampling: str) -> FloatArray:
    """Gamma from the response written out, with actual batch sizes, for every sampling (theory section 5).

    ``log_w`` and ``steps`` have shape ``(..., K_max)`` and ``n`` shape ``(...)``.  Under reshuffling each epoch gives
    ``(1/n) sum w^2/b - ((1/n) sum w)^2``: short last batches and partial epochs included.
    """
    peak = np.max(log_w, axis=-1, keepdims=True)
    base = np.where(np.isfinite(peak), peak, 0.0)
    w = np.exp(log_w - base)
    value = gamma_of_weights(w, steps.batch_size, n, sampling, steps.position)
    with np.errstate(over="ignore"):
        top = np.exp(base[..., 0])
        return times(top, times(top, value))


@vacuous
def gamma_of_weights(
    w: FloatArray, batch_size: ArrayLike, n: ArrayLike, sampling: str, position: ArrayLike | None = None
) -> FloatArray:
    """Gamma of a response ``w`` (shape ``(..., K)``, may be signed) under a sampling; see :func:`gamma_of_steps`."""
    b = np.broadcast_to(np.asarray(batch_size, dtype=np.float64), w.shape)
    samples = np.broadcast_to(np.asarray(n, dtype=np.float64)[..., None], w.shape)
    if sampling == "without_replacement":
        return np.asarray(np.sum(w**2 * np.maximum(1 / (b * samples) - 1 / samples**2, 0.0), axis=-1))
    if sampling == "with_replacement":
        return np.asarray(np.sum(w**2 * (1 - 1 / samples) / (b * samples), axis=-1))
    if sampling != "reshuffle" or position is None:
        raise RecipeError(f"sampling is {sampling!r}; choose without_replacement, with_replacement or reshuffle")
    place = np.broadcast_to(np.asarray(position), w.shape)
    total = np.zeros(w.shape[:-1])
    mean, second = np.zeros(w.shape[:-1]), np.zeros(w.shape[:-1])
    for k in range(w.shape[-1]):
        starts = place[..., k] == 0
        total = np.where(starts, total + np.maximum(second - mean**2, 0.0), total)
        mean, second = np.where(starts, 0.0, mean), np.where(starts, 0.0, second)
        mean = mean + w[..., k] / samples[..., k]
        second = second + w[..., k] ** 2 / (b[..., k] * samples[..., k])
    return total + np.maximum(second - mean**2, 0.0)


@vacuous
def gamma(expert: Expert, timing: Clock) -> FloatArray:
    """Gamma of an expert from its clock, shape ``(...)``; closed forms where the clock has one."""
    if timing.log_w is None:
        b = np.asarray(expert.batch_size, dtype=np.float64)
        if expert.sampling == "without_replacement":
            return gamma_without_replacement(timing.nu, expert.n, b)
        return gamma_with_replacement(timing.nu, expert.n, b)
    return gamma_of_steps(timing.log_w, write_out(expert), expert.n, expert.sampling)


@vacuous
def epsilon_sup(gap: ArrayLike, tau: ArrayLike, n: ArrayLike, gamma_value: ArrayLike) -> FloatArray:
    """``D sqrt((tau/n)^2 + Gamma)``: D_inf over visited x, or the rms of an envelope; any sampling (Theorem 2)."""
    return times(gap, evaluate(epsilon_sup_formula, 1.0, tau, n, gamma_value))


@vacuous
def epsilon_rms(gap: ArrayLike, tau: ArrayLike, n: ArrayLike, gamma_value: ArrayLike) -> FloatArray:
    """``D_2 (tau/n + sqrt(Gamma))``; first two samplings only (Theorem 2)."""
    return times(gap, evaluate(epsilon_rms_formula, 1.0, tau, n, gamma_value))


@vacuous
def epsilon_cap(drift: ArrayLike) -> FloatArray:
    """``sqrt(2) d``: any algorithm, anchor x_0 independent of the sample (theory section 5, cap)."""
    return np.asarray(np.sqrt(2.0) * np.asarray(drift, dtype=np.float64))


def epsilon_floor(variance_given_seeds: ArrayLike, n: ArrayLike) -> FloatArray:
    """Efron-Stein floor ``sqrt(2 E tr Var(x | seeds) / n)``: no valid bound can be below it."""
    return np.asarray(np.sqrt(2 * np.asarray(variance_given_seeds, dtype=np.float64) / np.asarray(n, dtype=np.float64)))


def _refuse_contraction(expert: Expert) -> tuple[Steps, NDArray[np.bool_]]:
    """The steps, and where they contract no more than the decay makes them, which gaps from the training loss need.

    Refuses an expert that meets this nowhere, unless ``held_out_losses`` serve in its place (independent batches).
    """
    if expert.batch_losses is None or expert.L is None:
        raise RecipeError(
            f"expert {expert.name!r}: batch_losses and L are both needed to bound the gradient gap from the log"
        )
    steps = write_out(expert)
    length = steps.learning_rate
    excess = step_excess(expert, length, per_step=True)
    decay = length * np.asarray(expert.weight_decay, dtype=np.float64)[..., None]
    covered = np.all(excess >= -decay * (1 + 1e-12) - 1e-15, axis=-1)
    if not np.any(covered) and not _fresh_gap_applies(expert):
        remedy = "" if expert.sampling == "reshuffle" else "held_out_losses (E F(x_k) before every step), "
        raise AssumptionError(
            f"expert {expert.name!r}: the steps contract (strongly_convex curvature, or a measured kappa < 0), "
            f"where the gap from the loss also needs the population risk; give {remedy}D_2 or D_inf, or curvature "
            "'convex'"
        )
    return steps, covered


def _fresh_gap_applies(expert: Expert) -> bool:
    """Whether the gap may be taken from losses of a training and of a fresh sample at the same twin."""
    return expert.held_out_losses is not None and expert.sampling != "reshuffle"


def _per_step_gap(expert: Expert, covered: NDArray[np.bool_]) -> FloatArray:
    """D_k from the logged losses (theory section 5, from the loss); shape ``(..., K)``.

    ``2 sqrt(2 L E F_B)`` where ``covered`` (shape ``(...)``): the steps do not contract; ``sqrt(2 L E F_S) + sqrt(2 L
    E F)`` with ``held_out_losses`` under independent batches, whatever the steps; the smaller where both hold, ``inf``
    where none does.
    """
    assert expert.batch_losses is not None
    high = np.asarray(expert.L, dtype=np.float64)
    stiffness = high[..., None] if high.ndim else high
    trained = np.sqrt(2 * stiffness * expert.batch_losses.values)
    gap = np.where(covered[..., None], 2 * trained, np.inf)
    if _fresh_gap_applies(expert):
        assert expert.held_out_losses is not None
        gap = np.minimum(gap, trained + np.sqrt(2 * stiffness * expert.held_out_losses.values))
    return np.asarray(gap)


@vacuous
def epsilon_from_losses(expert: Expert, timing: Clock, log_w: FloatArray) -> FloatArray:
    """Stability from the training log alone (theory section 5): per-sample L and the batch loss before each step.

    First two samplings: rms form with D_k inside; reshuffling: ``sum_epochs sqrt(sum_k w_k^2 D_k^2/(n b_k))``.  The gap
    ``D_k = 2 sqrt(2 L E F)`` needs steps that contract no more than the decay makes them (``m <= 0`` or ``kappa >=
    0``): the step of the exchanged sample is not common to the twins, so its share of a contraction cannot be used
    together with this gap.  Where steps contract, the first two samplings take ``D_k = sqrt(2 L E F_S(x_k)) + sqrt(2 L
    E F(x_k))`` from ``held_out_losses`` (both gradients at one twin: one of its samples and a fresh one).  Raises
    :class:`AssumptionError` where it does not apply.
    """
    steps, covered = _refuse_contraction(expert)
    gap = _per_step_gap(expert, covered)
    n = np.asarray(expert.n, dtype=np.float64)[..., None]
    b, place = steps.batch_size, steps.position
    with np.errstate(over="ignore"):
        w = np.exp(log_w)
    pushed = times(w, gap)
    if expert.sampling != "reshuffle":
        spread = 1 / (b * n) - 1 / n**2 if expert.sampling == "without_replacement" else (1 - 1 / n) / (b * n)
        noise = times(pushed**2, np.maximum(spread, 0.0)).sum(axis=-1)
        return np.asarray((pushed / n).sum(axis=-1) + np.sqrt(noise))
    total, running = np.zeros(pushed.shape[:-1]), np.zeros(pushed.shape[:-1])
    square = times(pushed, pushed) / (b * n)
    for k in range(pushed.shape[-1]):
        starts = place[..., k] == 0
        total = np.where(starts, total + np.sqrt(running), total)
        running = np.where(starts, 0.0, running) + square[..., k]
    return np.asarray(total + np.sqrt(running))


def largest_gap(expert: Expert) -> FloatArray:
    """Largest gradient gap of two samples: the smaller of ``D_inf`` and 2G; raises :class:`RecipeError` if neither."""
    given = [np.asarray(expert.D_inf, dtype=np.float64)] if expert.D_inf is not None else []
    if expert.G is not None:
        given.append(2 * np.asarray(expert.G, dtype=np.float64))
    if not given:
        raise RecipeError(
            f"expert {expert.name!r}: D_inf is missing; give the largest gradient gap of two samples, or G (then 2G)"
        )
    return np.asarray(given[0] if len(given) == 1 else np.minimum(*given))


def require_recursion(expert: Expert) -> None:
    """Refuse what the sharper recursion does not cover: momentum and reshuffling."""
    require_sgd(expert)
    if expert.sampling == "reshuffle" or np.all(np.asarray(expert.momentum) != 0):
        raise AssumptionError(
            f"expert {expert.name!r}: the sharper recursion needs plain SGD with independent batches; use epsilon_sup"
        )


@vacuous
def epsilon_recursion(expert: Expert, gap: ArrayLike | Schedule) -> FloatArray:
    """The sharper recursion with the rms gap, same constants (theory section 5): SGD, first two samplings.

    ``e^2 <- (q e + eta D/n)^2 + eta^2 D^2 Var(I)/b^2``, step by step; never above :func:`epsilon_rms`.  ``gap`` is D_2
    (shape ``(...)``), or D_k per step as a :class:`Schedule`, rms over samples of the gap at x_k.  *Proof:* the
    multiplicity of a batch is independent of the twins before it; Cauchy-Schwarz over the exchanged sample.  One pass
    over the steps; arrays over steps are written out only where something changes from step to step.  At a constant
    learning rate a run of more than :data:`LONGEST_RECURSION` steps that has not come to rest by then gets ``inf``: the
    closed forms serve it.
    """
    require_recursion(expert)
    size = gap.values if isinstance(gap, Schedule) else np.asarray(gap, dtype=np.float64)[..., None]
    if is_constant(expert) and not isinstance(gap, Schedule):
        return _constant_recursion(expert, size[..., 0])
    steps = write_out(expert)
    excess = step_excess(expert, steps.learning_rate, per_step=True)
    n, b = np.asarray(expert.n, dtype=np.float64)[..., None], steps.batch_size
    noise = np.sqrt(np.maximum(_spread(n, b, expert.sampling), 0.0))
    push = times(steps.learning_rate, size)
    shape = np.broadcast_shapes(steps.present.shape, push.shape, excess.shape, noise.shape)
    excess, push, noise = (np.broadcast_to(array, shape) for array in (excess, push, noise))
    drag = push / n
    error = np.zeros(shape[:-1])
    for k in range(shape[-1]):
        moved = np.hypot((1 + excess[..., k]) * error + drag[..., k], push[..., k] * noise[..., k])
        error = np.where(steps.present[..., k], moved, error)
    momentum = np.asarray(expert.momentum)
    return np.asarray(error) if not np.any(momentum) else np.where(momentum == 0, error, np.inf)


def _spread(n: FloatArray, b: FloatArray, sampling: str) -> FloatArray:
    """``Var(I)/b^2`` of the first two samplings."""
    return np.asarray(1 / (b * n) - 1 / n**2 if sampling == "without_replacement" else (1 - 1 / n) / (b * n))


def _constant_recursion(expert: Expert, gap: FloatArray) -> FloatArray:
    """The recursion at a constant learning rate and batch size, without an axis over steps."""
    eta, count = np.asarray(expert.learning_rate, dtype=np.float64), step_count(expert)
    n, b = np.asarray(expert.n, dtype=np.float64), np.asarray(expert.batch_size, dtype=np.float64)
    noise = np.sqrt(np.maximum(_spread(n, b, expert.sampling), 0.0))
    noise = np.where((b == n) & (expert.sampling == "without_replacement"), 0.0, noise)
    push = times(eta, gap)
    factor, drag, kick, last = np.broadcast_arrays(
        1 + step_excess(expert, eta), push / n, times(push, noise), count - 1
    )
    if factor.ndim == 0:
        return np.asarray(_scalar_recursion(float(factor), float(drag), float(kick), int(last) + 1))
    value = _many_recursions(*(np.ravel(array) for array in (factor, drag, kick, last)))
    return value.reshape(factor.shape)


def _many_recursions(factor: FloatArray, drag: FloatArray, kick: FloatArray, last: FloatArray) -> FloatArray:
    """``e <- hypot(factor e + drag, kick)`` for ``last + 1`` steps, many at once; ``inf`` where it is given up."""
    # (1 - factor) LONGEST_RECURSION < 10 is far from rest after that many steps: relative changes exceed 1e-13 there
    restless = ((1 - factor) * LONGEST_RECURSION < 10) & ((drag > 0) | (kick > 0))
    value = np.where((last >= LONGEST_RECURSION) & restless, np.inf, 0.0)
    places = np.flatnonzero(value == 0)
    places = places[np.argsort(-last[places], kind="stable")]  # the longest first: those that still run are in front
    f, d, u, ends = (array[places] for array in (factor, drag, kick, np.minimum(last, LONGEST_RECURSION - 1)))
    k = 0
    error = np.zeros(places.shape)
    while places.size:
        stop, rest = min(int(ends[0]) + 1, k + 256), np.zeros(places.shape, dtype=bool)
        while k < stop:
            running = int(np.searchsorted(-ends, -k, side="right"))
            until = min(int(ends[running - 1]) + 1, stop)
            old = moved = error[:running]
            f_now, d_now, u_now = f[:running], d[:running], u[:running]
            for _ in range(k, until):
                old, moved = moved, np.hypot(f_now * moved + d_now, u_now)
            rest[:running] = (moved == old) | ~np.isfinite(moved)
            error[:running], k = moved, until
        done = rest | (ends < k)
        given_up = (last[places] >= LONGEST_RECURSION) & ~rest
        value[places[done]] = np.where(given_up, np.inf, error)[done]
        places = places[~done]
        error, f, d, u, ends = (array[~done] for array in (error, f, d, u, ends))
    return value


def _scalar_recursion(factor: float, drag: float, kick: float, count: int) -> float:
    error = 0.0
    for _ in range(min(count, LONGEST_RECURSION)):
        moved = math.hypot(factor * error + drag, kick)
        if moved == error or math.isinf(moved):
            return moved
        error = moved
    return error if count <= LONGEST_RECURSION else math.inf


@vacuous
def epsilon_recursion_from_losses(expert: Expert) -> FloatArray:
    """The sharper recursion with D_k from the logged losses; the conditions of :func:`epsilon_from_losses`."""
    require_recursion(expert)
    _, covered = _refuse_contraction(expert)
    gap = _per_step_gap(expert, covered)
    known = np.all(np.isfinite(gap), axis=-1)
    return np.where(known, epsilon_recursion(expert, Schedule(np.where(np.isfinite(gap), gap, 0.0))), np.inf)
