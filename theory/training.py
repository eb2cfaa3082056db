"""Training risk of an expert from its hyperparameters (theory section 8): bounds on E F_S(x_K).

Four statements, the smallest that applies is taken by :func:`training_risk`:

* :func:`pl_training_risk`: mu-PL objectives (strongly convex ones, and convex ones with weight decay, are PL);
* :func:`convex_training_risk`: convex objectives, last iterate, any schedule;
* :func:`distance_training_risk`: distance to a minimiser, any step size;
* :func:`descent_training_risk`: any smooth loss, nothing but the descent lemma.

All need conditionally unbiased batches (not reshuffling) and no momentum; a nonconvex loss has no other rate, and is
refused where even the descent lemma lacks its constants.  With weight decay the objective is ``F_S + omega/2 ||x||^2``,
which is above F_S; ``minimal_risk`` then refers to it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.clocks import (
    _stepwise,
    geometric_sums,
    is_constant,
    require_sgd,
    sgd_log_response,
    smoothness,
    step_count,
    step_excess,
    write_out,
)
from theory.dispersion import smallest
from theory.drift import _base_norm, _need, _noise, _unbiased, _where_plain, finite_batch_factor
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert, Schedule
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous
from theory.symbols import symbol

TRAINING_FIELDS: dict[str, tuple[str, ...]] = {
    "PL bound": ("initial_risk", "sigma", "minimal_risk", "pl_constant", "mu", "base_norm", "L"),
    "convex bound": ("sigma", "minimal_risk", "minimizer_distance", "L"),
    "distance bound": ("sigma", "minimal_risk", "minimizer_distance", "initial_risk", "base_norm", "L", "mu", "kappa"),
    "descent bound": ("initial_risk", "sigma", "base_norm", "L"),
}


def pl_risk_formula() -> Formula:
    """``F* + (F_0 - F*)(1-mu eta)^K + L sigma^2 eta/(2 b mu) (1 - (1-mu eta)^K)``: constant learning rate."""
    keys = ("F_star", "F0", "mu", "eta", "K", "L", "sigma", "b")
    star, start, mu, eta, steps, L, sigma, b = (symbol(key) for key in keys)
    left = (1 - mu * eta) ** steps
    expression = star + (start - star) * left + L * sigma**2 * eta / (2 * b * mu) * (1 - left)
    return Formula("R", keys, expression, "section 8, PL")


def convex_risk_formula() -> Formula:
    """``F* + r^2/(2 eta K) + eta (1 + L eta) sigma^2 H_K/(2b)``, H_K the harmonic number: constant learning rate."""
    keys = ("F_star", "r0", "eta", "K", "L", "sigma", "b", "H_K")
    star, distance, eta, steps, L, sigma, b, harmonic_number = (symbol(key) for key in keys)
    expression = star + distance**2 / (2 * eta * steps) + eta * (1 + L * eta) * sigma**2 * harmonic_number / (2 * b)
    return Formula("R", keys, expression, "convex, last iterate")


def distance_risk_formula() -> Formula:
    """``F* + L/2 (r^2 q^(2K) + nu sigma^2/b)``, q the step factor and nu the noise time: constant learning rate."""
    keys = ("F_star", "L", "r0", "q", "K", "nu", "sigma", "b")
    star, L, distance, q, steps, nu, sigma, b = (symbol(key) for key in keys)
    expression = star + L / 2 * (distance**2 * q ** (2 * steps) + nu * sigma**2 / b)
    return Formula("R", keys, expression, "section 8, distance to a minimiser")


def descent_risk_formula() -> Formula:
    """``F_0 + L sigma^2 N_2/(2b)``, N_2 the sum of squared learning rates: any smooth loss."""
    keys = ("F0", "L", "sigma", "N2", "b")
    start, L, sigma, squares, b = (symbol(key) for key in keys)
    return Formula("R", keys, start + L * sigma**2 * squares / (2 * b), "section 8, descent lemma")


@vacuous
def harmonic(count: ArrayLike) -> FloatArray:
    """Harmonic numbers ``1 + 1/2 + ... + 1/K`` (Euler-Maclaurin beyond 64), for whole K >= 1.

    >>> harmonic([1, 2, 100]).round(6).tolist()
    [1.0, 1.5, 5.187378]
    """
    K = np.asarray(count, dtype=np.float64)
    table = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, 65))])
    small = table[np.clip(K, 0, 64).astype(np.int64)]
    tail = np.log(K) + np.euler_gamma + 1 / (2 * K) - 1 / (12 * K**2) + 1 / (120 * K**4) - 1 / (252 * K**6)
    return np.where(K <= 64, small, tail)


def _objective(expert: Expert, form: str) -> tuple[FloatArray, FloatArray]:
    """``(F*, L + omega)`` of the objective with decay; checks what every form needs."""
    require_sgd(expert)
    _unbiased(expert, form)
    if expert.minimal_risk is None:
        raise RecipeError(
            f"expert {expert.name!r}: minimal_risk is missing; give the smallest training risk (0 if it interpolates), "
            "or give training_risk itself"
        )
    return np.asarray(expert.minimal_risk, dtype=np.float64), _stiffness(expert)


def _stiffness(expert: Expert) -> FloatArray:
    return np.asarray(smoothness(expert) + np.asarray(expert.weight_decay, dtype=np.float64))


def _start(expert: Expert, form: str) -> FloatArray:
    """Objective at the base, with decay."""
    (start,) = _need(expert, form, "initial_risk")
    decay = np.asarray(expert.weight_decay, dtype=np.float64)
    if np.any(decay > 0):
        norm = _base_norm(expert, f"{form} with weight_decay", decay)
        start = start + 0.5 * decay * norm**2
    return start


def _small_steps(expert: Expert, stiffness: FloatArray, limit: float, form: str) -> NDArray[np.bool_]:
    """Where ``eta_k (L + omega) <= limit`` at every step; refuses an expert for which it holds nowhere."""
    small = np.all(_stepwise(expert.learning_rate) * stiffness[..., None] <= limit * (1 + 1e-12), axis=-1)
    if not np.any(small):
        raise AssumptionError(
            f"expert {expert.name!r}: learning_rate exceeds {limit:g}/(L + weight_decay), which the {form} needs; give "
            "training_risk instead"
        )
    return np.asarray(small)


def _is_flat(expert: Expert) -> bool:
    return not isinstance(expert.learning_rate, Schedule) and not isinstance(expert.batch_size, Schedule)


def _flat(expert: Expert, sigma: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Constant learning rate, batch size, and noise with its finite-sample factor."""
    eta, b = np.asarray(expert.learning_rate, dtype=np.float64), np.asarray(expert.batch_size, dtype=np.float64)
    return eta, b, sigma * np.sqrt(finite_batch_factor(expert.n, b, expert.sampling))


@vacuous
def pl_training_risk(expert: Expert) -> FloatArray:
    """Bound on E F_S(x_K), mu-PL objective: ``eta <= 1/(L+omega)``, unbiased batches, no momentum; shape ``(...)``.

    ``(F_0 - F*) prod (1 - mu eta_k) + L sigma^2/(2b) sum_k eta_k^2 prod_{l>k} (1 - mu eta_l)`` above F*.  mu is
    ``pl_constant``, or ``mu`` (plus the decay) for a strongly convex loss, or the decay for a convex one.
    ``minimal_risk`` F* must be given (0 if the expert interpolates); with decay, it and the bound refer to the decayed
    objective (which is above F_S) and ``base_norm`` is needed.  False with momentum.  Raises :class:`RecipeError` or
    :class:`AssumptionError` naming what is missing.  Source: theory section 8 (Karimi, Nutini and Schmidt 2016, with
    noise).
    """
    star, stiffness = _objective(expert, "PL training risk")
    (sigma,) = _need(expert, "PL training risk", "sigma")
    start = _start(expert, "PL training risk")
    decay = np.asarray(expert.weight_decay, dtype=np.float64)
    if expert.pl_constant is not None:
        mu = np.asarray(expert.pl_constant, dtype=np.float64)
    elif expert.curvature == "strongly_convex":
        mu = np.asarray(expert.mu, dtype=np.float64) + decay
    elif expert.curvature == "convex" and np.any(decay > 0):
        mu = decay
    else:
        raise RecipeError(
            f"expert {expert.name!r}: training_risk is missing; give the final empirical risk (or pl_constant, with "
            "initial_risk, sigma and minimal_risk, to bound it)"
        )
    small = _small_steps(expert, stiffness, 1.0, "PL training risk") & (mu > 0)
    mu = np.where(mu > 0, mu, 1.0)
    if _is_flat(expert):
        eta, b, effective = _flat(expert, sigma)
        value = evaluate(pl_risk_formula, star, start, mu, eta, step_count(expert), stiffness, effective, b)
    else:
        steps = write_out(expert)
        noise = _noise(expert, steps, sigma)
        gap = start - star
        for k in range(steps.present.shape[-1]):
            eta_k = steps.learning_rate[..., k]
            gap = (1 - mu * eta_k) * gap + stiffness / 2 * eta_k**2 * noise[..., k]
        value = star + gap
    return _where_plain(expert, np.where(small, np.maximum(value, 0.0), np.inf))


@vacuous
def convex_training_risk(expert: Expert) -> FloatArray:
    """Bound on E F_S(x_K) for convex losses, *last iterate*, any schedule, ``eta_k <= 1/(L+omega)``.

    With ``A_k = sum_{l>=k} eta_l`` and ``C_k = sum_{l>=k} eta_l^2 (1 + L eta_l) sigma^2/(2 b_l)``,

        ``E F_S(x_K) - F* <= r^2/(2 A_0) + C_0/A_0 + sum_{k=0}^{K-2} eta_k C_{k+1} / (A_k A_{k+1})``,

    ``r`` = ``minimizer_distance`` (rms distance of x_0 from a minimiser of the objective); constant learning rate:
    ``r^2/(2 eta K) + eta (1 + L eta) sigma^2 H_K/(2b)``.  *Proof:* for every z fixed before step k, convexity and the
    descent lemma give ``E||x_{k+1} - z||^2 <= ||x_k - z||^2 - 2 eta_k (F(x_{k+1}) - F(z)) + eta_k^2 (1 + L eta_k)
    sigma^2/b_k``; with z = x_k the eta-weighted mean of the risks after step k is at most ``F(x_k) + C_k/A_k``, so
    adding one risk to the mean (Shamir and Zhang 2013) raises it by at most the k-th summand; z the minimiser bounds
    the mean of all.  *Upper*: at most the factor H_K above the optimal dependence on the noise.

    >>> run = dict(n=100, batch_size=100, learning_rate=0.5, steps=10, curvature="convex", L=1.0, sigma=1.0)
    >>> float(convex_training_risk(Expert("a", minimal_risk=0.0, minimizer_distance=1.0, **run)))  # gradient descent
    0.1
    """
    form = "convex training risk"
    star, stiffness = _objective(expert, form)
    sigma, distance = _need(expert, form, "sigma", "minimizer_distance")
    if expert.curvature not in ("convex", "strongly_convex"):
        raise AssumptionError(
            f"expert {expert.name!r}: curvature is {expert.curvature!r}, but the {form} needs convex losses; give "
            "pl_constant or training_risk"
        )
    small = _small_steps(expert, stiffness, 1.0, form)
    if _is_flat(expert):
        eta, b, effective = _flat(expert, sigma)
        count = step_count(expert)
        value = evaluate(convex_risk_formula, star, distance, eta, count, stiffness, effective, b, harmonic(count))
        return _where_plain(expert, np.where(small, value, np.inf))
    steps = write_out(expert)
    eta = steps.learning_rate
    noise = eta**2 * (1 + stiffness[..., None] * eta) * _noise(expert, steps, sigma) / 2
    eta, noise = np.broadcast_arrays(eta, noise)
    A, C = (np.flip(np.cumsum(np.flip(part, axis=-1), axis=-1), axis=-1) for part in (eta, noise))
    later = times(eta[..., :-1] / np.where(A[..., :-1] > 0, A[..., :-1], 1.0), C[..., 1:])
    ladder = np.where(A[..., 1:] > 0, later / np.where(A[..., 1:] > 0, A[..., 1:], 1.0), 0.0).sum(axis=-1)
    value = star + (distance**2 / 2 + C[..., 0]) / A[..., 0] + ladder
    return _where_plain(expert, np.where(small & (A[..., 0] > 0), value, np.inf))


@vacuous
def distance_training_risk(expert: Expert) -> FloatArray:
    """Bound on E F_S(x_K) through the distance to a minimiser, any step size; shape ``(...)``.

    ``E F_S(x_K) - F* <= (L+omega)/2 [r^2 prod q_k^2 + sum_k w_k^2 sigma^2/b_k]`` with the step factors q and the
    response w of plain SGD; r is ``minimizer_distance``, or ``sqrt(2 (F_0 - F*)/mu)`` for a strongly convex objective.
    Useful for ``1/L < eta < 2/L``, where the PL and convex bounds stop.  *Proof:* ``E||x_{k+1} - x*||^2 <= q_k^2
    E||x_k - x*||^2 + eta_k^2 sigma^2/b_k`` (unbiased batches), and smoothness at the minimiser.
    """
    form = "distance training risk"
    star, stiffness = _objective(expert, form)
    (sigma,) = _need(expert, form, "sigma")
    decay = np.asarray(expert.weight_decay, dtype=np.float64)
    if expert.minimizer_distance is not None:
        square = np.asarray(expert.minimizer_distance, dtype=np.float64) ** 2
    elif expert.curvature == "strongly_convex":
        start = _start(expert, form)
        square = 2 * np.maximum(start - star, 0.0) / (np.asarray(expert.mu, dtype=np.float64) + decay)
    else:
        raise RecipeError(f"expert {expert.name!r}: minimizer_distance is missing; the {form} needs it")
    if is_constant(expert):
        eta, b, effective = _flat(expert, sigma)
        excess, count = step_excess(expert, eta), step_count(expert)
        left, (_, second) = np.exp(2 * count * np.log1p(excess)), geometric_sums(excess, count)
        spread = times(eta**2 * second, effective**2 / b)
        return _where_plain(expert, _from_distance(star, stiffness, times(square, left), spread))
    steps = write_out(expert)
    excess = step_excess(expert, steps.learning_rate, per_step=True)
    excess = np.where(steps.present, excess, 0.0)
    shrunk = np.exp(2 * np.log1p(excess).sum(axis=-1))
    log_w = np.where(steps.present, sgd_log_response(steps.learning_rate, excess), -np.inf)
    moved = times(np.exp(2 * log_w), _noise(expert, steps, sigma)).sum(axis=-1)
    return _where_plain(expert, _from_distance(star, stiffness, times(square, shrunk), moved))


def _from_distance(star: FloatArray, stiffness: FloatArray, left: FloatArray, noise: FloatArray) -> FloatArray:
    """The formula with what is left of the squared distance and the summed noise (powers are taken in log space)."""
    return evaluate(distance_risk_formula, star, stiffness, np.sqrt(left), 1.0, 1.0, noise, 1.0, 1.0)


@vacuous
def descent_training_risk(expert: Expert) -> FloatArray:
    """Bound on E F_S(x_K) for any smooth loss: ``F_0 + (L+omega) sigma^2 sum eta_k^2/(2 b_k)``; shape ``(...)``.

    ``eta_k <= 2/(L+omega)``, unbiased batches, no momentum.  Nothing but the descent lemma: training does not raise the
    objective by more than its noise.  It is what remains for a nonconvex loss without a PL constant.
    """
    form = "descent training risk"
    require_sgd(expert)
    _unbiased(expert, form)
    (sigma,) = _need(expert, form, "sigma")
    start, stiffness = _start(expert, form), _stiffness(expert)
    small = _small_steps(expert, stiffness, 2.0, form)
    if _is_flat(expert):
        eta, b, effective = _flat(expert, sigma)
        noise = times(step_count(expert) * eta**2, effective**2 / b)
    else:
        steps = write_out(expert)
        noise = (steps.learning_rate**2 * _noise(expert, steps, sigma)).sum(axis=-1)
    value = evaluate(descent_risk_formula, start, stiffness, 1.0, noise, 1.0)
    return _where_plain(expert, np.where(small, value, np.inf))


def training_risk(expert: Expert) -> tuple[FloatArray, str]:
    """The smallest bound on E F_S(x_K) that applies and its form; the given ``training_risk`` if there is one.

    Raises :class:`RecipeError` that says what to give: the final training risk, or ``initial_risk`` and ``sigma`` (with
    ``minimal_risk`` and ``pl_constant``, ``mu`` or ``minimizer_distance`` for something better than the start).

    >>> run = dict(n=100, batch_size=10, learning_rate=0.1, steps=200, curvature="convex", L=1.0, sigma=0.5)
    >>> risk, form = training_risk(Expert("a", initial_risk=2.0, minimal_risk=0.0, minimizer_distance=2.0, **run))
    >>> round(float(risk), 4), form
    (0.1073, 'convex bound')
    """
    if expert.training_risk is not None:
        return np.asarray(expert.training_risk, dtype=np.float64), "given"
    candidates: dict[str, Callable[[], FloatArray]] = {
        "PL bound": lambda: pl_training_risk(expert),
        "convex bound": lambda: convex_training_risk(expert),
        "distance bound": lambda: distance_training_risk(expert),
        "descent bound": lambda: descent_training_risk(expert),
    }
    found: dict[str, FloatArray] = {}
    refusals: list[RecipeError] = []
    for name, compute in candidates.items():
        try:
            found[name] = compute()
        except RecipeError as error:
            refusals.append(error)
    if found:
        return smallest(found)
    refused = next((error for error in refusals if isinstance(error, AssumptionError)), refusals[0])
    raise refused
