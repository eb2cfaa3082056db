"""Intervals over tasks for means over groups of few tasks: the jackknife that leaves out one task."""

from __future__ import annotations

import numpy as np

from experiments import statistics as st


def task_interval(values: st.Floats, members: st.Membership, level: float) -> st.Estimate:
    """Mean over groups with the interval of the jackknife that leaves out a task, and with it all its groups.

    With theta_(i) the mean over the groups without task i, for the K of E tasks that some group lacks::

        variance = (E - 1) / K * sum_i (theta_(i) - mean_i theta_(i))^2,    value -+ t_(K-1) * sqrt(variance)

    Where a group's value is a mean of effects of its N tasks and every group of N is there, theta_(i) is the mean
    effect of the other tasks, and the variance is s^2 / E, that of a mean of E effects; hence the quantile of t.  Noise
    of the groups' own is counted more than once: for values that are nothing else the interval is far too wide (about
    six times, for nine groups of six of eight tasks).  The expert bootstrap of :mod:`experiments.statistics`
    linearises the same jackknife; it has the normal law's quantiles, and it must cap the share of groups that hold a
    task at 0.75, which is less than the share here (six of seven tasks): it is too short for few tasks in large groups.

    Args:
        values: of the groups, (G,), finite; a group that was drawn twice counts twice.
        members: tasks of the groups, (G, E).
        level: of the interval.

    Returns:
        NaN limits where fewer than two tasks are ever left out, which says nothing about other tasks.
    """
    from scipy.stats import t

    there = members.matrix[:, members.matrix.any(axis=0)]
    lacking = ~there
    some = lacking.any(axis=0)
    centre, K = float(values.mean()), int(some.sum())
    if K < 2:
        return st.Estimate(centre, float("nan"), float("nan"))
    without = (values @ lacking[:, some]) / lacking[:, some].sum(axis=0)
    variance = (there.shape[1] - 1) / K * float(((without - without.mean()) ** 2).sum())
    half = float(t.ppf((1.0 + level) / 2.0, K - 1)) * np.sqrt(variance)
    return st.Estimate(centre, centre - half, centre + half)
