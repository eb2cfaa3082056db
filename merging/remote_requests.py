"""Requests that end: every attempt has a time limit, and what may pass is tried again with growing pauses.

Messages name the kind of an error and never its text, which may hold addresses with credentials.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from merging.errors import CheckpointError

T = TypeVar("T")

_SLICE = 0.25  # seconds after which a waiting thread looks whether it is still wanted
_LATER = (408, 425, 429)
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    NotImplementedError,
    ImportError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
)
_FINAL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Limits:
    """How long to wait for others.

    Attributes:
        attempt: seconds for one request (uploads: and a second for every megabyte).
        total: seconds for a request with all its repetitions.
        pause: seconds before the first repetition; doubled each time.
        longest: seconds between repetitions at most.
        parallel: requests at the same time.
    """

    attempt: float = 60.0
    total: float = 300.0
    pause: float = 0.25
    longest: float = 15.0
    parallel: int = 8


class Answered(Exception):
    """An answer that is not what was asked for; another attempt may help.  Its text is for people."""


def persistently(
    call: Callable[[], T],
    what: str,
    limits: Limits,
    *,
    stop: threading.Event | None = None,
    again: Callable[[], None] | None = None,
) -> T:
    """Call something that may fail for a while.

    Args:
        call: the request.
        what: what it is about, for messages (no credentials).
        limits: when to give up.
        stop: when this is set, nobody waits for the result any more.
        again: called before every repetition.

    Raises:
        CheckpointError: refused, not there, or no answer within the limits.
    """
    deadline = time.monotonic() + limits.total
    ended = threading.Event() if stop is None else stop
    pause, attempts, reason = limits.pause, 0, ""
    while True:
        if ended.is_set():
            raise CheckpointError(f"{what}: the request was given up")
        attempts += 1
        left = deadline - time.monotonic()
        try:
            return _within(call, min(limits.attempt, left), ended)
        except CheckpointError:
            raise
        except Exception as error:
            if not _may_pass(error):
                raise CheckpointError(f"{what}: {_remedy(error)}") from None
            if not (reason and left < limits.attempt and isinstance(error, TimeoutError)):  # cut short by ourselves
                reason = reason_of(error)
        if time.monotonic() + pause >= deadline or ended.wait(pause):
            tries = "one attempt" if attempts == 1 else f"{attempts} attempts"
            raise CheckpointError(
                f"{what}: no complete answer ({reason}) after {tries} in up to {limits.total:.3g} seconds: check the "
                "address and the network, and try again"
            )
        pause = min(2.0 * pause, limits.longest)
        if again is not None:
            again()


def reason_of(error: BaseException) -> str:
    """What an error is, in a few words without addresses."""
    cause = _cause(error)
    status = _status(cause)
    if status is not None:
        return f"HTTP status {status}"
    if isinstance(cause, Answered):
        return str(cause)
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, OSError) and isinstance(cause.errno, int) and cause.errno > 0:
        return os.strerror(cause.errno)
    return type(cause).__name__


def is_missing(error: BaseException) -> bool:
    """Whether an error says for sure that there is no such object."""
    cause = _cause(error)
    return _status(cause) in (404, 410) or (_status(cause) is None and isinstance(cause, FileNotFoundError))


class Requests:
    """A bounded number of requests at the same time; to be closed."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.stop = threading.Event()
        self._pool = ThreadPoolExecutor(limits.parallel, thread_name_prefix="mergebound-remote")

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Start a request when there is room."""
        return self._pool.submit(call)

    def close(self) -> None:
        """Give up what was not started, and stop waiting for the rest."""
        self.stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _within(call: Callable[[], T], seconds: float, stop: threading.Event) -> T:
    """The result of a call that is left alone when it takes too long (a thread cannot be ended from outside)."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="mergebound-request").start()
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            return future.result(max(0.0, min(_SLICE, left)))
        except TimeoutError:
            if future.done():
                return future.result()
            if left <= 0.0:
                raise
        if stop.is_set():
            raise CheckpointError("the request was given up")


def _may_pass(error: BaseException) -> bool:
    cause = _cause(error)
    status = _status(cause)
    if status is not None:
        return status in _LATER or status >= 500
    if isinstance(cause, OSError) and cause.errno in _FINAL_CODES:
        return False
    return not isinstance(cause, _FINAL)


def _remedy(error: BaseException) -> str:
    cause = _cause(error)
    status = _status(cause)
    if is_missing(error):
        return "there is no such file: check the address"
    if status in (401, 403) or (isinstance(cause, PermissionError) and status is None):
        return f"access is refused ({reason_of(error)}): check credentials and permissions"
    if isinstance(cause, NotImplementedError):
        return "this cannot be done at such an address: choose another one"
    return f"the request failed ({reason_of(error)}): check the address"


def _cause(error: BaseException) -> BaseException:
    """What is behind 'no such file', which some file systems make of every error."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and cause is not None else error


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of any of the usual clients."""
    response: Any = getattr(error, "response", None)
    nested = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    for value in (getattr(error, "status", None), nested, getattr(response, "status_code", None)):
        if isinstance(value, int) and 100 <= value < 600:
            return value
    code = getattr(error, "code", None)
    return int(code) if isinstance(code, int | str) and str(code).isdigit() and 400 <= int(code) < 600 else None
