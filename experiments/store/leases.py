"""Who works on which cohort: leases that end by themselves, so that a killed runner's work is taken over.

Times are seconds since 1970 by the clock of the machine that writes them.  A clock that is ahead of the others by d
seconds sees leases end d seconds early; so leases should be longer than the largest difference between clocks (minutes
against the seconds that are usual).  Nothing depends on it but double work: a run that two runners have trained is
committed once, because the second finds the same bits.  A lease that would end later than its own length and
:data:`SKEW` from now was written by a clock that jumped, and counts as ended.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.grid.result import Cohort
from experiments.store.database import Database
from experiments.store.errors import StoreError

_LOG = logging.getLogger(__name__)
SKEW = 300.0
"""Seconds by which clocks of machines that share a store may differ."""
GIVEN_UP = "given up:"
"""Before the name of a cohort in ``meta``: see :mod:`experiments.store.given_up`."""
LIVE = "(owner IS NOT NULL AND expires > :now AND expires - :now <= (expires - taken) + :skew)"


def now() -> float:
    """Seconds since 1970."""
    return time.time()


def lease(database: Database, owner: str, seconds: float, skip: frozenset[str] = frozenset()) -> Cohort | None:
    """Take the first cohort that has runs to do and that nobody holds; ``None`` if there is none.

    Args:
        database: of the store.
        owner: a name that no other runner has.
        seconds: until the lease ends unless it is renewed.
        skip: names of cohorts that are not wanted.
    """
    if not owner or seconds <= 0:
        raise StoreError(f"lease: needs an owner and a positive number of seconds, not {owner!r} and {seconds!r}")
    left = "" if not skip else f" AND name NOT IN ({', '.join(f':skip{k}' for k in range(len(skip)))})"
    values = {"now": now(), "skew": SKEW} | {f"skip{k}": name for k, name in enumerate(sorted(skip))}
    with database.writing() as connection:
        row = connection.execute(
            f"SELECT * FROM cohorts WHERE missing > 0 AND NOT {LIVE}{left} ORDER BY id LIMIT 1", values
        ).fetchone()
        if row is None:
            return None
        connection.execute(
            "UPDATE cohorts SET owner = ?, taken = ?, expires = ? WHERE id = ?",
            (owner, values["now"], now() + seconds, row["id"]),
        )
        connection.execute("DELETE FROM meta WHERE key = ?", (GIVEN_UP + row["name"],))
        if row["owner"] not in (None, owner):
            _LOG.info("cohort %s: taken over from %s, whose lease had ended", row["name"], row["owner"])
        return cohort_of(connection, row)


def renew(database: Database, owner: str, name: str, seconds: float | None = None) -> bool:
    """Extend a lease, by its own length where ``seconds`` is ``None``.

    Returns:
        False if it was lost to another owner or given back: the runner should stop, or lease anew.
    """
    with database.writing() as connection:
        at = now()
        changed = connection.execute(
            "UPDATE cohorts SET taken = ?, expires = ? + coalesce(?, expires - taken) WHERE name = ? AND owner = ?",
            (at, at, seconds, name, owner),
        )
        return changed.rowcount == 1


def release(database: Database, owner: str, name: str) -> bool:
    """Give a lease back; False if it was not this owner's any more."""
    with database.writing() as connection:
        changed = connection.execute(
            "UPDATE cohorts SET owner = NULL, taken = NULL, expires = NULL WHERE name = ? AND owner = ?", (name, owner)
        )
        return changed.rowcount == 1


def cohort_of(connection: sqlite3.Connection, row: sqlite3.Row) -> Cohort:
    """A row of ``cohorts`` with its runs."""
    runs = connection.execute("SELECT digest FROM runs WHERE cohort = ? ORDER BY place", (row["id"],)).fetchall()
    return Cohort(
        name=row["name"],
        runs=tuple(run["digest"] for run in runs),
        way=row["way"],
        chunk=row["chunk"],
        options=json.loads(row["options"]),
        reason=row["reason"],
    )


class Heartbeat:
    """What keeps a lease alive: ``lost`` is set as soon as it is no longer sure to be held."""

    def __init__(self) -> None:
        self.lost = threading.Event()
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    def beat(self, file: Path, owner: str, name: str, seconds: float) -> None:
        """Renew every third of the lease, over a connection of its own, until stopped or lost."""
        held = time.monotonic()
        database: Database | None = None
        try:
            while not self._stop.wait(seconds / 3):
                try:
                    database = database or Database(file, "w", patience=seconds / 3)
                    asked = time.monotonic()
                    if not renew(database, owner, name, seconds):
                        _LOG.warning("cohort %s: the lease of %s was taken over", name, owner)
                        self.lost.set()
                        return
                    held = asked
                except StoreError as error:
                    _LOG.warning("cohort %s: the lease could not be renewed (%s); trying again", name, error)
                    if time.monotonic() - held > seconds:
                        self.lost.set()
        finally:
            if database is not None:
                database.close()


@contextmanager
def keep_lease(file: Path, owner: str, name: str, seconds: float) -> Iterator[Heartbeat]:
    """Renew a lease from a thread while the body works; look at ``lost`` between two runs.

    Args:
        file: the store's database.
        owner: who holds the lease.
        name: of the cohort.
        seconds: as in :func:`lease`; it is renewed three times within them.
    """
    heart = Heartbeat()
    thread = threading.Thread(target=heart.beat, args=(file, owner, name, seconds), daemon=True, name=f"lease {name}")
    thread.start()
    try:
        yield heart
    finally:
        heart.stop()
        thread.join(timeout=seconds + 5.0)
