"""Comparisons between points: bases, sizes, numbers of experts, multitask models, methods; slopes of single numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.studies.scale.effects import Effects, Floats, Table, contrast, joined, slope_weights, stacked
from experiments.studies.scale.spec import ScaleSpec

_SAME = ("family", "architecture", "experts", "chain", "seed", "method")


def base_effects(table: Table, weak: str, strong: str) -> Effects:
    """Strong minus weak base, paired by network, group and method."""
    return contrast(table, "base", (weak, strong), (-1.0, 1.0), _SAME)


def size_effects(table: Table, spec: ScaleSpec) -> Effects:
    """Slope per tenfold number of parameters, paired by base, group and method, family by family."""
    parts = []
    for family in spec.families:
        own = table.where(family=family.name)
        levels, x = sizes(own)
        if len(levels) > 1:
            parts.append(
                contrast(own, "architecture", levels, slope_weights(x), ("base", "experts", "chain", "seed", "method"))
            )
    return joined(*parts) if parts else no_effects(table)


def number_effects(table: Table, spec: ScaleSpec) -> Effects:
    """Slope per doubling of the number of experts along each chain.

    The group of all experts belongs to every chain of its seed.
    """
    largest = spec.experts[-1]
    rows = table.rows
    about = list(zip(rows["chain"].astype(int), rows["experts"].astype(int), rows["seed"].astype(int), strict=True))
    chains = sorted({chain for chain, experts, _ in about if experts != largest})
    copies: list[int] = []
    numbers: list[int] = []
    for k, (chain, experts, seed) in enumerate(about):
        every = experts == largest == len(spec.held_in)
        own = [c for c in chains if spec.seeds[c % len(spec.seeds)] == seed] if every else [chain]
        copies += [k] * len(own)
        numbers += own
    if not copies:
        return no_effects(table)
    whole = table.take(np.asarray(copies))
    whole.rows["chain"] = numbers
    weights = slope_weights([float(np.log2(n)) for n in spec.experts])
    return contrast(
        whole, "experts", spec.experts, weights, ("family", "architecture", "base", "chain", "seed", "method")
    )


def multitask_effects(merges: Table, multitask: Table) -> Effects:
    """Merge of all experts minus the multitask model of the same network and base."""
    both = Table(
        pd.concat([merges.rows, multitask.rows], ignore_index=True),
        np.concatenate([merges.draws, multitask.draws]),
        stacked([merges.by_task, multitask.by_task]),
    )
    parts = []
    for method in dict.fromkeys(merges.rows["method"]):
        own = both.take(np.flatnonzero((both.rows["method"].isin([method, ""])).to_numpy()))
        own.rows["side"] = np.where(own.rows["kind"] == "merge", "merge", "multitask")
        parts.append(contrast(own, "side", ("multitask", "merge"), (-1.0, 1.0), ("family", "architecture", "base")))
    return joined(*parts) if parts else no_effects(merges)


def spread(table: Table, match: Sequence[str]) -> Table:
    """Largest minus smallest value over the methods of each combination of ``match``, as rows of a table.

    The gap of means over held-out tasks is no mean over them: ``by_task`` has its jackknife pseudo-values.
    """
    groups = table.rows.groupby(list(match), sort=False).indices
    rows, draws, tasks = [], [], []
    for places in groups.values():
        kept = table.draws[places]
        row = table.rows.iloc[places[0]].to_dict()
        values = table.rows["value"].to_numpy(dtype=float)[places]
        rows.append({**row, "method": "spread", "value": float(values.max() - values.min())})
        draws.append(kept.max(axis=0) - kept.min(axis=0))
        if table.by_task is not None:
            tasks.append(_gap_pseudo_values(table.by_task[places]))
    return Table(
        pd.DataFrame(rows, columns=table.rows.columns),
        np.asarray(draws).reshape(len(rows), table.draws.shape[1]),
        None if table.by_task is None else np.asarray(tasks).reshape(len(rows), table.by_task.shape[1]),
    )


def _gap_pseudo_values(values: Floats) -> Floats:
    """T times the largest gap of means over T tasks minus (T - 1) times that without one of them, (T,).

    Args:
        values: of the methods on each held-out task, (methods, T).
    """
    out = np.full(values.shape[1], np.nan)
    known = np.flatnonzero(np.isfinite(values).all(axis=0))
    T, own = len(known), values[:, known]
    if T == 1:
        out[known] = np.ptp(own)
    elif T > 1:
        without = (own.sum(axis=1, keepdims=True) - own) / (T - 1)
        out[known] = T * np.ptp(own.mean(axis=1)) - (T - 1) * np.ptp(without, axis=0)
    return out


def sizes(table: Table) -> tuple[tuple[str, ...], list[float]]:
    """Networks of a table, small to large, and log10 of their numbers of parameters."""
    known = table.rows.drop_duplicates("architecture").sort_values("parameters")
    return tuple(known["architecture"]), [float(np.log10(p)) for p in known["parameters"]]


def no_effects(table: Table) -> Effects:
    """No effect, with as many draws as the table."""
    return Effects(np.empty(0), np.empty((0, table.draws.shape[1])), ())


def scalar_slopes(frame: pd.DataFrame, match: Sequence[str], *, logarithm: bool = False, seed: int = 0) -> Effects:
    """Slopes against log10 of the number of parameters, one for each combination of ``match`` that all networks have.

    Args:
        frame: ``architecture``, ``parameters``, ``members``, ``value`` and the columns of ``match``.
        match: columns.
        logarithm: of values (log10); rows that are not positive are left out.
        seed: names the draws that stand for the values' own intervals (``value_low``, ``value_high``: 95 %), where they
            have some: normal, independent between rows.
    """
    values = frame["value"].to_numpy(dtype=float)
    if logarithm:
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.where(values > 0, np.log10(np.where(values > 0, values, 1.0)), np.nan)
    rows = frame.assign(value=values)
    table = Table(rows.reset_index(drop=True), _by_interval(rows, seed))
    levels, x = sizes(table)
    if len(levels) < 2:
        return no_effects(table)
    return contrast(table, "architecture", levels, slope_weights(x), match)


def _by_interval(rows: pd.DataFrame, seed: int, resamples: int = 300) -> NDArray[np.float64]:
    """Values that vary as much as their 95 % intervals say, (rows, R); NaN where no row has one."""
    out = np.full((len(rows), resamples), np.nan)
    if "value_low" not in rows:
        return out
    wide = (rows["value_high"] - rows["value_low"]).to_numpy(dtype=float) / (2 * 1.959964)
    if np.isfinite(wide).any():
        rng = np.random.default_rng([seed, 0x51A9])
        draws = rng.standard_normal((len(rows), resamples))
        out = rows["value"].to_numpy(dtype=float)[:, None] + np.nan_to_num(wide)[:, None] * draws
    return out
