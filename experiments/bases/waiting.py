"""One process at a time, with a limit on how long the others wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PAUSE = 0.05


@contextmanager
def alone(path: Path, limit: float, done: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Hold a lock file while the block runs; the system lets go of it if the process dies.

    Args:
        path: the lock file; it is created, and removed by its holder.
        limit: seconds to wait for another holder.
        done: whether waiting has become pointless; asked again and again.

    Yields:
        Whether the lock is held.  False: the limit has passed, ``done`` said so, or files cannot be locked here.
    """
    descriptor = _lock(path, limit, done)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _lock(path: Path, limit: float, done: Callable[[], bool]) -> int | None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    until = time.monotonic() + limit
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= until or done():
                os.close(descriptor)
                return None
            time.sleep(_PAUSE)
        except OSError:  # some network file systems cannot lock
            os.close(descriptor)
            return None
        os.close(descriptor)  # held by another process, or removed by one before it was locked here


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
