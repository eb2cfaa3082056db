"""A grid on this machine: one-thread worker processes that are watched, restarted, and never outlive the command.

The parent holds the leases (:mod:`experiments.engines.dispatch`) and gives cohorts to its workers; workers commit runs
themselves.  A worker that dies (lack of memory, a fault in native code) is replaced, and its cohort tried again at most
:data:`~experiments.engines.dispatch.ATTEMPTS` times, then given up with its error while the others go on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from experiments.engines.dispatch import ATTEMPTS, LEASE, Dispatcher
from experiments.engines.errors import EngineError
from experiments.engines.measured import RESAMPLES
from experiments.engines.progress import Meter, Outcome, Progress, Watch, meter_of
from experiments.engines.waiting import Waiting
from experiments.engines.worker import WorkerSpec, work
from experiments.grid.result import Cohort
from experiments.inputs.memory import available_bytes
from experiments.runner import one_thread_children
from experiments.store import Store
from experiments.store.errors import StoreError

_log = logging.getLogger(__name__)
StartMethod = Literal["spawn", "fork"]
SILENCE = 900.0
"""Seconds without a result and without processor time after which a worker counts as stuck."""
GRACE = 10.0
"""Seconds that workers have to stop before they are killed."""
_ASK = 0.5
"""Seconds between two requests to stop: a process that was just forked may lose the first one."""
_TICK = 0.5
_START_LIMIT = 300.0
_MOVING = 0.5


@dataclass
class _Worker:
    process: Any
    connection: Connection
    cohort: Cohort | None = None
    ready: bool = False
    heard: float = field(default_factory=time.monotonic)
    processor: float = 0.0


def run_local(
    store_folder: str | Path,
    root: str | Path | None = None,
    *,
    device: str = "cpu",
    workers: int | None = None,
    resamples: int = RESAMPLES,
    attempts: int = ATTEMPTS,
    lease: float = LEASE,
    silence: float = SILENCE,
    start: StartMethod = "spawn",
    watch: Watch | None = None,
) -> Outcome:
    """Do what is missing in a store whose plan is frozen.

    Returns when every run is stored, by this runner or another one, or belongs to a cohort that was given up.  Ctrl-C
    and SIGTERM stop it; what was stored stays.

    Args:
        store_folder: of the store.
        root: of the data sets; default: what ``MERGEBOUND_DATA`` names.
        device: where workers train.
        workers: processes; default: one per core, one on an accelerator.
        resamples: of the bootstrap over test images.
        attempts: at a cohort.
        lease: seconds of a lease.
        silence: see :data:`SILENCE`.
        start: how processes are started; ``fork`` is quick, but only for a process without threads of its own.
        watch: is told the progress about twice a second.

    Raises:
        EngineError: workers cannot be started.
        StoreError: no store, no plan, or the disk refuses.
        KeyboardInterrupt: it was stopped.
    """
    with Store.open(store_folder) as store, stoppable(), Dispatcher(store, attempts=attempts, seconds=lease) as leases:
        if store.plan() is None:
            raise EngineError(f"{store_folder}: its plan is not made yet; use `mergebound grid run` or `grid resume`")
        crew = _Crew(leases, store, root, device, workers, resamples, silence, start)
        try:
            return crew.run(watch)
        finally:
            crew.end()


class _Crew:
    """The workers of one session, and what they do."""

    def __init__(
        self,
        leases: Dispatcher,
        store: Store,
        root: str | Path | None,
        device: str,
        workers: int | None,
        resamples: int,
        silence: float,
        start: StartMethod,
    ) -> None:
        self._leases, self._store, self._silence = leases, store, silence
        self._most = workers or default_workers(device)
        free = available_bytes(torch.device(device))
        memory = None if free is None else int(0.5 * free / self._most)
        self._spec = WorkerSpec(
            str(store.folder), None if root is None else str(root), device, leases.owner, resamples, os.getpid(), memory
        )
        self._context: Any = multiprocessing.get_context(start)
        self._workers: list[_Worker] = []
        self._never_ready = 0
        self._meter = meter_of(store)
        self._wanted = min(self._most, _open_cohorts(store, self._meter))
        self._waiting = Waiting(leases, self._meter)
        self._began = time.monotonic()

    def run(self, watch: Watch | None) -> Outcome:
        """Until nothing is left to do."""
        while self._wanted and self._hand_out():
            self._listen()
            self._check()
            if watch is not None:
                watch(self._progress())
        outcome = self._meter.outcome(self._store, self._leases.failed, time.monotonic() - self._began)
        if watch is not None:
            watch(self._progress())
        return outcome

    def end(self) -> None:
        """Stop every worker: asked, again and again, and killed after :data:`GRACE` seconds."""
        until = time.monotonic() + GRACE
        alive = [worker.process for worker in self._workers if worker.process.is_alive()]
        while alive and time.monotonic() < until:
            for process in alive:
                process.terminate()
            wait([process.sentinel for process in alive], timeout=_ASK)
            alive = [process for process in alive if process.is_alive()]
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join(timeout=GRACE)
            worker.connection.close()
        self._workers.clear()

    def _progress(self) -> Progress:
        busy = sum(worker.cohort is not None for worker in self._workers)
        return self._meter.now(busy=busy, failed=len(self._leases.failed), note="" if busy else self._waiting.note)

    def _hand_out(self) -> bool:
        """Start workers that are missing and give cohorts to idle ones; returns whether anything is left."""
        while len(self._workers) < self._wanted:
            self._start()
        for worker in [each for each in self._workers if each.ready and each.cohort is None]:
            cohort = self._leases.next()
            if cohort is None:
                return any(each.cohort for each in self._workers) or self._waiting.go_on()
            self._send(worker, cohort)
        return True

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        with one_thread_children():
            process = self._context.Process(target=work, args=(self._spec, theirs), daemon=True, name="grid worker")
            process.start()
        theirs.close()  # so that a worker's death is an end of file here
        self._workers.append(_Worker(process, ours))

    def _send(self, worker: _Worker, cohort: Cohort) -> None:
        worker.cohort = cohort
        worker.heard = time.monotonic()
        try:
            worker.connection.send(("do", cohort))
        except OSError:
            self._lost(worker)

    def _listen(self) -> None:
        """Messages of workers, for at most a tick."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout=_TICK):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                while worker.connection.poll():
                    self._hear(worker, worker.connection.recv())
            except (EOFError, OSError):
                self._lost(worker)

    def _hear(self, worker: _Worker, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind == "alive":
            if content[0] - worker.processor >= _MOVING:
                worker.processor, worker.heard = content[0], time.monotonic()
            return
        worker.heard = time.monotonic()
        if kind == "ready":
            worker.ready, self._never_ready = True, 0
            self._meter.begin()
        elif kind == "run":
            self._meter.add(content[0])
        elif kind == "done":
            worker.cohort = None
            self._leases.finished(content[0])
        elif kind == "failed":
            worker.cohort = None
            name, error, again = content
            self._gave_up(name, error, again)
        elif kind == "disk":
            raise StoreError(content[0])

    def _gave_up(self, name: str, error: str, again: bool) -> None:
        if not self._leases.went_wrong(name, error, again=again):
            _log.warning("cohort %s is given up: %s", name, error)

    def _lost(self, worker: _Worker) -> None:
        """A worker has died, or is made to: its cohort is tried again by another one."""
        self._workers.remove(worker)
        worker.process.join(timeout=GRACE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join(timeout=GRACE)
        worker.connection.close()
        code = worker.process.exitcode
        if not worker.ready:
            self._never_ready += 1
            if self._never_ready >= 3:
                raise EngineError(f"three workers ended (exit code {code}) before they were ready; try --workers 1")
        if worker.cohort is not None:
            self._gave_up(worker.cohort.name, _why(code), True)

    def _check(self) -> None:
        """Workers that do nothing are ended."""
        now = time.monotonic()
        for worker in list(self._workers):
            waits = worker.cohort is None and worker.ready
            limit = self._silence if worker.ready else max(self._silence, _START_LIMIT)
            if not waits and now - worker.heard > limit:
                _log.warning("a worker did nothing for %.0f seconds and is replaced", limit)
                worker.process.kill()
                self._lost(worker)


def _why(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "its worker was killed, perhaps for lack of memory; use fewer --workers"
    if code is not None and code < 0:
        return f"its worker ended by signal {-code}"
    return f"its worker ended with exit code {code}"


def _open_cohorts(store: Store, meter: Meter) -> int:
    """Cohorts that are not done."""
    plan = store.plan()
    return sum(any(run in meter.work for run in cohort.runs) for cohort in plan.cohorts) if plan is not None else 0


def default_workers(device: str) -> int:
    """One per core that this process may use; one on an accelerator, which cohorts fill."""
    if device != "cpu":
        return 1
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:
        return max(1, os.cpu_count() or 1)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGTERM does what Ctrl-C does: finished runs are kept and no worker stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
