"""What the files of one training run say, and how a reader collects it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from theory import Expert, RecipeError, Schedule
from theory.unknown import Range

REQUIRED = {
    "n": "the number of training samples",
    "batch_size": "samples per optimisation step over all devices",
    "learning_rate": "one number, or a schedule with one value per step",
    "steps": "the number of optimisation steps",
}


@dataclass(frozen=True)
class RecipeReading:
    """What the files of one run say: ``known`` fields of :class:`theory.Expert`; ``unknown`` fields with what to give;
    ``ranges`` of fields that the files only bracket; ``ignored`` keys with the reason; ``notes`` (assumptions of the
    theory that the run touches, defaults that were assumed); ``per_sample_loss`` (A3): False where it is broken;
    ``interpolated``: known fields that the log has only for some steps; ``assumed``: known fields that rest on a guess
    (the number of devices, accumulated batches, a default of the tool)."""

    name: str
    tool: str
    files: tuple[Path, ...]
    known: Mapping[str, Any]
    unknown: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]]
    ignored: Mapping[str, str]
    notes: tuple[str, ...]
    per_sample_loss: bool | None = None
    interpolated: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Known fields, and the middle (a whole number) of those that are only bracketed."""
        middles = {name: round((low + high) / 2) for name, (low, high) in self.ranges.items()}
        return {**middles, **self.known}

    @property
    def guessed(self) -> tuple[str, ...]:
        """Fields at the middle of a bracket, interpolated from a log, or resting on a guess: whatever uses them is
        *estimated*, and the bound's assumptions name them."""
        brackets = (name for name in self.ranges if name not in self.known)
        assumed = (name for name in self.assumed if name in self.known)
        return tuple(dict.fromkeys((*brackets, *self.interpolated, *assumed)))

    def expert(self, **given: Any) -> Expert:
        """The expert, with ``given`` fields added or put in place of those read; the files' gaps are named."""
        values = {**self.fields(), **given}
        values["measured"] = frozenset(values.get("measured", ())) | (set(self.guessed) - given.keys())
        scheduled = any(isinstance(values.get(name), Schedule) for name in ("learning_rate", "batch_size"))
        missing = [name for name in REQUIRED if name not in values and not (name == "steps" and scheduled)]
        if missing:
            what = self.unknown.get(missing[0], REQUIRED[missing[0]])
            raise RecipeError(f"{self.files[0]}: {missing[0]} is not in the files; give {what}")
        return Expert(self.name, **values)

    def stated(self) -> dict[str, Range]:
        """The brackets as ranges for :func:`theory.unknown.bound_interval`."""
        return {f"{self.name}.{name}": Range(low, high) for name, (low, high) in self.ranges.items()}

    def explain(self) -> str:
        """Readable list of what is known, bracketed, unknown, ignored and assumed."""
        lines = [f"{self.name}: {self.tool} ({', '.join(path.name for path in self.files)})", ""]
        for name, value in self.known.items():
            shown = f"schedule of {value.steps} steps" if isinstance(value, Schedule) else value
            lines.append(f"  {name} = {shown}")
        lines += [f"  {name} between {low:g} and {high:g}" for name, (low, high) in self.ranges.items()]
        lines += [f"unknown: {name}: give {what}" for name, what in self.unknown.items()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"ignored: {name}: {why}" for name, why in self.ignored.items()]
        return "\n".join(lines)


@dataclass
class Notebook:
    """Collects what a reader finds."""

    known: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    per_sample_loss: bool | None = None
    interpolated: tuple[str, ...] = ()
    assumed: list[str] = field(default_factory=list)

    def close(self, name: str, tool: str, files: tuple[Path, ...]) -> RecipeReading:
        return RecipeReading(
            *(name, tool, files, self.known, self.unknown, self.ranges, self.ignored, tuple(self.notes)),
            self.per_sample_loss,
            self.interpolated,
            tuple(dict.fromkeys(self.assumed)),
        )


NOT_COVERED = (
    "is not covered by the stability and drift theorems: give the measured drift (norm of the task vector), and "
    "epsilon if it was measured; the bound is then estimated"
)


def count_devices(book: Notebook, devices: int | None) -> int:
    if devices is None:
        book.notes.append("one device is assumed; give devices=... for a distributed run (the batch grows with it)")
        book.assumed.append("batch_size")
    return devices or 1


def plain_schedule(values: Schedule) -> float | Schedule:
    """One number if the schedule is constant."""
    first = float(values.values[0])
    return first if np.all(values.values == first) else values
