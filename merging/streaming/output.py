"""Files that are filled at their offsets by a thread of their own, with a journal to go on from.

The journal says how many tasks are on the disk.  It is only written after the data are flushed, and emptied before the
files are begun anew, so that what it says holds even after a power failure.  Files begun anew are new files: an old one
of that name may be linked to a checkpoint that is in its place already.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from merging.errors import CheckpointError
from merging.writer import Outline

_WAIT = 600.0  # seconds after which a disk that takes nothing is given up
_POLL = 1.0

HELD = 1 << 26
"""Bytes that may wait to be written; a larger piece may wait alone."""


@dataclass(frozen=True)
class OutputFile:
    """A file to be filled.

    Attributes:
        path: where it is filled (a temporary name).
        outline: header and places of the tensors.
    """

    path: Path
    outline: Outline


class Output:
    """Filling files in the background; to be used in a ``with`` statement.

    Args:
        files: what to fill; every tensor lies in one of them.
        journal: where to record what is done; ``None``: nothing is recorded.
        key: says what merge this is; a journal with another key is not believed.
        every: bytes between two entries of the journal.
        depth: pieces that may wait to be written.

    Raises:
        OSError: the disk refuses.
    """

    def __init__(
        self, files: Sequence[OutputFile], journal: Path | None, key: str, *, every: int = 1 << 28, depth: int = 64
    ) -> None:
        self._files = tuple(files)
        self._journal = journal
        self._every = every
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        self._queue: queue.Queue[tuple[str, int, memoryview, int] | None] = queue.Queue(depth)
        self._held = 0
        self._room = threading.Condition()
        self._failure: BaseException | None = None
        self._record: int | None = None
        self._done = 0
        self._thread: threading.Thread | None = None
        try:
            self.resumed = self._open(key)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Output:
        self._thread = threading.Thread(target=self._work, name="mergebound-writer", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._put(None)
                self._join()
                self._flush(final=True)
            else:
                goes_on = self._failure is None and self._record is not None and not issubclass(kind, Exception)
                self._failure = self._failure or CheckpointError("the merge was given up")
                with suppress(queue.Full):
                    self._queue.put_nowait(None)
                if self._thread is not None:
                    self._thread.join(_WAIT)
                    if goes_on and not self._thread.is_alive():
                        with suppress(OSError):
                            self._flush()
        finally:
            if self._thread is None or not self._thread.is_alive():
                self._close()

    def write(self, name: str, offset: int, data: memoryview, task: int) -> None:
        """Hand over bytes of a tensor, ``offset`` bytes from its start; ``task`` is done when they are written.

        Raises:
            OSError: an earlier piece could not be written.
        """
        self._put((name, offset, data, task))

    def _open(self, key: str) -> int:
        """Open all files; the number of tasks that an earlier run has finished."""
        done = self._believed(key)
        if self._journal is not None:
            self._record = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            if not done:
                os.ftruncate(self._record, 0)
                _append(self._record, {"key": key})
                os.fsync(self._record)
        for index, file in enumerate(self._files):
            if not done:
                with suppress(FileNotFoundError):
                    file.path.unlink()
            descriptor = os.open(file.path, os.O_RDWR | (0 if done else os.O_CREAT | os.O_EXCL), 0o666)
            self._descriptors.append(descriptor)
            if not done:
                _reserve(descriptor, file.outline.size)
                _write_at(descriptor, memoryview(file.outline.header), 0)
            for name, (begin, _) in file.outline.places.items():
                self._places[name] = (index, begin)
        self._done = done
        return done

    def _close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        if self._record is not None:
            os.close(self._record)
            self._record = None

    def _believed(self, key: str) -> int:
        if self._journal is None:
            return 0
        try:
            lines = self._journal.read_text().splitlines()
            if not lines or json.loads(lines[0]).get("key") != key:
                return 0
            done = 0
            for line in lines[1:]:
                with suppress(ValueError, AttributeError, TypeError):  # the last line may be cut short
                    done = max(done, int(json.loads(line)["done"]))
            for file in self._files:
                with open(file.path, "rb") as handle:
                    if os.fstat(handle.fileno()).st_size != file.outline.size:
                        return 0
                    if handle.read(len(file.outline.header)) != file.outline.header:
                        return 0
        except (OSError, ValueError, AttributeError):
            return 0
        return done

    def _put(self, item: tuple[str, int, memoryview, int] | None) -> None:
        size = 0 if item is None else len(item[2])
        until = time.monotonic() + _WAIT
        with self._room:
            while self._held and self._held + size > HELD and self._failure is None:
                if time.monotonic() >= until:
                    raise _stuck()
                self._room.wait(_POLL)
            self._held += size
        while True:
            if self._failure is not None:
                raise self._failure
            try:
                self._queue.put(item, timeout=_POLL)
                return
            except queue.Full:
                if time.monotonic() >= until:
                    raise _stuck() from None

    def _join(self) -> None:
        assert self._thread is not None
        self._thread.join(_WAIT)  # at most the queue's depth of pieces are left
        if self._thread.is_alive():
            self._failure = self._failure or _stuck()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        pending = 0
        try:
            while (item := self._queue.get()) is not None:
                if self._failure is not None:
                    return
                name, offset, data, task = item
                index, begin = self._places[name]
                _write_at(self._descriptors[index], data, begin + offset)
                self._done = max(self._done, task + 1)
                with self._room:
                    self._held -= len(data)
                    self._room.notify()
                pending += len(data)
                if pending >= self._every:
                    self._flush()
                    pending = 0
        except BaseException as error:
            with self._room:
                self._failure = error
                self._room.notify()

    def _flush(self, *, final: bool = False) -> None:
        for descriptor in self._descriptors:
            os.fsync(descriptor) if final else _sync_data(descriptor)
        if self._record is not None:
            _append(self._record, {"done": self._done})
            os.fsync(self._record)


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and have the system set the space aside where it can: a full disk shows at once."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _append(descriptor: int, entry: Mapping[str, object]) -> None:
    os.write(descriptor, (json.dumps(entry) + "\n").encode())


def _stuck() -> OSError:
    return OSError(None, f"nothing was written for {_WAIT:.0f} seconds")


def _sync_data(descriptor: int) -> None:
    getattr(os, "fdatasync", os.fsync)(descriptor)
