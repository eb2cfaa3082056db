"""Interval of the training risk on a box: each bound of section 8 is a falling part plus a rising part."""

from __future__ import annotations

import contextlib

import numpy as np

from theory.clocks import clock, is_constant, smoothness, step_count, step_excess
from theory.drift import finite_batch_factor
from theory.enclosure.boxes import (
    CLOCK_DIRECTIONS,
    NOISE_DIRECTIONS,
    Ranges,
    check_box,
    corner_of,
    is_covered,
    smallest_of,
)
from theory.enclosure.relaxed import unchecked
from theory.enclosure.stabilities import with_extreme_factor
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert
from theory.symbolic import FloatArray, evaluate, times
from theory.training import (
    convex_risk_formula,
    convex_training_risk,
    descent_training_risk,
    distance_training_risk,
    harmonic,
    pl_risk_formula,
    pl_training_risk,
    training_risk,
)

_FALLING = {"learning_rate": -1, "steps": -1, "pl_constant": -1, "mu": -1, "weight_decay": -1}
_RISING = {"learning_rate": 1, "steps": 1, "pl_constant": -1, "mu": -1, "batch_size": -1, "n": 1}


def risk_range(expert: Expert, ranges: Ranges) -> tuple[FloatArray, FloatArray]:
    """Interval that contains the training risk of every expert in the box: given, or every bound of section 8.

    Each bound is a falling part (what is left of the start) plus a rising part (noise), evaluated at their own corners.
    An end is ``inf`` where no bound covers the box (upper) or any of it (lower).
    """
    check_box(expert, ranges)
    if expert.training_risk is not None or "training_risk" in ranges:
        low, high = (corner_of(expert, ranges, {}, up).training_risk for up in (False, True))
        return np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    if not ranges:
        exact, _ = training_risk(expert)
        return exact, exact
    middle = corner_of(expert, ranges, {**_RISING, **NOISE_DIRECTIONS}, False)
    with contextlib.suppress(AssumptionError):  # names what is missing
        training_risk(middle)
    plain = is_constant(middle)
    sides = [_plain_risks(expert, ranges, up) if plain else _stepwise_risks(expert, ranges, up) for up in (False, True)]
    return smallest_of(sides[0]), smallest_of(sides[1])


def _stepwise_risks(expert: Expert, ranges: Ranges, up: bool) -> list[FloatArray]:
    """Schedules, and whatever needs its steps written out: only constants of the loss have a range here."""
    corner, opposite = corner_of(expert, ranges, {}, up), corner_of(expert, ranges, {}, not up)
    found: list[FloatArray] = []
    for form in (pl_training_risk, convex_training_risk, descent_training_risk):
        with contextlib.suppress(RecipeError):
            found.append(form(corner))
    if corner.minimal_risk is None:
        return found or [np.asarray(np.inf)]
    with contextlib.suppress(RecipeError):
        star, other = (np.asarray(item.minimal_risk, dtype=np.float64) for item in (corner, opposite))
        value = distance_training_risk(unchecked(corner, minimal_risk=other))  # F* lowers the distance
        found.append(np.asarray(value - other + star))
    return found or [np.asarray(np.inf)]


def _plain_risks(expert: Expert, ranges: Ranges, up: bool) -> list[FloatArray]:
    fall, rise = corner_of(expert, ranges, _FALLING, up), corner_of(expert, ranges, _RISING, up)
    found = [np.asarray(np.inf)]
    if rise.sigma is None or rise.L is None or not is_covered(rise) or rise.sampling == "reshuffle":
        return found
    decay = np.asarray(rise.weight_decay, dtype=np.float64)
    stiffness = smoothness(rise) + decay
    eta, K = np.asarray(rise.learning_rate, dtype=np.float64), step_count(rise)
    early, few = np.asarray(fall.learning_rate, dtype=np.float64), step_count(fall)
    b = np.asarray(rise.batch_size, dtype=np.float64)
    noise = np.asarray(rise.sigma, dtype=np.float64) * np.sqrt(finite_batch_factor(rise.n, b, rise.sampling))
    star = None if rise.minimal_risk is None else np.asarray(rise.minimal_risk, dtype=np.float64)
    start = _start(rise)
    small = eta * stiffness <= 1 + 1e-12
    mu = _pl(fall)
    if start is not None:
        descent = start + stiffness / 2 * times(K * eta**2, noise**2 / b)
        found.append(np.where(eta * stiffness <= 2 * (1 + 1e-12), descent, np.inf))
    if star is not None and start is not None and mu is not None:
        # a PL constant above 1/eta is outside the domain, and occurs at mixed corners only
        positive = np.minimum(np.where(mu > 0, mu, 1.0), 1 / np.maximum(eta, early))
        first = evaluate(pl_risk_formula, star, np.maximum(start, star), positive, early, few, 1.0, 0.0, 1.0)
        second = evaluate(pl_risk_formula, 0.0, 0.0, positive, eta, K, stiffness, noise, b)
        found.append(np.where(small & (mu > 0), np.maximum(first + second, 0.0), np.inf))
    if star is None:
        return found
    distance = None if rise.minimizer_distance is None else np.asarray(rise.minimizer_distance, dtype=np.float64)
    if distance is not None and rise.curvature != "smooth":
        first = evaluate(convex_risk_formula, star, distance, early, few, 1.0, 0.0, 1.0, 0.0)
        second = evaluate(convex_risk_formula, 0.0, 0.0, eta, K, stiffness, noise, b, harmonic(K))
        found.append(np.where(small, first + second, np.inf))
    if distance is not None:
        square = distance**2
    elif rise.curvature == "strongly_convex" and start is not None:
        lowest = np.asarray(corner_of(expert, ranges, {"minimal_risk": -1}, up).minimal_risk, dtype=np.float64)
        convexity = np.asarray(fall.mu, dtype=np.float64) + np.asarray(fall.weight_decay, dtype=np.float64)
        square = 2 * np.maximum(start - lowest, 0.0) / convexity
    else:
        return found
    clocked = corner_of(expert, ranges, {**CLOCK_DIRECTIONS, "steps": 1}, up)
    factor = with_extreme_factor(clocked, ranges, up)
    excess = step_excess(factor, np.asarray(factor.learning_rate, dtype=np.float64))
    log_q = 2 * np.log1p(excess)
    left = np.exp(np.where((log_q > 0), K, few) * np.where(np.isneginf(log_q), -np.inf, log_q))
    found.append(star + stiffness / 2 * (times(square, left) + times(clock(clocked).nu, noise**2 / b)))
    return found


def _start(expert: Expert) -> FloatArray | None:
    """Objective at the base with decay; None where it is not known."""
    if expert.initial_risk is None:
        return None
    value, decay = (np.asarray(item, dtype=np.float64) for item in (expert.initial_risk, expert.weight_decay))
    if not np.any(decay > 0):
        return value
    return None if expert.base_norm is None else value + 0.5 * decay * np.asarray(expert.base_norm) ** 2


def _pl(expert: Expert) -> FloatArray | None:
    """The PL constant that the bound would use; None where there is none."""
    if expert.pl_constant is not None:
        return np.asarray(expert.pl_constant, dtype=np.float64)
    decay = np.asarray(expert.weight_decay, dtype=np.float64)
    if expert.curvature == "strongly_convex":
        return np.asarray(expert.mu, dtype=np.float64) + decay
    return decay if expert.curvature == "convex" else None
