"""Which fields of a grid's runs vary, and which are the same in all of them: found in the indexes, not in the rows."""

from __future__ import annotations

from typing import Any

from experiments.store.columns import SPEC_COLUMNS
from experiments.store.database import Database

FIELDS = (
    *("task", "architecture", "base_kind", "base_digest"),
    *(name for name in SPEC_COLUMNS if name not in ("task", "base", "checkpoints")),
)
"""What may vary; the digest of a split says what task and ``split_seed`` say, checkpoints mostly what steps say."""


def constant_fields(database: Database) -> dict[str, Any]:
    """Fields of :data:`FIELDS` that are the same in all runs, with their value (``None``: not given), in order.

    A base's digest counts as constant (value: its digest, or ``None`` for several) where architecture and kind tell the
    bases apart.
    """
    parts = [f"(SELECT min({name}) FROM runs), (SELECT max({name}) FROM runs)" for name in FIELDS]
    parts += [f"EXISTS (SELECT 1 FROM runs WHERE {name} IS NULL)" for name in FIELDS]
    parts.append("(SELECT count(DISTINCT base_digest) FROM runs)")
    parts.append("(SELECT count(*) FROM (SELECT DISTINCT architecture, base_kind FROM runs))")
    row = tuple(database.read(f"SELECT {', '.join(parts)}")[0])
    count = len(FIELDS)
    found: dict[str, Any] = {}
    for k, name in enumerate(FIELDS):
        low, high, lacking = row[2 * k], row[2 * k + 1], row[2 * count + k]
        if low == high and (low is None or not lacking):
            found[name] = low
    if row[-2] <= row[-1]:
        found.setdefault("base_digest", None)
    return found
