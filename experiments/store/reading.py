"""What is known of one run: its row, and what it left."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from experiments.finetune.loop import TrainingLog
from experiments.grid.result import RunResult
from experiments.store import table
from experiments.store.content import unpack_log, unpack_state
from experiments.store.database import Database
from experiments.store.errors import StoreError

BaseOf = Callable[[str], Mapping[str, Tensor]]


def run_row(database: Database, folder: Path, digest: str) -> sqlite3.Row:
    """The row of a run.

    Raises:
        StoreError: the store does not know it.
    """
    rows = database.read("SELECT * FROM runs WHERE digest = ?", (digest,))
    if not rows:
        raise StoreError(f"{folder}: knows no run {digest[:12]}; list them with `mergebound grid query`")
    return rows[0]


def result_row(database: Database, digest: str) -> sqlite3.Row:
    """The row of what a run left.

    Raises:
        StoreError: it is not done.
    """
    rows = database.read("SELECT results.* FROM results JOIN runs ON runs.id = run WHERE digest = ?", (digest,))
    if not rows:
        raise StoreError(f"run {digest[:12]}: is not done yet; resume the grid")
    return rows[0]


def state(database: Database, folder: Path, base_of: BaseOf, digest: str, step: int | None) -> dict[str, Tensor]:
    """The full state dict of a run at a checkpoint, the last one where no step is given.

    Raises:
        StoreError: the run is not done, has no such checkpoint, or its file is damaged (named).
    """
    row, result = run_row(database, folder, digest), result_row(database, digest)
    steps = _steps(database, row["id"])
    wanted = max(steps) if step is None else step
    if wanted not in steps:
        known = ", ".join(str(s) for s in steps)
        raise StoreError(f"run {digest[:12]}: has no checkpoint at step {wanted}; choose from {known}")
    return unpack_state(folder, result["blob"], digest, wanted, base_of(row["base_digest"]))


def log(database: Database, folder: Path, digest: str) -> TrainingLog:
    """The training log of a run.

    Raises:
        StoreError: the run is not done, or its file is damaged (named).
    """
    result = result_row(database, digest)
    return unpack_log(folder, result["blob"], digest, json.loads(result["log"]))


def result(database: Database, folder: Path, base_of: BaseOf, digest: str) -> RunResult:
    """Everything that a run left, as it was committed."""
    row, kept = run_row(database, folder, digest), result_row(database, digest)
    states = {step: state(database, folder, base_of, digest, step) for step in _steps(database, row["id"])}
    measured = tuple(table.metric_rows(database, row["id"]))
    return RunResult(kept["outcome"], states, log(database, folder, digest), measured, kept["seconds"])


def outcome(database: Database, folder: Path, digest: str) -> Literal["finished", "diverged"] | None:
    """How a run ended; ``None`` if it is not done."""
    number = run_row(database, folder, digest)["id"]
    rows = database.read("SELECT outcome FROM results WHERE run = ?", (number,))
    return rows[0]["outcome"] if rows else None


def _steps(database: Database, run: int) -> list[int]:
    rows = database.read("SELECT step FROM checkpoints WHERE run = ? ORDER BY step", (run,))
    return [int(row["step"]) for row in rows]
