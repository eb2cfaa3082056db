"""Worker processes for decoding: where one interpreter is not enough, or a decoder may crash on a damaged file.

A worker process has a pipe for short messages, a shared block for the pixels of one chunk and a shared number that
says which image it is reading.  Whoever waits for it also waits for its end and has a time limit, so that a process
that was killed, crashed or is stuck becomes an error that names the image.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from experiments.inputs.prefetch import WAIT_S, InputTimeout
from experiments.inputs.reader import Reader
from theory.errors import MergeboundError

_END_S = 5.0
START_S = 180.0
"""Seconds that a process may take to start and to import what it needs."""


class WorkerProcess:
    """One process that makes views; called from one thread at a time.

    Args:
        reader: what it makes them with.
        most: the largest number of images of a call.
        limit_s: seconds that a call may take.
        method: how the process is started: ``spawn`` or ``forkserver``.  Forking a process that has threads is unsafe.

    Raises:
        MergeboundError: the images cannot be sent to another process.
    """

    def __init__(self, reader: Reader, most: int, limit_s: float = WAIT_S, method: str = "spawn") -> None:
        try:
            pickle.dumps(reader)
        except (TypeError, AttributeError, ValueError, pickle.PicklingError) as error:
            reason = " ".join(str(error).split())
            raise MergeboundError(
                f"{reader.images.place(0)}: these images cannot be sent to worker processes ({reason}); use threads"
            ) from error
        context: Any = multiprocessing.get_context(method)
        form = reader.form
        self._place = reader.images.place
        self._shape = (most, form.channels, form.height, form.width)
        self._limit = limit_s
        self._row = context.RawValue("q", -1)
        block = context.RawArray("B", max(1, int(np.prod(self._shape))))
        self._pixels = _array(block, self._shape)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, reader, block, self._row, self._shape), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ready = False

    @property
    def pid(self) -> int:
        """Number of the process."""
        return int(self._process.pid)

    def __call__(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Views of some rows, uint8 (m, channels, height, width); the array is the caller's.

        Raises:
            InputTimeout: no answer in time.
            MergeboundError: an image cannot be read, or the process ended.
        """
        if not self._ready:
            self._answer(START_S)
            self._ready = True
        try:
            self._pipe.send((rows, epoch))
        except OSError:
            self._fail()
        message = self._answer(self._limit)
        if message is not None:
            raise MergeboundError(message)
        return self._pixels[: len(rows)].copy()

    def stop(self) -> None:
        """End the process, whatever it is doing; nothing happens if it has ended."""
        self._process.kill()
        self._process.join(_END_S)

    def _answer(self, limit: float) -> str | None:
        ready = wait([self._pipe, self._process.sentinel], limit)
        if self._pipe in ready:
            try:
                message: str | None = self._pipe.recv()
                return message
            except (EOFError, OSError):
                self._fail()
        if ready:
            self._fail()
        self.stop()
        raise InputTimeout(
            f"{self._reading()}: a worker process did not read it within {limit:g} s and was ended; check that the "
            "disk answers, remove the file, or raise the time limit"
        )

    def _fail(self) -> None:
        self._process.join(_END_S)
        code = self._process.exitcode
        how = f"by signal {-code} ({signal.Signals(-code).name})" if code is not None and code < 0 else f"code {code}"
        advice = (
            "start worker processes below `if __name__ == '__main__':`, or use threads"
            if not self._ready
            else "the usual causes are too little memory (use fewer workers) and a file that the decoder dies of"
        )
        raise MergeboundError(f"{self._reading()}: the worker process that read it ended ({how}); {advice}")

    def _reading(self) -> str:
        row = int(self._row.value)
        return self._place(row) if row >= 0 else "before the first image"


class ThreadReader:
    """The same call in the calling thread.

    Attributes:
        reader: makes the views.
        channels: of the result: 1 to keep grey images grey, by default what the network takes.
        reading: the row that it is at.
    """

    def __init__(self, reader: Reader, channels: int | None = None) -> None:
        self.reader = reader
        self.channels = reader.form.channels if channels is None else channels
        self.reading = -1

    def __call__(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Views of some rows, uint8 (m, channels, height, width)."""
        pixels = np.empty((len(rows), self.channels, self.reader.form.height, self.reader.form.width), dtype=np.uint8)
        self.reader.fill(rows, epoch, pixels, self._at)
        return pixels

    def _at(self, row: int) -> None:
        self.reading = row


def _serve(pipe: Connection[Any, Any], reader: Reader, block: Any, slot: Any, shape: tuple[int, ...]) -> None:
    """What a worker process does until its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    pixels = _array(block, shape)

    def at(row: int) -> None:
        slot.value = row

    try:
        pipe.send(None)
        while True:
            rows, epoch = pipe.recv()
            message = None
            try:
                reader.fill(rows, epoch, pixels, at)
            except MergeboundError as error:
                message = str(error)
            pipe.send(message)
    except (EOFError, OSError):
        return


def _array(block: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(block, dtype=np.uint8)[: int(np.prod(shape))].reshape(shape)
