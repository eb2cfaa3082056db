"""Experts of a finished grid and groups of them: which checkpoints are merged, and what the group was drawn for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.grid.run_spec import RunSpec
from theory.errors import MergeboundError

BASE_COLUMNS = ("architecture", "base_kind", "base_quality", "base_seed", "base_digest")
"""What tells bases apart; task vectors of two bases are never merged."""
_NOT_VARIED = ("task", "base", "seed", "checkpoints")
HYPERPARAMETERS = tuple(name for name in RunSpec.model_fields if name not in _NOT_VARIED)
"""Columns of a grid's table that a factor may be, besides ``step`` (the checkpoint) and :data:`BASE_COLUMNS`."""
FACTORS = (*HYPERPARAMETERS, "step", *BASE_COLUMNS)
NEEDED = ("digest", "step", "outcome", "task", "base_digest", "split_digest", "seed", "split_seed")
"""Columns that the table of a finished grid must have."""


@dataclass(frozen=True, order=True)
class Member:
    """One checkpoint of a run.

    Attributes:
        task: name.
        run: digest of the run.
        step: of the checkpoint.
        split: digest of the task's split.
        split_seed: of the split.
    """

    task: str
    run: str
    step: int
    split: str = ""
    split_seed: int = 0

    @property
    def name(self) -> str:
        """``run@step``: the expert's name in merges, which methods with random masks draw by."""
        return f"{self.run}@{self.step}"


@dataclass(frozen=True)
class Group:
    """Experts that are merged, one per task, and what they were drawn for.

    Attributes:
        members: in the order of their tasks.
        base: digest of the base.
        design: ``factor``, ``random`` or ``all``.
        factor: what varies between the levels, empty where nothing does.
        level: of the factor; an interval is text.
        seed: of the draw; groups of one seed, size and stratum at two levels are a pair.
        stratum: what was held fixed, JSON.
        matched: whether groups of one seed have the same tasks at every level.
        matched_seeds: whether they have the same seeds of fine-tuning too, task by task.
    """

    members: tuple[Member, ...]
    base: str
    design: str = "random"
    factor: str = ""
    level: Any = None
    seed: int = 0
    stratum: str = "{}"
    matched: bool = False
    matched_seeds: bool = False

    @property
    def runs(self) -> tuple[str, ...]:
        """Digests of the runs."""
        return tuple(member.run for member in self.members)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(member.task for member in self.members)

    @property
    def step(self) -> int | None:
        """The checkpoint, where all experts have the same."""
        steps = {member.step for member in self.members}
        return steps.pop() if len(steps) == 1 else None

    @property
    def digest(self) -> str:
        """SHA-256 of the base and the experts, whatever they were drawn for."""
        content = [self.base, [[m.task, m.split, m.run, m.step] for m in self.members]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def key(self) -> str:
        """SHA-256 of the group with what it was drawn for."""
        drawn = [self.design, self.factor, plain(self.level), self.seed, self.stratum, self.matched]
        return hashlib.sha256(json.dumps([self.digest, drawn]).encode()).hexdigest()

    def to_row(self) -> dict[str, Any]:
        """One row of a data frame."""
        return {
            "design": self.design,
            "factor": self.factor,
            "level": plain(self.level),
            "seed": self.seed,
            "stratum": self.stratum,
            "matched": self.matched,
            "matched_seeds": self.matched_seeds,
            "size": len(self.members),
            "experts": ";".join(member.name for member in self.members),
            "tasks": ";".join(self.tasks),
            "step": self.step,
            "base_digest": self.base,
            "group": self.digest,
        }


def plain(value: Any) -> Any:
    """A value as JSON has it: numpy's numbers as Python's."""
    return value.item() if hasattr(value, "item") else value


def grid_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of a grid with everything that designs need, one row for each usable checkpoint.

    Rows are those of finished runs, in the order of task, digest and step; ``base_quality`` and ``base_seed`` are read
    from the JSON of ``base``; ``final`` says which checkpoint is its run's last.  ``attrs["unusable"]`` holds the rows
    that were left out (diverged), ``attrs["checkpoints"]`` how many different steps there are.

    Raises:
        MergeboundError: a column is missing, or no run is finished.
    """
    lacking = [name for name in NEEDED if name not in frame.columns]
    if lacking:
        raise MergeboundError(
            f"the table of the grid has no column {lacking[0]!r}; give that of a store (Store.frame()), one row per "
            "run and checkpoint"
        )
    table = frame.copy()
    if "base" in table.columns:
        known = {text: _base_of(text) for text in table["base"].dropna().unique()}
        for name in ("quality", "seed"):
            if f"base_{name}" not in table.columns:
                table[f"base_{name}"] = [known.get(text, {}).get(name) for text in table["base"]]
    usable = (table["outcome"] == "finished") & table["step"].notna()
    left_out = table[~usable]
    table = table[usable].sort_values(["task", "digest", "step"], kind="stable").reset_index(drop=True)
    if not len(table):
        raise MergeboundError("the grid has no finished run; run it first (mergebound grid run)")
    table["step"] = table["step"].astype(int)
    table["final"] = table["step"] == table.groupby("digest")["step"].transform("max")
    table.attrs["unusable"], table.attrs["checkpoints"] = left_out, table["step"].nunique()
    return table


def _base_of(text: Any) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if isinstance(text, str) else dict(text)
    except (ValueError, TypeError):
        return {}
    quality = found.get("quality")
    return {**found, "quality": quality if isinstance(quality, str) else json.dumps(quality, sort_keys=True)}


def members(table: pd.DataFrame) -> list[Member]:
    """The checkpoints of a table's rows, in their order."""
    columns = (table[name] for name in ("task", "digest", "step", "split_digest", "split_seed"))
    return [Member(str(t), str(d), int(s), str(p), int(q)) for t, d, s, p, q in zip(*columns, strict=True)]


def group_of(chosen: Iterable[Member], base: str, **drawn: Any) -> Group:
    """A group of some experts, in the order of their tasks."""
    return Group(tuple(sorted(chosen)), base, **drawn)
