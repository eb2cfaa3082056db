"""The five findings of the paper and its three open checks: an effect with an interval each, and a verdict.

A verdict compares directions only: ``agrees`` or ``disagrees`` where the interval leaves zero out, else ``undecided``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.statistics import Estimate
from experiments.studies.scale.effects import Effects, Table, contrast, estimate, joined, slope_weights, spread
from experiments.studies.scale.spec import FamilySpec, ScaleSpec

FINDINGS = {
    "1 stronger base": "Experts of a stronger base merge better.",
    "2 larger model": "Larger models merge more easily.",
    "3 more experts": "Held-out performance improves with the number of experts.",
    "4 beats multitask": "All experts of a strong base, merged, beat multitask training on held-out tasks.",
    "5 methods converge": "Methods come closer to each other at large scale.",
}
CHECKS = {
    "barriers": "Loss barriers between experts, against size (are larger models flatter?).",
    "flatness": "Rise of the loss around the average, against size.",
    "optimised multitask": "Finding 4 against a multitask model with an optimised budget and early stopping.",
    "other family": "Findings 1, 2, 3 and 5 in the other family.",
}


def verdict(found: Estimate, direction: int) -> str:
    """Whether an effect has the paper's direction (+1 or -1), beyond its interval."""
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        return "undecided"
    if found.low > 0 or found.high < 0:
        return "agrees" if found.value * direction > 0 else "disagrees"
    return "undecided"


def _row(
    name: str, scope: str, measure: str, effects: Effects, direction: int, unit: str, seed: int, paper: str = "yes"
) -> dict[str, Any]:
    found = estimate(effects, seed=seed)
    return {
        "finding": name,
        "scope": scope,
        "measure": measure,
        "effect": found.value,
        "effect_low": found.low,
        "effect_high": found.high,
        "unit": unit,
        "paper": "above 0" if direction > 0 else "below 0",
        "verdict": verdict(found, direction) if np.isfinite(found.value) else "not measured",
        "comparisons": int(np.isfinite(effects.value).sum()),
        "interval_over": "tasks and test images" if len(set(effects.members)) > 1 else "test images",
        "papers_own": paper,
        "tier": "measured",
        "seed": seed,
    }


_SAME = ("family", "architecture", "experts", "chain", "seed", "method")


def base_effects(table: Table, weak: str, strong: str) -> Effects:
    """Strong minus weak base, paired by network, group and method."""
    return contrast(table, "base", (weak, strong), (-1.0, 1.0), _SAME)


def size_effects(table: Table, spec: ScaleSpec) -> Effects:
    """Slope per tenfold number of parameters, paired by base, group and method, family by family."""
    parts = []
    for family in spec.families:
        own = table.where(family=family.name)
        levels, x = _sizes(own)
        if len(levels) > 1:
            parts.append(
                contrast(own, "architecture", levels, slope_weights(x), ("base", "experts", "chain", "seed", "method"))
            )
    return joined(*parts) if parts else _none(table)


def number_effects(table: Table, spec: ScaleSpec) -> Effects:
    """Slope per doubling of the number of experts along each chain.

    The group of all experts belongs to every chain of its seed.
    """
    largest = spec.experts[-1]
    rows = table.rows
    places = [k for k in range(len(rows))]
    chains = sorted({int(c) for c, n in zip(rows["chain"], rows["experts"], strict=True) if n != largest})
    copies: list[int] = []
    numbers: list[int] = []
    for k in places:
        row = rows.iloc[k]
        if int(row["experts"]) == largest and largest == len(spec.held_in):
            own = [c for c in chains if spec.seeds[c % len(spec.seeds)] == int(row["seed"])]
        else:
            own = [int(row["chain"])]
        copies += [k] * len(own)
        numbers += own
    if not copies:
        return _none(table)
    whole = table.take(np.asarray(copies))
    whole.rows["chain"] = numbers
    weights = slope_weights([float(np.log2(n)) for n in spec.experts])
    return contrast(
        whole, "experts", spec.experts, weights, ("family", "architecture", "base", "chain", "seed", "method")
    )


def multitask_effects(merges: Table, multitask: Table) -> Effects:
    """Merge of all experts minus the multitask model of the same network and base."""
    both = Table(
        pd.concat([merges.rows, multitask.rows], ignore_index=True), np.concatenate([merges.draws, multitask.draws])
    )
    parts = []
    for method in dict.fromkeys(merges.rows["method"]):
        own = both.take(np.flatnonzero((both.rows["method"].isin([method, ""])).to_numpy()))
        own.rows["side"] = np.where(own.rows["kind"] == "merge", "merge", "multitask")
        parts.append(contrast(own, "side", ("multitask", "merge"), (-1.0, 1.0), ("family", "architecture", "base")))
    return joined(*parts) if parts else _none(merges)


def _sizes(table: Table) -> tuple[tuple[str, ...], list[float]]:
    known = table.rows.drop_duplicates("architecture").sort_values("parameters")
    return tuple(known["architecture"]), [float(np.log10(p)) for p in known["parameters"]]


def _none(table: Table) -> Effects:
    return Effects(np.empty(0), np.empty((0, table.draws.shape[1])), ())


def findings_table(table: Table, spec: ScaleSpec) -> pd.DataFrame:
    """One row per finding, scope and measure.

    The first family's rows with the paper's own measure come first (``papers_own == "yes"``); the others widen them.

    Returns:
        ``finding``, ``scope``, ``measure``, ``effect`` with ``_low`` and ``_high`` (95 %, over tasks and images),
        ``unit``, ``paper`` (its direction), ``verdict``, ``comparisons``, ``interval_over``, ``papers_own``,
        ``tier``, ``seed``.
    """
    rows: list[dict[str, Any]] = []
    for place, family in enumerate(spec.families):
        rows += _of_family(table.where(family=family.name), spec, family, "yes" if place == 0 else "other family")
    return pd.DataFrame(rows)


def _of_family(table: Table, spec: ScaleSpec, family: FamilySpec, paper: str) -> list[dict[str, Any]]:
    merges = table.where(kind="merge")
    name, bases, seed = family.name, spec.bases_of(family), spec.seed
    outs = [f"held_out/{one}" for one in spec.transfers]
    rows: list[dict[str, Any]] = []
    for weak, strong in _pairs(bases):
        for measure in ("held_in", "held_in_accuracy"):
            scope = f"{name}: {strong} against {weak}"
            own = "yes" if measure == "held_in" and (weak, strong) == (bases[0], bases[-1]) else "widened"
            effects = base_effects(merges.where(measure=measure), weak, strong)
            rows.append(_row("1 stronger base", scope, measure, effects, 1, "difference", seed, _own(paper, own)))
    for base in bases[::-1]:
        for measure in ("held_in", outs[0]):
            effects = size_effects(merges.where(measure=measure, base=base), spec)
            own = "yes" if base == spec.strongest and measure == "held_in" else "widened"
            scope = f"{name}: {base} base"
            rows.append(_row("2 larger model", scope, measure, effects, 1, "per tenfold size", seed, _own(paper, own)))
    for base in bases[::-1]:
        for measure in outs:
            effects = number_effects(merges.where(measure=measure, base=base), spec)
            own = "yes" if base == spec.strongest and measure == outs[0] else "widened"
            scope = f"{name}: {base} base"
            rows.append(_row("3 more experts", scope, measure, effects, 1, "per doubling of N", seed, _own(paper, own)))
    rows += _against_multitask(table, spec, name, paper)
    for base in bases[::-1]:
        for measure in ("held_in", outs[0]):
            spreads = spread(
                merges.where(measure=measure, base=base),
                ("family", "architecture", "parameters", "base", "experts", "chain", "seed"),
            )
            own = "yes" if base == spec.strongest and measure == "held_in" else "widened"
            effects = size_effects(spreads, spec) if len(spreads.rows) else _none(table)
            scope = f"{name}: {base} base"
            rows.append(
                _row("5 methods converge", scope, measure, effects, -1, "per tenfold size", seed, _own(paper, own))
            )
    return rows


def _against_multitask(table: Table, spec: ScaleSpec, name: str, paper: str) -> list[dict[str, Any]]:
    rows = []
    networks = tuple(table.rows.drop_duplicates("architecture").sort_values("parameters")["architecture"])
    for base in spec.multitask.bases if spec.multitask is not None else ():
        for model in ("fixed", "optimised"):
            for measure in [f"held_out_accuracy/{one}" for one in spec.transfers]:
                for scope, wanted in (("largest network", networks[-1:]), ("all networks", networks)):
                    own = table.where(base=base, measure=measure, architecture=wanted)
                    effects = multitask_effects(
                        own.where(kind="merge", experts=spec.experts[-1]), own.where(kind=f"multitask_{model}")
                    )
                    main = measure.endswith(spec.transfers[0]) and base == spec.strongest and scope == "largest network"
                    kind = "yes" if main and model == "fixed" else "widened"
                    about = f"{name}: {base} base, {scope}, {model} multitask"
                    rows.append(
                        _row("4 beats multitask", about, measure, effects, 1, "accuracy", spec.seed, _own(paper, kind))
                    )
    return rows


def _own(paper: str, own: str) -> str:
    return own if paper == "yes" else ("other family" if own == "yes" else "widened")


def _pairs(bases: Sequence[str]) -> list[tuple[str, str]]:
    ends = [(bases[0], bases[-1])]
    return ends + [pair for pair in pairwise(bases) if pair not in ends]


def shape_table(shape: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """The open checks on the loss's shape: slope of barriers and flatness per tenfold number of parameters.

    The paper supposes that larger models are flatter: the supposed direction is below zero.
    """
    rows = []
    if shape.empty:
        return pd.DataFrame()
    for family in spec.families:
        for base in spec.bases_of(family)[::-1]:
            own = shape[(shape["family"] == family.name) & (shape["base"] == base)]
            for quantity, at in (
                ("loss_barrier", None), ("error_barrier", None), ("average_filters", "average"), ("sam", "average"),
                ("average_filters", "base"),
            ):  # fmt: skip
                part = own[own["quantity"] == quantity]
                part = part if at is None else part[part["place"] == at]
                effects = scalar_slopes(part, ("place",), seed=spec.seed)
                if not len(effects):
                    continue
                name = "barriers" if at is None else "flatness"
                measure = quantity if at is None else f"{quantity} at the {at}"
                scope = f"{family.name}: {base} base"
                row = _row(name, scope, measure, effects, -1, "per tenfold size", spec.seed, "open check")
                rows.append({**row, "mean": float(part["value"].mean())})
    return pd.DataFrame(rows)


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
    levels, x = _sizes(table)
    if len(levels) < 2:
        return _none(table)
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
