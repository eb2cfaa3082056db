"""The folder and the database of a store: made, or found."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from experiments.store.blobs import TEMPORARY, disk_error, make_folders, remove
from experiments.store.content import TaskVectors
from experiments.store.database import DATABASE, Database, Mode
from experiments.store.errors import StoreError
from experiments.store.journal import Journal


def create(
    folder: Path,
    meta: Mapping[str, Any],
    task_vectors: TaskVectors,
    *,
    durable: bool,
    journal: Journal,
    patience: float,
    exist_ok: bool,
) -> Database:
    """Make a store's folder and database; arguments as :meth:`experiments.store.store.Store.create` has them.

    Raises:
        StoreError: there is one already, or the folder cannot be written to.
    """
    if task_vectors not in get_args(TaskVectors):
        raise StoreError(f"task_vectors: {task_vectors!r} is unknown; choose lossless or bfloat16")
    file = folder / DATABASE
    if file.exists() and not exist_ok:
        raise StoreError(f"{folder}: holds a store already; open it (resume), or choose an empty folder")
    try:
        make_folders(folder)
        probe = folder / f"{TEMPORARY}{secrets.token_hex(4)}"
        probe.touch()
        remove(probe)
    except OSError as error:
        raise disk_error(error, folder) from error
    database = Database(file, "w", patience=patience, journal=journal)
    about = {"meta": json.dumps(dict(meta), sort_keys=True)}
    about |= {"task_vectors": task_vectors, "durable": json.dumps(durable)}
    try:
        with database.writing() as connection:
            known = connection.execute("SELECT count(*) FROM meta WHERE key = 'task_vectors'").fetchone()[0]
            if not known:
                connection.executemany("INSERT INTO meta VALUES (?, ?)", about.items())
    except BaseException:
        database.close()
        raise
    return database


def find(folder: Path, mode: Mode, patience: float) -> Database:
    """The database of a store that is there.

    Raises:
        StoreError: no store, a newer version's, damaged, or it may not be read or written.
    """
    file = folder / DATABASE
    if mode not in get_args(Mode):
        raise StoreError(f"mode: {mode!r} is unknown; choose r or w")
    if not file.is_file():
        raise StoreError(f"{folder}: holds no store ({DATABASE} is missing); give the folder of a grid that was run")
    return Database(file, mode, patience=patience)
