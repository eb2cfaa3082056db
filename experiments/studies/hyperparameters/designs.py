"""Which experts are merged: matched groups for every factor, and groups of experts with recipes of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.combine.designs import by_factor, random_groups
from experiments.combine.groups import Group
from experiments.combine.recipe import Evaluate, MergeMethod
from experiments.studies.hyperparameters.grids import StudyGrid
from experiments.studies.hyperparameters.spec import HYPERPARAMETERS, StudySpec
from theory.errors import MergeboundError

JOINT = "heterogeneous"
"""Stands where a factor does, for groups of experts with recipes of their own."""


@dataclass(frozen=True)
class Drawn:
    """Groups of one grid for one factor and how they are merged.

    Attributes:
        grid: name.
        factor: of :data:`experiments.studies.hyperparameters.spec.FACTORS`, or :data:`JOINT`.
        groups: with their level and seed.
        methods: one, or one for each level of the coefficient.
        left_out: tasks that some level lacks, in words.
    """

    grid: str
    factor: str
    groups: tuple[Group, ...]
    methods: tuple[MergeMethod, ...]
    left_out: tuple[str, ...] = ()


def draw(spec: StudySpec, grid: StudyGrid, frame: pd.DataFrame) -> tuple[Drawn, ...]:
    """All groups of one grid.

    Args:
        spec: the study.
        grid: one of its grids.
        frame: ``Store.frame()`` of the finished grid.

    Raises:
        MergeboundError: a level without experts, or too few tasks for the groups.
    """
    found: list[Drawn] = []
    if grid.role in ("factors", "both"):
        found += [_factor(spec, grid, frame, factor) for factor in spec.levels.factors]
    if grid.role in ("joint", "both") and spec.heterogeneous is not None:
        design = random_groups(frame, sizes=(spec.size,), groups=spec.heterogeneous.groups, seed=spec.seed)
        groups = tuple(replace(group, factor=JOINT) for group in design)
        found.append(Drawn(grid.name, JOINT, groups, (MergeMethod(spec.method),)))
    return tuple(found)


def centre_of(spec: StudySpec, *, without: str = "") -> dict[str, Any]:
    """The values at which everything but one factor is held."""
    return {n: getattr(spec.centre, n) for n in (*HYPERPARAMETERS, "steps") if n != without}


def _factor(spec: StudySpec, grid: StudyGrid, frame: pd.DataFrame, factor: str) -> Drawn:
    method: tuple[MergeMethod, ...] = (MergeMethod(spec.method),)
    if factor in ("experts", "coefficient"):
        sizes = tuple(int(n) for n in spec.levels.experts) if factor == "experts" else (spec.size,)
        groups, lost = _at_centre(spec, frame, sizes)
        if factor == "experts":
            groups = tuple(replace(group, factor=factor, level=len(group.members)) for group in groups)
        else:
            groups = tuple(replace(group, factor=factor, level=None) for group in groups)
            method = tuple(
                MergeMethod("task_arithmetic", {"coefficient": float(value)}) for value in spec.levels.coefficient
            )
        return Drawn(grid.name, factor, groups, method, lost)
    fixed = centre_of(spec, without=factor)
    design = by_factor(
        frame, factor, sizes=(spec.size,), groups=spec.groups, seed=spec.seed, fixed=fixed, on_missing="leave_out"
    )
    wanted = spec.levels.of(factor)
    lacking = [level for level in wanted if level not in design.levels]
    if lacking:
        raise MergeboundError(f"{grid.name}: no finished run has {factor} = {lacking[0]}; finish the grid")
    return Drawn(grid.name, factor, tuple(g for g in design if g.level in wanted), method, design.left_out)


def _at_centre(
    spec: StudySpec, frame: pd.DataFrame, sizes: tuple[int, ...]
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """Groups of the centre's last checkpoints: those that the factors have at their centre."""
    factor = next((name for name in (*HYPERPARAMETERS, "step") if name in spec.levels.factors), None)
    if factor is None:
        raise MergeboundError("levels: give a hyperparameter or checkpoints besides experts and coefficient")
    centre = spec.centre.steps if factor == "step" else getattr(spec.centre, factor)
    fixed = centre_of(spec, without=factor)
    design = by_factor(
        frame, factor, sizes=sizes, groups=spec.groups, seed=spec.seed, fixed=fixed, on_missing="leave_out"
    )
    return tuple(group for group in design if group.level == centre), design.left_out


def merge_all(
    spec: StudySpec,
    drawn: Sequence[Drawn],
    stores: Path,
    *,
    root: str | Path | None = None,
    workers: int = 1,
    device: str = "cpu",
    watch: Callable[[Any], None] | None = None,
) -> None:
    """Merge and measure what is missing, in the stores of the grids."""
    from experiments.combine.api import combine

    for one in drawn:
        combine(
            stores / one.grid, one.groups, one.methods, evaluate=evaluation(spec), root=root, workers=workers,
            device=device, watch=watch,
        )  # fmt: skip


def evaluation(spec: StudySpec) -> Evaluate:
    """What is measured on every merge."""
    return Evaluate(images=spec.test_images)


def merges_frame(spec: StudySpec, drawn: Sequence[Drawn], stores: Path) -> pd.DataFrame:
    """Measured merges, one row for each group, factor and method; those that are not measured yet are left out.

    Columns: those of :func:`experiments.combine.rows.table_of`, ``grid`` and ``alpha`` (the common coefficient of every
    expert); ``level`` is lambda where the coefficient is the factor.
    """
    from experiments.combine.rows import table_of
    from experiments.store import Store

    tables = []
    kept: dict[str, pd.DataFrame] = {}
    for one in drawn:
        if one.grid not in kept:
            with Store.open(stores / one.grid, "r") as store:
                kept[one.grid] = store.merges()
        table = table_of(one.groups, one.methods, evaluation(spec), kept[one.grid])
        if not len(table):
            continue
        table = table.assign(grid=one.grid, factor=one.factor)
        table["alpha"] = [alpha_of(name, text, n) for name, text, n in _rows(table)]
        if one.factor == "coefficient":
            table["level"] = table["alpha"]
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _rows(table: pd.DataFrame) -> Any:
    return zip(table["method"], table["settings"], table["size"], strict=True)


def alpha_of(method: str, settings: str, size: int) -> float:
    """The common coefficient of every expert."""
    import json

    return 1.0 / size if method == "average" else float(json.loads(settings)["coefficient"])
