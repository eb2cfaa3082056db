"""What a runner does when no cohort is free: others work, or nothing is left."""

from __future__ import annotations

import time

from experiments.engines.dispatch import Dispatcher
from experiments.engines.owner import short_name
from experiments.engines.progress import Meter

LOOK = 3.0
"""Seconds between two looks at the store."""


class Waiting:
    """Looks from time to time whether other runners have left something, or everything is done.

    Attributes:
        note: what is waited for, in words.
    """

    def __init__(self, leases: Dispatcher, meter: Meter) -> None:
        self._leases, self._meter = leases, meter
        self._looked: float | None = None
        self.note = ""

    def go_on(self) -> bool:
        """Whether there is anything left to wait for."""
        if self._looked is not None and time.monotonic() - self._looked < LOOK:
            return True
        self._leases.reclaim()
        if self._leases.over():
            return False
        self._looked = time.monotonic()
        missing = len(self._leases.store.missing())
        self._meter.others(missing)
        holders = sorted({short_name(each.owner) for each in self._leases.store.status().leases})
        self.note = f"waiting for {', '.join(holders) or 'a lease to end'} ({missing} runs)"
        return True
