"""Tallies: how many rows every table should have and a digest of which, so that ``verify`` sees rows that are lost.

A seal (:mod:`experiments.store.seals`) finds a row that was altered; nothing is left of a row that was deleted.  So the
table ``tallies`` has for every table the number of its rows and the sum, modulo 2^256, of SHA-256 over what identifies
each of them.  It is changed in the transaction that adds or removes the rows, which holds the write lock: any number of
runners may add rows in any order, and the sum is the same.  A tally finds rows that are lost, that were put in by hand,
or exchanged.  Like a seal it does not stop somebody who changes the tally too.

Stores that were written before there were tallies are counted when they are opened for writing; what was lost before
cannot be seen.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.store.database import Database
from experiments.store.leases import now

TABLES = {
    "bases": "SELECT digest, architecture, classes, blob, record FROM bases",
    "runs": "SELECT digest FROM runs",
    "cohorts": (
        "SELECT c.name, c.way, c.chunk, c.options, c.reason, (SELECT group_concat(digest, ' ') FROM "
        "(SELECT digest FROM runs WHERE cohort = c.id ORDER BY place)) FROM cohorts c"
    ),
    "results": "SELECT r.digest FROM results s JOIN runs r ON r.id = s.run",
    "conflicts": "SELECT run, owner, content, kept FROM conflicts",
    "merges": "SELECT key FROM merges",
}
"""What identifies a row, by table: names where digests or seals watch the rest, otherwise all that never changes."""
_REMEDIES = {
    "bases": "restore the database from a copy",
    "runs": "restore the database from a copy, or give the grid's page to `mergebound grid run` again",
    "cohorts": "restore the database from a copy",
    "results": "`mergebound grid verify --forget-damaged` and `grid resume` do again what is lost",
    "conflicts": "restore the database from a copy to see them",
    "merges": "`mergebound grid verify --forget-damaged` and `grid merge` measure again what is lost",
}
_MODULUS = 1 << 256
_NAMED = 12


@dataclass(frozen=True)
class Tallied:
    """What was found.

    Attributes:
        problems: one sentence each.
        lost: the tables whose rows or counts are not those that were written.
        since: when the rows of a store of an older version were counted, in seconds since 1970: losses before cannot
            be seen; ``None`` where they were counted from the start.
        known: whether the store has tallies at all.
    """

    problems: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    since: float | None = None
    known: bool = True


def rows_of(connection: sqlite3.Connection, table: str, where: str = "", values: Sequence[Any] = ()) -> list[Any]:
    """What identifies the rows of a table for which a condition holds, for :func:`add` and :func:`take`."""
    cursor = connection.cursor()
    cursor.row_factory = None
    return cursor.execute(f"{TABLES[table]} {where}", values).fetchall()


def add(connection: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]]) -> None:
    """Count rows that the transaction adds.

    Args:
        connection: within the transaction, which holds the write lock.
        table: of :data:`TABLES`.
        rows: values of its columns there.
    """
    _change(connection, table, rows, 1)


def take(connection: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]]) -> None:
    """Count rows that the transaction removes; arguments as :func:`add` has them."""
    _change(connection, table, rows, -1)


def recount(connection: sqlite3.Connection, *, since: float | None = None) -> None:
    """Take what is there for what should be: for stores of older versions, and where a loss is accepted.

    Args:
        connection: within a transaction that holds the write lock.
        since: see :class:`Tallied`; kept where there is one already.
    """
    for table in TABLES:
        count, total = _total(rows_of(connection, table))
        connection.execute(
            "INSERT INTO tallies (name, count, digest, since) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET count = excluded.count, digest = excluded.digest",
            (table, count, _text(total), since),
        )


def repair(database: Database) -> None:
    """Accept what is lost: tallies, the runs that cohorts have to do, and the names of metrics, counted anew."""
    with database.writing() as connection:
        recount(connection, since=now())
        connection.execute(f"UPDATE cohorts SET missing = {_MISSING}")
        connection.execute(
            "INSERT INTO measures SELECT DISTINCT part, name FROM metrics WHERE true ON CONFLICT DO NOTHING"
        )


def check_tallies(database: Database) -> Tallied:
    """Compare tallies with the rows that are there, all of one moment."""
    with database.reading() as connection:
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'tallies'").fetchone():
            return Tallied(known=False)
        kept = {row["name"]: row for row in connection.execute("SELECT * FROM tallies")}
        found = [(table, said) for table in TABLES for said in _compared(connection, table, kept.get(table))]
        found += [("cohorts", said) for said in _miscounted(connection)]
        found += [("measures", said) for said in _unnamed(connection)]
    since = [row["since"] for row in kept.values() if isinstance(row["since"], float)]
    problems = tuple(f"{database.file}: {said}" for _, said in found)
    return Tallied(problems, tuple(dict.fromkeys(table for table, _ in found)), max(since, default=None))


def _change(connection: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]], sign: int) -> None:
    count, total = _total(rows)
    if not count:
        return
    kept = connection.execute("SELECT count, digest FROM tallies WHERE name = ?", (table,)).fetchone()
    before = None if kept is None else _number(kept["digest"])
    if before is None:  # the tally itself was lost or altered: verify says so, and it is not made up here
        return
    connection.execute(
        "UPDATE tallies SET count = count + ?, digest = ? WHERE name = ?",
        (sign * count, _text(before + sign * total), table),
    )


def _compared(connection: sqlite3.Connection, table: str, kept: sqlite3.Row | None) -> Iterator[str]:
    """What is wrong with a table; nothing if its rows are those that were counted."""
    rows = rows_of(connection, table)
    count, total = _total(rows)
    wanted = None if kept is None else _number(kept["digest"])
    if kept is None or wanted is None or not isinstance(kept["count"], int):
        yield f"the tally of its {table} is lost or was altered, so that lost rows cannot be seen; {_REMEDIES[table]}"
        return
    difference = (wanted - total) % _MODULUS
    if count == kept["count"] and not difference:
        return
    if count < kept["count"]:
        what = f"{kept['count'] - count:,} of {kept['count']:,} rows of its {table} are lost"
        what += _named(connection, difference) if table == "results" else ""
    elif count > kept["count"]:
        what = f"{count - kept['count']:,} rows of its {table} were put in by something else than mergebound"
    else:
        what = f"rows of its {table} were altered or exchanged"
    yield f"{what}; {_REMEDIES[table]}"


def _named(connection: sqlite3.Connection, difference: int) -> str:
    """Which run's result is lost, where it is a single one."""
    rows = connection.execute("SELECT digest FROM runs WHERE id NOT IN (SELECT run FROM results)").fetchall()
    found = next((row["digest"] for row in rows if _hash((row["digest"],)) == difference), None)
    return "" if found is None else f" (run {found[:_NAMED]})"


_MISSING = (
    "(SELECT count(*) FROM runs LEFT JOIN results ON results.run = runs.id "
    "WHERE runs.cohort = cohorts.id AND results.run IS NULL)"
)


def _miscounted(connection: sqlite3.Connection) -> Iterator[str]:
    """Cohorts whose number of runs to do is wrong: nobody would do those that are lost, or somebody for ever."""
    rows = connection.execute(
        f"SELECT name, missing, {_MISSING} AS true_missing FROM cohorts WHERE missing != true_missing ORDER BY id"
    )
    for name, kept, there in rows:
        yield (
            f"cohort {name} says that {kept:,} of its runs are to be done, and {there:,} are; "
            "`mergebound grid verify --forget-damaged` counts them again, and `grid resume` does them"
        )
    planned = connection.execute("SELECT count(*) FROM cohorts").fetchone()[0]
    if planned and not connection.execute("SELECT 1 FROM meta WHERE key = 'plan'").fetchone():
        yield "the device and seed of its plan are lost; restore the database from a copy"


def _unnamed(connection: sqlite3.Connection) -> Iterator[str]:
    """Metrics that the list of their names lacks, so that queries do not know them."""
    rows = connection.execute("SELECT DISTINCT part, name FROM metrics EXCEPT SELECT part, name FROM measures")
    for part, name in rows:
        yield f"the list of metrics lacks {part} {name}; `mergebound grid verify --forget-damaged` puts it back"


def _total(rows: Iterable[Sequence[Any]]) -> tuple[int, int]:
    count, total = 0, 0
    for row in rows:
        count += 1
        total += _hash(row)
    return count, total % _MODULUS


def _hash(row: Sequence[Any]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(list(row)).encode()).digest(), "big")


def _text(total: int) -> str:
    return f"{total % _MODULUS:064x}"


def _number(text: Any) -> int | None:
    try:
        return int(text, 16)
    except (TypeError, ValueError):
        return None
