"""The progress of a grid on a terminal, or as a line now and then where there is none."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from experiments.engines.progress import Progress

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class Display:
    """Shows progress while a grid runs."""

    def __init__(self, console: Console, *, every: float = EVERY) -> None:
        self._console, self._every = console, every
        self._last: float | None = None
        self._bars: Bars | None = None
        if console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"),
                console=console, transient=True,
            )  # fmt: skip
            self._task = self._bars.add_task("runs", total=None, said="starting")

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        """A moment of the grid."""
        if self._bars is not None:
            self._bars.update(self._task, completed=progress.done, total=progress.total, said=said(progress))
            return
        now = time.monotonic()
        if self._last is None or now - self._last >= self._every:
            self._last = now
            self._console.print(f"{progress.done} of {progress.total} runs, {said(progress)}", highlight=False)


def said(progress: Progress) -> str:
    """Rate and time left in words."""
    parts = [f"{progress.busy} at work"] if progress.busy else []
    if progress.per_minute > 0:
        parts.append(f"{progress.per_minute:.1f} runs a minute, {progress.samples_per_second:.0f} samples a second")
    if progress.left is not None and progress.left > 0:
        parts.append(f"about {duration(progress.left)} left")
    if progress.diverged:
        parts.append(f"{progress.diverged} diverged")
    if progress.failed:
        parts.append(f"{progress.failed} cohorts given up")
    parts += [progress.note] * bool(progress.note)
    return ", ".join(parts) or "starting workers"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits.

    >>> duration(42), duration(600), duration(7200), duration(400000)
    ('42 s', '10 min', '2.0 h', '4.6 days')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
