"""Which runs an entry of a grid (``when``, ``overrides``, ``exclude``) is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.bases.spec import BaseSpec
from experiments.grid.axes import HYPERPARAMETERS, check_value
from experiments.grid.errors import GridError
from theory.errors import nearest

KEYS = ("task", "architecture", *(f"base.{name}" for name in BaseSpec.model_fields), *HYPERPARAMETERS)
"""What can be matched."""


def unit_field(key: str) -> str:
    """The field of a run that a key reads: ``base`` for everything about the base."""
    return "base" if key == "architecture" or key.startswith("base.") else key


def matches(match: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a run with these values (``task``, ``base``, hyperparameters) is meant."""
    return all(_one(key, wanted, values) for key, wanted in match.items())


def _one(key: str, wanted: Any, values: Mapping[str, Any]) -> bool:
    options = wanted if isinstance(wanted, list | tuple) else (wanted,)
    if key == "task":
        return any(values["task"] == each or values["task"].startswith(f"{each}:") for each in options)
    if unit_field(key) == "base":
        found = getattr(values["base"], key.removeprefix("base."))
        return any(found == each or str(found) == each for each in options)
    return values.get(key) in options


def checked(
    match: Mapping[str, Any], tasks: tuple[str, ...], bases: tuple[BaseSpec, ...], *, empty: bool = False
) -> dict[str, Any]:
    """A match with its values in the types of a run.

    Args:
        match: of an entry.
        tasks, bases: of the grid.
        empty: whether a match of every run is allowed.

    Raises:
        GridError: an unknown key, or a value that no run of the grid has.
    """
    if not match and not empty:
        raise GridError("the match is empty; name what the entry is for, as {task: npz8:mnist}")
    found: dict[str, Any] = {}
    for key, wanted in match.items():
        if key not in KEYS:
            raise GridError(f"runs cannot be matched by this; {nearest(key, KEYS)}", (str(key),))
        options = wanted if isinstance(wanted, list | tuple) else [wanted]
        if not options:
            raise GridError("the list is empty; give at least one value", (key,))
        for number, value in enumerate(options):
            place = (key, number) if isinstance(wanted, list | tuple) else (key,)
            if key in HYPERPARAMETERS:
                try:
                    found.setdefault(key, []).append(check_value(key, value))
                except GridError as error:
                    raise error.at(place) from error
                continue
            if key == "task" and not any(_one("task", value, {"task": task}) for task in tasks):
                raise GridError(f"the grid has no task {value!r}; {nearest(value, tasks)}", place)
            if key != "task" and not any(_one(key, value, {"base": base}) for base in bases):
                known = dict.fromkeys(str(getattr(base, key.removeprefix("base."))) for base in bases)
                raise GridError(f"no base of the grid has {key} {value!r}; {nearest(value, known)}", place)
            found.setdefault(key, []).append(value)
    return found
