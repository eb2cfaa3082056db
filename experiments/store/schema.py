"""Tables of a store, as ordered migrations: ``PRAGMA user_version`` counts those that a file has been through.

A migration is never edited once released; a change of the schema is a new entry at the end.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from experiments.store.errors import StoreError

_FIRST = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE bases (
    digest TEXT PRIMARY KEY, architecture TEXT NOT NULL, classes INTEGER NOT NULL, blob TEXT NOT NULL,
    record TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, task TEXT NOT NULL, architecture TEXT NOT NULL,
    base TEXT NOT NULL, base_kind TEXT NOT NULL, base_digest TEXT NOT NULL, split_digest TEXT NOT NULL,
    learning_rate REAL NOT NULL, steps INTEGER NOT NULL, batch_size INTEGER NOT NULL, data_share REAL NOT NULL,
    momentum REAL NOT NULL, nesterov INTEGER NOT NULL, weight_decay REAL NOT NULL, optimizer TEXT NOT NULL,
    beta2 REAL NOT NULL, epsilon REAL NOT NULL, sam_radius REAL NOT NULL, schedule TEXT NOT NULL,
    warm_up INTEGER NOT NULL, label_smoothing REAL NOT NULL, clip_norm REAL, augment TEXT NOT NULL,
    sampling TEXT NOT NULL, precision TEXT NOT NULL, trained TEXT NOT NULL, rank INTEGER, checkpoints TEXT NOT NULL,
    seed INTEGER NOT NULL, split_seed INTEGER NOT NULL,
    cohort INTEGER, place INTEGER
);
CREATE TABLE results (
    run INTEGER PRIMARY KEY REFERENCES runs(id), outcome TEXT NOT NULL CHECK (outcome IN ('finished', 'diverged')),
    blob TEXT NOT NULL, bytes INTEGER NOT NULL, content TEXT NOT NULL, seconds REAL NOT NULL, log TEXT NOT NULL,
    owner TEXT NOT NULL, committed REAL NOT NULL
);
CREATE TABLE checkpoints (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES results(run), step INTEGER NOT NULL,
    digest TEXT NOT NULL, final INTEGER NOT NULL, UNIQUE (run, step)
);
CREATE TABLE metrics (
    checkpoint INTEGER NOT NULL REFERENCES checkpoints(id), part TEXT NOT NULL, name TEXT NOT NULL,
    value REAL, low REAL, high REAL, nan INTEGER NOT NULL, n INTEGER, tier TEXT,
    PRIMARY KEY (checkpoint, part, name)
) WITHOUT ROWID;
CREATE TABLE cohorts (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, way TEXT NOT NULL, chunk INTEGER NOT NULL,
    options TEXT NOT NULL, reason TEXT NOT NULL, missing INTEGER NOT NULL,
    owner TEXT, taken REAL, expires REAL
);
CREATE INDEX cohorts_missing ON cohorts(missing, id);
CREATE INDEX runs_cohort ON runs(cohort, place);
CREATE INDEX results_blob ON results(blob);
CREATE INDEX results_outcome ON results(outcome, run);
CREATE INDEX results_seconds ON results(seconds);
CREATE INDEX results_owner ON results(owner);
CREATE INDEX results_committed ON results(committed);
CREATE INDEX metrics_value ON metrics(name, part, value, checkpoint);
CREATE INDEX checkpoints_step ON checkpoints(step, run);
"""

INDEXED = (
    "task", "architecture", "base_kind", "base_digest", "split_digest", "learning_rate", "steps", "batch_size",
    "data_share", "momentum", "nesterov", "weight_decay", "optimizer", "beta2", "epsilon", "sam_radius", "schedule",
    "warm_up", "label_smoothing", "clip_norm", "augment", "sampling", "precision", "trained", "rank", "checkpoints",
    "seed", "split_seed",
)  # fmt: skip
"""Columns of ``runs`` that have an index of their own (``base``, the whole JSON, has none: its digest and kind do)."""

_SECOND = """
CREATE TABLE conflicts (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES runs(id), owner TEXT NOT NULL, content TEXT NOT NULL,
    kept TEXT NOT NULL, seen REAL NOT NULL, UNIQUE (run, owner, content)
);
CREATE TABLE measures (part TEXT NOT NULL, name TEXT NOT NULL, PRIMARY KEY (part, name)) WITHOUT ROWID;
CREATE INDEX metrics_nan ON metrics(name, part, checkpoint) WHERE nan > 0;
INSERT INTO measures SELECT DISTINCT part, name FROM metrics;
CREATE TABLE merges (key TEXT PRIMARY KEY, added REAL NOT NULL, record TEXT NOT NULL) WITHOUT ROWID;
"""

_THIRD = """
ALTER TABLE results ADD COLUMN seals TEXT;
ALTER TABLE merges ADD COLUMN seal TEXT;
"""
"""See :mod:`experiments.store.seals`; NULL in rows that are older."""

_FOURTH = """
CREATE TABLE tallies (
    name TEXT PRIMARY KEY, count INTEGER NOT NULL, digest TEXT NOT NULL, since REAL
) WITHOUT ROWID;
"""
"""See :mod:`experiments.store.tallies`; the rows that are there are counted at the end of the migration."""

MIGRATIONS: tuple[str, ...] = (
    _FIRST + "".join(f"CREATE INDEX runs_{name} ON runs({name});\n" for name in INDEXED),
    _SECOND,
    _THIRD,
    _FOURTH,
)
VERSION = len(MIGRATIONS)
READABLE = 2
"""The oldest schema that is read as it is: what came later are columns and tables that only ``verify`` asks for."""
_TALLIED = 4


def migrate(connection: sqlite3.Connection, file: Path, *, writable: bool = True) -> None:
    """Bring a file to the schema of this version, all of it or none of it.

    Args:
        connection: in autocommit mode (``isolation_level=None``).
        file: for messages.
        writable: False leaves the file as it is, and refuses one that is older than :data:`READABLE`.

    Raises:
        StoreError: the file was written by a newer version, or needs a migration that may not be done.
    """
    found = _version(connection, file)
    if found == VERSION or (not writable and found >= READABLE):
        return
    if not writable:
        raise StoreError(
            f"{file}: was written by an older version (schema {found}, now {VERSION}); open it "
            "once for writing, and it is brought up to date"
        )
    connection.execute("BEGIN IMMEDIATE")
    try:
        before = _version(connection, file)  # read again: another process may have been faster
        for number in range(before, VERSION):
            for statement in MIGRATIONS[number].split(";\n"):
                if statement.strip():
                    connection.execute(statement)
        if before < _TALLIED:
            _count(connection, new=before == 0)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _count(connection: sqlite3.Connection, *, new: bool) -> None:
    from experiments.store.leases import now
    from experiments.store.tallies import recount

    recount(connection, since=None if new else now())


def _version(connection: sqlite3.Connection, file: Path) -> int:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > VERSION:
        raise StoreError(
            f"{file}: was written by a newer version of mergebound (schema {found}, this one knows {VERSION}); update "
            "mergebound, or use another folder"
        )
    return found
