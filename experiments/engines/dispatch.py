"""Who does which cohort: leases of one runner, kept alive by a thread; attempts that failed are counted.

Both engines hand out cohorts through a :class:`Dispatcher`.  Several runners, on one machine or many, may work on one
store; each holds leases of its own.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Self

from experiments.engines.owner import is_gone, owner_name
from experiments.grid.result import Cohort
from experiments.store import Store
from experiments.store.errors import StoreError

_log = logging.getLogger(__name__)
LEASE = 90.0
"""Seconds of a lease; it is renewed every fifth of them."""
ATTEMPTS = 3
"""How often a cohort is tried before it is given up."""


class Dispatcher:
    """Hands out cohorts of a store.  Use as a context manager: leases end with it.

    Args:
        store: open for writing, by this thread.
        attempts: see :data:`ATTEMPTS`.
        seconds: see :data:`LEASE`.
    """

    def __init__(self, store: Store, *, attempts: int = ATTEMPTS, seconds: float = LEASE) -> None:
        self.store = store
        self.owner = owner_name()
        self.failed: dict[str, str] = {}
        self._attempts = attempts
        self._seconds = seconds
        self._tried: dict[str, int] = {}
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="leases")

    def __enter__(self) -> Self:
        self.reclaim()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=self._seconds)
        for name in sorted(self._held):
            try:
                self.store.release(self.owner, name)
            except StoreError as problem:  # leases end by themselves
                _log.warning("cohort %s: its lease could not be given back (%s)", name, problem)
        self._held.clear()

    def next(self) -> Cohort | None:
        """A cohort to work on, held from now on; ``None`` if there is none that is free."""
        cohort = self.store.lease(self.owner, self._seconds, skip=(*self.failed, *self._held))
        if cohort is not None:
            with self._lock:
                self._held.add(cohort.name)
        return cohort

    def finished(self, name: str) -> None:
        """A cohort is done, or was given back."""
        with self._lock:
            self._held.discard(name)
        self.store.release(self.owner, name)

    def went_wrong(self, name: str, error: str, *, again: bool = True) -> bool:
        """An attempt at a cohort failed; returns whether it will be tried again.

        Args:
            name: of the cohort.
            error: what went wrong, one line.
            again: false for errors that will come back.
        """
        self._tried[name] = self._tried.get(name, 0) + 1
        retry = again and self._tried[name] < self._attempts
        if not retry:
            self.failed[name] = error
            self.store.give_up(self.owner, name, self._tried[name], error)
        self.finished(name)
        return retry

    def reclaim(self) -> None:
        """Free what processes of this machine held that do not run any more."""
        for holder in self.store.status().leases:
            if is_gone(holder.owner):
                self.store.release(holder.owner, holder.cohort)

    def over(self) -> bool:
        """Whether nothing is left that this runner or another one may still do."""
        plan_missing = self.store.missing()
        if not plan_missing:
            return True
        if not self.failed:
            return False
        plan = self.store.plan()
        given_up = {run for each in (plan.cohorts if plan else ()) if each.name in self.failed for run in each.runs}
        return set(plan_missing) <= given_up

    def _renew(self) -> None:
        store: Store | None = None
        try:
            while not self._stop.wait(self._seconds / 5):
                with self._lock:
                    held = sorted(self._held)
                for name in held:
                    try:
                        store = store or Store.open(self.store.folder)
                        if not store.renew(self.owner, name, self._seconds) and name in self._held:
                            _log.warning("cohort %s: its lease was taken over; the same bits are stored once", name)
                    except StoreError as error:
                        _log.warning("cohort %s: its lease could not be renewed (%s); trying again", name, error)
        finally:
            if store is not None:
                store.close()
