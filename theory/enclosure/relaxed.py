"""Experts without checks, whose fields may be relaxed to real numbers, as boxes of recipes need them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from theory.recipe import Expert


@dataclass(frozen=True, eq=False)
class Unchecked(Expert):
    """An expert whose fields were checked elsewhere and may be relaxed (fractional steps, batches, samples)."""

    def __post_init__(self) -> None:
        """Skip the checks of :class:`Expert`."""


def unchecked(expert: Expert, **changes: Any) -> Unchecked:
    """The same expert without checks, with some fields replaced."""
    return Unchecked(**({item.name: getattr(expert, item.name) for item in fields(Expert)} | changes))
