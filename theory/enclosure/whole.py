"""The master bound on a box: its ingredients' intervals put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import smoothness
from theory.dispersion import sums_of_others
from theory.enclosure.boxes import Ranges, corner_of, smallest_of
from theory.enclosure.drifts import drift_range
from theory.enclosure.stabilities import epsilon_range
from theory.enclosure.training_risks import risk_range
from theory.errors import AssumptionError, RecipeError
from theory.master import sharpest_side, task_stability
from theory.operators import added_dispersion, coefficients, sensitivity
from theory.recipe import Merge, per_expert
from theory.symbolic import FloatArray, times


@dataclass(frozen=True, eq=False)
class Enclosure:
    """A guaranteed interval of the master bound on a box: ``lower <= value <= upper``, shape ``(...)``.

    ``terms`` maps ``optimization`` (training and dispersion) and ``instability`` (square roots, unit sqrt(loss)) to
    their own intervals.
    """

    lower: FloatArray
    upper: FloatArray
    terms: Mapping[str, tuple[FloatArray, FloatArray]]


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
        corners = [smoothness(corner_of(expert, box, {"L": 1}, up)) for up in (False, True)]
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
    masks = np.asarray(extra, dtype=np.float64)[None]
    F, low, high, drift, weights, stiff, added = _align(risks, alpha[0], alpha[1], d, p, L, masks)
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
            times(stiffness, square + added).sum(axis=0),
        ]
    mean = stiffness.sum(axis=0)
    if fixed_smoothness:
        share = stiffness / mean
        away = _magnitudes(low, high, share)[side]
        joint.append(mean * (times(away, drift).sum(axis=0) ** 2 + times(share, drift**2).sum(axis=0) + extra))
    elif side == 0:  # the pL-weighted centred form is at least its second part
        joint.append(times(stiffness, drift**2 + added).sum(axis=0))
    training = np.sqrt(times(weights, F).sum(axis=0))
    distances = smallest_of(squares) + added
    total, _, _ = sharpest_side(F, weights, stiff, distances, base_risks, None if base_risks is None else near + extra)
    return np.asarray(np.minimum(training + np.sqrt(smallest_of(joint) / 2), total))


def _base_risks(merge: Merge, ranges: Mapping[str, Ranges], up: bool) -> FloatArray | None:
    """F_j(x_0) with the final heads, ``inf`` where unknown; None if none is known."""
    found = []
    for expert in merge.experts:
        value = corner_of(expert, ranges.get(expert.name, {}), {}, up).initial_risk
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


def _stack(values: list[FloatArray]) -> FloatArray:
    return np.stack(np.broadcast_arrays(*values))


def _align(*values: FloatArray) -> list[FloatArray]:
    depth = max(value.ndim for value in values)
    return list(
        np.broadcast_arrays(
            *(value.reshape(value.shape[:1] + (1,) * (depth - value.ndim) + value.shape[1:]) for value in values)
        )
    )
