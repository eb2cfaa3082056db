"""Cells of a grid: for each level of a factor the experts of every task, with the other hyperparameters held."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.combine.groups import BASE_COLUMNS, FACTORS, HYPERPARAMETERS, Member, members, plain
from theory.errors import MergeboundError, nearest

_FEW = 4


@dataclass(frozen=True)
class Cell:
    """The experts that a factor is measured with, everything else held.

    Attributes:
        stratum: what is held, JSON.
        tasks: those that every level has, in order of names.
        choices: by level and task the experts to choose from: one entry for each seed, in their order, with all its
            experts (several within a bin, or where several values are held); with others that are free, one entry for
            each expert.
        bases: digest of the base at every level.
        same_seeds: whether entry k is of the same seed at every level, for every task.
    """

    stratum: str
    tasks: tuple[str, ...]
    choices: Mapping[Any, Mapping[str, tuple[tuple[Member, ...], ...]]]
    bases: Mapping[Any, str]
    same_seeds: bool = True

    def base(self, level: Any) -> str:
        """The base at a level."""
        return self.bases[level]

    @property
    def words(self) -> str:
        """What is held, in words."""
        return _words(json.loads(self.stratum))


def restricted(table: pd.DataFrame, fixed: Mapping[str, Any], *, keep_steps: bool) -> pd.DataFrame:
    """The rows with the values asked for; last checkpoints only, unless all are kept or ``fixed`` names a step.

    Args:
        table: of :func:`~experiments.combine.groups.grid_table`.
        fixed: column to a value, or to a list of values.

    Raises:
        MergeboundError: an unknown column, or no row has the value; names those that there are.
    """
    for name, wanted in fixed.items():
        if name not in (*FACTORS, "task", "seed") or name not in table.columns:
            known = [one for one in (*FACTORS, "task", "seed") if one in table.columns]
            raise MergeboundError(f"fixed: the grid has no hyperparameter {name!r}; {nearest(name, known)}")
        values = list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
        there = ordered_levels(table[name])
        for value in values:
            if value not in there:
                shown = ", ".join(str(one) for one in there[:12])
                raise MergeboundError(f"fixed: no finished run has {name} = {value!r}; there are {shown}")
        table = table[[_level(value) in values for value in table[name]]]
    if not len(table):
        raise MergeboundError(f"no finished run has {_words(dict(fixed))} together; hold fewer hyperparameters")
    return table if keep_steps or "step" in fixed else table[table["final"]]


def factor_cells(
    table: pd.DataFrame,
    factor: str,
    *,
    held: Collection[str],
    others: str,
    matched: bool,
    bins: int | None,
    leave_out: bool,
) -> tuple[tuple[Cell, ...], tuple[Any, ...], tuple[str, ...]]:
    """Cells, levels, and what was left out, in words.

    Raises:
        MergeboundError: an unknown factor, a factor with one level, or an empty cell, naming what is missing.
    """
    if factor not in FACTORS or factor not in table.columns:
        known = [name for name in FACTORS if name in table.columns]
        raise MergeboundError(f"factor: the grid has no hyperparameter {factor!r}; {nearest(factor, known)}")
    if others not in ("middle", "all", "free"):
        raise MergeboundError(f"others = {others!r}: choose middle, all or free")
    table = table.assign(_level=_cut(table[factor], bins, factor))
    levels = ordered_levels(table["_level"])
    if len(levels) < 2:
        raise MergeboundError(f"factor: {factor} has one value, {levels[0]}, in all finished runs{_instead(table)}")
    of_base = factor in BASE_COLUMNS
    open_names = [
        name
        for name in HYPERPARAMETERS
        if name in table.columns and name not in (factor, *held) and len(ordered_levels(table[name])) > 1
    ]
    tied = [] if others == "free" else _tied(table, open_names)
    split = [] if others == "free" else list(open_names)
    if others == "middle":
        for name in open_names:
            values = ordered_levels(table[name])
            table = table[[_level(value) == values[(len(values) - 1) // 2] for value in table[name]]]
        if not len(table):
            raise MergeboundError(
                f"no finished run has the middle value of {', '.join(open_names)} together; give fixed= values, or "
                "others='free' (--others free) for grids of random samples or tied fields"
            )
    if not of_base:
        split.append("base_digest")
    expected = sorted(set(table["task"]))
    cells, lost = [], []
    for stratum, rows in _strata(table, split):
        cell, missing = _cell(rows, factor, levels, stratum, expected, matched and others != "free", others)
        if missing and not leave_out:
            where = f" with {_words(json.loads(stratum))}" if split else ""
            trouble = f"empty cells of {factor}{where}: {_listed(missing)}{_diverged(table, factor)}"
            if tied:
                raise MergeboundError(
                    f"{trouble}; {factor} is tied to {', '.join(tied)} in this grid (each value of {tied[0]} comes "
                    f"with one value of {factor} only), so that one cannot be held while the other varies: let the "
                    "others vary along (others='free', --others free)"
                )
            raise MergeboundError(
                f"{trouble}; finish the grid, hold other values, or leave these tasks out (on_missing='leave_out', "
                "--leave-out-missing)"
            )
        cells.append(cell)
        lost += missing
    return tuple(cells), tuple(levels), tuple(lost)


def _tied(table: pd.DataFrame, names: list[str]) -> list[str]:
    """Those of some columns whose value says which level of the factor a run has: by a tie, or by random samples."""
    keys = {name: pd.Series([str(_level(value)) for value in table[name]], index=table.index) for name in names}
    levels = pd.Series([str(value) for value in table["_level"]], index=table.index)
    return [name for name, key in keys.items() if int(levels.groupby(key).nunique().max()) == 1]


def _cell(
    rows: pd.DataFrame, factor: str, levels: list[Any], stratum: str, expected: list[str], paired: bool, others: str
) -> tuple[Cell, list[str]]:
    found: dict[Any, dict[str, list[tuple[int, Member]]]] = {level: {} for level in levels}
    bases: dict[Any, str] = {}
    for level, seed, base, member in zip(rows["_level"], rows["seed"], rows["base_digest"], members(rows), strict=True):
        if bases.setdefault(level, str(base)) != str(base):
            raise MergeboundError(
                f"{factor} = {level}: its runs have several bases, whose experts cannot be merged; hold base_digest"
            )
        found[level].setdefault(member.task, []).append((int(seed), member))
    twins = set() if others == "free" else _twins(rows)
    missing: list[str] = []
    choices: dict[Any, dict[str, tuple[tuple[Member, ...], ...]]] = {level: {} for level in levels}
    kept = []
    same = True
    for task in expected:
        lacking = [level for level in levels if task not in found[level]]
        missing += [f"no expert of {task} at {factor} = {level}" for level in lacking]
        if lacking:
            continue
        pairs = {level: [pair for pair in sorted(found[level][task]) if pair[1] not in twins] for level in levels}
        own = {level: _by_seed(pairs[level], apart=others == "free") for level in levels}
        if paired:
            common = set.intersection(*({seed for seed, _ in entries} for entries in own.values()))
            if not common:
                missing.append(f"no seed of {task} that every level of {factor} has")
                continue
            own = {level: [entry for entry in entries if entry[0] in common] for level, entries in own.items()}
        kept.append(task)
        same &= len({tuple(seed for seed, _ in entries) for entries in own.values()}) == 1
        for level in levels:
            choices[level][task] = tuple(experts for _, experts in own[level])
    return Cell(stratum, tuple(kept), choices, bases, same), missing


def _by_seed(pairs: list[tuple[int, Member]], *, apart: bool) -> list[tuple[int, tuple[Member, ...]]]:
    """All experts of every seed, in the order of seeds; ``apart``: an entry for each expert."""
    if apart:
        return [(seed, (member,)) for seed, member in pairs]
    found: dict[int, list[Member]] = {}
    for seed, member in pairs:
        found.setdefault(seed, []).append(member)
    return [(seed, tuple(own)) for seed, own in found.items()]


def _twins(rows: pd.DataFrame) -> set[Member]:
    """Of experts that differ in nothing that counts (in what else is kept of them), all but the first by name."""
    counts = ["task", "seed", "step", *(name for name in HYPERPARAMETERS if name in rows.columns)]
    seen: set[tuple[Any, ...]] = set()
    found: set[Member] = set()
    keys = zip(*([_level(value) for value in rows[name]] for name in counts), strict=True)
    for member, key in sorted(zip(members(rows), keys, strict=True), key=lambda pair: pair[0]):
        if key in seen:
            found.add(member)
        seen.add(key)
    return found


def _strata(table: pd.DataFrame, names: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """Rows by the values of some columns, in order, with the values as JSON."""
    keys = [
        json.dumps({name: _level(row) for name, row in zip(names, values, strict=True)})
        for values in _rows(table, names)
    ]
    order = {key: None for key in keys}
    series = pd.Series(keys, index=table.index)
    return [(key, table[series == key]) for key in sorted(order)]


def _rows(table: pd.DataFrame, names: list[str]) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name] for name in names), strict=True)) if names else [()] * len(table)


def _cut(column: pd.Series, bins: int | None, factor: str) -> list[Any]:
    if bins is None:
        return [_level(value) for value in column]
    if bins < 2 or not pd.api.types.is_numeric_dtype(column):
        raise MergeboundError(f"bins = {bins} of {factor}: give 2 or more, and a factor of numbers")
    return [str(part) for part in pd.qcut(column, bins, duplicates="drop", precision=4)]


def _level(value: Any) -> Any:
    """A value that compares: numbers and text as they are, anything missing as ``none``."""
    if value is None or (isinstance(value, float) and value != value):
        return "none"
    found = plain(value)
    return "none" if found is None or found is pd.NA else found


def ordered_levels(column: Any) -> list[Any]:
    """Different values, numbers before text, in order."""
    found = {_level(value) for value in column}

    def order(value: Any) -> tuple[bool, Any]:
        number = float(value.strip("([]").split(",")[0]) if isinstance(value, str) and _interval(value) else None
        return (isinstance(value, str) and number is None, value if number is None else number)

    return sorted(found, key=order)


def _interval(text: str) -> bool:
    return text[:1] in "([" and text[-1:] == "]" and "," in text


def _words(held: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {str(value)[:12] if name == 'base_digest' else value}" for name, value in held.items())


def _listed(parts: list[str]) -> str:
    more = f" and {len(parts) - _FEW} more" if len(parts) > _FEW else ""
    return "; ".join(parts[:_FEW]) + more


def _diverged(table: pd.DataFrame, factor: str) -> str:
    lost = table.attrs.get("unusable")
    if lost is None or not len(lost):
        return ""
    values = ", ".join(str(value) for value in ordered_levels(lost[factor])[:_FEW]) if factor in lost else ""
    return f" ({lost['digest'].nunique()} runs diverged or are not finished, at {factor} = {values})"


def _instead(table: pd.DataFrame) -> str:
    varied = [name for name in FACTORS if name in table.columns and len(ordered_levels(table[name])) > 1]
    varied += ["step"] if table.attrs.get("checkpoints", 1) > 1 and "step" not in varied else []
    return f"; choose among those that vary: {', '.join(varied)}" if varied else "; run a grid that varies it"
