"""Whether the parts of a grid's specification fit together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from experiments.bases.spec import BaseSpec
from experiments.grid.axes import HYPERPARAMETERS, size
from experiments.grid.bases import base_specs
from experiments.grid.errors import GridError, Place
from experiments.grid.matching import checked, unit_field
from theory.errors import nearest

if TYPE_CHECKING:
    from experiments.grid.spec import GridSpec

NEEDED = ("learning_rate", "steps", "batch_size")
ORDERABLE = ("base", "task", *HYPERPARAMETERS)


def all_bases(spec: GridSpec) -> tuple[BaseSpec, ...]:
    """The bases of a grid, in the order in which they are written."""
    return tuple(one for content in spec.base for one in base_specs(content))


def all_tasks(spec: GridSpec) -> tuple[str, ...]:
    """The tasks of a grid, families expanded."""
    from experiments.tasks.named import expand

    return expand(spec.tasks)


def check_consistent(spec: GridSpec) -> None:
    """Everything that concerns several entries at once.

    Raises:
        GridError: with the place.
    """
    _check_seeds(spec)
    owners = _owners(spec)
    for name in NEEDED:
        if name not in owners:
            raise GridError(f"{name} is missing; every run needs {', '.join(NEEDED)}")
    if spec.checkpoints == ():
        raise GridError("the list is empty; leave it out to keep the last step only", ("checkpoints",))
    _check_ties(spec, owners)
    _check_whens(spec, owners)
    tasks, bases = all_tasks(spec), all_bases(spec)
    _unique(bases)
    entries: list[tuple[Any, Place]] = [(each.match, ("when", k, "match")) for k, each in enumerate(spec.when)]
    entries += [(each.match, ("overrides", k, "match")) for k, each in enumerate(spec.overrides)]
    entries += [(match, ("exclude", k)) for k, match in enumerate(spec.exclude)]
    for match, place in entries:
        try:
            checked(match, tasks, bases, empty=place[0] == "overrides")
        except GridError as error:
            raise error.at(place) from error
    for number, name in enumerate(spec.order):
        if name not in ORDERABLE:
            raise GridError(f"{name!r} is nothing to order by; {nearest(name, ORDERABLE)}", ("order", number))
        if name in spec.order[:number]:
            raise GridError(f"{name!r} is listed twice; list every field once", ("order", number))


def _check_seeds(spec: GridSpec) -> None:
    if spec.seeds is None:
        return
    if spec.seed is not None:
        raise GridError("seed is given too; give one of the two", ("seeds",))
    if isinstance(spec.seeds, tuple):
        if not spec.seeds:
            raise GridError("the list is empty, so that the grid would have no runs; give at least one", ("seeds",))
        for number, seed in enumerate(spec.seeds):
            if seed in spec.seeds[:number]:
                raise GridError(f"{seed} is listed twice; list every seed once", ("seeds", number))


def _owners(spec: GridSpec) -> dict[str, Place]:
    """Where each hyperparameter is given."""
    owners: dict[str, Place] = {name: (name,) for name in spec.axes()}
    if spec.seeds is not None:
        owners["seed"] = ("seeds",)
    for kind in ("sobol", "random"):
        for number, joint in enumerate(getattr(spec, kind)):
            for name in joint.axes:
                place = (kind, number, "axes", name)
                if name in owners:
                    raise GridError(f"{name} is given elsewhere too; give it once", place)
                owners[name] = place
    return owners


def _check_ties(spec: GridSpec, owners: dict[str, Place]) -> None:
    axes = spec.axes()
    seen: set[str] = set()
    for k, group in enumerate(spec.tie):
        for j, name in enumerate(group):
            place = ("tie", k, j)
            if name not in HYPERPARAMETERS:
                raise GridError(f"there is no hyperparameter {name!r}; {nearest(name, HYPERPARAMETERS)}", place)
            if name in seen:
                raise GridError(f"{name} is tied twice; name it once", place)
            if name not in axes:
                where = "is drawn in a joint design" if name in owners else "has no values"
                raise GridError(f"{name} {where}, so that it cannot be tied; give it a list of values", place)
            seen.add(name)
        if len(group) < 2:
            raise GridError("a tie needs at least two hyperparameters", ("tie", k))
        check_lengths(group, [size(axes[name]) for name in group], ("tie", k))


def check_lengths(group: Iterable[str], sizes: list[int], place: Place) -> None:
    """Tied axes have the same number of values.

    Raises:
        GridError: they have not.
    """
    if len(set(sizes)) > 1:
        said = ", ".join(f"{name} has {count}" for name, count in zip(group, sizes, strict=True))
        raise GridError(f"tied hyperparameters need as many values each, but {said}", place)


def condition_fields(spec: GridSpec) -> set[str]:
    """Fields that the conditions of ``when`` read, with those that expressions on their axes read."""
    axes = {**{name: axis for joint in (*spec.sobol, *spec.random) for name, axis in joint.axes.items()}, **spec.axes()}
    found: set[str] = set()
    left = [unit_field(key) for each in spec.when for key in each.match]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += [read for item in getattr(axes.get(name), "items", ()) for read in getattr(item, "names", ())]
    return found


def _check_whens(spec: GridSpec, owners: dict[str, Place]) -> None:
    matched = {unit_field(key) for each in spec.when for key in each.match}
    conditions = condition_fields(spec)
    for k, each in enumerate(spec.when):
        for name in each.set:
            place = ("when", k, "set", name)
            if name in matched:
                raise GridError(f"{name} is matched by a `when`, so none can set it; use overrides", place)
            if name in conditions:
                said = f"{name} is read by an expression whose number a `when` matches, so none can set it"
                raise GridError(f"{said}; use overrides, or match {name}", place)
            if owners.get(name, ("",))[0] in ("sobol", "random"):
                raise GridError(f"{name} is drawn in a joint design; set it with overrides", place)
            group = next((group for group in spec.tie if name in group), ())
            if conditions & set(group):
                raise GridError(f"{name} is tied to a hyperparameter that a `when` matches; untie it", place)
        if not each.set:
            raise GridError("nothing is set; give hyperparameters with their values", ("when", k, "set"))
    for k, override in enumerate(spec.overrides):
        if not override.set:
            raise GridError("nothing is set; give hyperparameters with their values", ("overrides", k, "set"))


def _unique(bases: tuple[BaseSpec, ...]) -> None:
    for number, base in enumerate(bases):
        if base in bases[:number]:
            raise GridError(f"the base {base.architecture} ({base.kind}) is listed twice; list it once", ("base",))
