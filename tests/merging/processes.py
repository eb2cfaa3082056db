"""Child processes for tests of killed and concurrent writers (forked: nothing is imported anew)."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable

SECONDS = 30


def start(work: Callable[[], None]) -> int:
    """Run ``work`` in a child; its exit status is 0, or 1 where it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(work: Callable[[], None]) -> int:
    return wait(start(work))
