"""What a store knows before the first run: bases, runs and the frozen plan."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.grid.result import Cohort, Plan
from experiments.grid.run_spec import RunSpec
from experiments.store import tallies
from experiments.store.columns import OTHER, RUN_COLUMNS, run_row, spec_of
from experiments.store.database import Database, present
from experiments.store.errors import StoreError
from experiments.store.leases import cohort_of

_PLAN = ("device", "machine", "seed")


def add_runs(
    database: Database,
    runs: Mapping[str, RunSpec],
    base: str | Mapping[str, str],
    split: str | Mapping[str, str],
) -> int:
    """Add runs that are not known yet, all or none; returns how many were new.

    Raises:
        StoreError: a digest that is not the one of its specification.
    """
    rows = []
    for digest, run in runs.items():
        of_base = base if isinstance(base, str) else base[digest]
        of_split = split if isinstance(split, str) else split[digest]
        if run.digest(base=of_base.partition(OTHER)[0], split=of_split) != digest:
            raise StoreError(
                f"run {digest[:12]} ({run.task}): the name is not that of its specification, base and split; name runs "
                "with RunSpec.digest"
            )
        rows.append(run_row(digest, run, of_base, of_split))
    columns, marks = ", ".join(RUN_COLUMNS), ", ".join("?" * len(RUN_COLUMNS))
    with database.writing() as connection:
        there = present(connection, "runs", "digest", list(runs))
        new = [row for row in rows if row[0] not in there]
        connection.executemany(f"INSERT INTO runs ({columns}) VALUES ({marks})", new)
        if new:
            tallies.add(connection, "runs", [row[:1] for row in new])
            connection.execute("ANALYZE runs")
    return len(new)


def known(database: Database, digests: Iterable[str]) -> dict[str, tuple[RunSpec, str, str]]:
    """By digest: specification, what the base is called, and digest of the split.

    Raises:
        StoreError: a run that the store does not know.
    """
    wanted = list(digests)
    rows: dict[str, sqlite3.Row] = {}
    for start in range(0, len(wanted), 500):
        part = wanted[start : start + 500]
        marks = ", ".join("?" * len(part))
        rows |= {row["digest"]: row for row in database.read(f"SELECT * FROM runs WHERE digest IN ({marks})", part)}
    unknown = next((digest for digest in wanted if digest not in rows), None)
    if unknown is not None:
        raise StoreError(f"{database.file}: knows no run {unknown[:12]}; list them with `mergebound grid query`")
    return {d: (spec_of(dict(rows[d])), rows[d]["base_digest"], rows[d]["split_digest"]) for d in wanted}


def work(database: Database) -> dict[str, int]:
    """Samples (steps times batch size) of every run that is not done, in the order in which they were added."""
    rows = database.read_tuples(
        "SELECT digest, steps * batch_size FROM runs LEFT JOIN results ON results.run = runs.id "
        "WHERE results.run IS NULL ORDER BY id"
    )
    return {str(digest): int(count) for digest, count in rows}


def sources(database: Database) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """What the runs are made of: splits by task and seed of the split, and bases by their specifications (JSON)."""
    splits = database.read("SELECT DISTINCT task, split_seed, split_digest FROM runs")
    bases = database.read("SELECT DISTINCT base, base_digest FROM runs")
    return (
        {(row["task"], row["split_seed"]): row["split_digest"] for row in splits},
        {row["base"]: row["base_digest"] for row in bases},
    )


def freeze(database: Database, plan: Plan) -> int:
    """Write down how the runs will be done; returns the number of new cohorts.

    A plan that is frozen stays: the same cohorts again change nothing, cohorts of other runs are added at the end.

    Raises:
        StoreError: a cohort of this name has another content, a run that the store does not know, one that belongs to
            another cohort, or an empty cohort.
    """
    described = json.dumps({name: getattr(plan, name) for name in _PLAN}, sort_keys=True)
    with database.writing() as connection:
        frozen = {row["name"]: cohort_of(connection, row) for row in connection.execute("SELECT * FROM cohorts")}
        new = 0
        for cohort in plan.cohorts:
            known = frozen.get(cohort.name)
            if known is not None:
                _check_same(known, cohort)
                continue
            _add_cohort(connection, cohort)
            frozen[cohort.name] = cohort
            new += 1
        if new:
            connection.execute("INSERT INTO meta VALUES ('plan', ?) ON CONFLICT (key) DO NOTHING", (described,))
            connection.execute("ANALYZE runs")
    return new


def read_plan(database: Database) -> Plan | None:
    """The frozen plan; ``None`` before :func:`freeze`."""
    described = database.read("SELECT value FROM meta WHERE key = 'plan'")
    if not described:
        return None
    rows = database.read("SELECT * FROM cohorts ORDER BY id")
    return Plan(tuple(cohort_of(database.connection, row) for row in rows), **json.loads(described[0]["value"]))


def _check_same(known: Cohort, cohort: Cohort) -> None:
    same = (known.runs, known.way, known.chunk) == (cohort.runs, cohort.way, cohort.chunk)
    if not same or _json(known.options) != _json(cohort.options):
        raise StoreError(
            f"cohort {cohort.name}: is frozen with other runs, way or options; a grid that has begun keeps its plan, "
            "so that its bits stay: resume it, or start in an empty folder"
        )


def _add_cohort(connection: sqlite3.Connection, cohort: Cohort) -> None:
    if not cohort.runs or len(set(cohort.runs)) != len(cohort.runs):
        raise StoreError(f"cohort {cohort.name}: must name at least one run, and none twice")
    number = connection.execute(
        "INSERT INTO cohorts (name, way, chunk, options, reason, missing) VALUES (?, ?, ?, ?, ?, 0)",
        (cohort.name, cohort.way, cohort.chunk, _json(cohort.options), cohort.reason),
    ).lastrowid
    for place, digest in enumerate(cohort.runs):
        changed = connection.execute(
            "UPDATE runs SET cohort = ?, place = ? WHERE digest = ? AND cohort IS NULL", (number, place, digest)
        )
        if changed.rowcount != 1:
            raise StoreError(
                f"cohort {cohort.name}: run {digest[:12]} is not in the store, or is in another cohort; add the runs "
                "before the plan, each to one cohort"
            )
    connection.execute(
        "UPDATE cohorts SET missing = (SELECT count(*) FROM runs LEFT JOIN results ON results.run = runs.id "
        "WHERE runs.cohort = cohorts.id AND results.run IS NULL) WHERE id = ?",
        (number,),
    )
    tallies.add(connection, "cohorts", tallies.rows_of(connection, "cohorts", "WHERE c.id = ?", (number,)))


def unplanned(database: Database) -> tuple[str, ...]:
    """Runs that are in no cohort and not done."""
    rows = database.read(
        "SELECT digest FROM runs LEFT JOIN results ON results.run = runs.id "
        "WHERE cohort IS NULL AND results.run IS NULL ORDER BY id"
    )
    return tuple(row["digest"] for row in rows)


def missing(database: Database, digests: Iterable[str] | None = None) -> tuple[str, ...]:
    """Those of some runs (or of all) that are not done, in the order given."""
    if digests is None:
        rows = database.read(
            "SELECT digest FROM runs LEFT JOIN results ON results.run = runs.id WHERE results.run IS NULL ORDER BY id"
        )
        return tuple(row["digest"] for row in rows)
    wanted = list(digests)
    absent: set[str] = set()
    for start in range(0, len(wanted), 500):
        part = wanted[start : start + 500]
        rows = database.read(
            "SELECT digest FROM runs LEFT JOIN results ON results.run = runs.id WHERE results.run IS NULL "
            f"AND digest IN ({', '.join('?' * len(part))})",
            part,
        )
        absent |= {row["digest"] for row in rows}
    return tuple(digest for digest in wanted if digest in absent)


def _json(options: Mapping[str, Any]) -> str:
    return json.dumps(dict(options), sort_keys=True)
