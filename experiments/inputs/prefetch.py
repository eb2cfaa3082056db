"""Work done ahead of its use: results in order from background threads, bounded in number, every wait with a limit."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

from theory.errors import MergeboundError

if TYPE_CHECKING:  # worker processes import this module, and need no torch
    import numpy as np
    from torch import Tensor

    from experiments.inputs.training_data import TrainingData

T = TypeVar("T")
R = TypeVar("R")

Batch: TypeAlias = "tuple[Tensor, Tensor]"
Order: TypeAlias = "Iterable[tuple[np.ndarray, int]]"
"""Batches to come: the rows of each and the epoch that names its views."""

WAIT_S = 120.0
"""Seconds that a result is waited for."""
_JOIN_S = 5.0


@runtime_checkable
class Loads(Protocol):
    """Training data that prepares batches ahead when it is told their order."""

    def loader(self, order: Order) -> Iterator[Batch]:
        """The batches of ``order``, equal to ``batch(rows, epoch)`` of each."""


class InputTimeout(MergeboundError):
    """An input was not ready in time: a worker is stuck, or a disk does not answer."""


def in_order(data: TrainingData, order: Order, *, ahead: bool = True) -> Generator[Batch, None, None]:
    """The batches of a training loop, prepared while the network computes where the data can (:class:`Loads`).

    The numbers are those of ``data.batch(rows, epoch)``.  Close the generator where the loop ends early.

    Args:
        order: rows and epoch of each batch.  It is consumed ahead of the batches.
        ahead: false where ``order`` must be consumed step by step, because it draws from a generator that the loop
            also draws from.
    """
    if ahead and isinstance(data, Loads):
        with closing(_generator(data.loader(order))) as batches:
            yield from batches
    else:
        for rows, epoch in order:
            yield data.batch(rows, epoch)


def background(
    data: TrainingData, order: Order, *, ahead: int = 2, limit_s: float = WAIT_S
) -> Generator[Batch, None, None]:
    """The same for any data: one thread calls ``data.batch``, at most ``ahead`` batches before they are asked for."""

    def work(item: tuple[np.ndarray, int]) -> Batch:
        return data.batch(item[0], item[1])

    def told(item: tuple[np.ndarray, int]) -> str:
        return f"a batch of {len(item[0])} images"

    return ordered([work], order, ahead=ahead, limit_s=limit_s, told=told)


def ordered(
    workers: Sequence[Callable[[T], R]],
    items: Iterable[T],
    *,
    ahead: int,
    limit_s: float = WAIT_S,
    told: Callable[[T], str] = str,
) -> Generator[R, None, None]:
    """``work(item)`` of each item, in order, computed by one thread for each of ``workers``.

    At most ``ahead`` items are in work or waiting to be collected.  ``items`` is consumed in the caller's thread.
    Close the iterator to end the threads early; a worker with a method ``stop`` has it called then.

    Args:
        workers: one function per thread; all must give the same result for an item.
        limit_s: seconds that a result is waited for.
        told: what an item is, for messages.

    Raises:
        InputTimeout: a result did not come in ``limit_s`` seconds.
        Exception: what a worker raised, in the item's turn.
    """
    tasks: queue.SimpleQueue[_Job[T, R] | None] = queue.SimpleQueue()
    pending: deque[_Job[T, R]] = deque()
    ended = threading.Event()
    threads = [
        threading.Thread(target=_work, args=(worker, tasks, ended), name=f"inputs-{number}", daemon=True)
        for number, worker in enumerate(workers)
    ]
    source = iter(items)
    more = True
    late = False
    for thread in threads:
        thread.start()
    try:
        while True:
            while more and len(pending) < max(1, ahead):
                try:
                    job: _Job[T, R] = _Job(next(source))
                except StopIteration:
                    more = False
                    break
                pending.append(job)
                tasks.put(job)
            if not pending:
                return
            job = pending.popleft()
            if not job.done.wait(limit_s):
                late = True
                raise InputTimeout(
                    f"{told(job.item)}: not read within {limit_s:g} s; check that the disk answers, remove the file, "
                    "or raise the time limit"
                )
            if job.error is not None:
                raise job.error
            yield job.result[0]
            del job
    finally:
        ended.set()
        for worker in workers:
            getattr(worker, "stop", _nothing)()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join(0.0 if late else _JOIN_S)


class _Job(Generic[T, R]):
    """One item, and what became of it."""

    def __init__(self, item: T) -> None:
        self.item = item
        self.done = threading.Event()
        self.result: list[R] = []
        self.error: BaseException | None = None


def _work(worker: Callable[[Any], Any], tasks: queue.SimpleQueue[Any], ended: threading.Event) -> None:
    while (job := tasks.get()) is not None:
        if ended.is_set():
            return
        try:
            job.result.append(worker(job.item))
        except BaseException as error:  # raised again where the result is asked for
            job.error = error
        job.done.set()
        del job


def _nothing() -> None:
    pass


def _generator(batches: Iterator[Batch]) -> Any:
    """Something with ``close``, whatever kind of iterator a loader is."""
    return batches if hasattr(batches, "close") else (batch for batch in batches)
