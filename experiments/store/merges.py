"""Rows about merges, beside the runs that they are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.store import tallies
from experiments.store.database import Database, present
from experiments.store.errors import StoreError
from experiments.store.leases import now
from experiments.store.seals import merge_seal

if TYPE_CHECKING:
    import pandas as pd

KEY = "key"


def add_merges(database: Database, rows: Iterable[Mapping[str, Any]]) -> int:
    """Store rows in one transaction; returns how many were new.

    Args:
        database: of the store.
        rows: JSON data (numpy scalars, NaN and infinities too).  ``key`` names a merge and its task; a row of a key
            that is there is passed over.  Rows without one are named by their content.

    Raises:
        StoreError: a value that is not JSON.
    """
    ready = []
    for row in rows:
        try:
            record = json.dumps(dict(row), sort_keys=True, default=_plain)
        except (TypeError, ValueError) as error:
            raise StoreError(f"merges: a row cannot be stored ({error}); give numbers, texts and lists") from error
        key = str(row[KEY]) if KEY in row else hashlib.sha256(record.encode()).hexdigest()
        ready.append((key, now(), record, merge_seal(key, record)))
    with database.writing() as connection:
        there = present(connection, "merges", "key", [row[0] for row in ready])
        new = {row[0]: row for row in reversed(ready) if row[0] not in there}  # of a key that comes twice, the first
        connection.executemany("INSERT INTO merges (key, added, record, seal) VALUES (?, ?, ?, ?)", new.values())
        tallies.add(connection, "merges", [(key,) for key in new])
    return len(new)


def read_merges(database: Database) -> pd.DataFrame:
    """All rows, in the order in which they came; ``key`` is the first column."""
    import pandas as pd

    rows = database.read("SELECT key, record FROM merges ORDER BY added, key")
    return pd.DataFrame([{KEY: row["key"], **json.loads(row["record"])} for row in rows])


def forget_merges(database: Database, keys: Iterable[str]) -> int:
    """Make merges absent, so that the same command measures them again; returns how many were there."""
    with database.writing() as connection:
        there = present(connection, "merges", "key", list(keys))
        connection.executemany("DELETE FROM merges WHERE key = ?", [(key,) for key in there])
        tallies.take(connection, "merges", [(key,) for key in there])
    return len(there)


def merge_keys(database: Database) -> frozenset[str]:
    """Keys that are there."""
    return frozenset(row["key"] for row in database.read("SELECT key FROM merges"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r} is no JSON data")
