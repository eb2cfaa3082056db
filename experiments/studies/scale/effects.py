"""From scores to effects: normalised performance of every point, and contrasts between points with intervals.

Two sources of chance are joined: which tasks were merged (the expert bootstrap of :mod:`experiments.statistics`, over
tasks, because experts of one task are matched between sizes, bases and methods), and which test images were scored (all
points resample them jointly).  Deviations of both are added, which is right to first order for independent sources.
Which tasks are held out is chance as well: what the few that there are say of others is in
:mod:`experiments.studies.scale.over_tasks`.  Seeds of fine-tuning are in no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.evaluate.bootstrap import bootstrap_means
from experiments.statistics import Estimate, expert_weights, mean, membership
from experiments.studies.scale.cells import Cell
from experiments.studies.scale.points import Points
from experiments.studies.scale.runner import Measured

Floats = NDArray[np.float64]
RESAMPLES = 300
SCALE = 0.1
"""Of the expert bootstrap."""


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers of points with their resampled values.

    Attributes:
        rows: ``family``, ``architecture``, ``base``, ``parameters``, ``place``, ``kind``, ``method``, ``experts``,
            ``chain``, ``seed``, ``members``, ``measure``, ``value``.
        draws: (rows, R), ``value`` on resampled test images.
        by_task: (rows, T), ``value`` on each held-out task alone (``value`` is its mean over those that are not NaN);
            NaN where a measure is not one of held-out tasks, ``None`` where no row is.
    """

    rows: pd.DataFrame
    draws: Floats
    by_task: Floats | None = None

    def where(self, **wanted: Any) -> Table:
        """Rows with these values; a list or tuple stands for any of its members."""
        keep = np.ones(len(self.rows), dtype=bool)
        for name, value in wanted.items():
            keep &= self.rows[name].isin(list(value) if isinstance(value, list | tuple) else [value]).to_numpy()
        return self.take(np.flatnonzero(keep))

    def take(self, places: NDArray[np.int64]) -> Table:
        """Rows by place."""
        tasks = None if self.by_task is None else self.by_task[places]
        return Table(self.rows.iloc[places].reset_index(drop=True), self.draws[places], tasks)


@dataclass(frozen=True, eq=False)
class Effects:
    """E values (E,), on resampled images (E, R), the merged tasks behind each, and each on every held-out task (E, T).

    ``by_task`` is ``None`` or NaN where nothing was measured on held-out tasks.  Where an effect is no mean over tasks
    (a largest gap), its columns are the pseudo-values of the jackknife that leaves out a held-out task.
    """

    value: Floats
    draws: Floats
    members: tuple[str, ...]
    by_task: Floats | None = None

    def __len__(self) -> int:
        return len(self.value)


def joined(*parts: Effects) -> Effects:
    """All effects together."""
    return Effects(
        np.concatenate([p.value for p in parts]),
        np.concatenate([p.draws for p in parts]),
        tuple(name for p in parts for name in p.members),
        stacked([p.by_task for p in parts]),
    )


def stacked(parts: Sequence[Floats | None]) -> Floats | None:
    """Values by held-out task, one below the other; ``None`` where some part has none."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known and len(known) == len(parts) else None


def table_of(measured: Measured, resamples: int = RESAMPLES, seed: int = 0) -> Table:
    """Normalised performance and losses of every point.

    Measures: ``held_in`` (mean over its tasks of merged / expert), ``held_in_accuracy`` and ``held_in_loss`` over a
    point's own tasks (all held-in tasks for base and multitask), ``joint_loss`` over all held-in tasks;
    ``held_out/<transfer>`` (mean over held-out tasks of point / base), ``held_out_accuracy/<transfer>``.

    Tasks where the reference is zero are left out of a ratio.
    """
    rows: list[dict[str, Any]] = []
    draws: list[Floats] = []
    tasks: list[Floats] = []
    about = measured.about.set_index(["architecture", "base"])["parameters"]
    for cell, points in measured.points.items():
        common = {"family": cell.family, "architecture": cell.architecture, "base": cell.base, "place": cell.place}
        common["parameters"] = int(about[(cell.architecture, cell.base)])
        for row, drawn, single in _points_of(cell, points, resamples, seed):
            rows.append({**common, **row})
            draws.append(drawn)
            tasks.append(single)
    width = max(len(single) for single in tasks)
    none = np.full(width, np.nan)
    return Table(pd.DataFrame(rows), np.stack(draws), np.stack([s if len(s) else none for s in tasks]))


_POINT = ("kind", "method", "experts", "chain", "seed", "members")


def _points_of(cell: Cell, points: Points, resamples: int, seed: int) -> list[tuple[dict[str, Any], Floats, Floats]]:
    rows = points.rows
    accuracy = _drawn(points, resamples, seed)
    value = rows["accuracy"].to_numpy(dtype=float)
    loss = rows["loss"].to_numpy(dtype=float)
    place = {
        (int(p), t, s): k
        for k, (p, t, s) in enumerate(zip(rows["point"], rows["task"], rows["scored_by"], strict=True))
    }
    heads = rows[rows["scored_by"] == "head"]
    transfers = list(dict.fromkeys(rows.loc[rows["group"] == "held_out", "scored_by"]))
    held_out = list(dict.fromkeys(rows.loc[rows["group"] == "held_out", "task"]))
    held_in = list(dict.fromkeys(heads["task"]))
    base = int(rows.loc[rows["kind"] == "base", "point"].iloc[0])
    experts = {
        (int(r["seed"]), r["members"]): int(r["point"])
        for r in rows[rows["kind"] == "expert"].drop_duplicates("point").to_dict("records")
    }
    first = next(iter(experts))[0]
    out: list[tuple[dict[str, Any], Floats, Floats]] = []
    nowhere = np.empty(0)

    def add(point: dict[str, Any], measure: str, number: float, drawn: Floats, tasks: Floats = nowhere) -> None:
        out.append(({**point, "measure": measure, "value": number}, drawn, tasks))

    none = np.full(resamples, np.nan)
    for number, own in rows.drop_duplicates("point").set_index("point")[list(_POINT)].iterrows():
        p = int(number)  # type: ignore[call-overload]
        point = {name: own[name] for name in _POINT}
        tasks = str(own["members"]).split(";") if own["members"] else held_in
        seed_of = int(own["seed"]) if (int(own["seed"]), tasks[0]) in experts else first
        mine = [place[p, t, "head"] for t in tasks]
        theirs = [place[experts[seed_of, t], t, "head"] for t in tasks]
        add(point, "held_in", *_ratio(value, accuracy, mine, theirs))
        add(point, "held_in_accuracy", float(value[mine].mean()), accuracy[mine].mean(axis=0))
        add(point, "held_in_loss", float(loss[mine].mean()), none)
        add(point, "joint_loss", float(loss[[place[p, t, "head"] for t in held_in]].mean()), none)
        for transfer in transfers:
            mine = [place[p, t, transfer] for t in held_out]
            theirs = [place[base, t, transfer] for t in held_out]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.where(value[theirs] > 0, value[mine] / value[theirs], np.nan)
            add(point, f"held_out/{transfer}", *_ratio(value, accuracy, mine, theirs), ratios)
            drawn = accuracy[mine].mean(axis=0)
            add(point, f"held_out_accuracy/{transfer}", float(value[mine].mean()), drawn, value[mine])
    return out


def _ratio(value: Floats, draws: Floats, mine: Sequence[int], theirs: Sequence[int]) -> tuple[float, Floats]:
    """Mean over tasks of one row over another, with its draws; tasks whose reference is zero are left out."""
    good = [(a, b) for a, b in zip(mine, theirs, strict=True) if value[b] > 0]
    if not good:
        return float("nan"), np.full(draws.shape[1], np.nan)
    a, b = [x for x, _ in good], [x for _, x in good]
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.where(draws[b] > 0, draws[a] / draws[b], np.nan)
    known = np.isfinite(drawn).sum(axis=0)
    means = np.where(known > 0, np.nansum(drawn, axis=0) / np.maximum(known, 1), np.nan)
    return float((value[a] / value[b]).mean()), np.asarray(means)


def _drawn(points: Points, resamples: int, seed: int) -> Floats:
    """Accuracy of every row on resampled test images, (rows, R); the same draws for every cell and point."""
    tasks = list(dict.fromkeys(points.rows["task"]))
    out = np.full((len(points.rows), resamples), np.nan)
    places = [np.flatnonzero((points.rows["task"] == task).to_numpy()) for task in tasks]
    blocks = []
    for rows in places:
        block = points.correct[rows].T.astype(np.float64)
        blocks.append(block[~np.isnan(block).any(axis=1)])
    sources = [points.sources.get(task) for task in tasks]
    for rows, means in zip(
        places, bootstrap_means(blocks, sources=sources, resamples=resamples, seed=seed), strict=True
    ):
        out[rows] = means.T
    return out


def slope_weights(x: Sequence[float]) -> Floats:
    """Weights that turn values at x into their least squares slope."""
    centred = np.asarray(x, dtype=float) - np.mean(x)
    return np.asarray(centred / (centred @ centred))


def contrast(
    table: Table, factor: str, levels: Sequence[Any], weights: Sequence[float] | Floats, match: Sequence[str]
) -> Effects:
    """Weighted sums over the levels of a factor, one for every combination of the other columns that has all levels.

    Args:
        table: rows of one measure.
        factor: column.
        levels: of the factor, each with its weight.
        weights: of the levels.
        match: columns that are equal within a combination.

    Returns:
        Effects; the members are those of the combination's row with the fewest experts (but some): along a chain that
        ends with all tasks, it is the beginning that chance decides.
    """
    rows = table.rows
    keys = list(zip(*(rows[name] for name in match), strict=True)) if match else [()] * len(rows)
    found: dict[Any, dict[Any, int]] = {}
    for place, (key, level) in enumerate(zip(keys, rows[factor], strict=True)):
        found.setdefault(key, {})[level] = place
    value, draws, members, tasks = [], [], [], []
    w = np.asarray(weights, dtype=float)
    numbers = rows["value"].to_numpy(dtype=float)
    behind = [str(text) for text in rows["members"]]
    for places in found.values():
        if not all(level in places for level in levels):
            continue
        chosen = [places[level] for level in levels]
        value.append(float(w @ numbers[chosen]))
        draws.append(w @ table.draws[chosen])
        if table.by_task is not None:
            tasks.append(w @ table.by_task[chosen])
        named = [behind[k] for k in chosen]
        members.append(min((text for text in named if text), key=lambda text: text.count(";"), default="all"))
    width = table.draws.shape[1]
    single = None if table.by_task is None else np.asarray(tasks).reshape(len(value), table.by_task.shape[1])
    return Effects(np.asarray(value, dtype=float), np.asarray(draws).reshape(len(value), width), tuple(members), single)


def estimate(effects: Effects, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Mean effect with an interval over merged tasks and test images; NaN bounds where there is nothing to resample.

    Held-out tasks stay the same in it: see :func:`experiments.studies.scale.over_tasks.judged_over_tasks`.
    """
    good = np.isfinite(effects.value)
    if not good.any():
        return Estimate(float("nan"), float("nan"), float("nan"))
    value, draws = effects.value[good], effects.draws[good]
    members = membership([m.split(";") for m, keep in zip(effects.members, good, strict=True) if keep])
    centre = float(value.mean())
    weights = expert_weights(members, draws.shape[1], seed, SCALE)
    deviations = (mean(value, weights) - centre) / SCALE if len(value) > 1 else np.zeros(draws.shape[1])
    images = draws.mean(axis=0)
    if np.isfinite(images).any():
        deviations = deviations + np.nan_to_num(images - np.nanmean(images))
    if not np.ptp(deviations) > 0:
        return Estimate(centre, float("nan"), float("nan"))
    tail = (1.0 - level) / 2.0
    low, high = centre + np.quantile(deviations, [tail, 1.0 - tail])
    return Estimate(centre, float(low), float(high))
