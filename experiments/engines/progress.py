"""How far a grid is: counted as results come in, with rate and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from experiments.engines.cohort_job import Done
from experiments.store import Store


@dataclass(frozen=True)
class Progress:
    """A moment of a grid.

    Attributes:
        total: runs of the grid.
        done: runs that are stored, of earlier sessions too.
        diverged: of those that this session stored.
        failed: cohorts that were given up.
        busy: workers that train.
        per_minute: runs that this session stored a minute.
        samples_per_second: that this session trained on, all workers together.
        left: seconds that the rest will take at this rate; ``None`` before there is one.
        note: what is being waited for, empty if nothing.
    """

    total: int
    done: int
    diverged: int = 0
    failed: int = 0
    busy: int = 0
    per_minute: float = 0.0
    samples_per_second: float = 0.0
    left: float | None = None
    note: str = ""


Watch = Callable[[Progress], None]


@dataclass
class Meter:
    """Counts what a session does.

    Attributes:
        work: samples (steps times batch size) of every run that was to be done when the session began.
        total: runs of the grid.
        kept: runs that were done before.
    """

    work: dict[str, int]
    total: int
    kept: int
    started: float = field(default_factory=time.monotonic)
    seen: dict[str, int] = field(default_factory=dict)
    diverged: int = 0

    def begin(self) -> None:
        """Work begins now: starting workers does not count for the rate."""
        if not self.seen:
            self.started = time.monotonic()

    def add(self, done: Done) -> None:
        """A run was stored."""
        if done.digest not in self.seen:
            self.diverged += done.outcome == "diverged"
            self.seen[done.digest] = done.samples

    def others(self, missing: int) -> None:
        """Other runners have done some: so many are missing now."""
        self.kept = max(self.kept, self.total - missing - len(self.seen))

    def now(self, *, busy: int = 0, failed: int = 0, note: str = "") -> Progress:
        """The present moment."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        samples = sum(self.seen.values())
        left = None
        if self.seen:
            planned = sum(self.work.get(digest, 0) for digest in self.seen)
            rest = max(sum(self.work.values()) - planned, 0)
            share = max(self.total - self.kept - len(self.seen), 0) / max(len(self.work) - len(self.seen), 1)
            left = seconds * rest * min(share, 1.0) / max(planned, 1)
        return Progress(
            self.total,
            self.kept + len(self.seen),
            self.diverged,
            failed,
            busy,
            60.0 * len(self.seen) / seconds,
            samples / seconds,
            left,
            note,
        )

    def outcome(self, store: Store, failed: Mapping[str, str], seconds: float) -> Outcome:
        """The end of a session: counted in the store."""
        missing = len(store.missing())
        self.others(missing)
        return Outcome(
            self.total, self.total - missing, len(self.seen), self.diverged, dict(failed) if missing else {}, seconds
        )


def meter_of(store: Store) -> Meter:
    """A meter for what is missing in a store."""
    work, runs = store.work(), len(store.runs())
    return Meter(work, runs, runs - len(work))


@dataclass(frozen=True)
class Outcome:
    """How a session ended.

    Attributes:
        total, done: runs of the grid, and those that are stored.
        new: stored in this session.
        diverged: of the new ones.
        failed: error by the name of the cohort that was given up.
        seconds: of the session.
    """

    total: int
    done: int
    new: int
    diverged: int
    failed: dict[str, str]
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every run is stored."""
        return self.done == self.total
