"""A store copied to an object store or another folder: weights that are not there yet, then the database.

Files of weights are named by their content, so only new ones travel, and a copy that was interrupted goes on.  The
database comes last and as one consistent snapshot: whatever it names is there.  The copy is a store: copied back to a
folder, ``grid resume`` goes on with it.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.engines.errors import EngineError
from experiments.store import Store
from experiments.store.blobs import FOLDER
from experiments.store.database import DATABASE
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)
EVERY = 300.0
"""Seconds between two copies while a grid runs."""


class Mirror:
    """Keeps a copy of a store while the body of ``with`` works: at its start, from time to time, and at its end.

    The last copy is made however the body ends, by Ctrl-C too.  A target that refuses at the start is an error, later a
    warning; at the end of a body that came to its own end it is an error again.

    Args:
        folder: of the store.
        url: see :func:`mirror_store`.
        every: seconds between two copies; 0 for none but the first and the last.
        tell: is told of the last copy, one line.
    """

    def __init__(
        self, folder: str | Path, url: str, *, every: float = EVERY, tell: Callable[[str], None] | None = None
    ) -> None:
        self._folder, self._url, self._every, self._tell = folder, url, every, tell or _log.info
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True, name="mirror")
        self._said = ""
        self.copies = 0

    def __enter__(self) -> Self:
        mirror_store(self._folder, self._url)
        self.copies += 1
        if self._every > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            copied = mirror_store(self._folder, self._url)
        except MergeboundError as problem:
            if error is None:
                raise
            _log.warning("%s; the copy there is older than the store", problem)
            return
        self.copies += 1
        self._tell(f"{copied} files copied to {self._url}, which holds all that is stored")

    def _repeat(self) -> None:
        while not self._stop.wait(self._every):
            try:
                if mirror_store(self._folder, self._url, stop=self._stop.is_set):
                    self.copies += 1
            except MergeboundError as problem:
                if str(problem) != self._said:
                    self._said = str(problem)
                    _log.warning("%s; trying again", problem)


def mirror_store(
    folder: str | Path,
    url: str,
    *,
    watch: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> int:
    """Copy a store; returns the number of files that were copied, 0 where it was stopped.

    Args:
        folder: of the store.
        url: as fsspec knows it: ``s3://bucket/grid``, ``gs://...``, ``file:///...``, or a path.
        watch: is told of every file that was copied.
        stop: asked before every file; true ends the copy, and the database that is there stays.

    Raises:
        EngineError: fsspec or the protocol's package is missing, or the other side refuses.
    """
    place = Path(folder)
    with Store.open(place, "r"):
        pass
    try:
        import fsspec
    except ImportError as error:
        raise EngineError("fsspec is not installed; pip install 'mergebound[remote]'") from error
    try:
        system, target = fsspec.core.url_to_fs(url)
        return _copy(place, system, target.rstrip("/"), watch, stop)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(f"{url}: cannot be written ({reason}); check address, rights and credentials") from error


def _copy(
    place: Path, system: Any, target: str, watch: Callable[[str], None] | None, stop: Callable[[], bool] | None
) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        snapshot = Path(scratch) / DATABASE
        source, copy = sqlite3.connect(place / DATABASE), sqlite3.connect(snapshot)
        try:
            source.backup(copy)  # before the weights are listed, so that all that it names are
        finally:
            source.close()
            copy.close()
        there = _sizes(system, f"{target}/{FOLDER}")
        copied = 0
        for path in sorted((place / FOLDER).glob("*/*.safetensors")):
            name = path.relative_to(place).as_posix()
            if path.name.startswith(".") or there.get("/".join(path.parts[-2:])) == path.stat().st_size:
                continue
            if stop is not None and stop():
                return 0
            _put(system, path, f"{target}/{name}")
            copied += 1
            if watch is not None:
                watch(name)
        _put(system, snapshot, f"{target}/{DATABASE}")
    return copied + 1


def _sizes(system: Any, folder: str) -> dict[str, int]:
    """Bytes of files that are there, by their last two names."""
    try:
        found = system.find(folder, detail=True)
    except FileNotFoundError:
        return {}
    return {"/".join(name.split("/")[-2:]): int(entry["size"]) for name, entry in found.items()}


def _put(system: Any, path: Path, target: str) -> None:
    system.makedirs(target.rpartition("/")[0], exist_ok=True)
    system.put_file(str(path), target)
