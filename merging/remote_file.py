"""Objects behind URLs, read by ranges: each request is repeated for a while, a change is an error."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from merging.errors import CheckpointError
from merging.remote_place import Place, connect, look
from merging.remote_requests import Answered, Limits, Requests, persistently
from merging.safetensors_file import Identity

T = TypeVar("T")

BLOCK = 1 << 21
"""Bytes of one request of a streamed merge."""

KEPT = 6  # blocks of a file that are held at the same time

_PIECE = 1 << 23  # bytes of one request when a tensor is read as a whole

_AHEAD = 2  # blocks that are asked for before they are needed, where a file is read from front to back

_CHECKED = 30.0  # seconds between two looks at whether an object changed, during a merge


@dataclass(frozen=True)
class RemoteFile:
    """An object as it was when it was opened.

    Attributes:
        place: where it is.
        size: in bytes.
        marks: what changes when it changes: its entity tag, checksum, version or time, as far as they are known.
        limits: of its requests.
    """

    place: Place
    size: int
    marks: tuple[tuple[str, str], ...]
    limits: Limits

    @property
    def shown(self) -> str:
        """Its URL without credentials."""
        return self.place.shown

    @property
    def identity(self) -> Identity:
        """The same in four numbers, as :class:`merging.lazy.Region` has them."""
        digest = sha256(repr((self.shown, self.size, self.marks)).encode()).digest()
        return (-1, int.from_bytes(digest[:7], "big"), self.size, int.from_bytes(digest[7:14], "big"))

    @property
    def held(self) -> int:
        """Bytes that a :class:`RangeReader` holds at most: its blocks, and as many answers on their way."""
        return min(self.size, 2 * KEPT * BLOCK)

    def read(self, begin: int, end: int, stop: threading.Event | None = None) -> bytes:
        """Bytes ``begin`` to ``end``, in one request.

        Raises:
            CheckpointError: no complete answer within the limits.
        """
        if begin == end:
            return b""

        def ask() -> bytes:
            more = {"cache_type": "none"} if "hf" in self.place.protocols else {}  # it would read ahead by itself
            data: bytes = self.place.fs.cat_file(self.place.path, start=begin, end=end, **more)
            if len(data) != end - begin:
                if len(data) > end - begin:
                    raise CheckpointError(f"{self.shown}: this server does not serve parts of files: download it first")
                raise Answered(f"{len(data)} of {end - begin} bytes")
            return data

        return persistently(ask, self.shown, self.limits, stop=stop, again=self.check)

    def read_into(self, view: memoryview, begin: int) -> None:
        """Fill ``view`` with the bytes from ``begin`` on, several requests at a time.

        Raises:
            CheckpointError: no complete answer within the limits, or the object changed.
        """
        if len(view) <= _PIECE:
            view[:] = self.read(begin, begin + len(view))
        else:
            starts = range(0, len(view), _PIECE)
            with requests(self.limits) as pool:
                waiting: list[Future[bytes]] = []
                for number, start in enumerate(starts):
                    while len(waiting) < min(len(starts), number + self.limits.parallel):
                        first = starts[len(waiting)]
                        last = min(first + _PIECE, len(view))
                        waiting.append(pool.submit(partial(self.read, begin + first, begin + last, pool.stop)))
                    data = result_of(waiting[number], self.shown, self.limits)
                    view[start : start + len(data)] = data
                    waiting[number] = Future()  # the bytes are not needed twice
        self.check()

    def check(self) -> None:
        """Check that the object is the one that was opened.

        Raises:
            CheckpointError: it is another one, or it is gone.
        """
        if look(self.place, self.limits) != (self.size, self.marks):
            raise CheckpointError(f"{self.shown}: the file changed while it was in use: open it again")


def open_file(url: str, limits: Limits | None = None) -> RemoteFile:
    """An object behind a URL: its size and version.

    Raises:
        CheckpointError: nothing there, refused, or no answer.
    """
    given = Limits() if limits is None else limits
    place = connect(url)
    size, marks = look(place, given)
    return RemoteFile(place, size, marks, given)


class RangeReader:
    """Reads an object in blocks, ahead of who uses them; a stand-in for :class:`merging.streaming.source.MappedFile`.

    At most six blocks of :data:`BLOCK` bytes are held.  Threads may share it.
    """

    mapped = False
    address = 0

    def __init__(self, file: RemoteFile, requests: Requests) -> None:
        self.file = file
        self.path = Path(file.shown)
        self._requests = requests
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._fresh: set[int] = set()
        self._last = -1
        self._checked = time.monotonic()

    def announce(self, begin: int, end: int) -> None:
        """Ask for bytes that will be needed soon, as far as there is room for them."""
        with self._lock:
            for number in range(begin // BLOCK, -(-end // BLOCK)):
                if len(self._fresh) >= KEPT - 2:
                    return
                self._start(number)

    def read_into(self, buffer: NDArray[np.uint8], begin: int) -> None:
        """Read ``len(buffer)`` bytes from ``begin`` on.

        Raises:
            CheckpointError: no complete answer within the limits.
        """
        view = buffer.data
        while view:
            number, offset = divmod(begin, BLOCK)
            data = memoryview(self._block(number))[offset : offset + len(view)]
            view[: len(data)] = data
            view, begin = view[len(data) :], begin + len(data)

    def populate(self, begin: int, end: int) -> int:
        """Only files of this machine are mapped."""
        raise AssertionError("a remote file is not mapped")

    def drop(self, begin: int, end: int) -> None:
        """Blocks are let go of when others need the room."""

    def check(self) -> None:
        """As :meth:`RemoteFile.check`, at most every half minute (:meth:`confirm` does it at the end)."""
        if time.monotonic() - self._checked > _CHECKED:
            self.confirm()

    def confirm(self) -> None:
        """As :meth:`RemoteFile.check`."""
        self.file.check()
        self._checked = time.monotonic()

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            for future in self._blocks.values():
                future.cancel()
            self._blocks.clear()
            self._fresh.clear()

    def _block(self, number: int) -> bytes:
        with self._lock:
            future = self._start(number)
            self._fresh.discard(number)
            if number in (self._last, self._last + 1):
                for following in range(number + 1, number + 1 + _AHEAD):
                    if len(self._fresh) < KEPT - 2:
                        self._start(following)
            self._last = number
        try:
            return result_of(future, self.file.shown, self.file.limits)
        except BaseException:
            with self._lock:
                if self._blocks.get(number) is future:
                    del self._blocks[number]
                    self._fresh.discard(number)
            raise

    def _start(self, number: int) -> Future[bytes]:
        found = self._blocks.get(number)
        if found is not None:
            self._blocks.move_to_end(number)
            return found
        begin = number * BLOCK
        end = min(begin + BLOCK, self.file.size)
        if begin >= end:
            return Future()
        while len(self._blocks) >= KEPT:
            oldest = next((other for other in self._blocks if other not in self._fresh), next(iter(self._blocks)))
            self._blocks.pop(oldest)
            self._fresh.discard(oldest)
        self._fresh.add(number)
        future = self._requests.submit(partial(self.file.read, begin, end, self._requests.stop))
        self._blocks[number] = future
        return future


@contextmanager
def requests(limits: Limits) -> Iterator[Requests]:
    """Requests that are given up at the end."""
    pool = Requests(limits)
    try:
        yield pool
    finally:
        pool.close()


def result_of(future: Future[T], what: str, limits: Limits) -> T:
    """What a request gives, which may wait behind others."""
    try:
        return future.result(8.0 * limits.total + limits.attempt)
    except TimeoutError:
        raise CheckpointError(f"{what}: no answer in time: check the network, and try again") from None
    except CancelledError:
        raise CheckpointError(f"{what}: the request was given up") from None
