"""One process at a time, with a limit on how long the others wait."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from merging.file_locks import hold


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
    descriptor = hold(path, limit, done)
    try:
        yield descriptor is not None and descriptor is not False
    finally:
        if descriptor is not None and descriptor is not False:
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)
