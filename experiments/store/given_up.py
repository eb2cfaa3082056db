"""Cohorts that a runner has given up: remembered in the store, so that whoever asks for its state sees why.

They are entries of the table ``meta``, so that older stores need no change.  An entry goes as soon as somebody takes
the cohort again, and does not count once its runs are done.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from experiments.store.database import Database
from experiments.store.leases import GIVEN_UP, now


@dataclass(frozen=True)
class GivenUp:
    """A cohort that was given up.

    Attributes:
        cohort: its name.
        owner: the runner that gave it up.
        attempts: how often that one tried.
        error: of the last attempt, one line.
        at: when, in seconds since 1970.
        missing: runs of it that are not done.
    """

    cohort: str
    owner: str
    attempts: int
    error: str
    at: float
    missing: int = 0


def give_up(database: Database, cohort: str, owner: str, attempts: int, error: str) -> None:
    """Remember that a runner tries a cohort no more."""
    record = {"owner": owner, "attempts": attempts, "error": " ".join(error.split()), "at": now()}
    with database.writing() as connection:
        connection.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (GIVEN_UP + cohort, json.dumps(record)),
        )


def given_up(database: Database) -> tuple[GivenUp, ...]:
    """Cohorts with runs to do that were given up and that nobody has taken again, in the order of the plan."""
    rows = database.read(
        "SELECT name, missing, value FROM cohorts JOIN meta ON key = ? || name WHERE missing > 0 ORDER BY id",
        (GIVEN_UP,),
    )
    return tuple(GivenUp(row["name"], **json.loads(row["value"]), missing=row["missing"]) for row in rows)
