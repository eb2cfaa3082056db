"""Whether the rows of a store's database are those that were written: specifications by digests, numbers by seals.

See :mod:`experiments.store.seals`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.grid.run_spec import RunSpec
from experiments.spec import NUMERICS_VERSION
from experiments.store.columns import OTHER, RUN_COLUMNS, run_row, spec_of
from experiments.store.database import Database
from experiments.store.seals import altered, merge_seal, run_seals

_AT_A_TIME = 500


@dataclass
class Recorded:
    """What was found.

    Attributes:
        problems: one sentence each.
        renamed: digests of the runs whose specification, base or split is not the one that the digest names.
        numbers: digests of the runs whose numbers are not those that were committed.
        merges: keys of the rows about merges that are not those that were stored.
        unsealed_runs, unsealed_merges: rows without a seal, from before there were any.
    """

    problems: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    unsealed_runs: int = 0
    unsealed_merges: int = 0


def check_recorded(database: Database, numerics: int | None) -> Recorded:
    """Compare every row with its digest or seal.

    Args:
        database: of the store.
        numerics: version that its runs were named with; digests are compared where it is this one's, or not known.
    """
    found = Recorded()
    if numerics in (None, NUMERICS_VERSION):
        for row in _rows(database, "SELECT * FROM runs WHERE id > ? ORDER BY id LIMIT ?"):
            what = _renamed(row)
            if what:
                found.renamed.append(row["digest"])
                found.problems.append(
                    f"{database.file}: run {row['digest'][:12]}: {what}; restore the database from a copy"
                )
    else:
        found.problems.append(
            f"{database.file}: its runs were named with numerics version {numerics}, this is {NUMERICS_VERSION}; "
            "verify them with the version that the grid was begun with"
        )
    _check_runs(database, found)
    _check_merges(database, found)
    return found


def _renamed(row: sqlite3.Row) -> str:
    """What is wrong with the row of a run; empty if nothing is."""
    digest, base, split = row["digest"], row["base_digest"], row["split_digest"]
    try:
        spec: RunSpec = spec_of(dict(row))
    except (ValueError, TypeError) as error:
        return f"its specification was altered to one that is no specification ({_line(error)})"
    if spec.digest(base=base.partition(OTHER)[0], split=split) != digest:
        return "its specification, base or split was altered: it is not the one that the digest names"
    expected = dict(zip(RUN_COLUMNS, run_row(digest, spec, base, split), strict=True))
    differs = [name for name in RUN_COLUMNS if expected[name] != row[name]]
    return f"its column {differs[0]} was altered" if differs else ""


def _check_runs(database: Database, found: Recorded) -> None:
    if not _has(database, "results", "seals"):
        found.unsealed_runs = int(database.read("SELECT count(*) FROM results")[0][0])
        return
    sql = (
        "SELECT s.*, s.run AS id, r.digest, r.task, r.base FROM results s JOIN runs r ON r.id = s.run "
        "WHERE s.run > ? ORDER BY s.run LIMIT ?"
    )
    for rows in _parts(database, sql):
        numbers = [row["run"] for row in rows]
        points = _by_run(database, "SELECT run, step, digest, final FROM checkpoints WHERE run IN ({})", numbers)
        metrics = _by_run(
            database,
            "SELECT c.run, c.step, m.part, m.name, m.value, m.low, m.high, m.nan, m.n, m.tier FROM metrics m "
            "JOIN checkpoints c ON c.id = m.checkpoint WHERE c.run IN ({})",
            numbers,
        )
        for row in rows:
            if row["seals"] is None:
                found.unsealed_runs += 1
                continue
            record = [
                row[name] for name in ("digest", "task", "base", "outcome", "blob", "bytes", "content", "seconds")
            ]
            own = points.get(row["run"], []), metrics.get(row["run"], [])
            changed = altered(row["seals"], run_seals(record, own[0], row["log"], own[1]))
            if changed:
                found.numbers.append(row["digest"])
                found.problems.append(
                    f"{database.file}: run {row['digest'][:12]}: {' and '.join(changed)} were altered after they were "
                    "committed"
                )


def _check_merges(database: Database, found: Recorded) -> None:
    if not _has(database, "merges", "seal"):
        found.unsealed_merges = int(database.read("SELECT count(*) FROM merges")[0][0])
        return
    for key, record, seal in database.read_tuples("SELECT key, record, seal FROM merges ORDER BY added, key"):
        if seal is None:
            found.unsealed_merges += 1
        elif merge_seal(key, record) != seal:
            found.merges.append(key)
            found.problems.append(f"{database.file}: the row about merge {key[:12]} was altered after it was stored")


def _has(database: Database, table: str, column: str) -> bool:
    return any(row["name"] == column for row in database.read(f"PRAGMA table_info({table})"))


def _parts(database: Database, sql: str) -> Iterator[list[sqlite3.Row]]:
    """Rows some at a time; the query takes the last ``id`` and how many."""
    last = -1
    while rows := database.read(sql, (last, _AT_A_TIME)):
        yield rows
        last = rows[-1]["id"]


def _rows(database: Database, sql: str) -> Iterator[sqlite3.Row]:
    for rows in _parts(database, sql):
        yield from rows


def _by_run(database: Database, sql: str, runs: Sequence[int]) -> dict[int, list[tuple[Any, ...]]]:
    """Rows without their first column, by it."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for run, *content in database.read_tuples(sql.format(", ".join("?" * len(runs))), runs):
        found.setdefault(run, []).append(tuple(content))
    return found


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[1:3]) if len(lines) > 2 else " ".join(lines)
