"""The master bound on a whole box of recipes: a guaranteed interval from proven monotonicity, ingredient by ingredient.

A field of an expert may be known only to lie in ``[lower, upper]``.  The bound as a whole is not monotone in most
fields (a longer training lowers the training risk and raises the drift), but its *ingredients* are: every form of the
drift, of the stability, and each half of the PL training risk.  Each ingredient is evaluated at the corner of the box
where it is largest (smallest), and the master inequality, which increases in all of them, combines the results.

Why the ingredients are monotone (plain SGD, constant learning rate and batch size, first two samplings; q, tau, nu of
theory section 4, ``m`` the lowest curvature):

* ``tau = eta sum q^a`` and ``nu = eta^2 sum q^(2a)`` increase in K (more nonnegative terms) and in L, and decrease in
  mu.  In eta: while ``q = 1 - eta (m + omega)``, either m + omega < 0 and every factor increases, or
  ``eta (m + omega) <= 1`` there, and ``tau = (1 - q^K)/(m + omega)``,
  ``nu = eta (1 - q^(2K))/((m + omega)(2 - eta (m + omega)))`` are products of increasing nonnegative factors; on the
  other branch ``q = eta (L + omega) - 1`` increases.
* ``(tau/n)^2 + Gamma`` decreases in b, and in n because ``tau^2 >= nu`` (w >= 0); the rms form ``tau/n + sqrt(Gamma)``
  does **not** decrease in n (Gamma = 0 at n = b, and rises up to n = 2b): its two parts are bounded apart.
* the noise of a batch, ``(n - b)/(b (n - 1))``, decreases in b and *increases* in n for distinct samples.
* decay lowers tau while the first branch holds on the whole box, and raises the energy form (c).

For other clocks (momentum, schedules, reshuffling) only the fields in which the ingredients are visibly monotone are
proven: g, sigma, sigma0, the gaps D, risks, norms and measured quantities; the rest is refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import clock, is_constant, log_response, lowest_curvature, smoothness, step_excess
from theory.dispersion import sums_of_others
from theory.drift import drift_base, drift_energy, drift_log, drift_losses, drift_noise, finite_batch_factor
from theory.errors import AssumptionError, RecipeError
from theory.expert_terms import expert_drift, expert_epsilon
from theory.master import sharpest_side, task_stability
from theory.operators import added_dispersion, coefficients, sensitivity
from theory.recipe import Expert, Merge, per_expert
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

Ranges = Mapping[str, tuple[ArrayLike, ArrayLike]]

SCALES = frozenset(
    (
        *("initial_gradient_norm", "sigma", "sigma0", "G", "D_inf", "D_2", "D_envelope", "initial_risk"),
        *("training_risk", "minimal_risk", "base_norm", "minimizer_distance", "drift", "private_drift"),
        "epsilon",
    )
)
CLOSED_FORM = SCALES | {"learning_rate", "steps", "batch_size", "n", "L", "mu", "kappa", "pl_constant", "weight_decay"}

_CLOCK = {"learning_rate": 1, "steps": 1, "L": 1, "mu": -1, "kappa": 1, "weight_decay": -1}
_NOISE = {"n": 1, "batch_size": -1}
_DRIFT: dict[str, tuple[Callable[..., FloatArray], dict[str, int]]] = {
    "6(a)": (drift_noise, {**_CLOCK, **_NOISE, "initial_gradient_norm": 1, "sigma": 1}),
    "6(b)": (drift_base, {**_CLOCK, **_NOISE, "initial_gradient_norm": 1, "sigma0": 1, "base_norm": 1}),
    "6(c)": (
        drift_energy,
        {
            **_NOISE,
            **{"learning_rate": 1, "steps": 1, "L": 1, "weight_decay": 1, "initial_risk": 1, "training_risk": -1},
            **{"sigma": 1, "base_norm": 1},
        },
    ),
    "6(d), gradient log": (drift_log, {"base_norm": 1}),
    "6(d), loss log": (drift_losses, {"L": 1}),
}
_STABILITY = {**_CLOCK, "batch_size": -1, "n": -1}


@dataclass(frozen=True, eq=False)
class Unchecked(Expert):
    """An expert whose fields were checked elsewhere and may be relaxed (fractional steps, batches, samples)."""

    def __post_init__(self) -> None:
        """Skip the checks of :class:`Expert`."""


def unchecked(expert: Expert, **changes: Any) -> Unchecked:
    """The same expert without checks, with some fields replaced."""
    return Unchecked(**({item.name: getattr(expert, item.name) for item in fields(Expert)} | changes))


@dataclass(frozen=True, eq=False)
class Enclosure:
    """A guaranteed interval of the master bound on a box: ``lower <= value <= upper``, shape ``(...)``.

    ``terms`` maps ``optimization`` (training and dispersion) and ``instability`` (square roots, unit sqrt(loss)) to
    their own intervals.
    """

    lower: FloatArray
    upper: FloatArray
    terms: Mapping[str, tuple[FloatArray, FloatArray]]


def _corner(expert: Expert, ranges: Ranges, directions: Mapping[str, int], up: bool) -> Unchecked:
    """The expert at the corner of the box where an increasing (+1) or decreasing (-1) ingredient is largest."""
    chosen = {
        name: np.asarray(bounds[1 if (directions.get(name, 1) > 0) == up else 0], dtype=np.float64)
        for name, bounds in ranges.items()
    }
    return unchecked(expert, **chosen)


def _check(expert: Expert, ranges: Ranges) -> None:
    known = {item.name for item in fields(Expert)}
    for name, bounds in ranges.items():
        if name not in known:
            raise RecipeError(f"expert {expert.name!r}: {name} is not a field; give a range of a field of Expert")
        low, high = (np.asarray(bound, dtype=np.float64) for bound in bounds)
        if np.any(np.isnan(low) | np.isnan(high)) or np.any(low > high):
            raise RecipeError(f"expert {expert.name!r}: the range of {name} is empty; give lower <= upper")
        if name == "kappa" and expert.kappa is None:
            raise RecipeError(f"expert {expert.name!r}: kappa has a range but is not given; give one value in it")
    sample = unchecked(expert, **{name: bounds[0] for name, bounds in ranges.items()})
    plain = is_constant(sample) and "momentum" not in ranges and expert.batch_losses is None
    allowed = CLOSED_FORM if plain else SCALES
    for name in ranges:
        if name not in allowed:
            raise AssumptionError(
                f"expert {expert.name!r}: the bound is not proven monotone in {name} for its kind of training; sample "
                "the range instead (bound_interval does), or fix the field"
            )
    _check_domain(expert, ranges)


def _check_domain(expert: Expert, ranges: Ranges) -> None:
    """Where the proofs of the module docstring need the whole box on one side of a threshold."""
    low, high = (_corner(expert, ranges, {}, up) for up in (False, True))
    if low.L is not None and high.mu is not None and np.any(np.asarray(high.mu) > np.asarray(low.L)):
        raise RecipeError(f"expert {expert.name!r}: the range of mu reaches above L; lower its upper end")
    if low.kappa is not None and ({"kappa", "learning_rate"} & set(ranges)):
        rate = np.asarray(high.learning_rate, dtype=np.float64)
        if np.any(1 + rate * np.asarray(low.kappa, dtype=np.float64) < 0):
            raise RecipeError(
                f"expert {expert.name!r}: 1 + learning_rate*kappa is negative in the box; narrow one of the two ranges"
            )
    if "weight_decay" not in ranges:
        return
    if high.base_norm is None:
        raise RecipeError(f"expert {expert.name!r}: base_norm is missing; a range of weight_decay needs it")
    if expert.kappa is None and high.L is not None:
        worst = _corner(expert, ranges, {"learning_rate": 1, "L": 1, "weight_decay": 1, "mu": 1}, True)
        reach = np.asarray(worst.learning_rate) * (
            smoothness(worst) + lowest_curvature(worst) + 2 * np.asarray(worst.weight_decay, dtype=np.float64)
        )
        if np.any(reach > 2):
            raise AssumptionError(
                f"expert {expert.name!r}: learning_rate exceeds 2/(L + m + 2 weight_decay) somewhere in the box, where "
                "the clock is not monotone in weight_decay; lower the upper end of learning_rate or fix the decay"
            )


def _covered(expert: Expert) -> bool:
    return (
        expert.optimizer.lower() == "sgd"
        and not expert.gradient_clipping
        and (expert.L is not None or expert.kappa is not None)
    )


def _least(found: list[FloatArray]) -> FloatArray:
    value = found[0]
    for other in found[1:]:
        value = np.minimum(value, other)
    return value


def drift_range(expert: Expert, ranges: Ranges, *, measured: bool = True) -> tuple[FloatArray, FloatArray]:
    """Interval that contains the drift bound of every expert in the box; ``measured=False`` ignores a measured drift.

    Raises :class:`RecipeError` if no form of Theorem 3 applies on the whole box.
    """
    _check(expert, ranges)
    if not ranges and (measured or expert.drift is None):
        exact, _ = expert_drift(expert)
        return exact, exact
    sides: list[FloatArray] = []
    for up in (False, True):
        found: list[FloatArray] = []
        for name, (form, directions) in _DRIFT.items():
            corner = _corner(expert, ranges, directions, up)
            try:
                if name in ("6(a)", "6(b)"):
                    if not _covered(corner):
                        continue
                    found.append(form(corner, clock(corner)))
                else:
                    found.append(form(corner))
            except RecipeError:
                continue
        if measured and (expert.drift is not None or "drift" in ranges):
            found.append(np.asarray(_corner(expert, ranges, {}, up).drift, dtype=np.float64))
        if not found:
            raise RecipeError(
                f"expert {expert.name!r}: no bound on the drift applies on the whole box; give initial_gradient_norm "
                "with sigma0 or sigma, or the measured drift"
            )
        sides.append(_least(found))
    return sides[0], sides[1]


def epsilon_range(
    expert: Expert, ranges: Ranges, drift: tuple[FloatArray, FloatArray] | None, *, recursion: bool = True
) -> tuple[FloatArray, FloatArray]:
    """Interval that contains the stability bound of every expert in the box, given the interval of its drift."""
    _check(expert, ranges)
    sides: list[FloatArray] = []
    for side, up in enumerate((False, True)):
        cap = None if drift is None else drift[side]
        if not ranges:
            sides.append(expert_epsilon(expert, None, cap, recursion=recursion)[0])
            continue
        found: list[FloatArray] = []
        corner = _corner(expert, ranges, _STABILITY, up)
        if _covered(corner):
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
        sides.append(_least(found))
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
                found.append(epsilon_recursion(_with_factor(corner, ranges, up), corner.D_2))
    if corner.batch_losses is not None:
        with contextlib.suppress(RecipeError):
            log_w = log_response(corner) if timing.log_w is None else timing.log_w
            found.append(epsilon_from_losses(corner, timing, log_w))
            if recursion:
                found.append(epsilon_recursion_from_losses(corner))
    return found


def _with_factor(corner: Unchecked, ranges: Ranges, up: bool) -> Unchecked:
    """The corner with the one-step factor q at its own extreme (it may fall with eta while the kicks rise)."""
    if not _CLOCK.keys() & set(ranges):
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


_FALLING = {"learning_rate": -1, "steps": -1, "pl_constant": -1, "mu": -1, "weight_decay": -1}
_RISING = {"learning_rate": 1, "steps": 1, "pl_constant": -1, "mu": -1, "batch_size": -1, "n": 1}


def risk_range(expert: Expert, ranges: Ranges) -> tuple[FloatArray, FloatArray]:
    """Interval that contains the training risk of every expert in the box: given, or every bound of section 8.

    Each bound is a falling part (what is left of the start) plus a rising part (noise), evaluated at their own corners.
    An end is ``inf`` where no bound covers the box (upper) or any of it (lower).
    """
    _check(expert, ranges)
    if expert.training_risk is not None or "training_risk" in ranges:
        low, high = (_corner(expert, ranges, {}, up).training_risk for up in (False, True))
        return np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    if not ranges:
        exact, _ = training_risk(expert)
        return exact, exact
    middle = _corner(expert, ranges, {**_RISING, **_NOISE}, False)
    with contextlib.suppress(AssumptionError):  # names what is missing
        training_risk(middle)
    plain = is_constant(middle)
    sides = [_plain_risks(expert, ranges, up) if plain else _stepwise_risks(expert, ranges, up) for up in (False, True)]
    return _least(sides[0]), _least(sides[1])


def _stepwise_risks(expert: Expert, ranges: Ranges, up: bool) -> list[FloatArray]:
    """Schedules, and whatever needs its steps written out: only constants of the loss have a range here."""
    corner, opposite = _corner(expert, ranges, {}, up), _corner(expert, ranges, {}, not up)
    found: list[FloatArray] = []
    for form in (pl_training_risk, convex_training_risk, descent_training_risk):
        with contextlib.suppress(RecipeError):
            found.append(form(corner))
    with contextlib.suppress(RecipeError):
        star, other = (np.asarray(item.minimal_risk, dtype=np.float64) for item in (corner, opposite))
        value = distance_training_risk(unchecked(corner, minimal_risk=other))  # F* lowers the distance
        found.append(np.asarray(value - other + star))
    return found or [np.asarray(np.inf)]


def _plain_risks(expert: Expert, ranges: Ranges, up: bool) -> list[FloatArray]:
    fall, rise = _corner(expert, ranges, _FALLING, up), _corner(expert, ranges, _RISING, up)
    found = [np.asarray(np.inf)]
    if rise.sigma is None or rise.L is None or not _covered(rise) or rise.sampling == "reshuffle":
        return found
    decay = np.asarray(rise.weight_decay, dtype=np.float64)
    stiffness = smoothness(rise) + decay
    eta, K = (np.asarray(value, dtype=np.float64) for value in (rise.learning_rate, rise.steps))
    early, few = (np.asarray(value, dtype=np.float64) for value in (fall.learning_rate, fall.steps))
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
        lowest = np.asarray(_corner(expert, ranges, {"minimal_risk": -1}, up).minimal_risk, dtype=np.float64)
        convexity = np.asarray(fall.mu, dtype=np.float64) + np.asarray(fall.weight_decay, dtype=np.float64)
        square = 2 * np.maximum(start - lowest, 0.0) / convexity
    else:
        return found
    clocked = _corner(expert, ranges, {**_CLOCK, "steps": 1}, up)
    factor = _with_factor(clocked, ranges, up)
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


def _stack(values: list[FloatArray]) -> FloatArray:
    return np.stack(np.broadcast_arrays(*values))


def _align(*values: FloatArray) -> list[FloatArray]:
    depth = max(value.ndim for value in values)
    return list(
        np.broadcast_arrays(
            *(value.reshape(value.shape[:1] + (1,) * (depth - value.ndim) + value.shape[1:]) for value in values)
        )
    )


def _magnitudes(low: FloatArray, high: FloatArray, shift: FloatArray | float) -> tuple[FloatArray, FloatArray]:
    """Interval of ``|alpha - shift|`` for alpha in ``[low, high]``."""
    left, right = low - shift, high - shift
    inside = (left <= 0) & (right >= 0)
    least = np.where(inside, 0.0, np.minimum(np.abs(left), np.abs(right)))
    return least, np.maximum(np.abs(left), np.abs(right))


@np.errstate(all="ignore")
def _optimization_side(
    risks: FloatArray,
    base_risks: FloatArray | None,
    d: FloatArray,
    alpha: tuple[FloatArray, FloatArray],
    p: FloatArray,
    L: FloatArray,
    extra: FloatArray,
    orthogonal: bool,
    side: int,
    fixed_smoothness: bool,
) -> FloatArray:
    """The left half of the master bound (section 7, every aggregation) with every factor at its lower or upper end.

    ``|1 - alpha|``, ``|alpha|`` and ``|alpha - p|`` are interval arithmetic; everything else increases in risks,
    drifts and smoothness.  Returns the smallest total, unit sqrt(loss), shape ``(...)``.
    """
    F, low, high, drift, weights, stiff = _align(risks, alpha[0], alpha[1], d, p, L)
    own, moved, off = (_magnitudes(low, high, shift)[side] for shift in (1.0, 0.0, weights))
    largest, stiffness = stiff.max(axis=0), weights * stiff
    far = (times(own, drift) + sums_of_others(times(moved, drift))) ** 2
    near = times(moved, drift).sum(axis=0) ** 2
    squares = [far]
    if orthogonal:
        squares.append(times(own**2, drift**2) + sums_of_others(times(moved**2, drift**2)))
        near = np.minimum(near, times(moved**2, drift**2).sum(axis=0))
    centred = times(off, drift).sum(axis=0) ** 2 + times(weights, drift**2).sum(axis=0)
    joint = [largest * (centred + extra)]
    for square in squares:
        joint += [
            largest * (times(weights, square).sum(axis=0) + extra),
            times(stiffness, square + extra).sum(axis=0),
        ]
    mean = stiffness.sum(axis=0)
    if fixed_smoothness:
        share = stiffness / mean
        away = _magnitudes(low, high, share)[side]
        joint.append(mean * (times(away, drift).sum(axis=0) ** 2 + times(share, drift**2).sum(axis=0) + extra))
    elif side == 0:  # the pL-weighted centred form is at least its second part
        joint.append(times(stiffness, drift**2 + extra).sum(axis=0))
    training = np.sqrt(times(weights, F).sum(axis=0))
    distances = _least(squares) + extra
    total, _, _ = sharpest_side(F, weights, stiff, distances, base_risks, None if base_risks is None else near + extra)
    return np.asarray(np.minimum(training + np.sqrt(_least(joint) / 2), total))


@np.errstate(all="ignore")
def enclose(
    merge: Merge,
    ranges: Mapping[str, Ranges],
    *,
    coefficient_range: tuple[ArrayLike, ArrayLike] | None = None,
    recursion: bool = True,
) -> Enclosure:
    """Guaranteed interval of :func:`theory.master_bound` over a box of recipes (module docstring for the proofs).

    ``ranges`` maps expert names to ``{field: (lower, upper)}``; the ends may be arrays (a box per configuration).
    ``coefficient_range`` (each shape ``(N, ...)`` or a number) replaces the merge's coefficients; ``recursion``: also
    the recursions of section 5, step by step, as :func:`theory.master_bound` does by default.  Assumes the
    recipe's own assumptions.  Raises :class:`AssumptionError` for a field in which monotonicity is not proven (or
    TIES, trained heads with a range, shared samples of uncertain number), :class:`RecipeError` for what is missing.

    >>> from theory import Expert, Merge
    >>> known = dict(n=1000, batch_size=50, learning_rate=0.1, steps=100, curvature="convex", L=1.0,
    ...              initial_gradient_norm=0.5, sigma=1.0, D_inf=2.0, training_risk=0.05)
    >>> merge = Merge((Expert("a", **known), Expert("b", **known)))
    >>> found = enclose(merge, {"a": {"steps": (50, 200)}})
    >>> bool(found.lower < found.upper)
    True
    """
    names = [expert.name for expert in merge.experts]
    for name in ranges:
        if name not in names:
            raise RecipeError(f"merge: there is no expert {name!r}; choose one of {', '.join(names)}")
    if merge.shared_samples and any("n" in ranges.get(name, {}) for name in names):
        raise AssumptionError("merge: n has a range and tasks share samples, which is not proven monotone; fix n")
    risks, drifts, epsilons, stiff = [], [], [], []
    for expert in merge.experts:
        box = ranges.get(expert.name, {})
        if expert.private_drift is not None or (expert.head == "trained" and expert.D_inf_private is not None):
            raise AssumptionError(
                f"expert {expert.name!r}: head is trained with its own drift or gap (private_drift, D_inf_private), "
                "which is not covered on boxes; sample the range"
            )
        risks.append(risk_range(expert, box))
        try:
            reach: tuple[FloatArray, FloatArray] | None = drift_range(expert, box)
        except AssumptionError:
            raise
        except RecipeError:
            if merge.dispersion is None:
                raise
            reach = None
        drifts.append(reach)
        epsilons.append(epsilon_range(expert, box, reach, recursion=recursion))
        corners = [smoothness(_corner(expert, box, {"L": 1}, up)) for up in (False, True)]
        stiff.append((corners[0], corners[1]))
    p = per_expert(merge, "weights")
    alpha, c = _linear(merge, coefficient_range)
    n = _stack([np.asarray(expert.n, dtype=np.float64) for expert in merge.experts]) if merge.shared_samples else None
    trained = np.array([expert.head == "trained" for expert in merge.experts])
    orthogonal = bool(merge.orthogonal_task_vectors)
    fixed = not any("L" in ranges.get(name, {}) for name in names)
    made = []
    for side in (0, 1):
        L = _stack([item[side] for item in stiff])
        risk = _stack([item[side] for item in risks])
        if merge.dispersion is not None:
            V = np.asarray(merge.dispersion, dtype=np.float64)
            left = np.sqrt(times(*_align(p, risk)).sum(axis=0)) + np.sqrt(L.max(axis=0) / 2 * V)
        else:
            assert alpha is not None
            d = _stack([item[side] for item in drifts if item is not None])
            base = _base_risks(merge, ranges, bool(side))
            extra = added_dispersion(merge, d)
            left = _optimization_side(risk, base, d, alpha, p, L, extra, orthogonal, side, fixed)
        moved = task_stability(
            c[side],
            _stack([item[side] for item in epsilons]),
            trained=trained,
            shared_samples=bool(merge.shared_samples),
            samples=n,
        )
        weights, stiffness, square = _align(p, L, moved)
        right = np.sqrt(times(weights * stiffness / 2, square).sum(axis=0))
        made.append((left, right, np.asarray((left + right) ** 2)))
    low, high = made
    terms = {"optimization": (low[0], high[0]), "instability": (low[1], high[1])}
    return Enclosure(np.where(np.isnan(low[2]), 0.0, low[2]), np.where(np.isnan(high[2]), np.inf, high[2]), terms)


def _base_risks(merge: Merge, ranges: Mapping[str, Ranges], up: bool) -> FloatArray | None:
    """F_j(x_0) with the final heads, ``inf`` where unknown; None if none is known."""
    found = []
    for expert in merge.experts:
        value = _corner(expert, ranges.get(expert.name, {}), {}, up).initial_risk
        unknown = value is None or expert.head == "trained"
        found.append(np.asarray(np.inf if unknown else value, dtype=np.float64))
    return None if all(value.ndim == 0 and np.isinf(value) for value in found) else _stack(found)


def _linear(
    merge: Merge, given: tuple[ArrayLike, ArrayLike] | None
) -> tuple[tuple[FloatArray, FloatArray] | None, tuple[FloatArray, FloatArray]]:
    if given is None:
        c = sensitivity(merge)
        if merge.dispersion is not None:
            return None, (c, c)
        alpha = coefficients(merge)
        return (alpha, alpha), (c, c)
    if merge.method not in ("weighted", "task_arithmetic"):
        raise AssumptionError(
            f"merge: method is {merge.method!r}, whose coefficients cannot have a range here; choose 'weighted' or "
            "'task_arithmetic'"
        )
    if merge.sensitivity is not None or merge.dispersion is not None:
        raise AssumptionError(
            "merge: sensitivity or dispersion was measured at the given coefficients, so a range of coefficients is "
            "not covered; leave them out"
        )
    low, high = (np.asarray(end, dtype=np.float64) for end in given)
    ends = [np.broadcast_to(end, (merge.size,)) if end.ndim == 0 else end for end in (low, high)]
    return (ends[0], ends[1]), _magnitudes(ends[0], ends[1], 0.0)


def replaced(merge: Merge, experts: tuple[Expert, ...], **changes: Any) -> Merge:
    """The same merge of other experts (which may be relaxed)."""
    return replace(merge, experts=experts, **changes)
