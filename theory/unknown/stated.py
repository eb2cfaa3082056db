"""What is said about unknown fields: a range or a set of values, checked and spread over the experts it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from theory.addressing import field_of, groups_of
from theory.errors import RecipeError
from theory.recipe import LOGS, Expert, Merge, _numbers
from theory.symbolic import FloatArray

WHOLE = ("n", "batch_size", "steps")
NOT_NUMBERS = ("name", "measured", *LOGS)


@dataclass(frozen=True)
class Range:
    """An unknown between ``lower`` and ``upper``; ``log``: sampled uniformly in its logarithm (orders of magnitude)."""

    lower: float
    upper: float
    log: bool = False


@dataclass(frozen=True)
class OneOf:
    """An unknown that is one of a few values (numbers, or words such as the sampling)."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Unknown:
    """One unknown: its name as reported, the field, the experts that share it, and what is stated of it."""

    name: str
    field: str
    experts: tuple[int, ...]
    stated: Range | OneOf

    @property
    def whole(self) -> bool:
        """Whether only whole numbers make sense."""
        return self.field in WHOLE

    def at(self, shares: FloatArray) -> FloatArray:
        """Values of a range at shares in [0, 1]."""
        assert isinstance(self.stated, Range)
        low, high = self.stated.lower, self.stated.upper
        value = low * (high / low) ** shares if self.stated.log else low + (high - low) * shares
        return np.clip(np.round(value) if self.whole else value, low, high)


def read_unknowns(merge: Merge, unknown: Mapping[str, Range | OneOf]) -> tuple[Unknown, ...]:
    """The stated mapping as unknowns; raises :class:`RecipeError` for what names nothing or is stated twice."""
    names = [expert.name for expert in merge.experts]
    known = {item.name for item in fields(Expert)} - set(NOT_NUMBERS)
    made: list[Unknown] = []
    for key, stated in unknown.items():
        field = field_of(key)
        if field not in known | {"coefficients"}:
            raise RecipeError(f"unknown: {key!r} is not a field of an expert that can be unknown; check its spelling")
        checked = _checked(key, field, stated)
        made += [Unknown(name, field, experts, checked) for name, experts in groups_of(key, names, "unknown")]
    if not made:
        raise RecipeError("unknown: nothing is unknown; name at least one field with a Range or OneOf")
    taken = [(item.field, index) for item in made for index in item.experts]
    twice = sorted({pair for pair in taken if taken.count(pair) > 1})
    if twice:
        raise RecipeError(f"unknown: {twice[0][0]} of expert {names[twice[0][1]]!r} is stated twice; name it once")
    return tuple(made)


def _checked(key: str, field: str, stated: Range | OneOf) -> Range | OneOf:
    if isinstance(stated, OneOf):
        if not isinstance(stated.values, (tuple, list)) or not stated.values:
            raise RecipeError(f"unknown: {key!r} has no values; give a tuple of at least one")
        if any(not isinstance(value, str) and np.ndim(value) != 0 for value in stated.values):
            raise RecipeError(f"unknown: {key!r} has a value that is an array; give numbers or words")
        if field == "coefficients":
            raise RecipeError(f"unknown: {key!r} must be a Range; give its lower and upper end")
        return stated
    if not isinstance(stated, Range):
        raise RecipeError(f"unknown: {key!r} is {stated!r}; give a Range or OneOf")
    ends = [_numbers("unknown", f"an end of the range of {key!r}", end) for end in (stated.lower, stated.upper)]
    if any(end.ndim for end in ends) or not isinstance(stated.log, (bool, np.bool_)):
        raise RecipeError(f"unknown: {key!r} is {stated!r}; give one lower and one upper number, and log True or False")
    low, high = float(ends[0]), float(ends[1])
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise RecipeError(f"unknown: the range of {key!r} is [{low:g}, {high:g}]; give finite lower <= upper")
    if stated.log and low <= 0:
        raise RecipeError(f"unknown: the range of {key!r} is logarithmic but starts at {low:g}; give lower > 0")
    if field not in ("kappa", "coefficients") and low < 0:
        raise RecipeError(f"unknown: the range of {key!r} starts at {low:g}; it cannot be negative")
    if field in (*WHOLE, "learning_rate", "mu", "pl_constant") and low <= 0:
        raise RecipeError(f"unknown: the range of {key!r} starts at {low:g}; give lower > 0")
    if field in WHOLE:
        low, high = float(np.ceil(low)), float(np.floor(high))
        if low > high:
            raise RecipeError(f"unknown: there is no whole number in the range of {key!r}; widen it")
    return Range(low, high, stated.log)
