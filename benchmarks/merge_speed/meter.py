"""Processor seconds, wall time, anonymous memory and device traffic of a piece of work in this process (Linux)."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """What a piece of work took.

    Attributes:
        user: processor seconds outside the kernel, of all threads and of children that have ended.
        system: processor seconds in the kernel, likewise.
        wall: seconds.
        level: bytes of anonymous memory before.
        above: largest number of bytes of anonymous memory above that level, sampled.
        device_read: bytes that were fetched from the device.
    """

    user: float
    system: float
    wall: float
    level: int
    above: int
    device_read: int


def anonymous() -> int:
    """Bytes of resident anonymous memory: private data, not pages of mapped files."""
    with open("/proc/self/statm", "rb") as handle:
        pages, shared = handle.read().split()[1:3]
    return (int(pages) - int(shared)) * os.sysconf("SC_PAGESIZE")


def processor() -> tuple[float, float]:
    """User and system seconds of this process and of its children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + children.ru_utime, own.ru_stime + children.ru_stime


def measure(work: Callable[[], object], interval: float = 0.01) -> Reading:
    """Do a piece of work and measure it.

    A thread reads the level of anonymous memory every ``interval`` seconds; its own processor seconds are subtracted
    (from the system's share, where nearly all of them are spent).
    """
    level = anonymous()
    peak, own = level, 0.0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak, own
        while not done.wait(interval):
            peak = max(peak, anonymous())
        own = time.thread_time()

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    traffic, (user, system), start = _device_read(), processor(), time.perf_counter()
    try:
        work()
    finally:
        wall, (user_after, system_after) = time.perf_counter() - start, processor()
        traffic = _device_read() - traffic
        peak = max(peak, anonymous())
        done.set()
        sampler.join(timeout=10.0)
    return Reading(
        user=user_after - user,
        system=max(0.0, system_after - system - own),
        wall=wall,
        level=level,
        above=peak - level,
        device_read=traffic,
    )


def _device_read() -> int:
    try:
        with open("/proc/self/io", encoding="ascii") as handle:
            return next(int(line.split()[1]) for line in handle if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return 0
