"""Trends over the levels of a factor with intervals, and verdicts by the rule of the specification.

Groups are matched: one row per draw, one column per level; the same tasks in a row, or, over the number of experts,
groups that are parts of each other.  Tasks are shared by groups, and groups are draws: an interval is the hull of two,
one from leaving out tasks (the same at every level; :mod:`experiments.studies.hyperparameters.jackknife`) and one from
resampling different groups; over the number of experts of the second alone, widened for few groups (:func:`contrast`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments import statistics as st
from experiments.studies.hyperparameters.jackknife import task_interval
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
        bend: mean over groups of the log-log slope between the last two levels less that between the first two (0 for
            a power law); NaN with fewer than three levels.
        turn: index of the inner level of a minimum or maximum, else -1.
        groups: different groups with finite values at every level.
        draws: of them; several may have drawn the same group.
        used: positions of the levels that it is over.
        left_out: positions of levels at which all draws are the same group.
    """

    kind: Kind
    slope: st.Estimate
    change: st.Estimate
    bend: st.Estimate
    turn: int
    groups: int
    draws: int
    used: tuple[float, ...]
    left_out: tuple[float, ...]


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


@dataclass(frozen=True)
class Draws:
    """Matched draws of groups over some levels.

    Attributes:
        members: tasks of each draw, (G, tasks).
        same: (G,), draws with the same number drew the same groups, which count as one.
        matched: whether every draw has the same tasks at all levels.
    """

    members: st.Membership
    same: NDArray[np.int64]
    matched: bool

    @property
    def distinct(self) -> int:
        """Different groups."""
        return len(set(self.same.tolist()))


def draws_of(tasks: Sequence[Sequence[Sequence[str]]], groups: NDArray[Any] | None = None) -> Draws:
    """Draws from their tasks at every level, (G, L) of names, and the names of their merges, (G, L); without names all
    draws are different."""
    members = st.membership([sorted({name for own in row for name in own}) for row in tasks])
    rows = [(g,) for g in range(len(tasks))] if groups is None else [tuple(row) for row in groups.tolist()]
    order: dict[tuple[Any, ...], int] = {}
    same = np.array([order.setdefault(row, len(order)) for row in rows], dtype=np.int64)
    return Draws(members, same, all(set(own) == set(row[0]) for row in tasks for own in row))


def at_every_level(tasks: Sequence[Sequence[str]], levels: int) -> list[list[Sequence[str]]]:
    """Tasks of draws that have the same ones at every level, for :func:`draws_of`."""
    return [[own] * levels for own in tasks]


def contrast(
    values: Floats, weights: ArrayLike, draws: Draws, rule: Rule, seed: int, level: float | None = None
) -> st.Estimate:
    """Mean over draws of a linear combination over levels, with its interval.

    Where draws have the same tasks at all levels: the hull of the jackknife over tasks and of resampling different
    groups (each with all of its draws).  In simulations it covers 93 to 97 % of slopes and means whose tasks have
    effects (7 or 8 tasks, ten draws of six); of noise of the groups' own it covers nearly all.  Where their groups grow
    (over the number of experts), a draw goes through most tasks there are, and leaving out tasks says nothing about it:
    different groups are resampled alone, and the interval is widened by ``t / z * sqrt(D / (D - 1))`` for D of them, as
    for a mean of D values.  NaN limits with fewer than two different groups: draws that all drew the same group say
    nothing about others.

    Args:
        values: (G, L), finite.
        weights: of the levels, (L,).
        draws: of the rows.
        rule, seed: of the intervals.
        level: default the rule's.
    """
    from scipy.stats import norm, t

    wanted = rule.level if level is None else level
    own = values @ np.asarray(weights, dtype=np.float64)
    centre, D = float(own.mean()), draws.distinct
    if D < 2:
        return st.Estimate(centre, float("nan"), float("nan"))
    often = np.random.default_rng([seed, GROUPS]).multinomial(D, np.full(D, 1.0 / D), size=rule.resamples)
    means = (often @ np.bincount(draws.same, weights=own)) / (often @ np.bincount(draws.same))
    tail = (1.0 - wanted) / 2.0
    low, high = (float(v) for v in np.quantile(means, [tail, 1.0 - tail]))
    if not draws.matched:
        wider = float(t.ppf(1.0 - tail, D - 1) / norm.ppf(1.0 - tail)) * np.sqrt(D / (D - 1))
        return st.Estimate(centre, centre - wider * (centre - low), centre + wider * (high - centre))
    by_task = task_interval(own, draws.members, wanted)
    ends = [by_task.low, by_task.high, low, high]
    return st.Estimate(centre, float(np.nanmin(ends)), float(np.nanmax(ends)))


def estimate(
    values: Floats, tasks: Sequence[Sequence[str]], groups: Sequence[str] | None, rule: Rule, seed: int
) -> st.Estimate:
    """Mean over draws at one level with its interval (:func:`contrast`).

    Args:
        values: (G,); those that are not finite are left out.
        tasks: of the draws.
        groups: names of their merges; draws of the same merge count as one group.
        rule, seed: of the interval.
    """
    good = [g for g, value in enumerate(values) if np.isfinite(value)]
    if not good:
        return NOTHING
    names = None if groups is None else np.array([[groups[g]] for g in good])
    draws = draws_of([[tasks[g]] for g in good], names)
    return contrast(values[good][:, None], [1.0], draws, rule, seed)


def trend(
    x: Floats,
    values: Floats,
    tasks: Sequence[Sequence[Sequence[str]]],
    rule: Rule,
    seed: int = 0,
    groups: NDArray[Any] | None = None,
) -> Trend:
    """The trend of a positive quantity over levels.

    Levels at which all draws are the same group (all tasks there are) are left out where others are not: their value
    has no interval.

    Args:
        x: positions of the levels, (L,), ascending and positive.
        values: (G, L); rows with a value that is not positive and finite are left out.
        tasks: of each draw at each level, (G, L) of names (:func:`at_every_level`).
        rule: levels of intervals and the smallest difference that counts.
        seed: of the resamples.
        groups: names of the merges, (G, L); default all different.
    """
    kept = [l for l in range(len(x)) if groups is None or len(set(groups[np.isfinite(values[:, l]), l])) > 1]
    places = tuple(float(x[l]) for l in kept), tuple(float(v) for l, v in enumerate(x) if l not in kept)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(values[:, kept])
    good = [g for g, row in enumerate(logs) if np.isfinite(row).all()]
    if len(good) < 2 or len(kept) < 2:
        return Trend("undecided", NOTHING, NOTHING, NOTHING, -1, len(good), len(good), *places)
    logs = logs[good]
    draws = draws_of(
        [[tasks[g][l] for l in kept] for g in good], None if groups is None else groups[np.ix_(good, kept)]
    )
    place = np.log(x[kept]) - np.log(x[kept]).mean()
    unit = np.eye(len(kept))
    slope = contrast(logs, place / (place @ place), draws, rule, seed)
    change = contrast(logs, unit[-1] - unit[0], draws, rule, seed)
    ends = np.diff(unit, axis=0) / np.diff(place)[:, None]
    bend = contrast(logs, ends[-1] - ends[0], draws, rule, seed) if len(kept) > 2 else NOTHING
    about = (draws.distinct, len(good), *places)
    inner = range(1, len(kept) - 1)
    corrected = 1.0 - (1.0 - rule.level) / max(len(inner), 1)
    for sign, kind in ((-1.0, "minimum"), (1.0, "maximum")):
        beyond = [
            k
            for k in inner
            if all(
                _above(contrast(logs, sign * (unit[k] - unit[end]), draws, rule, seed, corrected), rule.least)
                for end in (0, -1)
            )
        ]
        if beyond:
            turn = max(beyond, key=lambda k: sign * logs[:, k].mean())
            return Trend(kind, slope, change, bend, kept[turn], *about)  # type: ignore[arg-type]
    decided = (slope.low > 0 or slope.high < 0) and abs(change.value) >= rule.least
    if not decided or np.sign(slope.value) != np.sign(change.value):
        return Trend("undecided", slope, change, bend, -1, *about)
    return Trend("rises" if slope.value > 0 else "falls", slope, change, bend, -1, *about)


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

    A coefficient that the design does not determine (another combination of the columns fits as well) is NaN.  In
    simulations the intervals are conservative: they cover 99 % and more of planted slopes, at level 0.95.

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
            inverse = np.linalg.pinv(normal, rcond=1e-12, hermitian=True)
            return np.asarray((inverse @ right[..., None])[:, column + 1, 0])

        return solve

    known = determined(design[good])
    return [st.interval(statistic(k), weights, level=rule.level) if known[k] else NOTHING for k in range(count)]


def determined(design: Floats) -> NDArray[np.bool_]:
    """Which coefficients of a linear regression with a constant its design (G, F) determines, (F,)."""
    centred = design - design.mean(axis=0)
    scale = np.sqrt((centred**2).mean(axis=0))
    scaled = centred / np.where(scale > 0, scale, 1.0)
    _, values, right = np.linalg.svd(scaled, full_matrices=False)
    rows = right[values > 1e-6 * values.max(initial=1e-300)]
    return np.asarray((rows**2).sum(axis=0) > 1.0 - 1e-6)
