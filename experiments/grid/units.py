"""What varies in a grid: units of fields that vary together, their combinations, and how many there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.bases.spec import BaseSpec
from experiments.grid.axes import Axis, points, size
from experiments.grid.checks import all_bases, all_tasks, check_lengths, condition_fields
from experiments.grid.designs import design
from experiments.grid.errors import GridError, Place
from experiments.grid.spec import GridSpec

Record = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Fields that vary together.

    Attributes:
        fields: their names.
        points: one value per field each.
    """

    fields: tuple[str, ...]
    points: tuple[tuple[Any, ...], ...]


def outer_fields(spec: GridSpec) -> set[str]:
    """Fields that conditions read, with all that vary with them."""
    fields = condition_fields(spec)
    together = [set(group) for group in spec.tie] + [set(j.axes) for j in (*spec.sobol, *spec.random)]
    for group in together:
        if fields & group:
            fields |= group
    return fields


def replaced(spec: GridSpec, active: Sequence[int]) -> dict[str, Axis]:
    """The grid's axes with those of the conditions that hold."""
    axes = spec.axes()
    for k in active:
        axes |= spec.when[k].set
    return axes


def units_of(
    spec: GridSpec,
    axes: Mapping[str, Axis],
    bases: tuple[BaseSpec, ...],
    tasks: tuple[str, ...],
    *,
    only: set[str] | None = None,
    without: set[str] | None = None,
) -> list[Unit]:
    """The units whose fields are (or are not) among some."""

    chosen = (without if only is None else only) or set()

    def wanted(fields: Sequence[str]) -> bool:
        return bool(set(fields) & chosen) == (only is not None)

    found = []
    if wanted(("base",)):
        found.append(Unit(("base",), tuple((base,) for base in bases)))
    if wanted(("task",)):
        found.append(Unit(("task",), tuple((task,) for task in tasks)))
    for k, group in enumerate(spec.tie):
        if wanted(group):
            columns = [points(name, axes[name], spec.draw_seed) for name in group]
            check_lengths(group, [len(column) for column in columns], ("tie", k))
            found.append(Unit(tuple(group), tuple(zip(*columns, strict=True))))
    tied = {name for group in spec.tie for name in group}
    for name, axis in axes.items():
        if name not in tied and wanted((name,)):
            found.append(Unit((name,), tuple((value,) for value in points(name, axis, spec.draw_seed))))
    for kind in ("sobol", "random"):
        for number, joint in enumerate(getattr(spec, kind)):
            if wanted(tuple(joint.axes)):
                names, rows = design(kind, number, joint, spec.draw_seed)
                found.append(Unit(names, rows))
    return found


def combinations(units: Sequence[Unit]) -> Iterator[tuple[Record, dict[str, int]]]:
    """Every combination: values by field, and the position of each field's unit."""
    for chosen in itertools.product(*(range(len(unit.points)) for unit in units)):
        values: Record = {}
        index: dict[str, int] = {}
        for unit, k in zip(units, chosen, strict=True):
            values.update(zip(unit.fields, unit.points[k], strict=True))
            index.update(dict.fromkeys(unit.fields, k))
        yield values, index


def sizes_of(spec: GridSpec) -> dict[tuple[str, ...], int]:
    """Numbers of points by the fields that vary together, for the grid without conditions; nothing is made."""
    return {
        ("base",): len(all_bases(spec)),
        ("task",): len(all_tasks(spec)),
        **inner_sizes(spec, spec.axes(), set()),
    }


def inner_sizes(spec: GridSpec, axes: Mapping[str, Axis], outer: set[str]) -> dict[tuple[str, ...], int]:
    """Numbers of points by the fields that vary together, without those that conditions read."""
    found: dict[tuple[str, ...], int] = {("base",): len(all_bases(spec)), ("task",): len(all_tasks(spec))}
    tied = {name for group in spec.tie for name in group}
    found |= {tuple(group): min(size(axes[name]) for name in group) for group in spec.tie}
    found |= {(name,): size(axis) for name, axis in axes.items() if name not in tied}
    found |= {tuple(joint.axes): joint.count for joint in (*spec.sobol, *spec.random)}
    return {fields: number for fields, number in found.items() if not set(fields) & outer}


def check_number(spec: GridSpec, number: int, sizes: Mapping[tuple[str, ...], int], least: str = "") -> None:
    """Refuse a grid of too many runs.

    Raises:
        GridError: more than ``most_runs``; says which axes make them.
    """
    if number <= spec.most_runs:
        return
    varied = {fields: n for fields, n in sizes.items() if n > 1}
    said = " x ".join(f"{'+'.join(fields)} {n:,}" for fields, n in varied.items())
    largest = max(varied, key=lambda fields: varied[fields], default=("",))[0]
    place: Place = (largest,) if largest in spec.axes() and largest in type(spec).model_fields else ()
    joint = [(kind, k) for kind in ("sobol", "random") for k, j in enumerate(getattr(spec, kind)) if largest in j.axes]
    if joint:
        place = (*joint[0], "count")
    if largest == "seed" and spec.seeds is not None:
        place = ("seeds",)
    raise GridError(
        f"the grid has {least}{number:,} runs ({said}), more than most_runs = {spec.most_runs:,}; "
        + ("lower count" if joint else "shorten the axes, or draw from them with sobol"),
        place,
    )
