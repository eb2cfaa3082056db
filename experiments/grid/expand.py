"""From a grid's specification to its runs: counted first, then made, always in the same order.

Axes are multiplied (each value with each); tied axes and joint designs count as one axis whose points have several
coordinates.  Where a ``when`` matches, its axes take the place of the grid's.  Then overrides are set, expressions get
their numbers, checkpoints are laid, excluded runs are left out, and runs that became the same are merged.

Overrides are for the runs whose values match before any of them is set, expressions by the numbers that they have then;
they are set in their order, and expressions get their numbers again from what is set.  Exclusions match the values at
the end.

Order: by the fields of ``order``, then ``base``, ``task``, and hyperparameters in the order of
:class:`~experiments.grid.run_spec.RunSpec`; earlier ones vary slower; values in the order in which they are listed.
The order of keys in the file does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from experiments.grid.axes import resolved
from experiments.grid.checks import ORDERABLE, all_bases, all_tasks
from experiments.grid.coinciding import coinciding
from experiments.grid.errors import GridError, Place
from experiments.grid.matching import checked, matches, numbers_known
from experiments.grid.remarks import remarks
from experiments.grid.run_spec import RunSpec
from experiments.grid.spec import Every, GridSpec
from experiments.grid.units import (
    Record,
    check_number,
    combinations,
    inner_sizes,
    outer_fields,
    replaced,
    sizes_of,
    units_of,
)

MOST_CHECKPOINTS = 10_000
"""Of a run."""


@dataclass(frozen=True)
class Expansion:
    """What a grid is made of.

    Attributes:
        runs: in order, without duplicates.
        notes: what was left out or merged, and what should be known of the runs, in words.
    """

    runs: tuple[RunSpec, ...]
    notes: tuple[str, ...] = ()


def expand(spec: GridSpec) -> tuple[RunSpec, ...]:
    """The runs of a grid, in order, without duplicates.

    Raises:
        GridError: too many, or a combination that cannot be run.
    """
    return expansion(spec).runs


def count(spec: GridSpec) -> int:
    """How many combinations a grid has, before exclusions and merging, without making them.

    Raises:
        GridError: more than ``most_runs``.
    """
    sizes = sizes_of(spec)
    outer = outer_fields(spec)
    least = math.prod(number for fields, number in sizes.items() if set(fields) & outer)
    if not spec.when:
        check_number(spec, least * math.prod(n for fields, n in sizes.items() if not set(fields) & outer), sizes)
    else:
        check_number(spec, least, sizes, "at least ")
    total = 0
    kept: dict[tuple[int, ...], int] = {}
    whens = _matches(spec, "when")
    bases, tasks = all_bases(spec), all_tasks(spec)
    for values, _ in combinations(units_of(spec, spec.axes(), bases, tasks, only=outer)):
        active = tuple(k for k, each in enumerate(whens) if matches(each, numbers_known({**_defaults(), **values})))
        if active not in kept:
            axes = replaced(spec, active)
            rough = inner_sizes(spec, axes, outer)
            check_number(spec, total + math.prod(rough.values()), {**sizes, **rough}, "at least ")
            kept[active] = math.prod(len(u.points) for u in units_of(spec, axes, bases, tasks, without=outer))
        total += kept[active]
        check_number(spec, total, sizes, "at least ")
    return total


def expansion(spec: GridSpec) -> Expansion:
    """The runs of a grid, and what was left out or merged.

    Raises:
        GridError: too many runs, none, an entry that is for no run, or a combination that cannot be run.
    """
    total = count(spec)
    overrides, excludes, whens = (_matches(spec, kind) for kind in ("overrides", "exclude", "when"))
    used: dict[str, set[int]] = {"when": set(), "overrides": set(), "exclude": set()}
    rank = {name: k for k, name in enumerate(dict.fromkeys((*spec.order, *ORDERABLE)))}
    outer = outer_fields(spec)
    bases, tasks = all_bases(spec), all_tasks(spec)
    sorted_records: list[tuple[tuple[int, ...], Record, tuple[int, ...]]] = []
    for first, first_index in combinations(units_of(spec, spec.axes(), bases, tasks, only=outer)):
        active = tuple(k for k, each in enumerate(whens) if matches(each, numbers_known({**_defaults(), **first})))
        used["when"] |= set(active)
        for rest, rest_index in combinations(units_of(spec, replaced(spec, active), bases, tasks, without=outer)):
            index = {**first_index, **rest_index}
            key = tuple(index.get(name, 0) for name in rank)
            sorted_records.append((key, {**first, **rest}, active))
    sorted_records.sort(key=lambda item: item[0])
    runs: dict[tuple[Any, ...], RunSpec] = {}
    excluded = 0
    for _, record, active in sorted_records:
        stated = numbers_known({**_defaults(), **record}) if overrides else {}
        found = [k for k, match in enumerate(overrides) if matches(match, stated)]
        used["overrides"] |= set(found)
        for k in found:
            record |= spec.overrides[k].set
        run = _run(spec, record, active, found)
        out = [k for k, match in enumerate(excludes) if matches(match, run.__dict__)]
        used["exclude"] |= set(out)
        if out:
            excluded += 1
            continue
        runs.setdefault(_key(run), run)
    for kind, seen in used.items():
        for k in range(len(getattr(spec, kind))):
            if k not in seen:
                raise GridError("no run of the grid is matched; correct or remove the entry", (kind, k))
    if not runs:
        raise GridError("every run is excluded; relax an exclusion", ("exclude",))
    merged = total - excluded - len(runs)
    notes = [f"{excluded:,} of {total:,} combinations are excluded"] * bool(excluded)
    notes += [f"{merged:,} of {total:,} combinations became the same as others and are merged"] * bool(merged)
    notes += [*coinciding(spec), *remarks(runs.values())]
    return Expansion(tuple(runs.values()), tuple(notes))


# --- runs ------------------------------------------------------------------------------------------------------------


def _matches(spec: GridSpec, kind: str) -> list[dict[str, Any]]:
    bases, tasks = all_bases(spec), all_tasks(spec)
    entries = getattr(spec, kind)
    return [checked(each if kind == "exclude" else each.match, tasks, bases, empty=True) for each in entries]


def _as_record(run: RunSpec) -> Record:
    return {name: getattr(run, name) for name in type(run).model_fields}


def _key(run: RunSpec) -> tuple[Any, ...]:
    """What tells runs of one expansion apart (its bases are the same objects)."""
    return tuple(id(value) if name == "base" else value for name, value in run.__dict__.items())


def _run(spec: GridSpec, record: Record, active: Sequence[int], found: Sequence[int]) -> RunSpec:
    stated = {k: v for k, v in record.items() if k not in ("task", "base", "checkpoints")}
    try:
        values = resolved({**_defaults(), **stated})
        steps = int(values["steps"])
        marks = laid(record.get("checkpoints", spec.checkpoints), steps)
        return RunSpec(task=record["task"], base=record["base"], checkpoints=marks, **values)
    except GridError as error:
        field = str(error.place[0]) if error.place else ""
        raise GridError(error.message, _origin(spec, field, active, found)) from error
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        field = str(first["loc"][0]) if first["loc"] else message.partition(":")[0]
        text = message.partition(": ")[2] if not first["loc"] else f"{first['input']!r}: {message}"
        raise GridError(
            f"{text or message} (task {record['task']}, {_shown(record)})", _origin(spec, field, active, found)
        ) from error


@cache
def _defaults() -> Mapping[str, Any]:
    skip = ("task", "base", "checkpoints", "learning_rate", "steps", "batch_size")
    return MappingProxyType({name: info.default for name, info in RunSpec.model_fields.items() if name not in skip})


def laid(checkpoints: Any, steps: int) -> tuple[int, ...]:
    """The checkpoints of a run of so many steps: those stated that it reaches, and its last step.

    >>> laid((100, 200, 300), 250)
    (100, 200, 250)
    """
    if checkpoints is None:
        return (steps,)
    if isinstance(checkpoints, Every) and -(-steps // checkpoints.every) > MOST_CHECKPOINTS:
        number = -(-steps // checkpoints.every)
        raise GridError(
            f"{number:,} checkpoints of a run of {steps:,} steps are more than {MOST_CHECKPOINTS:,}; give a larger "
            "number for every",
            ("checkpoints",),
        )
    stated = range(checkpoints.every, steps, checkpoints.every) if isinstance(checkpoints, Every) else checkpoints
    return (*(step for step in stated if step < steps), steps)


def _shown(record: Record) -> str:
    names = ("learning_rate", "batch_size", "steps", "seed")
    return ", ".join(f"{name} {getattr(record[name], 'text', record[name])}" for name in names if name in record)


def origin(spec: GridSpec, run: RunSpec, field: str) -> Place:
    """Where the value of a hyperparameter of a run was stated; empty for a default."""
    record = _as_record(run)
    found = [k for k, match in enumerate(_matches(spec, "overrides")) if matches(match, record)]
    active = [k for k, match in enumerate(_matches(spec, "when")) if matches(match, record)]
    place = _origin(spec, field, active, found)
    axis = spec.axes().get(field)
    if place == (field,) and axis is not None and axis.listed and record[field] in axis.items:
        return (field, axis.items.index(record[field]))
    return place


def _origin(spec: GridSpec, field: str, active: Sequence[int], found: Sequence[int]) -> Place:
    """Where the value of a field was stated."""
    for k in reversed(found):
        if field in spec.overrides[k].set:
            return ("overrides", k, "set", field)
    for k in reversed(active):
        if field in spec.when[k].set:
            return ("when", k, "set", field)
    for kind in ("sobol", "random"):
        for number, joint in enumerate(getattr(spec, kind)):
            if field in joint.axes:
                return (kind, number, "axes", field)
    if field == "seed" and spec.seeds is not None:
        return ("seeds",)
    return (field,) if field and getattr(spec, field, None) is not None else ()
