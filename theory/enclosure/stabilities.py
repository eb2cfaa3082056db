"""Interval of the stability bound (Theorem 2, its recursions and its cap) on a box."""

from __future__ import annotations

import contextlib

import numpy as np

from theory.clocks import clock, log_response, lowest_curvature, smoothness
from theory.enclosure.boxes import CLOCK_DIRECTIONS, Ranges, check_box, corner_of, is_covered, smallest_of
from theory.enclosure.relaxed import Unchecked, unchecked
from theory.errors import AssumptionError, RecipeError
from theory.expert_terms import expert_epsilon
from theory.recipe import Expert
from theory.stability import (
    epsilon_cap,
    epsilon_from_losses,
    epsilon_recursion,
    epsilon_recursion_from_losses,
    epsilon_sup,
    gamma,
    gamma_with_replacement,
    gamma_without_replacement,
)
from theory.symbolic import FloatArray, times

_STABILITY = {**CLOCK_DIRECTIONS, "batch_size": -1, "n": -1}


def epsilon_range(
    expert: Expert, ranges: Ranges, drift: tuple[FloatArray, FloatArray] | None, *, recursion: bool = True
) -> tuple[FloatArray, FloatArray]:
    """Interval that contains the stability bound of every expert in the box, given the interval of its drift."""
    check_box(expert, ranges)
    sides: list[FloatArray] = []
    for side, up in enumerate((False, True)):
        cap = None if drift is None else drift[side]
        if not ranges:
            sides.append(expert_epsilon(expert, None, cap, recursion=recursion)[0])
            continue
        found: list[FloatArray] = []
        corner = corner_of(expert, ranges, _STABILITY, up)
        if is_covered(corner):
            found += _gap_forms(corner, ranges, up, recursion)
        if cap is not None:
            found.append(epsilon_cap(cap))
        if corner.epsilon is not None:
            found.append(np.asarray(corner.epsilon, dtype=np.float64))
        if not found:
            raise RecipeError(
                f"expert {expert.name!r}: no bound on the stability applies on the whole box; give D_inf, D_2 or "
                "D_envelope, or what a drift bound needs"
            )
        sides.append(smallest_of(found))
    return sides[0], sides[1]


def _gap_forms(corner: Unchecked, ranges: Ranges, up: bool, recursion: bool) -> list[FloatArray]:
    timing = clock(corner)
    variance = gamma(corner, timing)
    double = None if corner.G is None else 2 * np.asarray(corner.G, dtype=np.float64)
    gaps = [gap for gap in (corner.D_inf, double, corner.D_envelope) if gap is not None]
    found = [epsilon_sup(gap, timing.tau, corner.n, variance) for gap in gaps]
    if corner.D_2 is not None and corner.sampling != "reshuffle":
        spread = _gamma_extreme(corner, ranges, timing.nu, up) if "n" in ranges else variance
        mean = np.asarray(timing.tau) / np.asarray(corner.n, dtype=np.float64)
        found.append(times(corner.D_2, mean + np.sqrt(spread)))
        if recursion:
            with contextlib.suppress(AssumptionError):
                found.append(epsilon_recursion(with_extreme_factor(corner, ranges, up), corner.D_2))
    if corner.batch_losses is not None:
        with contextlib.suppress(RecipeError):
            log_w = log_response(corner) if timing.log_w is None else timing.log_w
            found.append(epsilon_from_losses(corner, timing, log_w))
            if recursion:
                found.append(epsilon_recursion_from_losses(corner))
    return found


def with_extreme_factor(corner: Unchecked, ranges: Ranges, up: bool) -> Unchecked:
    """The corner with the one-step factor q at its own extreme (it may fall with eta while the kicks rise)."""
    if not CLOCK_DIRECTIONS.keys() & set(ranges):
        return corner
    rate = np.asarray(corner.learning_rate, dtype=np.float64)
    ends = ranges.get("learning_rate", (rate, rate))
    low, high = (np.asarray(end, dtype=np.float64) for end in ends)
    if corner.kappa is not None:
        moved = [end * np.asarray(corner.kappa, dtype=np.float64) for end in (low, high)]
        excess = np.maximum(*moved) if up else np.minimum(*moved)
    else:
        m, L = lowest_curvature(corner), smoothness(corner)
        decay = np.asarray(corner.weight_decay, dtype=np.float64)
        if up:  # q is convex in eta: its largest value is at an end
            opposite = ranges.get("weight_decay", (decay, decay))[1]
            curved = high * (L + np.asarray(opposite, dtype=np.float64)) - 2
            excess = np.maximum(np.maximum(-low * (m + decay), -high * (m + decay)), curved)
        else:
            opposite = ranges.get("weight_decay", (decay, decay))[0]
            curved = low * (L + np.asarray(opposite, dtype=np.float64)) - 2
            excess = np.maximum(np.minimum(-low * (m + decay), -high * (m + decay)), curved)
    return unchecked(corner, kappa=np.maximum(excess, -1.0) / rate)


def _gamma_extreme(corner: Expert, ranges: Ranges, nu: FloatArray, up: bool) -> FloatArray:
    """Largest or smallest Gamma over the range of n (rising up to ``n = 2b`` or 2, falling after)."""
    low, high = (np.asarray(bound, dtype=np.float64) for bound in ranges["n"])
    b = np.asarray(corner.batch_size, dtype=np.float64)
    law = gamma_without_replacement if corner.sampling == "without_replacement" else gamma_with_replacement
    peak = np.clip(2 * b if corner.sampling == "without_replacement" else np.asarray(2.0), low, high)
    values = [law(nu, place, b) for place in (low, high)]
    if up:
        return np.maximum(np.maximum(*values), law(nu, peak, b))
    # a batch cannot exceed n, where Gamma is zero: at most the smaller end
    return np.minimum(*values)
