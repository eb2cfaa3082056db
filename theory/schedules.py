"""Learning-rate schedules as :class:`Schedule` values, with the conventions of the training libraries.

Convention: entry k of a schedule (k = 0, 1, ..., K-1) is the learning rate that optimisation step k *uses*, that is,
torch's ``optimizer.param_groups[0]["lr"]`` before the (k+1)-th ``optimizer.step()``, when ``scheduler.step()`` is
called after every optimisation step.  ``steps_per_epoch`` changes the clock of the schedule from steps to epochs: step
k uses the value of epoch ``k // steps_per_epoch`` (``scheduler.step()`` once per epoch, timm's default), and every
length in the call (``every``, ``milestones``, ``horizon``, ``warmup``) is then counted in epochs.

``learning_rate`` may be an array of shape ``(...)``: schedules then have shape ``(..., K)``.  Any other schedule is
``Schedule(values)`` with one value per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from theory.errors import RecipeError
from theory.recipe import Schedule
from theory.symbolic import FloatArray


def _rates(learning_rate: ArrayLike, field: str = "learning_rate") -> FloatArray:
    try:
        rates = np.asarray(learning_rate, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"schedule: {field} is not a number; give a number of at least 0") from error
    if rates.size == 0 or not np.all(np.isfinite(rates) & (rates >= 0)):
        raise RecipeError(f"schedule: {field} is negative or not finite; give a number of at least 0")
    return rates


def _whole(value: object, field: str, least: int = 1) -> int:
    number = np.asarray(value)
    if isinstance(value, bool) or number.ndim != 0 or number.dtype.kind not in "iuf" or float(number) != number // 1:
        raise RecipeError(f"schedule: {field} is {value!r}; give a whole number of at least {least}")
    if not least <= float(number) <= 1e9:
        raise RecipeError(f"schedule: {field} is {value!r}; give a whole number from {least} to 1e9")
    return int(number)


def _time(steps: object, steps_per_epoch: object) -> FloatArray:
    """The schedule's own time at every step: the step, or its epoch."""
    index = np.arange(_whole(steps, "steps"))
    if steps_per_epoch is not None:
        index = index // _whole(steps_per_epoch, "steps_per_epoch")
    return index.astype(np.float64)


def constant(learning_rate: ArrayLike, steps: int) -> Schedule:
    """The same learning rate at every step.

    >>> constant(0.1, 3).values.tolist()
    [0.1, 0.1, 0.1]
    """
    return Schedule(_rates(learning_rate)[..., None] * np.ones(_whole(steps, "steps")))


def step(
    learning_rate: ArrayLike, steps: int, *, every: int, factor: ArrayLike = 0.1, steps_per_epoch: int | None = None
) -> Schedule:
    """``eta_k = eta factor^(k // every)`` (torch ``StepLR``; timm ``StepLRScheduler`` without warm-up).

    >>> step(0.5, 5, every=2, factor=0.5).values.tolist()
    [0.5, 0.5, 0.25, 0.25, 0.125]
    """
    time, decay = _time(steps, steps_per_epoch), _rates(factor, "factor")[..., None]
    return Schedule(_rates(learning_rate)[..., None] * decay ** (time // _whole(every, "every")))


def multi_step(
    learning_rate: ArrayLike,
    steps: int,
    *,
    milestones: Sequence[int],
    factor: ArrayLike = 0.1,
    steps_per_epoch: int | None = None,
) -> Schedule:
    """``eta_k = eta factor^(number of milestones <= k)`` (torch ``MultiStepLR``).

    >>> multi_step(1.0, 5, milestones=[2, 4], factor=0.5).values.tolist()
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    points = np.sort(np.array([_whole(point, "milestones", 0) for point in milestones], dtype=np.float64))
    passed = np.searchsorted(points, _time(steps, steps_per_epoch), side="right")
    return Schedule(_rates(learning_rate)[..., None] * _rates(factor, "factor")[..., None] ** passed.astype(np.float64))


def cosine(
    learning_rate: ArrayLike,
    steps: int,
    *,
    final: ArrayLike = 0.0,
    horizon: int | None = None,
    steps_per_epoch: int | None = None,
) -> Schedule:
    """``eta_k = final + (eta - final)(1 + cos(pi k/T))/2`` up to k = T, then ``final``.

    T is ``horizon`` (default: all steps, or all epochs).  The value ``final`` itself is reached at k = T, which is one
    past the last step, as in torch ``CosineAnnealingLR(T_max=T)`` and timm ``CosineLRScheduler(t_initial=T)`` with one
    cycle (timm's ``cycle_limit=1`` stays at the final value, torch would rise again beyond T).

    >>> cosine(1.0, 2).values.round(12).tolist()
    [1.0, 0.5]
    """
    time = _time(steps, steps_per_epoch)
    end = float(time[-1] + 1) if horizon is None else float(_whole(horizon, "horizon"))
    shape = (1 + np.cos(np.pi * np.minimum(time, end) / end)) / 2
    high, low = _rates(learning_rate)[..., None], _rates(final, "final")[..., None]
    return Schedule(np.maximum(low + (high - low) * shape, 0.0))


def linear(
    learning_rate: ArrayLike,
    steps: int,
    *,
    final: ArrayLike = 0.0,
    horizon: int | None = None,
    steps_per_epoch: int | None = None,
) -> Schedule:
    """``eta_k = eta + (final - eta) k/T`` up to k = T, then ``final`` (Hugging Face's ``linear`` with ``final = 0``).

    >>> linear(1.0, 4).values.tolist()
    [1.0, 0.75, 0.5, 0.25]
    """
    time = _time(steps, steps_per_epoch)
    end = float(time[-1] + 1) if horizon is None else float(_whole(horizon, "horizon"))
    share = np.minimum(time, end) / end
    return Schedule(_rates(learning_rate)[..., None] * (1 - share) + _rates(final, "final")[..., None] * share)


def linear_warmup(
    after: Schedule,
    warmup: int,
    *,
    start: ArrayLike = 0.0,
    peak: ArrayLike | None = None,
    shift: bool = True,
    steps_per_epoch: int | None = None,
) -> Schedule:
    """A linear rise ``start + (peak - start) k/W`` for ``k < W = warmup``, around the schedule ``after``.

    ``peak`` defaults to the first value of ``after``.  ``shift``: ``after`` begins when the warm-up ends (timm
    ``warmup_prefix=True``, Hugging Face, torch ``SequentialLR``) and the result is W steps longer; else the warm-up
    replaces the first W steps of ``after`` (timm's default) and the length is kept.  With ``steps_per_epoch`` the
    warm-up is a staircase of W epochs.

    >>> linear_warmup(constant(1.0, 2), 2).values.tolist()
    [0.0, 0.5, 1.0, 1.0]
    >>> linear_warmup(cosine(1.0, 4), 2, shift=False).values.round(3).tolist()
    [0.0, 0.5, 0.5, 0.146]
    """
    count, scale = (
        _whole(warmup, "warmup", 0),
        1 if steps_per_epoch is None else _whole(steps_per_epoch, "steps_per_epoch"),
    )
    values = after.values
    length = count * scale
    if not shift and length > values.shape[-1]:
        raise RecipeError(
            f"schedule: warmup of {length} steps is longer than the schedule of {values.shape[-1]}; shorten the warm-up"
        )
    if count == 0:
        return after
    share = (np.arange(length) // scale) / count
    low = _rates(start, "start")[..., None]
    high = values[..., :1] if peak is None else _rates(peak, "peak")[..., None]
    rise = low + (high - low) * share
    rest = values if shift else values[..., length:]
    lead = np.broadcast_shapes(rise.shape[:-1], rest.shape[:-1])
    parts = [np.broadcast_to(part, (*lead, part.shape[-1])) for part in (rise, rest)]
    return Schedule(np.concatenate(parts, axis=-1))


def one_cycle(
    peak: ArrayLike,
    steps: int,
    *,
    rise: float = 0.3,
    start_factor: ArrayLike = 25.0,
    end_factor: ArrayLike = 1e4,
    anneal: Literal["cos", "linear"] = "cos",
) -> Schedule:
    """One-cycle policy: from ``peak/start_factor`` up to ``peak``, then down to ``peak/(start_factor end_factor)``.

    The rise ends at step ``rise K - 1`` (need not be whole), the fall at step ``K - 1``: torch ``OneCycleLR`` (two
    phases) with ``max_lr, total_steps, pct_start, div_factor, final_div_factor``.  torch also cycles the momentum
    unless ``cycle_momentum=False``; the theory covers a constant momentum only.

    >>> one_cycle(1.0, 5, rise=0.4, start_factor=2, end_factor=2).values.round(4).tolist()
    [0.5, 1.0, 0.8125, 0.4375, 0.25]
    """
    count, high = _whole(steps, "steps"), _rates(peak, "peak")[..., None]
    first, last = _rates(start_factor, "start_factor")[..., None], _rates(end_factor, "end_factor")[..., None]
    if np.ndim(rise) or not 0 < float(rise) < 1 or np.any(first < 1) or np.any(last <= 0):
        raise RecipeError(
            "schedule: one_cycle needs one rise in (0, 1), start_factor >= 1 and end_factor > 0; change them"
        )
    if anneal not in ("cos", "linear"):
        raise RecipeError(f"schedule: anneal is {anneal!r}; choose 'cos' or 'linear'")
    top, end = rise * count - 1, float(count - 1)
    if top <= 0 or end <= top:
        raise RecipeError(
            f"schedule: one_cycle with {count} steps has no step for its rise of {rise:g}; use more steps or a longer "
            "rise"
        )
    time = np.arange(count, dtype=np.float64)

    def between(left: FloatArray, right: FloatArray, share: FloatArray) -> FloatArray:
        weight = share if anneal == "linear" else (1 - np.cos(np.pi * share)) / 2
        return np.asarray(left + (right - left) * weight)

    low = high / first
    up = between(low, high, np.minimum(time, top) / top)
    down = between(high, low / last, (np.maximum(time, top) - top) / (end - top))
    return Schedule(np.where(time <= top, up, down))
