"""Committing results: weights to the disk first, then one transaction; a run is absent or complete.

What a commit waits for (the disk, the lock of the database) is paid once for all runs of a transaction, and so are its
statements: rows go to the database table by table.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.grid.result import RunResult
from experiments.store import tallies
from experiments.store.blobs import has_blob, put_blob
from experiments.store.content import Packed, TaskVectors, bundle, pack
from experiments.store.database import Database
from experiments.store.errors import StoreConflict, StoreError
from experiments.store.joined import Reference
from experiments.store.leases import now
from experiments.store.seals import run_seals

_NAN = {"value": 1, "low": 2, "high": 4}
"""SQLite has no NaN: it is stored as NULL with its bit in ``nan``; what was not measured is NULL without."""

_TOGETHER = 8 << 20
"""Bytes of a file that holds several runs."""
_ASKED = 500


@dataclass(frozen=True)
class _Ready:
    run: int
    digest: str
    result: RunResult
    packed: Packed
    known: tuple[str, str]
    """Task and base, as the table ``runs`` has them."""


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
    ready, there = _prepared(database, results, base_of, vectors)
    blobs: dict[str, bytes] = {}
    lies: dict[str, str] = {}
    for group in _groups([item for item in ready if item.run not in there]):
        data = bundle({item.digest: item.packed for item in group})
        name = put_blob(folder, data, durable=durable)
        blobs[name] = data
        lies |= {item.digest: name for item in group}
    new: list[_Ready] = []
    refused: list[str] = []
    with database.writing() as connection:
        there = _stored(connection, [item.run for item in ready])  # others may have been faster
        for item in ready:
            kept = there.get(item.run)
            if kept is None:
                if item.digest not in lies:  # it was there a moment ago, and was forgotten since
                    raise StoreError(f"run {item.digest[:12]}: was removed while it was committed; commit it again")
                new.append(item)
            elif kept != item.packed.content:
                row = (item.run, owner, item.packed.content, kept)
                added = connection.execute(
                    "INSERT INTO conflicts (run, owner, content, kept, seen) VALUES (?, ?, ?, ?, ?) "
                    "ON CONFLICT DO NOTHING",
                    (*row, now()),
                )
                if added.rowcount:
                    tallies.add(connection, "conflicts", [row])
                refused.append(item.digest)
        for name in dict.fromkeys(lies[item.digest] for item in new):
            if not has_blob(folder, name):  # gc may have taken it while we waited for the lock; now it waits
                put_blob(folder, blobs[name], durable=durable)
        _insert(connection, new, lies, owner)
    if refused:
        raise StoreConflict(
            f"run {refused[0][:12]}: is stored already, with other bits than {owner} has found"
            + (f" (and {len(refused) - 1} more)" if len(refused) > 1 else "")
            + "; what was stored first is kept: see `mergebound grid status`, and check that all machines have the "
            "same type of processor and the same versions"
        )
    return len(new)


def _prepared(
    database: Database,
    results: Mapping[str, RunResult],
    base_of: Callable[[str], Mapping[str, Tensor]],
    vectors: TaskVectors,
) -> tuple[list[_Ready], dict[int, str]]:
    """Results as they will be stored, and by run the content of those that are there already."""
    rows = {
        row["digest"]: row
        for part in _parts(list(results))
        for row in database.read(
            f"SELECT digest, id, base_digest, task, base FROM runs WHERE digest IN ({_marks(part)})", part
        )
    }
    ready = []
    nothing = Reference()
    for digest, result in results.items():
        if digest not in rows:
            raise StoreError(f"run {digest[:12]}: is not in this store; add it with add_runs before its result")
        _check_metrics(digest, result)
        row = rows[digest]
        packed = pack(result, base_of(row["base_digest"]), vectors, nothing=nothing)
        ready.append(_Ready(row["id"], digest, result, packed, (row["task"], row["base"])))
    return ready, _stored(database.connection, [item.run for item in ready])


def _stored(connection: sqlite3.Connection, runs: Sequence[int]) -> dict[int, str]:
    """Content of those runs that are there."""
    found: dict[int, str] = {}
    for part in _parts(runs):
        rows = connection.execute(f"SELECT run, content FROM results WHERE run IN ({_marks(part)})", part)
        found |= {int(row["run"]): str(row["content"]) for row in rows}
    return found


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[start : start + _ASKED] for start in range(0, len(values), _ASKED))


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


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


def _insert(connection: sqlite3.Connection, items: Sequence[_Ready], lies: Mapping[str, str], owner: str) -> None:
    """The rows of new runs, table by table, within a transaction that holds the write lock."""
    at = now()
    free = connection.execute("SELECT coalesce(max(id), 0) + 1 FROM checkpoints").fetchone()[0]
    results: list[tuple[Any, ...]] = []
    points: list[tuple[Any, ...]] = []
    metrics: list[tuple[Any, ...]] = []
    for item in items:
        last = max(item.packed.digests)
        numbers = {step: free + len(points) + k for k, step in enumerate(item.packed.digests)}
        own = [(numbers[s], item.run, s, digest, s == last) for s, digest in item.packed.digests.items()]
        rows = [(int(row["step"]), _metric(numbers[int(row["step"])], row)) for row in item.result.metrics]
        points += own
        metrics += [row for _, row in rows]
        log = json.dumps(dict(item.packed.log))
        packed, seconds = item.packed, float(item.result.seconds)
        record = (item.result.outcome, lies[item.digest], packed.nbytes, packed.content, seconds)
        seals = run_seals(
            (item.digest, *item.known, *record), [row[2:] for row in own], log, [(s, *row[1:]) for s, row in rows]
        )
        results.append((item.run, *record, log, owner, at, seals))
    connection.executemany(
        "INSERT INTO results (run, outcome, blob, bytes, content, seconds, log, owner, committed, seals) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        results,
    )
    tallies.add(connection, "results", [(item.digest,) for item in items])
    connection.executemany("INSERT INTO checkpoints (id, run, step, digest, final) VALUES (?, ?, ?, ?, ?)", points)
    connection.executemany(
        "INSERT INTO metrics (checkpoint, part, name, value, low, high, nan, n, tier) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        metrics,
    )
    connection.executemany(
        "INSERT INTO measures (part, name) VALUES (?, ?) ON CONFLICT DO NOTHING", sorted({row[1:3] for row in metrics})
    )
    for part in _parts([item.run for item in items]):
        done = connection.execute(
            f"SELECT cohort, count(*) AS n FROM runs WHERE id IN ({_marks(part)}) GROUP BY cohort", part
        ).fetchall()
        connection.executemany(
            "UPDATE cohorts SET missing = missing - ? WHERE id = ?", [(row["n"], row["cohort"]) for row in done]
        )


def _metric(checkpoint: int, row: Mapping[str, Any]) -> tuple[Any, ...]:
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
