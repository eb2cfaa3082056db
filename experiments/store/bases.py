"""Bases x_0 in a store: kept once, task vectors are stored against them."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.bases.base import Base, read_base, save_base
from experiments.store import tallies
from experiments.store.blobs import FOLDER, TEMPORARY, blob_path, disk_error, put_blob, remove
from experiments.store.columns import OTHER
from experiments.store.database import Database
from experiments.store.errors import StoreError
from experiments.store.joined import Reference

_FEW = 2


def add_base(database: Database, folder: Path, base: Base) -> str:
    """Keep a base, once; returns what it is called, see :meth:`experiments.store.store.Store.add_base`.

    Raises:
        StoreError: the disk refuses.
    """
    described = base.describe()
    name = base.digest
    for _ in range(2):
        known = database.read("SELECT record FROM bases WHERE digest = ?", (name,))
        if not known:
            break
        if _network(json.loads(known[0]["record"])) == _network(described):
            return name
        name = f"{base.digest}{OTHER}{hashlib.sha256(_network(described).encode()).hexdigest()[:12]}"
    temporary = folder / FOLDER / f"{TEMPORARY}{secrets.token_hex(4)}.safetensors"
    try:
        save_base(temporary, base)
        blob = put_blob(folder, temporary.read_bytes())
    except OSError as error:
        raise disk_error(error, temporary) from error
    finally:
        remove(temporary)
    with database.writing() as connection:
        row = (name, base.architecture, base.classes, blob, json.dumps(described, default=str))
        if connection.execute("INSERT INTO bases VALUES (?, ?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING", row).rowcount:
            tallies.add(connection, "bases", [row])
    return name


def open_base(database: Database, folder: Path, name: str) -> Base:
    """A base by its name.

    Raises:
        MergeboundError: not there, or damaged.
    """
    found = database.read("SELECT blob FROM bases WHERE digest = ?", (name,))
    if not found:
        raise StoreError(f"{folder}: holds no base {name[:12]}; add it with add_base")
    return read_base(blob_path(folder, found[0]["blob"]))


class BaseStates:
    """Tensors of the bases that were asked for last."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._database, self._folder = database, folder
        self._kept: dict[str, Reference] = {}

    def __call__(self, name: str) -> Reference:
        """Tensors of a base; none if the store does not have it (its runs are then stored as they are)."""
        if name not in self._kept:
            if not self._database.read("SELECT 1 FROM bases WHERE digest = ?", (name,)):
                return Reference()
            while len(self._kept) >= _FEW:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = Reference(open_base(self._database, self._folder, name).state)
        return self._kept[name]


def _network(described: Mapping[str, Any]) -> str:
    """What a base computes with its tensors, as text."""
    kept = {name: described[name] for name in ("architecture", "classes", "options")}
    return json.dumps(kept, sort_keys=True, default=str)
