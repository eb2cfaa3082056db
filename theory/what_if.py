"""What-if queries on a prediction of merged risk: drop or add an expert, choose lambda, follow a curve.

Everything here asks the same question of a :class:`Surface` (a predicted joint risk as a function of the merging
coefficients, from collected statistics; nothing is merged and nothing is evaluated): what would the risk be if a
*subset* of the experts were merged by a given :class:`MergingRule`?  Tier *estimated* throughout.  What is proven is
the search: each answer says how far it can be from the best answer of its kind *under the prediction* (``gap``).

*Trap:* dropping an expert from the merge is not dropping its task.  By default all tasks keep counting, so that an
expert is worth what it does for everybody; ``with_task=True`` drops the task too and compares the remaining tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from theory.errors import MergeboundError
from theory.function_space import Array, LogitField
from theory.surfaces import (
    MergingRule,
    PredictedMerge,
    Surface,
    coefficients_of,
    indices,
    predicted_merge,
    task_arithmetic,
)


@dataclass(frozen=True)
class Changes:
    """What single changes to a merge would do.

    Attributes:
        before: the merge as it is.
        experts: who is dropped or added, one per entry.
        after: the merges that result.
        change: predicted risk after minus before on the tasks that are compared, (len(experts),): negative is better.
        gap: each change is off by at most this because minima were not solved to the last digit.
    """

    before: PredictedMerge
    experts: tuple[int, ...]
    after: tuple[PredictedMerge, ...]
    change: Array
    gap: Array
    tier: str = "estimated"


def leave_one_out(
    surface: Surface, rule: MergingRule, experts: Iterable[int] | None = None, *, with_task: bool = False
) -> Changes:
    """Drop each expert of a merge in turn.

    Args:
        surface: the prediction.
        rule: how what is left is merged; ``optimal`` re-optimises.
        experts: the merge, default all.
        with_task: drop expert i's task i as well, and compare before and after on the other tasks; coefficients are
            then chosen for those.

    >>> from theory import averaging, secant
    >>> from theory.surfaces import risk_surface
    >>> task = secant(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 1.0]]]), np.array([0]))
    >>> asked = risk_surface([task])
    >>> leave_one_out(asked, averaging()).change.round(3).tolist()  # without the second it is better
    [0.839, -0.347]
    """
    members = indices(range(surface.experts) if experts is None else experts, surface.experts, "expert")
    before = predicted_merge(surface, rule, members)
    after, change, gaps = [], [], []
    for i in members:
        rest = tuple(m for m in members if m != i)
        if not with_task:
            choice, reference = predicted_merge(surface, rule, rest), before.risk
        else:
            if len(surface.parts) != surface.experts:
                raise MergeboundError("with_task needs one task per expert, in the same order")
            others = surface.on_tasks(j for j in range(len(surface.parts)) if j != i)
            choice, reference = predicted_merge(others, rule, rest), float(others.risk(before.alpha))
        after.append(choice)
        change.append(choice.risk - reference)
        gaps.append(choice.gap if with_task else max(choice.gap, before.gap))
    return Changes(before, members, tuple(after), np.array(change), np.array(gaps))


def additions(surface: Surface, rule: MergingRule, experts: Iterable[int]) -> Changes:
    """Add each expert that is not yet in the merge; its statistics are among the surface's (:func:`add_expert`).

    >>> from theory import averaging, secant
    >>> from theory.surfaces import risk_surface
    >>> task = secant(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 1.0]]]), np.array([0]))
    >>> asked = risk_surface([task])
    >>> additions(asked, averaging(), [0]).change.round(3).tolist()
    [0.347]
    """
    members = indices(experts, surface.experts, "expert")
    before = predicted_merge(surface, rule, members)
    others = tuple(i for i in range(surface.experts) if i not in members)
    after = tuple(predicted_merge(surface, rule, (*members, i)) for i in others)
    return Changes(
        before,
        others,
        after,
        np.array([choice.risk - before.risk for choice in after]),
        np.array([max(choice.gap, before.gap) for choice in after]),
    )


def add_expert(
    fields: Sequence[LogitField], slopes: Sequence[Array], own: LogitField | None = None
) -> tuple[LogitField, ...]:
    """Fields over one expert more: a newcomer costs its own products or logits, nothing is collected again.

    Args:
        fields: one per task, over the experts so far (one coefficient each).
        slopes: the newcomer's slope in each of these tasks, (n_j, C).
        own: field of the newcomer's own task over all experts, the newcomer last; ``None``: no new task.
    """
    wider = tuple(
        replace(field, slopes=np.concatenate([field.slopes, slope[None]]))
        for field, slope in zip(fields, slopes, strict=True)
    )
    return wider if own is None else (*wider, own)


@dataclass(frozen=True)
class LineMinimum:
    """The best point of a line of merges, ``origin + t direction``.

    Attributes:
        t: the best coefficient found.
        bracket: contains a minimiser of the prediction on the interval.
        risk: predicted at ``t``.
        gap: above the minimum on the interval by at most this (from the tangents at the ends of the bracket).
        alpha: (K,).
    """

    t: float
    bracket: tuple[float, float]
    risk: float
    gap: float
    alpha: Array
    tier: str = "estimated"


def best_on_line(
    surface: Surface,
    origin: npt.ArrayLike,
    direction: npt.ArrayLike,
    low: float = 0.0,
    high: float = 1.0,
    *,
    tolerance: float = 1e-6,
) -> LineMinimum:
    """Minimise the convex prediction along a line by bisection on the sign of its slope.

    Args:
        surface: the prediction.
        origin, direction: (K,).
        low, high: range of t.
        tolerance: width of the bracket at which to stop.
    """
    surface.require_convex("the best point of a line")
    if not (np.isfinite([low, high]).all() and low < high):
        raise MergeboundError(f"low, high = {low}, {high}: give a range of coefficients")
    if not tolerance > 0.0:
        raise MergeboundError(f"tolerance = {tolerance}: the width of a bracket is above zero")
    start, step = np.asarray(origin, dtype=np.float64), np.asarray(direction, dtype=np.float64)
    for name, vector in (("origin", start), ("direction", step)):
        if vector.shape != (surface.size,):
            raise MergeboundError(f"{name} has shape {vector.shape}, expected ({surface.size},)")

    def at(t: float) -> tuple[float, float, float]:
        value, slope = surface.gradient(start + t * step)
        return value, float(slope @ step), t

    left, right = at(low), at(high)
    best = min(left, right)
    if left[1] >= 0.0:
        best, right = left, left
    elif right[1] <= 0.0:
        best, left = right, right
    while right[2] - left[2] > tolerance:
        t = 0.5 * (left[2] + right[2])
        if not left[2] < t < right[2]:
            break
        middle = at(t)
        best = min(best, middle)
        if middle[1] == 0.0:
            left = right = best = middle
        elif middle[1] < 0.0:
            left = middle
        else:
            right = middle
    lowest = best[0]
    if left[2] < right[2]:
        crossing = (left[0] - right[0] + right[1] * right[2] - left[1] * left[2]) / (right[1] - left[1])
        lowest = min(best[0], left[0] + left[1] * (crossing - left[2]))
    return LineMinimum(best[2], (left[2], right[2]), best[0], max(best[0] - lowest, 0.0), start + best[2] * step)


def best_coefficient(
    surface: Surface, low: float = 0.0, high: float = 1.0, *, experts: Iterable[int] | None = None, **options: float
) -> LineMinimum:
    """The best common coefficient lambda of task arithmetic over all experts, or over some.

    >>> import numpy as np
    >>> from theory.surfaces import risk_surface
    >>> task = LogitField(np.zeros((2, 2)), np.array([[[2.0, 0.0], [1.0, 0.0]]]), np.array([0, 1]), "secant")
    >>> round(best_coefficient(risk_surface([task])).t, 3)
    0.42
    """
    members = indices(range(surface.experts) if experts is None else experts, surface.experts, "expert")
    direction = coefficients_of(surface, task_arithmetic(1.0), [members])[0]
    return best_on_line(surface, np.zeros(surface.size), direction, low, high, **options)


@dataclass(frozen=True)
class Curve:
    """Predicted risk along a line: ``t`` (m,), ``alpha`` (m, K), ``risk`` (m,), ``per_task`` (m, tasks)."""

    t: Array
    alpha: Array
    risk: Array
    per_task: Array
    tier: str = "estimated"

    def barrier(self, task: int | None = None) -> float:
        """Largest height above the chord between the ends, of the joint risk or of one task's; 0 if there is none.

        *Trap:* a field that is affine in alpha, like every curvature model, is convex and can never show a barrier;
        only a field that is quadratic in alpha can.
        """
        values = self.risk if task is None else self.per_task[:, task]
        if self.t[-1] == self.t[0]:
            raise MergeboundError("a barrier needs a curve between two different ends: give at least two values")
        share = (self.t - self.t[0]) / (self.t[-1] - self.t[0])
        return max(float((values - (1 - share) * values[0] - share * values[-1]).max()), 0.0)


def lambda_curve(surface: Surface, values: npt.ArrayLike, *, experts: Iterable[int] | None = None) -> Curve:
    """Task arithmetic over a range of common coefficients.

    >>> from theory import averaging, secant
    >>> from theory.surfaces import risk_surface
    >>> task = secant(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 1.0]]]), np.array([0]))
    >>> asked = risk_surface([task])
    >>> lambda_curve(asked, [0.0, 0.5, 1.0]).risk.round(3).tolist()
    [0.693, 0.474, 0.313]
    """
    members = indices(range(surface.experts) if experts is None else experts, surface.experts, "expert")
    t = _points(values)
    return _curve(surface, t, t[:, None] * coefficients_of(surface, task_arithmetic(1.0), [members]))


def pair_curve(surface: Surface, first: int, second: int, values: npt.ArrayLike) -> Curve:
    """The segment ``(1 - t) x_first + t x_second`` between two experts.

    >>> from theory import averaging, secant
    >>> from theory.surfaces import risk_surface
    >>> task = secant(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 1.0]]]), np.array([0]))
    >>> asked = risk_surface([task])
    >>> pair_curve(asked, 0, 1, [0.0, 0.5, 1.0]).risk.round(3).tolist()
    [0.127, 0.474, 1.313]
    """
    pair = np.eye(surface.experts)[list(indices((first,), surface.experts, "expert"))]
    other = np.eye(surface.experts)[list(indices((second,), surface.experts, "expert"))]
    t = _points(values)
    return _curve(surface, t, np.repeat((1 - t[:, None]) * pair + t[:, None] * other, surface.layers, axis=1))


def layer_curve(surface: Surface, layer: int, alpha: npt.ArrayLike, values: npt.ArrayLike) -> Curve:
    """One layer's task vectors scaled by t, the other layers as in ``alpha`` (K,): which layer wants less or more."""
    if not 0 <= layer < surface.layers:
        raise MergeboundError(f"layer = {layer}, expected 0..{surface.layers - 1}")
    t, a = _points(values), np.asarray(alpha, dtype=np.float64)
    if a.shape != (surface.size,):
        raise MergeboundError(f"alpha has shape {a.shape}, expected ({surface.size},)")
    here = np.arange(surface.size) % surface.layers == layer
    return _curve(surface, t, np.where(here, t[:, None] * a, a))


def _curve(surface: Surface, t: Array, alphas: Array) -> Curve:
    per_task = surface.per_task(alphas)
    return Curve(t, alphas, np.asarray(per_task @ surface.weights), per_task)


def _points(values: npt.ArrayLike) -> Array:
    t = np.asarray(values, dtype=np.float64)
    if t.ndim != 1 or not len(t) or not np.isfinite(t).all():
        raise MergeboundError("values of a curve are a list of finite numbers")
    return t
