"""Rows as JSON lines, and units of work over processes of one thread; what is finished is kept whatever happens."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from theory.errors import MergeboundError

Row = dict[str, Any]
Watch = Callable[[int, int], None]
"""Is told how many units are done, and how many there are."""


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of JSON lines; a last line that was cut off by a kill is passed over.

    Raises:
        MergeboundError: a damaged line before the last one.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number >= len(lines) - 2:
                break
            raise MergeboundError(f"{path}: line {number + 1} is damaged; remove the file and run again") from error
    return rows


def add_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows in one write that is on the disk when this returns; a line that was cut off before is ended."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size > 0 and not _ends_line(path)
    if cut:
        whole = path.read_bytes()
        with path.open("r+b") as stream:
            stream.truncate(whole.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _ends_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"


def run_units(
    units: Sequence[Any],
    work: Callable[[Any], list[Row]],
    path: Path,
    *,
    workers: int = 1,
    watch: Watch | None = None,
) -> None:
    """Do every unit and append its rows to ``path`` as soon as it is done.

    Args:
        units: data that can be pickled.
        work: a function of a module; called in processes of one thread, or here with one worker.
        path: of JSON lines.
        workers: processes at a time.
        watch: see :data:`Watch`.

    Raises:
        MergeboundError: a process that died, and whatever ``work`` raises; finished units are kept.
    """
    tell = watch or (lambda done, total: None)
    tell(0, len(units))
    if workers <= 1 or len(units) <= 1:
        for done, unit in enumerate(units):
            add_rows(path, work(unit))
            tell(done + 1, len(units))
        return
    from experiments.runner import one_thread_children

    context = multiprocessing.get_context("spawn")
    with one_thread_children(), ProcessPoolExecutor(min(workers, len(units)), mp_context=context) as pool:
        waiting: list[Future[list[Row]]] = [pool.submit(work, unit) for unit in units]
        try:
            for done, future in enumerate(as_completed(waiting)):
                add_rows(path, future.result())
                tell(done + 1, len(units))
        except BrokenProcessPool as error:
            raise MergeboundError(
                "a worker ended before its work (it may have run out of memory); run the same command again, with "
                "fewer --workers"
            ) from error
        finally:
            for future in waiting:
                future.cancel()
