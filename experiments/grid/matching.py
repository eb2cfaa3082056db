"""Which runs an entry of a grid (``when``, ``overrides``, ``exclude``) is for.

Numbers are compared, whether they were written or come from an expression: those of ``when`` and ``overrides`` before
any override, those of ``exclude`` at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.bases.spec import BaseSpec
from experiments.grid.axes import HYPERPARAMETERS, check_value, resolved
from experiments.grid.errors import GridError
from experiments.grid.expressions import Expression
from theory.errors import nearest

KEYS = ("task", "architecture", *(f"base.{name}" for name in BaseSpec.model_fields), *HYPERPARAMETERS)
"""What can be matched."""
CLOSE = 1e-12
"""Relative difference below which two numbers are the same: 0.1 * 3 is 0.3."""


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
    found = values.get(key)
    if isinstance(found, float):
        numbers = (each for each in options if isinstance(each, int | float) and not isinstance(each, bool))
        return any(math.isclose(found, each, rel_tol=CLOSE) for each in numbers)
    return found in options


def numbers_known(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Values of a run with its expressions replaced by their numbers; those that have none stay (and match nothing)."""
    formulas = [name for name, value in values.items() if isinstance(value, Expression)]
    if not formulas:
        return values
    found = dict(values)
    for name in formulas:
        try:
            found[name] = resolved({each: values[each] for each in read_by(name, values) if each in values})[name]
        except GridError:
            continue  # refused with its line when the run is made, unless an override replaces it
    return found


def read_by(name: str, values: Mapping[str, Any]) -> set[str]:
    """A field with all that its expression reads, directly or through others."""
    found: set[str] = set()
    left = [name]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += getattr(values.get(one), "names", ())
    return found


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
                    wanted_value = check_value(key, value)
                except GridError as error:
                    raise error.at(place) from error
                if isinstance(wanted_value, Expression):
                    said = f"{value!r} is an expression, and matches compare numbers"
                    raise GridError(f"{said}; write the numbers that it gives, or match what it reads", place)
                found.setdefault(key, []).append(wanted_value)
                continue
            if key == "task" and not any(_one("task", value, {"task": task}) for task in tasks):
                raise GridError(f"the grid has no task {value!r}; {nearest(value, tasks)}", place)
            if key != "task" and not any(_one(key, value, {"base": base}) for base in bases):
                known = dict.fromkeys(str(getattr(base, key.removeprefix("base."))) for base in bases)
                raise GridError(f"no base of the grid has {key} {value!r}; {nearest(value, known)}", place)
            found.setdefault(key, []).append(value)
    return found
