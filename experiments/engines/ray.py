"""A grid on a Ray cluster: the same cohorts, the same work, the same bits; many machines, several GPUs, one terminal.

The driver (this process) holds the leases and hands out cohorts as Ray tasks.  Results stream back run by run.  With
``collect`` the driver commits them, so that workers need no shared disk and the store has one writer; without it
workers commit into the store themselves, which must then lie in a folder that all of them see under the same path.
Data sets lie on every machine, below ``root``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.engines.cohort_job import Known, Together, known_runs
from experiments.engines.dispatch import ATTEMPTS, LEASE, Dispatcher
from experiments.engines.errors import EngineError
from experiments.engines.local import stoppable
from experiments.engines.machines import Machines
from experiments.engines.measured import RESAMPLES
from experiments.engines.needs import memory_needed
from experiments.engines.progress import Meter, Outcome, Progress, Watch, meter_of
from experiments.engines.ray_cluster import REACH_LIMIT, START_LIMIT, Share, connected, imported, room
from experiments.engines.ray_tasks import collected, stored
from experiments.engines.waiting import Waiting
from experiments.grid.result import Cohort
from experiments.store import Store
from experiments.store.errors import StoreError
from experiments.tasks.npz8 import VARIABLE
from theory.errors import MergeboundError

__all__ = [
    "PIECE_LIMIT",
    "REACH_LIMIT",
    "START_LIMIT",
    "Share",
    "connected",
    "imported",
    "room",
    "run_ray",
]
_log = logging.getLogger(__name__)
PIECE_LIMIT = 24 * 3600.0
"""Seconds that a cohort's next run may take to arrive before the cohort is given up."""
_TICK = 0.5


@dataclass
class _Running:
    cohort: Cohort
    stream: Any
    heard: float = field(default_factory=time.monotonic)
    started: bool = False


def run_ray(
    store_folder: str | Path,
    root: str | Path | None = None,
    *,
    address: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    share: Share | None = None,
    collect: bool = True,
    resamples: int = RESAMPLES,
    attempts: int = ATTEMPTS,
    lease: float = LEASE,
    piece_limit: float = PIECE_LIMIT,
    watch: Watch | None = None,
) -> Outcome:
    """Do what is missing in a store whose plan is frozen, on a Ray cluster.

    Args:
        store_folder: of the store, as the driver (and without ``collect`` every worker) sees it.
        root: of the data sets, on every machine; default: what ``MERGEBOUND_DATA`` names here.
        address: of the cluster (``auto``, ``host:6379``, ``ray://host:10001``); without one, Ray is started here.
        device: where cohorts are trained.
        workers: tasks at a time; default: as many as the cluster has room for.
        share: of a machine for each task; default one CPU, and one GPU where the device is one.
        collect: see above.
        resamples, attempts, lease: see :func:`experiments.engines.local.run_local`.
        piece_limit: see :data:`PIECE_LIMIT`.
        watch: is told the progress about twice a second.

    Raises:
        EngineError: Ray is not installed, the cluster cannot be reached or has no room for a task, or no plan.
        StoreError: no store, or the disk refuses.
        KeyboardInterrupt: it was stopped; finished runs are kept.
    """
    ray = imported()
    taken = share or Share(gpus=0.0 if device == "cpu" else 1.0)
    with Store.open(store_folder) as store, connected(ray, address, workers), stoppable():  # Ray sets a handler, too
        if store.plan() is None:
            raise EngineError(f"{store_folder}: its plan is not made yet; use `mergebound grid run` or `grid resume`")
        most = workers or room(ray, taken)
        with Dispatcher(store, attempts=attempts, seconds=lease) as leases:
            place = str(root or os.environ.get(VARIABLE) or "") or None
            driver = _Driver(ray, leases, store, place, device, most, taken, collect, resamples, piece_limit)
            try:
                return driver.run(watch)
            finally:
                driver.end()


class _Driver:
    """The tasks of one session."""

    def __init__(
        self,
        ray: Any,
        leases: Dispatcher,
        store: Store,
        root: str | None,
        device: str,
        most: int,
        share: Share,
        collect: bool,
        resamples: int,
        piece_limit: float,
    ) -> None:
        self._ray, self._leases, self._store = ray, leases, store
        self._root, self._device, self._most, self._share = root, device, most, share
        self._collect, self._resamples, self._limit = collect, resamples, piece_limit
        self._running: list[_Running] = []
        self._arrived = Together(store, leases.owner)
        self._bases: dict[str, Any] = {}
        self._machines = Machines(store)
        self._meter: Meter = meter_of(store)
        self._waiting = Waiting(leases, self._meter)
        self._began = time.monotonic()

    def run(self, watch: Watch | None) -> Outcome:
        """Until nothing is left to do."""
        while self._hand_out():
            self._listen()
            if watch is not None:
                watch(self._progress())
        outcome = self._meter.outcome(self._store, self._leases.failed, time.monotonic() - self._began)
        if watch is not None:
            watch(self._progress())
        return outcome

    def end(self) -> None:
        """Stop what runs; what has arrived is kept."""
        try:
            self._commit()
        except StoreError as error:
            _log.warning("%s", error)
        for each in self._running:
            try:
                self._ray.cancel(each.stream, force=True)
            except Exception as error:  # the cluster may be gone
                _log.debug("a task could not be cancelled: %s", error)
        self._running.clear()

    def _progress(self) -> Progress:
        return self._meter.now(
            busy=len(self._running), failed=len(self._leases.failed), note="" if self._running else self._waiting.note
        )

    def _hand_out(self) -> bool:
        while len(self._running) < self._most:
            cohort = self._leases.next()
            if cohort is None:
                return bool(self._running) or self._waiting.go_on()
            self._submit(cohort)
        return True

    def _submit(self, cohort: Cohort) -> None:
        known = known_runs(self._store, cohort.runs)
        wanted = self._store.missing(cohort)
        options: dict[str, Any] = {
            "num_cpus": self._share.cpus,
            "max_retries": 0,  # the dispatcher counts attempts
            "num_returns": "streaming",
            "scheduling_strategy": "SPREAD",
            "name": f"cohort {cohort.name}",
        }
        if self._share.gpus:
            options["num_gpus"] = self._share.gpus
        if memory := self._memory(cohort, known):
            options["memory"] = memory
        if self._collect:
            bases = {digest: self._base(digest) for digest in dict.fromkeys(each.base for each in known.values())}
            task = self._ray.remote(collected).options(**options)
            stream = task.remote(cohort, known, tuple(wanted), bases, self._root, self._device, self._resamples)
        else:
            task = self._ray.remote(stored).options(**options)
            folder = str(self._store.folder.resolve())
            stream = task.remote(folder, cohort, self._root, self._leases.owner, self._device, self._resamples)
        self._running.append(_Running(cohort, stream))

    def _base(self, digest: str) -> Any:
        if digest not in self._bases:
            self._bases[digest] = self._ray.put(self._store.base(digest))
        return self._bases[digest]

    def _memory(self, cohort: Cohort, known: Mapping[str, Known]) -> int:
        if self._share.memory is not None:
            return self._share.memory
        largest = max(
            (int(node["Resources"].get("memory", 0)) for node in self._ray.nodes() if node["Alive"]), default=0
        )
        return min(memory_needed(cohort, known, self._store), largest)

    def _listen(self) -> None:
        """Results of tasks, for at most a tick."""
        if not self._running:
            time.sleep(_TICK)
            return
        by_stream = {each.stream: each for each in self._running}
        ready, _ = self._ray.wait(list(by_stream), num_returns=len(by_stream), timeout=_TICK, fetch_local=False)
        for stream in ready:
            self._hear(by_stream[stream])
        if self._arrived.due():
            self._commit()
        for each in list(self._running):
            if time.monotonic() - each.heard > self._limit:
                self._ray.cancel(each.stream, force=True)
                self._failed(each, f"nothing arrived for {self._limit:.0f} s", again=True)

    def _hear(self, each: _Running) -> None:
        try:
            content = self._ray.get(next(each.stream), timeout=self._limit)
        except StopIteration:
            self._commit()
            self._running.remove(each)
            self._leases.finished(each.cohort.name)
            return
        except Exception as error:
            self._wrong(each, error)
            return
        each.heard = time.monotonic()
        if isinstance(content, str):  # the task has begun, on this machine
            self._meter.begin()
            self._machines.heard(content)
        elif self._collect:
            self._arrived.add(*content)
        else:
            self._meter.add(content)

    def _commit(self) -> None:
        """Commit the results that have arrived, together."""
        for done in self._arrived.commit():
            self._meter.add(done)

    def _wrong(self, each: _Running, error: Exception) -> None:
        from experiments.engines.worker import is_of_disk, said, worth_another

        cause = getattr(error, "cause", None)
        if isinstance(cause, MergeboundError):
            if is_of_disk(cause):
                raise StoreError(str(cause)) from error
            self._failed(each, said(cause), again=worth_another(cause))
        elif isinstance(cause, Exception):
            self._failed(each, said(cause), again=True)
        else:  # Ray's own: the worker or its machine died, or memory ran out
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            self._failed(each, f"{type(error).__name__}: {first}", again=True)

    def _failed(self, each: _Running, error: str, *, again: bool) -> None:
        self._commit()
        self._running.remove(each)
        retried = self._leases.went_wrong(each.cohort.name, error, again=again)
        _log.log(
            logging.INFO if retried else logging.WARNING,
            "cohort %s %s: %s", each.cohort.name, "is tried again" if retried else "is given up", error,
        )  # fmt: skip
