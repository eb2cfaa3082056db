"""How far a grid is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.store.database import Database
from experiments.store.given_up import GivenUp, given_up
from experiments.store.leases import LIVE, SKEW, now
from experiments.store.machines import other_machines

_WINDOW = 3600.0
_LATEST = 500
_CLAMPED = (  # keys of a record are sorted, so that the number is never the last one; a record with NaN is no JSON
    "SELECT count(*) FROM merges WHERE instr(record, '\"clamped\": ') > 0 AND instr(record, '\"clamped\": 0.0,') = 0"
)


@dataclass(frozen=True)
class Lease:
    """Somebody at work: the cohort, who, seconds until the lease ends, and runs left in the cohort."""

    cohort: str
    owner: str
    seconds: float
    missing: int


@dataclass(frozen=True)
class Status:
    """Where a grid stands.

    Attributes:
        runs: all of them.
        finished, diverged: done, by outcome.
        missing: not done.
        cohorts, cohorts_done: of the frozen plan.
        unplanned: runs that are not done and in no cohort.
        leases: that hold now.
        ended: cohorts whose lease ended without their being done; the next runner takes them.
        given_up: cohorts that a runner tried in vain and that nobody has taken again; a resume tries them.
        conflicts: runs that were done twice with different bits (the first is kept).
        bytes: of all results.
        training_seconds: of all results.
        rate: runs per second, over the latest commits of the last hour up to now; None before two commits.
        seconds_left: at that rate; None where it is unknown.
        merges: rows about merges.
        clamped: of those, measured merges with a running variance of BatchNorm that was set to 0.
        machine: that the plan was made on.
        other_machines: that runs were trained on too; their last bits may differ.
    """

    runs: int
    finished: int
    diverged: int
    missing: int
    cohorts: int
    cohorts_done: int
    unplanned: int
    leases: tuple[Lease, ...]
    ended: int
    given_up: tuple[GivenUp, ...]
    conflicts: int
    bytes: int
    training_seconds: float
    rate: float | None
    seconds_left: float | None
    merges: int
    clamped: int = 0
    machine: str = ""
    other_machines: tuple[str, ...] = ()

    def to_row(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


def status(database: Database, folder: Path) -> Status:
    """Count what there is; one short read of the database, no file is opened."""
    del folder
    at = now()
    outcomes = {
        row["outcome"]: row for row in database.read("SELECT outcome, count(*) AS n FROM results GROUP BY outcome")
    }
    sums = database.read("SELECT count(*) AS n, total(bytes) AS bytes, total(seconds) AS seconds FROM results")[0]
    runs = int(database.read("SELECT count(*) FROM runs")[0][0])
    plan = database.read("SELECT count(*) AS n, coalesce(sum(missing = 0), 0) AS done FROM cohorts")[0]
    loose = database.read(
        "SELECT count(*) FROM runs LEFT JOIN results ON results.run = runs.id "
        "WHERE cohort IS NULL AND results.run IS NULL"
    )[0][0]
    held = database.read(
        f"SELECT name, owner, expires - :now AS seconds, missing, {LIVE} AS live FROM cohorts "
        "WHERE owner IS NOT NULL AND missing > 0 ORDER BY id",
        {"now": at, "skew": SKEW},
    )
    leases = tuple(Lease(row["name"], row["owner"], row["seconds"], row["missing"]) for row in held if row["live"])
    missing = runs - int(sums["n"])
    rate = _rate(database, at)
    return Status(
        runs=runs,
        finished=int(outcomes["finished"]["n"]) if "finished" in outcomes else 0,
        diverged=int(outcomes["diverged"]["n"]) if "diverged" in outcomes else 0,
        missing=missing,
        cohorts=int(plan["n"]),
        cohorts_done=int(plan["done"]),
        unplanned=int(loose),
        leases=leases,
        ended=len(held) - len(leases),
        given_up=given_up(database),
        conflicts=int(database.read("SELECT count(*) FROM (SELECT DISTINCT run FROM conflicts)")[0][0]),
        bytes=int(sums["bytes"]),
        training_seconds=float(sums["seconds"]),
        rate=rate,
        seconds_left=0.0 if missing == 0 else missing / rate if rate else None,
        merges=int(database.read("SELECT count(*) FROM merges")[0][0]),
        clamped=int(database.read(_CLAMPED)[0][0]),
        machine=_machine(database),
        other_machines=other_machines(database),
    )


def _machine(database: Database) -> str:
    """What the frozen plan names; empty before there is one."""
    rows = database.read("SELECT value FROM meta WHERE key = 'plan'")
    return str(json.loads(rows[0]["value"]).get("machine", "")) if rows else ""


def _rate(database: Database, at: float) -> float | None:
    """Commits per second since the first of the latest ones."""
    rows = database.read(
        "SELECT committed FROM results WHERE committed > ? AND committed <= ? ORDER BY committed DESC LIMIT ?",
        (at - _WINDOW, at, _LATEST),
    )
    if len(rows) < 2 or at <= rows[-1]["committed"]:
        return None
    return float((len(rows) - 1) / (at - rows[-1]["committed"]))
