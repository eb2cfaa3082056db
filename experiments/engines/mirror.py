"""A store copied to an object store or another folder: weights that are not there yet, then the database.

Files of weights are named by their content, so only new ones travel, and a copy that was interrupted goes on.  The
database comes last and as one consistent snapshot: whatever it names is there.  The copy is a store: copied back to a
folder, ``grid resume`` goes on with it.  What lies there is read first (:mod:`experiments.engines.backup`): a copy of
another grid, or one with results that the store lacks, is not replaced unless that is asked for.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from experiments.engines.backup import BESIDE, Held, check_replaced, held_by, stamp, there
from experiments.engines.errors import EngineError
from experiments.store import Store
from experiments.store.blobs import FOLDER
from experiments.store.database import DATABASE
from theory.errors import MergeboundError

T = TypeVar("T")
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
        replace: whether the first copy may replace what is there, whatever it is.
    """

    def __init__(
        self,
        folder: str | Path,
        url: str,
        *,
        every: float = EVERY,
        tell: Callable[[str], None] | None = None,
        replace: bool = False,
    ) -> None:
        self._folder, self._url, self._every, self._tell = folder, url, every, tell or _log.info
        self._replace, self._ours = replace, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True, name="mirror")
        self._said = ""
        self.copies = 0

    def __enter__(self) -> Self:
        self._copy(replace=self._replace)
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
            copied = self._copy()
        except MergeboundError as problem:
            if error is None:
                raise
            _log.warning("%s; the copy there is older than the store", problem)
            return
        self._tell(f"{copied} files copied to {self._url}, which holds all that is stored")

    def _repeat(self) -> None:
        while not self._stop.wait(self._every):
            try:
                self._copy(stop=self._stop.is_set)
            except MergeboundError as problem:
                if str(problem) != self._said:
                    self._said = str(problem)
                    _log.warning("%s; trying again", problem)

    def _copy(self, **options: Any) -> int:
        """One copy; what it left there is known, so that the next one need not read it."""
        copied = mirror_store(self._folder, self._url, ours=self._ours, **options)
        if copied:
            self._ours = _at(self._url, lambda system, target: stamp(system, target) or "")
            self.copies += 1
        return copied


def check_mirror(folder: str | Path, url: str, digest: str | None = None) -> None:
    """Refuse a place for copies before anything runs.

    Args:
        folder: of the store; it need not be there yet.
        url: see :func:`mirror_store`.
        digest: of the grid's specification, for a store that is not there yet, or that grows to it.

    Raises:
        EngineError: as :func:`mirror_store`.
    """
    place = Path(folder)
    own = Held(digests=frozenset([digest]))
    if (place / DATABASE).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            own = held_by(_snapshot(place, Path(scratch)))
        own = Held(own.name, own.digests | {digest}, own.results, own.merges)

    def check(system: Any, target: str) -> None:
        _refuse_itself(place, system, target)
        _check(own, place, system, target, url)

    _at(url, check)


def mirror_store(
    folder: str | Path,
    url: str,
    *,
    watch: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
    replace: bool = False,
    ours: str = "",
) -> int:
    """Copy a store; returns the number of files that were copied, 0 where it was stopped.

    Args:
        folder: of the store.
        url: as fsspec knows it: ``s3://bucket/grid``, ``gs://...``, ``file:///...``, or a path.
        watch: is told of every file that was copied.
        stop: asked before every file; true ends the copy, and the database that is there stays.
        replace: whether what is there may be replaced, whatever it is.
        ours: what :func:`~experiments.engines.backup.stamp` said of a copy of this store; one that is still there is
            replaced without being read.

    Raises:
        EngineError: fsspec or the protocol's package is missing, the other side refuses, it is the store's own folder,
            another grid's copy is there, or one with results that the store lacks.
    """
    place = Path(folder)
    with Store.open(place, "r"):
        pass

    def copy(system: Any, target: str) -> int:
        _refuse_itself(place, system, target)
        with tempfile.TemporaryDirectory() as scratch:
            snapshot = _snapshot(place, Path(scratch))  # before the weights are listed, so that all that it names are
            if not replace and (not ours or stamp(system, target) != ours):
                _check(held_by(snapshot), place, system, target, url)
            return _copy(place, snapshot, system, target, watch, stop)

    return _at(url, copy)


def _at(url: str, act: Callable[[Any, str], T]) -> T:
    """Do something with the file system and the folder that a URL names.

    Raises:
        EngineError: fsspec or the protocol's package is missing, or the other side refuses.
        MergeboundError: what ``act`` raises.
    """
    try:
        import fsspec
    except ImportError as error:
        raise EngineError("fsspec is not installed; pip install 'mergebound[remote]'") from error
    try:
        system, target = fsspec.core.url_to_fs(url)
        return act(system, target.rstrip("/"))
    except MergeboundError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(f"{url}: cannot be written ({reason}); check address, rights and credentials") from error


def _snapshot(place: Path, scratch: Path) -> Path:
    """The database of a store at one moment, whoever writes to it."""
    snapshot = scratch / DATABASE
    with closing(sqlite3.connect(place / DATABASE)) as source, closing(sqlite3.connect(snapshot)) as copy:
        source.backup(copy)
    return snapshot


def _check(own: Held, place: Path, system: Any, target: str, url: str) -> None:
    if (found := there(system, target, url)) is not None:
        check_replaced(own, found, place, url)


def _copy(
    place: Path,
    snapshot: Path,
    system: Any,
    target: str,
    watch: Callable[[str], None] | None,
    stop: Callable[[], bool] | None,
) -> int:
    known = _sizes(system, f"{target}/{FOLDER}")
    copied = 0
    for path in sorted((place / FOLDER).glob("*/*.safetensors")):
        name = path.relative_to(place).as_posix()
        if path.name.startswith(".") or known.get("/".join(path.parts[-2:])) == path.stat().st_size:
            continue
        if stop is not None and stop():
            return 0
        _put(system, path, f"{target}/{name}")
        copied += 1
        if watch is not None:
            watch(name)
    part = target + f"/.{DATABASE}.part" if _is_local(system) else ""  # object stores put a file at once
    _put(system, snapshot, part or f"{target}/{DATABASE}")
    for end in BESIDE:  # of the database that is replaced: SQLite would take it for the new one's
        if system.exists(f"{target}/{DATABASE}{end}"):
            system.rm_file(f"{target}/{DATABASE}{end}")
    if part:
        system.mv(part, f"{target}/{DATABASE}")
    return copied + 1


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple | list) else (system.protocol,))


def _refuse_itself(place: Path, system: Any, target: str) -> None:
    if _is_local(system) and Path(target).resolve() == place.resolve():
        raise EngineError(f"--mirror {target}: is the folder of the store itself; give another folder")


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
