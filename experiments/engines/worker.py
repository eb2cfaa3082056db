"""A worker process: one thread, does the cohorts that its parent sends, and ends when the parent does."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.engines.measured import RESAMPLES
from experiments.grid.result import Cohort
from experiments.store import Store
from experiments.store.errors import StoreBusy, StoreError
from theory.errors import MergeboundError

PULSE = 2.0
"""Seconds between two signs of life."""
_CHECK = 0.5


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is told at its start.

    Attributes:
        folder: of the store.
        root: of the data sets.
        device: where it trains.
        owner: the runner that holds the leases.
        resamples: of the bootstrap over test images.
        parent: the process that started it.
        memory: bytes of images that it may keep; ``None`` for half of what is available.
    """

    folder: str
    root: str | None
    device: str
    owner: str
    resamples: int = RESAMPLES
    parent: int = 0
    memory: int | None = None


class _Stopped(BaseException):
    """The parent asked to stop."""


class Channel:
    """The way to the parent, for several threads.  Messages are tuples; the first entry says what they are.

    To the parent: ``ready``; ``run`` (a :class:`~experiments.engines.cohort_job.Done`); ``alive`` (processor seconds of
    this worker so far); ``done`` (cohort); ``failed`` (cohort, error, whether another attempt makes sense); ``disk``
    (error: nobody can go on).  From it: ``do`` (a cohort), ``end``.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        """Tell the parent; ends the process if it is gone."""
        try:
            with self._lock:
                self._connection.send(message)
        except (BrokenPipeError, ConnectionError, OSError):
            os._exit(1)

    def receive(self) -> tuple[Any, ...]:
        """What the parent says (the pulse's thread watches whether there still is one)."""
        try:
            while not self._connection.poll(60.0):
                pass
            message: tuple[Any, ...] = self._connection.recv()
            return message
        except (EOFError, OSError):
            os._exit(1)


def work(spec: WorkerSpec, connection: Connection) -> None:
    """Main function of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    try:
        signal.signal(signal.SIGTERM, _stop)
        channel = Channel(connection)
        threading.Thread(target=_pulse, args=(channel, spec.parent), daemon=True, name="pulse").start()
        warnings.filterwarnings("ignore", category=FutureWarning)  # timm scripts functions at import
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        try:
            _serve(spec, channel)
        except MergeboundError as error:
            channel.send("disk", str(error))
        os._exit(0)  # a signal that comes while Python shuts down would be shown as a fault
    except _Stopped:
        os._exit(0)  # nothing of value is in memory


def _serve(spec: WorkerSpec, channel: Channel) -> None:
    import torch

    from experiments.engines.cohort_job import run_cohort
    from experiments.engines.workplace import Workplace

    torch.set_num_threads(1)
    with Store.open(spec.folder) as store:
        place = Workplace(
            store.base, spec.root, device=spec.device, memory=spec.memory, cache=Path(spec.folder) / "images"
        )
        channel.send("ready")
        while True:
            kind, *content = channel.receive()
            if kind == "end":
                return
            cohort: Cohort = content[0]
            try:
                run_cohort(
                    store,
                    cohort,
                    owner=spec.owner,
                    workplace=place,
                    resamples=spec.resamples,
                    watch=lambda done: channel.send("run", done),
                )
            except Exception as error:
                if is_of_disk(error):
                    channel.send("disk", str(error))
                    return
                channel.send("failed", cohort.name, said(error), worth_another(error))
                continue
            channel.send("done", cohort.name)


def is_of_disk(error: BaseException) -> bool:
    """Whether the store itself cannot be written, so that no cohort can go on."""
    if isinstance(error, StoreBusy):  # others hold it now, and will let go
        return False
    return isinstance(error, StoreError) and isinstance(error.__cause__, OSError | sqlite3.Error)


def worth_another(error: BaseException) -> bool:
    """Whether another attempt may succeed: not for what the toolkit refuses, which it would refuse again."""
    return isinstance(error, StoreBusy) or not isinstance(error, MergeboundError)


def said(error: BaseException) -> str:
    """An error in one line; unexpected ones with their place."""
    text = " ".join(str(error).split())
    if isinstance(error, MergeboundError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text or 'without a message'}{place}"


def _pulse(channel: Channel, parent: int) -> None:
    """Signs of life, and the end of the process as soon as its parent is gone."""
    last = 0.0
    while os.getppid() == parent:
        if time.monotonic() - last >= PULSE:
            last = time.monotonic()
            channel.send("alive", time.process_time())
        time.sleep(_CHECK)
    os._exit(1)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # it may be asked again while it ends
    raise _Stopped
