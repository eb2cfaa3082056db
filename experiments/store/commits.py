"""Committing results: weights to the disk first, then one transaction; a run is absent or complete."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.grid.result import RunResult
from experiments.store.blobs import has_blob, put_blob
from experiments.store.content import Packed, TaskVectors, bundle, pack
from experiments.store.database import Database
from experiments.store.errors import StoreConflict, StoreError
from experiments.store.leases import now

_NAN = {"value": 1, "low": 2, "high": 4}
"""SQLite has no NaN: it is stored as NULL with its bit in ``nan``; what was not measured is NULL without."""


_TOGETHER = 8 << 20
"""Bytes of a file that holds several runs."""


@dataclass(frozen=True)
class _Ready:
    run: int
    digest: str
    result: RunResult
    packed: Packed


def commit(
    database: Database,
    folder: Path,
    results: Mapping[str, RunResult],
    owner: str,
    *,
    base_of: Callable[[str], Mapping[str, Tensor]],
    vectors: TaskVectors,
    durable: bool,
) -> int:
    """Store results, all in one transaction; returns how many were new.

    A run that is there with the same outcome, bits and log is passed over.  One that is there with others is recorded
    as a conflict, and refused after the rest was stored.

    Args:
        database: of the store.
        folder: of the store.
        results: by digest of the run.
        owner: who did them.
        base_of: tensors of a base by its digest (empty if the store does not have it).
        vectors: how task vectors are stored.
        durable: see :func:`experiments.store.blobs.put_blob`.

    Raises:
        StoreConflict: a run is stored with other bits.
        StoreError: a run that the store does not know, a metric of a step without a state, or the disk is full.
    """
    ready = []
    for digest, result in results.items():
        found = database.read("SELECT id, base_digest FROM runs WHERE digest = ?", (digest,))
        if not found:
            raise StoreError(f"run {digest[:12]}: is not in this store; add it with add_runs before its result")
        _check_metrics(digest, result)
        packed = pack(result, base_of(found[0]["base_digest"]), vectors)
        ready.append(_Ready(found[0]["id"], digest, result, packed))
    blobs: dict[str, bytes] = {}
    lies: dict[str, str] = {}
    for group in _groups([item for item in ready if _stored(database.connection, item.run) is None]):
        data = bundle({item.digest: item.packed for item in group})
        name = put_blob(folder, data, durable=durable)
        blobs[name] = data
        lies |= {item.digest: name for item in group}
    new, refused = 0, []
    with database.writing() as connection:
        for item in ready:
            kept = _stored(connection, item.run)
            if kept is None:
                if item.digest not in lies:  # it was there a moment ago, and was forgotten since
                    raise StoreError(f"run {item.digest[:12]}: was removed while it was committed; commit it again")
                name = lies[item.digest]
                if not has_blob(folder, name):  # gc may have taken it while we waited for the lock; now it waits
                    put_blob(folder, blobs[name], durable=durable)
                _insert(connection, item, name, owner)
                new += 1
            elif kept != item.packed.content:
                connection.execute(
                    "INSERT INTO conflicts (run, owner, content, kept, seen) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT DO NOTHING",
                    (item.run, owner, item.packed.content, kept, now()),
                )
                refused.append(item.digest)
    if refused:
        raise StoreConflict(
            f"run {refused[0][:12]}: is stored already, with other bits than {owner} has found"
            + (f" (and {len(refused) - 1} more)" if len(refused) > 1 else "")
            + "; what was stored first is kept: see `mergebound grid status`, and check that all machines have the "
            "same type of processor and the same versions"
        )
    return new


def _stored(connection: sqlite3.Connection, run: int) -> str | None:
    row = connection.execute("SELECT content FROM results WHERE run = ?", (run,)).fetchone()
    return None if row is None else str(row["content"])


def _groups(items: list[_Ready]) -> list[list[_Ready]]:
    """Runs that share a file: in order, as long as the file stays small."""
    groups: list[list[_Ready]] = []
    size = _TOGETHER
    for item in items:
        if size + item.packed.nbytes > _TOGETHER:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.packed.nbytes
    return groups


def _insert(connection: sqlite3.Connection, item: _Ready, blob: str, owner: str) -> None:
    result, packed = item.result, item.packed
    connection.execute(
        "INSERT INTO results (run, outcome, blob, bytes, content, seconds, log, owner, committed) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            item.run,
            result.outcome,
            blob,
            packed.nbytes,
            packed.content,
            float(result.seconds),
            json.dumps(dict(packed.log)),
            owner,
            now(),
        ),
    )
    last = max(packed.digests)
    numbers = {}
    for step, digest in packed.digests.items():
        numbers[step] = connection.execute(
            "INSERT INTO checkpoints (run, step, digest, final) VALUES (?, ?, ?, ?)",
            (item.run, step, digest, step == last),
        ).lastrowid
    connection.executemany(
        "INSERT INTO metrics (checkpoint, part, name, value, low, high, nan, n, tier) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [_metric(numbers[int(row["step"])], row) for row in result.metrics],
    )
    connection.executemany(
        "INSERT INTO measures (part, name) VALUES (?, ?) ON CONFLICT DO NOTHING",
        {(str(row.get("part", "test")), str(row["name"])) for row in result.metrics},
    )
    connection.execute(
        "UPDATE cohorts SET missing = missing - 1 WHERE id = (SELECT cohort FROM runs WHERE id = ?)", (item.run,)
    )


def _metric(checkpoint: int | None, row: Mapping[str, Any]) -> tuple[Any, ...]:
    numbers = {name: None if row.get(name) is None else float(row[name]) for name in _NAN}
    nan = sum(bit for name, bit in _NAN.items() if numbers[name] is not None and math.isnan(numbers[name] or 0.0))
    count = None if row.get("n") is None else int(row["n"])
    part, name = str(row.get("part", "test")), str(row["name"])
    return (checkpoint, part, name, *numbers.values(), nan, count, row.get("tier"))


def _check_metrics(digest: str, result: RunResult) -> None:
    seen = set()
    for row in result.metrics:
        if row.get("name") is None or row.get("step") not in result.states:
            steps = ", ".join(str(step) for step in result.states)
            raise StoreError(
                f"run {digest[:12]}: the metric {row.get('name')!r} belongs to step {row.get('step')!r}, but there are "
                f"states of {steps or 'no step'} only"
            )
        key = (row["step"], row.get("part", "test"), row["name"])
        if key in seen:
            raise StoreError(f"run {digest[:12]}: the metric {row['name']!r} is given twice for step {row['step']}")
        seen.add(key)
