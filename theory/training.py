"""Training risk of an expert from its hyperparameters (theory section 8)."""

from __future__ import annotations

import numpy as np

from theory.clock import _stepwise, require_sgd, smoothness, step_count, write_out
from theory.drift import _need, _noise, _unbiased, finite_batch_factor
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert, Schedule
from theory.symbolic import FloatArray, Formula, evaluate, vacuous
from theory.symbols import symbol


def pl_risk_formula() -> Formula:
    """``F* + (F_0 - F*)(1-mu eta)^K + L sigma^2 eta/(2 b mu) (1 - (1-mu eta)^K)``: constant learning rate."""
    keys = ("F_star", "F0", "mu", "eta", "K", "L", "sigma", "b")
    star, start, mu, eta, steps, L, sigma, b = (symbol(key) for key in keys)
    left = (1 - mu * eta) ** steps
    expression = star + (start - star) * left + L * sigma**2 * eta / (2 * b * mu) * (1 - left)
    return Formula("R", keys, expression, "section 8, PL")


@vacuous
def pl_training_risk(expert: Expert) -> FloatArray:
    """Bound on E F_S(x_K), mu-PL objective: ``eta <= 1/(L+omega)``, unbiased batches, no momentum; shape ``(...)``.

    mu is ``pl_constant``, or ``mu`` (plus the decay) for a strongly convex loss.  ``minimal_risk`` F* must be given (0
    if the expert interpolates); with decay, it and the bound refer to the decayed objective (which is above F_S) and
    ``base_norm`` is needed.  Raises :class:`RecipeError` or :class:`AssumptionError` naming what is missing.
    """
    require_sgd(expert)
    _unbiased(expert, "PL training risk")
    start, sigma = _need(expert, "PL training risk", "initial_risk", "sigma")
    if expert.minimal_risk is None:
        raise RecipeError(
            f"expert {expert.name!r}: minimal_risk is missing; give the smallest training risk (0 if it interpolates), "
            "or give training_risk itself"
        )
    star = np.asarray(expert.minimal_risk, dtype=np.float64)
    decay = np.asarray(expert.weight_decay, dtype=np.float64)
    if expert.pl_constant is not None:
        mu = np.asarray(expert.pl_constant, dtype=np.float64)
    elif expert.curvature == "strongly_convex":
        mu = np.asarray(expert.mu, dtype=np.float64) + decay
    else:
        raise RecipeError(
            f"expert {expert.name!r}: training_risk is missing; give the final empirical risk (or pl_constant, with "
            "initial_risk, sigma and minimal_risk, to bound it)"
        )
    if np.any(decay > 0):
        (norm,) = _need(expert, "PL training risk with weight_decay", "base_norm")
        start = start + 0.5 * decay * norm**2
    stiffness = smoothness(expert) + decay
    if np.any(_stepwise(expert.learning_rate) * stiffness[..., None] > 1 + 1e-12):
        raise AssumptionError(
            f"expert {expert.name!r}: learning_rate exceeds 1/(L + weight_decay), which the PL training risk needs; "
            "give training_risk instead"
        )
    if not isinstance(expert.learning_rate, Schedule) and not isinstance(expert.batch_size, Schedule):
        eta, b = np.asarray(expert.learning_rate, dtype=np.float64), np.asarray(expert.batch_size, dtype=np.float64)
        effective = sigma * np.sqrt(finite_batch_factor(expert.n, b, expert.sampling))
        return np.maximum(
            evaluate(pl_risk_formula, star, start, mu, eta, step_count(expert), stiffness, effective, b), 0
        )
    steps = write_out(expert)
    noise = _noise(expert, steps, sigma)
    gap = start - star
    for k in range(steps.present.shape[-1]):
        eta_k = steps.learning_rate[..., k]
        gap = (1 - mu * eta_k) * gap + stiffness / 2 * eta_k**2 * noise[..., k]
    return np.maximum(star + gap, 0.0)
