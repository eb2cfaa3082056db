"""Trends over the levels of a factor with intervals, and verdicts by the rule of the specification.

Groups are matched: one row per group, one column per level, the same tasks in a row.  Tasks are shared by groups, and
groups are draws: an interval is the hull of two, one from resampling experts (by task, the same at every level;
:mod:`experiments.statistics`) and one from resampling groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experiments import statistics as st
from experiments.studies.hyperparameters.spec import Rule

Floats = NDArray[np.float64]
Kind = Literal["rises", "falls", "minimum", "maximum", "undecided"]
Verdict = Literal["agrees", "disagrees", "undecided"]
GROUPS = 0x96B0
"""Names the stream of resampled groups: ``default_rng([seed, GROUPS])``."""


@dataclass(frozen=True)
class Trend:
    """What a curve does over the levels of a factor, on a log scale.

    Attributes:
        kind: by the rule (:class:`~experiments.studies.hyperparameters.spec.Rule`).
        slope: mean over groups of the log-log slope (the fitted exponent).
        change: mean over groups of log(last / first).
        turn: index of the inner level of a minimum or maximum, else -1.
        groups: with finite values at every level.
    """

    kind: Kind
    slope: st.Estimate
    change: st.Estimate
    turn: int
    groups: int


NOTHING = st.Estimate(float("nan"), float("nan"), float("nan"))


def position(factor: str, levels: Sequence[object]) -> Floats:
    """Where the levels lie on the axis of exponents, (L,): the level itself, 1/(1 - beta) for momentum, and 1, 2, ...
    for levels that are names (their order is a ranking, so that a slope has a sign and no meaning as an exponent)."""
    if any(isinstance(level, str) for level in levels):
        return np.arange(1.0, len(levels) + 1.0)
    values = np.array([float(level) for level in levels])  # type: ignore[arg-type]
    return 1.0 / (1.0 - values) if factor == "momentum" else values


def group_slopes(x: Floats, logs: Floats) -> Floats:
    """Least-squares slope of every row on log x; (G,) from (G, L)."""
    place = np.log(x) - np.log(x).mean()
    return np.asarray(logs @ place / (place @ place))


def estimate(values: Floats, members: st.Membership, rule: Rule, seed: int, level: float | None = None) -> st.Estimate:
    """Mean over groups with its interval; NaN limits with fewer than two groups."""
    wanted = rule.level if level is None else level
    good = np.isfinite(values)
    if not good.any():
        return NOTHING
    kept = values[good]
    if len(kept) < 2:
        return st.Estimate(float(kept.mean()), float("nan"), float("nan"))
    by_expert = st.mean_interval(values, members, rule.resamples, seed, level=wanted)
    rng = np.random.default_rng([seed, GROUPS])
    weights = rng.multinomial(len(kept), np.full(len(kept), 1.0 / len(kept)), size=rule.resamples) / len(kept)
    tail = (1.0 - wanted) / 2.0
    low, high = np.quantile(weights @ kept, [tail, 1.0 - tail])
    ends = [by_expert.low, by_expert.high, float(low), float(high)]
    return st.Estimate(float(kept.mean()), float(np.nanmin(ends)), float(np.nanmax(ends)))


def trend(x: Floats, values: Floats, tasks: Sequence[Sequence[str]], rule: Rule, seed: int = 0) -> Trend:
    """The trend of a positive quantity over levels.

    Args:
        x: positions of the levels, (L,), ascending and positive.
        values: (G, L); rows with a value that is not positive and finite are left out.
        tasks: of each group.
        rule: levels of intervals and the smallest difference that counts.
        seed: of the resamples.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values)
    good = np.asarray(np.isfinite(logs).all(axis=1))
    if good.sum() < 2:
        return Trend("undecided", NOTHING, NOTHING, -1, int(good.sum()))
    logs = logs[good]
    members = st.membership([list(own) for own, kept in zip(tasks, good, strict=True) if kept])
    slope = estimate(group_slopes(x, logs), members, rule, seed)
    change = estimate(logs[:, -1] - logs[:, 0], members, rule, seed)
    inner = range(1, logs.shape[1] - 1)
    corrected = 1.0 - (1.0 - rule.level) / max(len(inner), 1)
    for sign, kind in ((-1.0, "minimum"), (1.0, "maximum")):
        beyond = [
            k
            for k in inner
            if all(
                _above(estimate(sign * (logs[:, k] - logs[:, end]), members, rule, seed, corrected), rule.least)
                for end in (0, -1)
            )
        ]
        if beyond:
            turn = max(beyond, key=lambda k: sign * logs[:, k].mean())
            return Trend(kind, slope, change, turn, int(good.sum()))  # type: ignore[arg-type]
    decided = (slope.low > 0 or slope.high < 0) and abs(change.value) >= rule.least
    if not decided or np.sign(slope.value) != np.sign(change.value):
        return Trend("undecided", slope, change, -1, int(good.sum()))
    return Trend("rises" if slope.value > 0 else "falls", slope, change, -1, int(good.sum()))


def _above(found: st.Estimate, least: float) -> bool:
    return bool(found.low > 0 and found.value >= least)


def sign_kind(slope: st.Estimate) -> Kind:
    """The kind of a slope alone: its interval leaves out 0, or it is undecided."""
    if slope.low > 0:
        return "rises"
    return "falls" if slope.high < 0 else "undecided"


def verdict(measured: Kind, predicted: Kind) -> Verdict:
    """By the rule of the specification."""
    if "undecided" in (measured, predicted):
        return "undecided"
    return "agrees" if measured == predicted else "disagrees"


def regression_slopes(
    design: Floats, logs: Floats, experts: Sequence[Sequence[str]], rule: Rule, seed: int = 0
) -> list[st.Estimate]:
    """Coefficients of a linear regression with a constant, each with an interval from resampling experts.

    Args:
        design: (G, F), one column per factor.
        logs: (G,); rows that are not finite are left out.
        experts: of each group.
        rule, seed: of the intervals.
    """
    good = np.asarray(np.isfinite(logs) & np.isfinite(design).all(axis=1))
    count = design.shape[1]
    if good.sum() < count + 3:
        return [NOTHING] * count
    X, y = np.column_stack([np.ones(int(good.sum())), design[good]]), logs[good]
    members = st.membership([list(own) for own, kept in zip(experts, good, strict=True) if kept])
    weights = st.expert_weights(members, rule.resamples, seed)

    def statistic(column: int) -> st.Statistic:
        def solve(w: Floats) -> Floats:
            normal = np.einsum("rm,mi,mj->rij", w, X, X)
            right = np.einsum("rm,mi,m->ri", w, X, y)
            return np.asarray((np.linalg.pinv(normal) @ right[..., None])[:, column + 1, 0])

        return solve

    return [st.interval(statistic(k), weights, level=rule.level) for k in range(count)]
