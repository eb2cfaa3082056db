"""Drift of one expert (theory section 6, Theorem 3): ``E ||x_K - x_0||^2 <= d^2``."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import Clock, Steps, _stepwise, require_sgd, step_count, write_out
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert, Schedule
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous
from theory.symbols import symbol


def drift_noise_formula() -> Formula:
    """Theorem 3 (a), constant batch size: ``g tau + sigma sqrt(nu/b)``."""
    import sympy

    g, tau, sigma, nu, b = (symbol(key) for key in ("g", "tau", "sigma", "nu", "b"))
    expression = g * tau + sigma * sympy.sqrt(nu / b)
    return Formula("d", ("g", "tau", "sigma", "nu", "b"), expression, "Theorem 3 (a)")


def drift_base_formula() -> Formula:
    """Theorem 3 (b), constant batch size: ``tau sqrt(g^2 + sigma_0^2/b)`` (noise already finite-sample corrected)."""
    import sympy

    g, tau, sigma0, b = (symbol(key) for key in ("g", "tau", "sigma0", "b"))
    return Formula("d", ("g", "tau", "sigma0", "b"), tau * sympy.sqrt(g**2 + sigma0**2 / b), "Theorem 3 (b)")


def drift_energy_formula() -> Formula:
    """Theorem 3 (c): ``sqrt(2T (F_S(x_0) - E F_S(x_K) + L sigma^2 N_2/(2b))) + sigma sqrt(N_2/b)``."""
    import sympy

    total, squares, start, end, L, sigma, b = (symbol(key) for key in ("T", "N2", "F0", "FK", "L", "sigma", "b"))
    noise = sigma**2 * squares / b
    expression = sympy.sqrt(2 * total * (start - end + L * noise / 2)) + sympy.sqrt(noise)
    return Formula("d", ("T", "N2", "F0", "FK", "L", "sigma", "b"), expression, "Theorem 3 (c)")


def finite_batch_factor(n: ArrayLike, b: ArrayLike, sampling: str) -> FloatArray:
    """Factor on ``sigma^2/b``: ``(n-b)/(n-1)`` for distinct samples (also marginally under reshuffling), else 1."""
    samples, size = np.asarray(n, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if sampling == "with_replacement":
        return np.ones(np.broadcast_shapes(samples.shape, size.shape))
    return np.asarray(np.maximum(samples - size, 0.0) / np.maximum(samples - 1, 1.0))


def _need(expert: Expert, form: str, *names: str) -> list[FloatArray]:
    missing = [name for name in names if getattr(expert, name) is None]
    if missing:
        raise RecipeError(
            f"expert {expert.name!r}: {missing[0]} is missing; {_statement(form)} needs {', '.join(names)}"
        )
    return [np.asarray(getattr(expert, name), dtype=np.float64) for name in names]


def _base_norm(expert: Expert, form: str, decay: FloatArray) -> FloatArray:
    """``||x_0||``; where it is missing, ``inf`` for configurations with decay and 0 for the others, which need none."""
    if expert.base_norm is None and not np.all(decay > 0):
        return np.where(decay > 0, np.inf, 0.0)
    return _need(expert, form, "base_norm")[0]


def _statement(form: str) -> str:
    """Name of a form in messages: a letter of section 6, or the name of a bound on the training risk."""
    return form if "risk" in form else f"drift by 6({form})"


def _unbiased(expert: Expert, form: str) -> None:
    remedy = "give training_risk instead" if "risk" in form else "use 6(b) (sigma0) or 6(d) (batch_gradient_norms)"
    if expert.sampling == "reshuffle":
        raise AssumptionError(
            f"expert {expert.name!r}: sampling is 'reshuffle', whose batches are not conditionally unbiased, as "
            f"{_statement(form)} requires; {remedy}"
        )
    if np.all(np.asarray(expert.momentum) != 0):
        raise AssumptionError(
            f"expert {expert.name!r}: momentum is not 0, which {_statement(form)} does not cover; {remedy}"
        )


def _where_plain(expert: Expert, value: FloatArray) -> FloatArray:
    """The value where the momentum is zero, ``inf`` (this form says nothing) elsewhere."""
    momentum = np.asarray(expert.momentum)
    return value if not np.any(momentum) else np.where(momentum == 0, value, np.inf)


def decays_outside_buffer(expert: Expert) -> bool:
    """Decoupled decay that differs from coupled decay somewhere: with momentum and a decay that is not zero."""
    return expert.decoupled_decay and bool(np.any(_outside(expert)))


def _outside(expert: Expert) -> FloatArray:
    """The decay where it is decoupled in effect, 0 elsewhere."""
    momentum, decay = np.asarray(expert.momentum), np.asarray(expert.weight_decay, dtype=np.float64)
    return np.asarray(np.where(momentum != 0, decay, 0.0))


def _noise(expert: Expert, steps: Steps, sigma: FloatArray) -> FloatArray:
    """Variance of the batch gradient at each step, ``sigma^2 factor / b_k``, shape ``(..., K)``."""
    n = np.asarray(expert.n, dtype=np.float64)[..., None]
    factor = finite_batch_factor(n, steps.batch_size, expert.sampling)
    return np.asarray(sigma[..., None] ** 2 * factor / steps.batch_size)


@vacuous
def drift_noise(expert: Expert, timing: Clock) -> FloatArray:
    """Theorem 3 (a): SGD, conditionally unbiased batches, ``sigma`` uniform on the path; shape ``(...)``."""
    require_sgd(expert)
    _unbiased(expert, "a")
    g, sigma = _need(expert, "a", "initial_gradient_norm", "sigma")
    if timing.log_w is None:
        b = np.asarray(expert.batch_size, dtype=np.float64)
        effective = sigma * np.sqrt(finite_batch_factor(expert.n, b, expert.sampling))
        drag = times(g, timing.tau)
        return np.asarray(drag + times(effective, evaluate(drift_noise_formula, 0.0, 0.0, 1.0, timing.nu, b)))
    steps = write_out(expert)
    with np.errstate(over="ignore"):
        square = times(np.exp(2 * timing.log_w), _noise(expert, steps, sigma)).sum(axis=-1)
    return _where_plain(expert, np.asarray(times(g, timing.tau) + np.sqrt(square)))


@vacuous
def drift_base(expert: Expert, timing: Clock) -> FloatArray:
    """Theorem 3 (b): any sampling, any momentum, gradient noise at the base only; shape ``(...)``."""
    require_sgd(expert)
    g, sigma0 = _need(expert, "b", "initial_gradient_norm", "sigma0")
    if timing.log_w is None:
        b = np.asarray(expert.batch_size, dtype=np.float64)
        effective = sigma0 * np.sqrt(finite_batch_factor(expert.n, b, expert.sampling))
        return times(timing.tau, evaluate(drift_base_formula, g, 1.0, effective, b))
    steps = write_out(expert)
    size = np.sqrt(g[..., None] ** 2 + _noise(expert, steps, sigma0))
    if decays_outside_buffer(expert):
        # the buffer is kicked by the loss alone, whose gradient is at most g + omega ||x_0||
        norm = _base_norm(expert, "b, decoupled decay", _outside(expert))
        size = size + (_outside(expert) * norm)[..., None]
    with np.errstate(over="ignore"):
        return np.asarray(times(np.exp(timing.log_w), size).sum(axis=-1))


@vacuous
def drift_energy(expert: Expert) -> FloatArray:
    """Theorem 3 (c): no rate kappa, nonconvex allowed; SGD, ``eta <= 1/(L+omega)``, first two samplings.

    The end risk defaults to 0 (a loss is nonnegative).  With decay the objective is ``F_S + omega/2 ||x||^2`` and
    ``base_norm`` is needed.  Raises :class:`RecipeError` or :class:`AssumptionError` where it does not apply.
    """
    require_sgd(expert)
    _unbiased(expert, "c")
    start, sigma, high = _need(expert, "c", "initial_risk", "sigma", "L")
    end = np.asarray(0.0 if expert.training_risk is None else expert.training_risk, dtype=np.float64)
    decay = np.asarray(expert.weight_decay, dtype=np.float64)
    if np.any(decay > 0):
        norm = _base_norm(expert, "c", decay)
        start = start + 0.5 * decay * norm**2
    stiffness = high + decay
    eta, b = expert.learning_rate, expert.batch_size
    rates = _stepwise(eta)
    small = np.all(rates * stiffness[..., None] <= 1, axis=-1)
    if not np.any(small):
        raise AssumptionError(
            f"expert {expert.name!r}: learning_rate exceeds 1/(L + weight_decay), which drift by 6(c) needs; use 6(d) "
            "(batch_gradient_norms)"
        )
    if isinstance(eta, Schedule) or isinstance(b, Schedule):
        steps = write_out(expert)
        total = steps.learning_rate.sum(axis=-1)
        noise = (steps.learning_rate**2 * _noise(expert, steps, sigma)).sum(axis=-1)
        fall = np.maximum(start - end + stiffness * noise / 2, 0.0)
        return _where_plain(expert, np.where(small, np.sqrt(2 * total * fall) + np.sqrt(noise), np.inf))
    count, rate = step_count(expert), np.asarray(eta, dtype=np.float64)
    effective = sigma * np.sqrt(finite_batch_factor(expert.n, b, expert.sampling))
    square = count * rate**2
    # an end risk above the start plus the noise cannot be an exact expectation; the descent lemma then reads zero
    end = np.minimum(end, start + stiffness * effective**2 * square / (2 * np.asarray(b, dtype=np.float64)))
    value = evaluate(drift_energy_formula, count * rate, square, start, end, stiffness, effective, b)
    return _where_plain(expert, np.where(small, value, np.inf))


def buffer_weights(learning_rate: ArrayLike, momentum: ArrayLike, *, nesterov: bool = False) -> FloatArray:
    """``w_hat_k = sum_{l>=k} eta_l beta^(l-k)``, shape ``(..., K)``: the step a batch gradient makes in the end.

    ``nesterov``: ``eta_k + sum_{l>=k} eta_l beta^(l-k+1)``.
    """
    eta = np.asarray(learning_rate, dtype=np.float64)
    beta = np.asarray(momentum, dtype=np.float64)
    weights: FloatArray = np.empty(np.broadcast_shapes(eta.shape, beta[..., None].shape))
    running: FloatArray = np.zeros(weights.shape[:-1])
    for k in range(weights.shape[-1] - 1, -1, -1):
        running = eta[..., k] + beta * running
        weights[..., k] = eta[..., k] + beta * running if nesterov else running
    return weights


@vacuous
def drift_log(expert: Expert) -> FloatArray:
    """Theorem 3 (d): ``sum_k w_hat_k rms||g_{B_k}(x_k)||``: any sampling, momentum, learning rate; no kappa.

    Needs the rms norms of the batch gradients (with decay) from the training log; shape ``(...)``.  Decoupled
    decay with momentum: the norms are those of the loss alone, and ``omega ||x_0|| sum eta`` (``base_norm``) is added,
    which holds for ``eta omega <= 2`` because the shrinkage ``|1 - eta omega| <= 1`` never enlarges what was moved.
    """
    require_sgd(expert)
    if expert.batch_gradient_norms is None:
        raise RecipeError(
            f"expert {expert.name!r}: batch_gradient_norms is missing; drift by 6(d) needs the training log"
        )
    steps = write_out(expert)
    weights = buffer_weights(steps.learning_rate, expert.momentum, nesterov=expert.nesterov)
    moved = np.asarray((weights * expert.batch_gradient_norms.values).sum(axis=-1))
    if decays_outside_buffer(expert):
        decay = _outside(expert)
        covered = np.all(steps.learning_rate * decay[..., None] <= 2, axis=-1)
        if not np.any(covered):
            raise AssumptionError(
                f"expert {expert.name!r}: learning_rate times weight_decay exceeds 2, so decoupled decay moves the "
                "weights through zero and beyond; drift by 6(d) does not cover it"
            )
        norm = _base_norm(expert, "d, decoupled decay", decay)
        moved = np.where(covered, moved + decay * norm * steps.learning_rate.sum(axis=-1), np.inf)
    return moved


@vacuous
def drift_losses(expert: Expert) -> FloatArray:
    """Theorem 3 (d) from logged batch losses: ``sqrt(sum w_hat * 2 L sum w_hat_k E F_{B_k}(x_k))``; no decay."""
    require_sgd(expert)
    (high,) = _need(expert, "d", "L")
    if expert.batch_losses is None:
        raise RecipeError(f"expert {expert.name!r}: batch_losses is missing; drift by 6(d) needs the training log")
    if np.all(np.asarray(expert.weight_decay) > 0):
        raise AssumptionError(
            f"expert {expert.name!r}: weight_decay is not 0, so the logged losses are not those of the decayed "
            "objective; give batch_gradient_norms instead"
        )
    weights = buffer_weights(write_out(expert).learning_rate, expert.momentum, nesterov=expert.nesterov)
    value = np.sqrt(weights.sum(axis=-1) * 2 * high * (weights * expert.batch_losses.values).sum(axis=-1))
    return np.where(np.asarray(expert.weight_decay) == 0, value, np.inf)


@vacuous
def drift_saturation(
    g: ArrayLike, mu: ArrayLike, learning_rate: ArrayLike, sigma: ArrayLike, b: ArrayLike
) -> FloatArray:
    """Limit of (a), strongly convex, ``eta <= 2/(L+mu)``: ``g/mu + sigma sqrt(eta/(b mu (2 - mu eta)))``."""
    gradient, convexity, eta, noise, size = (
        np.asarray(value, dtype=np.float64) for value in (g, mu, learning_rate, sigma, b)
    )
    return np.asarray(gradient / convexity + noise * np.sqrt(eta / (size * convexity * (2 - convexity * eta))))
