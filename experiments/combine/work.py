"""Doing jobs: in this process, or in one-thread worker processes that are handed one job after the other."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from experiments.combine.bench import TEST_MEMORY, Bench
from experiments.combine.groups import Member
from experiments.combine.merge_many_groups import Job, measure_groups, measure_references
from experiments.combine.recipe import Evaluate
from experiments.combine.rows import Row
from experiments.combine.source import Source
from experiments.combine.testing import Opener
from experiments.combine.vectors import MEMORY, TaskVectors
from experiments.runner import one_thread_children
from theory.errors import MergeboundError

JOB_LIMIT = 3600.0
"""Seconds that one job may take in a worker."""

References = Mapping[str, Row]
Task = tuple[Job, References]


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know.

    Attributes:
        open_source: opens the store for reading; a function that pickles where there are several workers.
        open_task: opens a task; likewise.
        evaluate: what is measured.
        members: all experts, by the base's digest.
        double: bases whose experts have float64 weights.
        memory: bytes of task vectors.
        test_memory: bytes of test images.
        scratch: folder for task vectors that do not fit.
        device: where networks run.
    """

    open_source: Callable[[], Source]
    open_task: Opener
    evaluate: Evaluate
    members: Mapping[str, tuple[Member, ...]]
    double: frozenset[str] = frozenset()
    memory: int = MEMORY
    test_memory: int = TEST_MEMORY
    scratch: Path | None = None
    device: str = "cpu"


class Worker:
    """Does jobs; keeps one base's network, test images and task vectors."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._source = setup.open_source()
        self._base = ""
        self._bench: Bench | None = None
        self._vectors: TaskVectors | None = None

    def do(self, job: Job, references: References) -> list[Row]:
        """The rows of a job.

        Raises:
            MergeboundError: a store, data or method that does not fit.
        """
        bench, vectors = self._ready(job.base)
        if job.method is None:
            return measure_references(job, bench, self._source, vectors)
        return measure_groups(job, bench, vectors, references)

    def _ready(self, base: str) -> tuple[Bench, TaskVectors]:
        if self._bench is None or self._vectors is None or base != self._base:
            setup = self._setup
            self._bench = self._vectors = None  # room first
            bench = Bench(
                self._source.base(base),
                setup.evaluate,
                setup.open_task,
                double=base in setup.double,
                device=setup.device,
                memory=setup.test_memory,
            )
            self._vectors = TaskVectors(
                self._source, bench, setup.members[base], memory=setup.memory // 2, scratch=setup.scratch
            )
            self._bench, self._base = bench, base
        return self._bench, self._vectors


def do_here(tasks: Iterator[Task], worker: Worker) -> Iterator[tuple[Job, list[Row]]]:
    """Jobs one after the other in this process."""
    for job, references in tasks:
        yield job, worker.do(job, references)


class Workers:
    """Worker processes, for use in ``with``; none of them outlives it, nor this process.

    Args:
        setup: for each of them.
        count: how many.
        job_limit: seconds that one job may take, start included.
    """

    def __init__(self, setup: Setup, count: int, *, job_limit: float = JOB_LIMIT) -> None:
        self._setup, self._count, self._limit = setup, count, job_limit
        self._running: dict[Connection, tuple[Any, float]] = {}
        self._free: list[Connection] = []
        self._jobs: dict[Connection, Job] = {}

    def __enter__(self) -> Workers:
        context = multiprocessing.get_context("spawn")
        with one_thread_children():
            for number in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, self._setup), name=f"merge-{number}", daemon=True
                )
                process.start()
                theirs.close()
                self._running[ours] = (process, time.monotonic())
                self._free.append(ours)
        return self

    def __exit__(self, *_: object) -> None:
        for connection, (process, _since) in self._running.items():
            connection.close()
            process.terminate()
        for process, _since in self._running.values():
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join(timeout=10)
        self._running = {}

    def do(self, tasks: Iterator[Task]) -> Iterator[tuple[Job, list[Row]]]:
        """Jobs as they are done, in any order.

        Raises:
            MergeboundError: what a worker was refused, a worker that ended, or one that takes too long.
        """
        more = True
        while more or self._jobs:
            while more and self._free:
                task = next(tasks, None)
                if task is None:
                    more = False
                    break
                self._hand_out(*task)
            if not self._jobs:
                continue
            for connection in wait(list(self._jobs), timeout=1.0):
                assert isinstance(connection, Connection)
                yield self._take(connection)
            self._check_time()

    def _hand_out(self, job: Job, references: References) -> None:
        connection = self._free.pop()
        process, _ = self._running[connection]
        try:
            connection.send((job, dict(references)))
        except OSError as error:
            raise _ended(process) from error
        self._running[connection] = (process, time.monotonic())
        self._jobs[connection] = job

    def _take(self, connection: Connection) -> tuple[Job, list[Row]]:
        process, _ = self._running[connection]
        try:
            kind, content = connection.recv()
        except (EOFError, OSError) as error:
            raise _ended(process) from error
        if kind == "refused":
            raise MergeboundError(content)
        if kind == "failed":
            raise RuntimeError(f"a worker failed:\n{content}")
        self._free.append(connection)
        return self._jobs.pop(connection), content

    def _check_time(self) -> None:
        for connection in self._jobs:
            if time.monotonic() - self._running[connection][1] > self._limit:
                raise MergeboundError(
                    f"a job of {len(self._jobs[connection])} merges was not done within {self._limit:.0f} s; run the "
                    "same command again with fewer groups in a job, what is measured is kept"
                )


def _ended(process: Any) -> MergeboundError:
    process.join(timeout=5)
    return MergeboundError(
        f"a worker process ended (exit code {process.exitcode}), perhaps for lack of memory; run the same command "
        "again with fewer workers, what is measured is kept"
    )


def _serve(connection: Connection, setup: Setup) -> None:
    """Do jobs until the other side is gone; in a worker."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # timm scripts functions at import
    import torch

    torch.set_num_threads(1)
    worker: Worker | None = None
    while True:
        try:
            job, references = connection.recv()
        except (EOFError, OSError):
            return
        try:
            worker = Worker(setup) if worker is None else worker
            answer: tuple[str, Sequence[Row] | str] = ("done", worker.do(job, references))
        except MergeboundError as error:
            answer = ("refused", str(error))
        except Exception:
            answer = ("failed", traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:
            return
