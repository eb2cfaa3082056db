"""A store copied to an object store or another folder: weights that are not there yet, then the database.

Files of weights are named by their content, so only new ones travel, and a copy that was interrupted goes on.  The
database comes last and as one consistent snapshot: whatever it names is there.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.engines.errors import EngineError
from experiments.store import Store
from experiments.store.blobs import FOLDER
from experiments.store.database import DATABASE


def mirror_store(folder: str | Path, url: str, *, watch: Callable[[str], None] | None = None) -> int:
    """Copy a store; returns the number of files that were copied.

    Args:
        folder: of the store.
        url: as fsspec knows it: ``s3://bucket/grid``, ``gs://...``, ``file:///...``, or a path.
        watch: is told of every file that was copied.

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
        return _copy(place, system, target.rstrip("/"), watch)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EngineError(f"{url}: cannot be written ({reason}); check address, rights and credentials") from error


def _copy(place: Path, system: Any, target: str, watch: Callable[[str], None] | None) -> int:
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
