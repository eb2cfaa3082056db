"""Locks between processes that write beside each other, where the file system can lock."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

_LOCKED = 600.0  # seconds after which another writer's renaming is taken to be stuck

_PAUSE = 0.02


def hold(path: Path, patience: float, done: Callable[[], bool] = lambda: False) -> int | Literal[False] | None:
    """Lock a file, which is created if need be: a descriptor, or false if it is locked, ``None`` if nothing can be.

    Args:
        path: the lock file.
        patience: seconds to wait for another holder.
        done: whether waiting has become pointless; asked again and again.

    Raises:
        OSError: it cannot be created.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    until = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= until or done():
                os.close(descriptor)
                return False
            time.sleep(_PAUSE)
        except OSError:  # some network file systems cannot lock
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # locked by another process, or removed by one before it was locked here


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other writers from publishing in the same folder at the same time, where the system can.

    Raises:
        OSError: another one has not come to an end for minutes.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        attempt = _attempt()
        until = time.monotonic() + _LOCKED
        while attempt is not None and not attempt(descriptor):
            if time.monotonic() >= until:
                raise OSError(errno.EBUSY, "another process holds the folder")
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(descriptor)  # which also unlocks


def _attempt() -> Callable[[int], bool] | None:
    """Tries to lock; whether that is done (or cannot be)."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None

    def attempt(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems
            return True
        return True

    return attempt
