"""A store: one folder with the specifications, weights, logs and measurements of a grid of runs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from experiments.bases.base import Base
from experiments.finetune.loop import TrainingLog
from experiments.grid.result import Cohort, Plan, RunResult
from experiments.grid.run_spec import RunSpec
from experiments.store import bases, creating, leases, planned, reading, table, tallies
from experiments.store.columns import spec_of
from experiments.store.commits import commit
from experiments.store.content import TaskVectors
from experiments.store.database import PATIENCE, Database, Mode
from experiments.store.errors import StoreError
from experiments.store.garbage import Garbage, collect
from experiments.store.given_up import give_up
from experiments.store.journal import Journal
from experiments.store.machines import note_machine
from experiments.store.merges import forget_merges
from experiments.store.tables import Tables
from experiments.store.verify import Verification, forget, verify

if TYPE_CHECKING:
    import pandas as pd

LEASE = 120.0
"""Seconds of a lease unless said otherwise."""


class Store(Tables):
    """A store that is open in this process; threads and other processes open their own.

    ``with Store.open(folder) as store: frame = store.frame()``
    """

    def __init__(self, folder: Path, database: Database) -> None:
        super().__init__(folder, database)
        self._states = bases.BaseStates(database, folder)
        self._kept = {row["key"]: row["value"] for row in database.read("SELECT key, value FROM meta")}
        if not {"meta", "task_vectors", "durable"} <= set(self._kept):
            raise StoreError(f"{database.file}: is not a complete store; create it again with Store.create")

    @classmethod
    def create(
        cls,
        folder: str | Path,
        meta: Mapping[str, Any] | None = None,
        *,
        task_vectors: TaskVectors = "lossless",
        durable: bool = True,
        journal: Journal = "auto",
        patience: float = PATIENCE,
        exist_ok: bool = False,
    ) -> Store:
        """Make a store.

        Args:
            folder: made where it does not exist.
            meta: about the grid, JSON data; read back as :attr:`meta`.
            task_vectors: ``lossless`` (every bit comes back) or ``bfloat16`` (x - x_0 of the backbone is rounded).
            durable: wait for the disk before a run counts as done; without it, runs that were committed in the last
                seconds before a power cut may be damaged (a killed process loses nothing either way).
            journal: ``auto`` takes a write-ahead log where the file system can.
            patience: seconds to wait for other processes.
            exist_ok: open a store that is there, as it is.

        Raises:
            StoreError: there is one already, or the folder cannot be written to.
        """
        folder = Path(folder)
        database = creating.create(
            folder, meta or {}, task_vectors, durable=durable, journal=journal, patience=patience, exist_ok=exist_ok
        )
        return cls._of(folder, database)

    @classmethod
    def open(cls, folder: str | Path, mode: Mode = "w", *, patience: float = PATIENCE) -> Store:
        """Open a store that is there; ``mode`` ``r`` never writes to the folder's files.

        Raises:
            StoreError: no store, a newer version's, damaged, or it may not be read or written.
        """
        folder = Path(folder)
        return cls._of(folder, creating.find(folder, mode, patience))

    @classmethod
    def _of(cls, folder: Path, database: Database) -> Store:
        try:
            return cls(folder, database)
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        """Close the database; what was committed stays."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def meta(self) -> dict[str, Any]:
        """What :meth:`create` was told about the grid."""
        found: dict[str, Any] = json.loads(self._kept["meta"])
        return found

    def set_meta(self, meta: Mapping[str, Any]) -> None:
        """Replace what :meth:`create` was told about the grid: of a grid that has grown."""
        text = json.dumps(dict(meta), sort_keys=True)
        with self._database.writing() as connection:
            connection.execute("UPDATE meta SET value = ? WHERE key = 'meta'", (text,))
        self._kept["meta"] = text

    @property
    def task_vectors(self) -> str:
        """``lossless`` or ``bfloat16``."""
        return str(self._kept["task_vectors"])

    @property
    def journal(self) -> str:
        """``wal``, or ``delete`` on file systems that several machines share."""
        return str(self._database.read("PRAGMA journal_mode")[0][0])

    # what is to be done

    def add_base(self, base: Base) -> str:
        """Keep x_0, once; task vectors of runs from it are stored against it.

        Returns:
            What the base is called here: its digest; with an addition where another network with the same tensors has
            that name (another activation from the same random start, other options).
        """
        return bases.add_base(self._database, self.folder, base)

    def base(self, digest: str) -> Base:
        """A base that was added, by what :meth:`add_base` called it.

        Raises:
            MergeboundError: not there, or damaged.
        """
        return bases.open_base(self._database, self.folder, digest)

    def add_runs(
        self, runs: Mapping[str, RunSpec], base: str | Mapping[str, str], split: str | Mapping[str, str]
    ) -> int:
        """Add runs by their digests, with the names of their bases and the digests of their splits (all, or by run).

        See :func:`experiments.store.planned.add_runs`.
        """
        return planned.add_runs(self._database, runs, base, split)

    def freeze(self, plan: Plan) -> int:
        """Write down how runs will be done; see :func:`experiments.store.planned.freeze`."""
        return planned.freeze(self._database, plan)

    def plan(self) -> Plan | None:
        """The frozen plan; ``None`` before :meth:`freeze`."""
        return planned.read_plan(self._database)

    def spec(self, digest: str) -> RunSpec:
        """The specification of a run."""
        return spec_of(dict(self._run(digest)))

    def digests(self, digest: str) -> tuple[str, str]:
        """What the base of a run is called, and the digest of its split."""
        row = self._run(digest)
        return row["base_digest"], row["split_digest"]

    def known(self, digests: Iterable[str]) -> dict[str, tuple[RunSpec, str, str]]:
        """Specification, base and split of some runs at once; see :func:`experiments.store.planned.known`."""
        return planned.known(self._database, digests)

    def work(self) -> dict[str, int]:
        """Samples that each run that is not done will see; see :func:`experiments.store.planned.work`."""
        return planned.work(self._database)

    def runs(self) -> tuple[str, ...]:
        """Digests of all runs, done or not, in the order in which they were added."""
        return tuple(row["digest"] for row in self._database.read("SELECT digest FROM runs ORDER BY id"))

    def sources(self) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
        """What the runs are made of; see :func:`experiments.store.planned.sources`."""
        return planned.sources(self._database)

    def missing(self, runs: Cohort | Iterable[str] | None = None) -> tuple[str, ...]:
        """Those of a cohort (of some runs, of all) that are not done."""
        return planned.missing(self._database, runs.runs if isinstance(runs, Cohort) else runs)

    def unplanned(self) -> tuple[str, ...]:
        """Runs that are not done and in no cohort of the plan."""
        return planned.unplanned(self._database)

    # who does it

    def lease(self, owner: str, seconds: float = LEASE, *, skip: Iterable[str] = ()) -> Cohort | None:
        """Take a cohort with runs to do that nobody holds; see :mod:`experiments.store.leases`."""
        return leases.lease(self._database, owner, seconds, frozenset(skip))

    def renew(self, owner: str, cohort: Cohort | str, seconds: float | None = None) -> bool:
        """Extend a lease; False if it was lost."""
        return leases.renew(self._database, owner, _name(cohort), seconds)

    def release(self, owner: str, cohort: Cohort | str) -> bool:
        """Give a lease back; False if it was not this owner's any more."""
        return leases.release(self._database, owner, _name(cohort))

    def give_up(self, owner: str, cohort: Cohort | str, attempts: int, error: str) -> None:
        """Remember that a runner tries a cohort no more; see :mod:`experiments.store.given_up`."""
        give_up(self._database, _name(cohort), owner, attempts, error)

    def note_machine(self, machine: str) -> bool:
        """Remember a machine other than the plan's that runs are trained on; returns whether it was not known."""
        return note_machine(self._database, machine)

    def keep_lease(
        self, owner: str, cohort: Cohort | str, seconds: float = LEASE
    ) -> AbstractContextManager[leases.Heartbeat]:
        """Renew a lease from a thread while the body of ``with`` works."""
        return leases.keep_lease(self._database.file, owner, _name(cohort), seconds)

    # what was done

    def commit(self, digest: str, result: RunResult, *, owner: str = "") -> bool:
        """Store one result; True if it was new, False if the same bits were there.  See :meth:`commit_many`."""
        return self.commit_many({digest: result}, owner=owner) == 1

    def commit_many(self, results: Mapping[str, RunResult], *, owner: str = "") -> int:
        """Store results in one transaction: all or none; see :func:`experiments.store.commits.commit`."""
        return commit(
            self._database,
            self.folder,
            results,
            owner,
            base_of=self._states,
            vectors=self.task_vectors,  # type: ignore[arg-type]
            durable=json.loads(self._kept["durable"]),
        )

    def state(self, digest: str, step: int | None = None) -> dict[str, Tensor]:
        """The full state dict of a run at a checkpoint, the last one where no step is given.

        Raises:
            StoreError: the run is not done, has no such checkpoint, or its file is damaged (named).
        """
        return reading.state(self._database, self.folder, self._states, digest, step)

    def log(self, digest: str) -> TrainingLog:
        """The training log of a run."""
        return reading.log(self._database, self.folder, digest)

    def result(self, digest: str) -> RunResult:
        """Everything that a run left, as it was committed."""
        return reading.result(self._database, self.folder, self._states, digest)

    def outcome(self, digest: str) -> Literal["finished", "diverged"] | None:
        """How a run ended; ``None`` if it is not done."""
        return reading.outcome(self._database, self.folder, digest)

    def metrics(self, digest: str) -> list[dict[str, Any]]:
        """Rows of numbers of a run; what was not measured is ``None``, NaN is NaN."""
        return table.metric_rows(self._database, self._run(digest)["id"])

    # care

    def gc(self, *, dry_run: bool = False, older_than: float = 3600.0) -> Garbage:
        """Delete files that no run needs; see :func:`experiments.store.garbage.collect`."""
        return collect(self._database, self.folder, dry_run=dry_run, older_than=older_than)

    def verify(
        self,
        rerun: Callable[[str, RunSpec], RunResult] | None = None,
        *,
        sample: int = 0,
        seed: int = 0,
        deep: bool = False,
    ) -> Verification:
        """Re-hash everything, and run a sample again; see :func:`experiments.store.verify.verify`."""
        return verify(self, self._database, rerun, sample=sample, seed=seed, deep=deep)

    def forget(self, digests: Iterable[str]) -> int:
        """Make runs absent, so that they are done again; returns how many were there."""
        return forget(self._database, digests)

    def forget_merges(self, keys: Iterable[str]) -> int:
        """Make rows about merges absent, so that they are measured again; returns how many were there."""
        return forget_merges(self._database, keys)

    def accept_losses(self) -> None:
        """Count what is there anew: what is lost can then be done again; see :mod:`experiments.store.tallies`."""
        tallies.repair(self._database)

    def _run(self, digest: str) -> sqlite3.Row:
        return reading.run_row(self._database, self.folder, digest)


def _name(cohort: Cohort | str) -> str:
    return cohort if isinstance(cohort, str) else cohort.name


def open_results(path: str | Path) -> pd.DataFrame:
    """The results of a grid as a data frame, one row per run and checkpoint: ``open_results("out/grid")``.

    Raises:
        StoreError: no store there.
    """
    with Store.open(path, "r") as store:
        return store.frame()
