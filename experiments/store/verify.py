"""Whether a store still holds what was put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from experiments.bases.base import tensors_digest
from experiments.grid.result import RunResult
from experiments.grid.run_spec import RunSpec
from experiments.store import tallies
from experiments.store.blobs import blob_path, check_blob
from experiments.store.content import pack
from experiments.store.database import Database
from experiments.store.errors import StoreError
from experiments.store.recorded import check_recorded
from experiments.store.table import metric_rows
from experiments.store.tallies import check_tallies
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.store.store import Store


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        blobs: files that were hashed.
        problems: one sentence each; files are named.
        damaged: digests of the runs whose file is missing or damaged, or whose numbers were altered: those that to
            forget and to do again would help.
        rerun: digests of the runs that were done again.
        unequal: of those, the ones that gave other bits or other metrics, with what differs.
        renamed: digests of the runs whose specification is not the one that the digest names; doing them again would
            not help.
        merges: keys of the rows about merges that were altered.
        unsealed_runs, unsealed_merges: rows that older versions wrote, without a seal to compare with.
        remeasured: of the runs that were done again, those whose metrics were compared.
        lost: tables that lack rows that were written, or have others (:mod:`experiments.store.tallies`).
        counted_since: when the rows of a store of an older version were counted, in seconds since 1970: losses before
            cannot be seen; ``None`` where they were counted from the start.
        counted: whether rows were counted at all.
    """

    blobs: int
    problems: tuple[str, ...]
    damaged: tuple[str, ...]
    rerun: tuple[str, ...]
    unequal: tuple[tuple[str, str], ...]
    renamed: tuple[str, ...] = ()
    merges: tuple[str, ...] = ()
    unsealed_runs: int = 0
    unsealed_merges: int = 0
    remeasured: int = 0
    lost: tuple[str, ...] = ()
    counted_since: float | None = None
    counted: bool = True

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.unequal


def verify(
    store: Store,
    database: Database,
    rerun: Callable[[str, RunSpec], RunResult] | None = None,
    *,
    sample: int = 0,
    seed: int = 0,
    deep: bool = False,
) -> Verification:
    """Hash every file, check the database row by row, and do a random sample of the runs again.

    Specifications are compared with the digests that name the runs; metrics, scalars of logs and rows about merges with
    the seals that were stored with them (:mod:`experiments.store.seals`); which rows there are with the tallies
    (:mod:`experiments.store.tallies`).

    Args:
        store: to verify.
        database: of the store.
        rerun: does a run again, given its digest and specification; needed with ``sample``.  Metrics that it gives
            are compared too, number by number.
        sample: how many runs.
        seed: names the sample.
        deep: also unpack every state and compare the digests of its tensors.
    """
    if sample < 0 or (sample and rerun is None):
        raise StoreError(f"verify: a sample of {sample} runs needs a number above 0 and a way to run them")
    problems = [f"{database.file}: {row[0]}" for row in database.read("PRAGMA integrity_check") if row[0] != "ok"]
    problems += [
        f"{database.file}: a row of {row[0]} has no parent" for row in database.read("PRAGMA foreign_key_check")
    ]
    recorded = check_recorded(database, store.meta.get("numerics"))
    problems += recorded.problems
    tallied = check_tallies(database)
    problems += tallied.problems
    rows = database.read(
        "SELECT r.digest, s.blob, r.base_digest, s.run FROM results s JOIN runs r ON r.id = s.run ORDER BY s.run"
    )
    damaged = []
    hashed: dict[str, str | None] = {}
    bases = database.read("SELECT digest, blob FROM bases ORDER BY digest")
    bad_bases = set()
    for base in bases:
        reason = check_blob(store.folder, base["blob"])
        if reason is None:
            reason = _reason(lambda digest=base["digest"]: store.base(digest))  # type: ignore[misc]
        if reason is not None:
            bad_bases.add(base["digest"])
            problems.append(f"{reason}; it is the base {base['digest'][:12]}, copy it back from elsewhere")
    for row in rows:
        if row["blob"] not in hashed:
            hashed[row["blob"]] = check_blob(store.folder, row["blob"])
        reason = hashed[row["blob"]]
        if reason is None and deep and row["base_digest"] not in bad_bases:
            reason = _deep(store, database, row["digest"], row["run"])
        if reason is not None:
            damaged.append(row["digest"])
            problems.append(f"{reason}; it holds run {row['digest'][:12]}")
    picked: list[str] = []
    unequal = []
    remeasured = 0
    if sample and rerun is not None:
        without = {*damaged, *recorded.renamed}
        whole = [row["digest"] for row in rows if row["digest"] not in without]
        chosen = np.random.default_rng([seed, 0x5EED]).choice(len(whole), min(sample, len(whole)), replace=False)
        picked = [whole[int(index)] for index in sorted(chosen)]
        for digest in picked:
            again = rerun(digest, store.spec(digest))
            difference = _compare(store, database, digest, again)
            if not difference and again.metrics:
                remeasured += 1
                difference = _measured(database, digest, again)
            if difference:
                unequal.append((digest, difference))
    renamed = set(recorded.renamed)
    bad = dict.fromkeys(digest for digest in (*damaged, *recorded.numbers) if digest not in renamed)
    return Verification(
        len(hashed) + len(bases),
        tuple(problems),
        tuple(bad),
        tuple(picked),
        tuple(unequal),
        tuple(recorded.renamed),
        tuple(recorded.merges),
        recorded.unsealed_runs,
        recorded.unsealed_merges,
        remeasured,
        tallied.lost,
        tallied.since,
        tallied.known,
    )


def forget(database: Database, digests: Iterable[str]) -> int:
    """Make runs absent; their files are left to ``gc``."""
    count = 0
    with database.writing() as connection:
        for digest in digests:
            row = connection.execute(
                "SELECT r.id, r.cohort FROM runs r JOIN results s ON s.run = r.id WHERE r.digest = ?", (digest,)
            ).fetchone()
            if row is None:
                continue
            number = (row["id"],)
            connection.execute(
                "DELETE FROM metrics WHERE checkpoint IN (SELECT id FROM checkpoints WHERE run = ?)", number
            )
            connection.execute("DELETE FROM checkpoints WHERE run = ?", number)
            tallies.take(connection, "conflicts", tallies.rows_of(connection, "conflicts", "WHERE run = ?", number))
            connection.execute("DELETE FROM conflicts WHERE run = ?", number)
            connection.execute("DELETE FROM results WHERE run = ?", number)
            tallies.take(connection, "results", [(digest,)])
            connection.execute("UPDATE cohorts SET missing = missing + 1 WHERE id = ?", (row["cohort"],))
            count += 1
    return count


def _deep(store: Store, database: Database, digest: str, run: int) -> str | None:
    for row in database.read("SELECT step, digest FROM checkpoints WHERE run = ? ORDER BY step", (run,)):
        try:
            if tensors_digest(store.state(digest, row["step"])) != row["digest"]:
                blob = database.read("SELECT blob FROM results WHERE run = ?", (run,))[0]["blob"]
                return f"{blob_path(store.folder, blob)}: step {row['step']} does not unpack to what was stored"
        except MergeboundError as error:
            return str(error)
    return _reason(lambda: store.log(digest))


def _reason(action: Callable[[], object]) -> str | None:
    try:
        action()
    except MergeboundError as error:
        return str(error)
    return None


def _compare(store: Store, database: Database, digest: str, again: RunResult) -> str:
    """What differs between a stored run and the same run done again; empty if nothing does."""
    row = database.read("SELECT s.* FROM results s JOIN runs r ON r.id = s.run WHERE r.digest = ?", (digest,))[0]
    packed = pack(again, {})
    if packed.content == row["content"]:
        return ""
    if again.outcome != row["outcome"]:
        return f"the outcome: {row['outcome']} is stored, now it {again.outcome}"
    stored = database.read("SELECT step, digest FROM checkpoints WHERE run = ? ORDER BY step", (row["run"],))
    if [r["step"] for r in stored] != list(packed.digests):
        return "the steps of the checkpoints"
    if store.task_vectors == "lossless":
        for kept in stored:
            if packed.digests[kept["step"]] != kept["digest"]:
                return f"the weights at step {kept['step']}"
        return "the training log"
    return "the weights or the training log"


def _measured(database: Database, digest: str, again: RunResult) -> str:
    """What differs between the stored metrics of a run and those that were measured again; empty if nothing does.

    A bound of an interval that one of the two lacks is not compared: how many bootstrap samples there were is no part
    of a run.
    """
    number = database.read("SELECT id FROM runs WHERE digest = ?", (digest,))[0]["id"]
    stored = {(row["step"], row["part"], row["name"]): row for row in metric_rows(database, number)}
    for row in again.metrics:
        place = (row["step"], row.get("part", "test"), row["name"])
        words = f"the metric {place[1]} {place[2]} at step {place[0]}"
        if place not in stored:
            return f"{words}: it is measured now, and is not in the store"
        kept = stored.pop(place)
        for name in ("value", "low", "high", "n"):
            before, now = kept[name], row.get(name)
            if None in (before, now) or before == now or (before != before and now != now):
                continue
            return f"{words}: {name} {before!r} is stored, {now!r} is measured now"
    if stored:
        step, part, name = next(iter(stored))
        return f"the metric {part} {name} at step {step}: it is in the store, and is not measured now"
    return ""
