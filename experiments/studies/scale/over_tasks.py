"""What a few held-out tasks say of held-out tasks in general: the interval of everything that is measured on them.

Resampling merged tasks and test images (:func:`experiments.studies.scale.effects.estimate`) keeps the held-out tasks as
they are: it answers for *these* tasks.  A statement about held-out tasks in general has to vary them as well, and there
are few.  So there is a second interval with tasks as units, the t interval of the effects m_1 .. m_T on single tasks::

    value -+ t_(T-1) * s / sqrt(T),    s^2 = sum_j (m_j - mean m)^2 / (T - 1)

and what is judged is the hull of both.  The t interval assumes effects that are independent draws from one normal law;
their noise from test images is in it.  Merged tasks are the same for every held-out task, hence the hull.  It is not
the interval of the sum of both sources, which is wider by up to a factor sqrt(2) of the wider one; with few tasks the
quantile of t makes up for that: with 2 to 5 held-out and 8 merged tasks, 400 worlds each, the hull covered the planted
mean in 90 to 97 %, and the interval of these tasks in 44 to 92 % (the more the held-out tasks differ, the fewer; 44 to
58 % where they differ most).  One held-out task says nothing of others: then there are no limits.  Seeds of
fine-tuning are in none of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from experiments.statistics import Estimate
from experiments.studies.scale.effects import Effects, Floats, Table, estimate


@dataclass(frozen=True)
class Judged:
    """A mean effect with its intervals.

    Attributes:
        general: what verdicts are given from: ``fixed``, or its hull with ``tasks`` where there are held-out tasks.
        fixed: over merged tasks and test images, the held-out tasks as they are.
        tasks: over held-out tasks as units; NaN limits where there are fewer than two.
        held_out_tasks: T; 0 where nothing was measured on held-out tasks.
        over: what the interval of ``general`` is over, in words.
    """

    general: Estimate
    fixed: Estimate
    tasks: Estimate
    held_out_tasks: int
    over: str


def task_values(effects: Effects) -> Floats:
    """Mean effect on each held-out task, (T,), without tasks where it is not known; empty where there are none."""
    good = np.isfinite(effects.value)
    if effects.by_task is None or not good.any():
        return np.empty(0)
    known = effects.by_task[good]
    known = known[:, np.isfinite(known).any(axis=0)]
    return np.asarray(np.nanmean(known, axis=0)) if known.size else np.empty(0)


def tasks_interval(value: float, tasks: Floats, level: float = 0.95) -> Estimate:
    """The t interval of a mean over T tasks.

    Args:
        value: the mean (where an effect is no mean over tasks, its value on all of them).
        tasks: effects on single tasks, or pseudo-values of the jackknife, (T,).
        level: of the interval.

    Returns:
        NaN limits where T < 2.
    """
    from scipy.stats import t

    T = len(tasks)
    if T < 2:
        return Estimate(value, float("nan"), float("nan"))
    half = float(t.ppf((1.0 + level) / 2.0, T - 1)) * float(tasks.std(ddof=1)) / np.sqrt(T)
    return Estimate(value, value - half, value + half)


def judged_over_tasks(effects: Effects, *, level: float = 0.95, seed: int = 0) -> Judged:
    """Mean effect with the interval that verdicts are given from; see the module's docstring.

    Args:
        effects: E of them.
        level: of the intervals.
        seed: names the draws of merged tasks.
    """
    fixed = estimate(effects, level=level, seed=seed)
    single = task_values(effects)
    words = "merged tasks, test images" if len(set(effects.members)) > 1 else "test images"
    if not len(single):
        return Judged(fixed, fixed, Estimate(fixed.value, float("nan"), float("nan")), 0, words)
    own = tasks_interval(fixed.value, single, level)
    if len(single) == 1:
        none = Estimate(fixed.value, float("nan"), float("nan"))
        return Judged(none, fixed, own, 1, "nothing: one held-out task says nothing of others")
    low, high = (float(end([a, b])) for end, a, b in ((np.fmin.reduce, fixed.low, own.low),
                                                      (np.fmax.reduce, fixed.high, own.high)))  # fmt: skip
    return Judged(Estimate(fixed.value, low, high), fixed, own, len(single), f"{words}, {len(single)} held-out tasks")


def limits(found: Judged) -> dict[str, Any]:
    """Columns of a table for the held-out tasks of an effect.

    Returns:
        ``held_out_tasks``; ``on_these_tasks`` with ``_low`` and ``_high`` (held-out tasks as they are) and
        ``over_tasks_low``, ``over_tasks_high`` (as units), NaN where nothing was measured on held-out tasks.
    """
    there = found.held_out_tasks > 0
    nan = float("nan")
    return {
        "held_out_tasks": found.held_out_tasks,
        "on_these_tasks": found.fixed.value if there else nan,
        "on_these_tasks_low": found.fixed.low if there else nan,
        "on_these_tasks_high": found.fixed.high if there else nan,
        "over_tasks_low": found.tasks.low,
        "over_tasks_high": found.tasks.high,
    }


def _within(found: Estimate, measure: str) -> Estimate:
    """An interval without values that the measure cannot take: no ratio is below 0, no accuracy above 1."""
    if "loss" in measure:
        return found
    most = 1.0 if "accuracy" in measure else np.inf
    return Estimate(found.value, float(np.clip(found.low, 0.0, most)), float(np.clip(found.high, 0.0, most)))


def summary(table: Table, by: Sequence[str], measures: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Mean of each measure over the points of every combination of ``by``, with intervals.

    Returns:
        the columns of ``by``, ``measure``, ``value`` with ``_low`` and ``_high`` (95 %; of held-out measures the hull),
        the columns of :func:`limits`, ``points``, ``tier``, ``seed``.  Intervals are cut to the values that a measure
        can take.
    """
    out = []
    chosen = table.where(measure=list(measures))
    groups: dict[Any, Any] = dict(chosen.rows.groupby([*by, "measure"], sort=False).indices)
    for key, places in groups.items():
        part = chosen.take(np.asarray(places))
        members = tuple(str(m) or "all" for m in part.rows["members"])
        value = part.rows["value"].to_numpy(dtype=float)
        found = judged_over_tasks(Effects(value, part.draws, members, part.by_task), seed=seed)
        names: Mapping[str, Any] = dict(zip([*by, "measure"], key, strict=True))
        general, fixed, tasks = (_within(one, names["measure"]) for one in (found.general, found.fixed, found.tasks))
        found = replace(found, general=general, fixed=fixed, tasks=tasks)
        out.append(
            {
                **names,
                "value": found.general.value,
                "value_low": found.general.low,
                "value_high": found.general.high,
                **limits(found),
                "points": len(part.rows),
                "tier": "measured",
                "seed": seed,
            }
        )
    return pd.DataFrame(out)


AGAINST_BASE = ("below the base", "above the base", "undecided")


def against_base(means: pd.DataFrame) -> pd.DataFrame:
    """Where merges lie against the untouched base on held-out tasks.

    Args:
        means: rows of :func:`summary` for ``held_out/<transfer>`` (merged / base).

    Returns:
        Those rows with ``merging`` (in general) and ``merging_on_these_tasks``: below the base, above it, undecided.
    """
    own = means[means["measure"].str.startswith("held_out/")].reset_index(drop=True) if len(means) else means
    if own.empty:
        return pd.DataFrame()

    def said(low: float, high: float) -> str:
        return AGAINST_BASE[0] if high < 1.0 else AGAINST_BASE[1] if low > 1.0 else AGAINST_BASE[2]

    return own.assign(
        merging=[said(a, b) for a, b in zip(own["value_low"], own["value_high"], strict=True)],
        merging_on_these_tasks=[
            said(a, b) for a, b in zip(own["on_these_tasks_low"], own["on_these_tasks_high"], strict=True)
        ],
    )
