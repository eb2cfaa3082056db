"""Seals: hashes of the numbers in the database, written with them, so that ``verify`` sees what was altered.

Weights, training curves and specifications have hashes that name them; metrics, scalars of the log and rows about
merges are rows of a database that anybody can edit.  A seal finds a damaged or edited row.  It does not stop somebody
who edits the seal too.

A run has one seal for each of three parts, so that a report can say which one was altered.  Stores that were written
before there were seals have none: they are reported as not recorded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

PARTS = {
    "metrics": "its metrics",
    "log": "the scalars of its training log",
    "record": "its outcome, seconds, task, base or list of checkpoints",
}
"""Parts of a run that have a seal, in words."""


def run_seals(
    record: Sequence[Any], points: Iterable[Sequence[Any]], log: str, metrics: Iterable[Sequence[Any]]
) -> str:
    """The column ``seals`` of a result.

    Args:
        record: digest, task, base (JSON), outcome, blob, bytes, content and seconds of the run.
        points: step, digest and whether it is the last one, of every checkpoint.
        log: the column ``log``.
        metrics: step, part, name, value, low, high, nan, n and tier of every metric; numbers as SQLite gives them back
            (NaN is ``None`` with its bit in ``nan``).

    Returns:
        JSON: SHA-256 by the names of :data:`PARTS`.
    """
    return json.dumps(
        {
            "metrics": _hash(sorted(_plain(row) for row in metrics)),
            "log": hashlib.sha256(log.encode()).hexdigest(),
            "record": _hash([_plain(record), sorted(_plain(row) for row in points)]),
        }
    )


def altered(kept: str, now: str) -> list[str]:
    """What of a run is not what was committed, in words; empty if nothing is.

    Args:
        kept: seals that were stored.
        now: :func:`run_seals` of what the database holds.
    """
    try:
        before = json.loads(kept)
        return [words for name, words in PARTS.items() if before[name] != json.loads(now)[name]]
    except (ValueError, KeyError, TypeError):
        return ["its seals"]


def merge_seal(key: str, record: str) -> str:
    """The column ``seal`` of a row about merges: SHA-256 of its key and content."""
    return hashlib.sha256(f"{key}\n{record}".encode()).hexdigest()


def _plain(row: Sequence[Any]) -> str:
    """A row as text; SQLite keeps no sign of zero, and knows booleans as numbers."""
    return json.dumps([_value(value) for value in row])


def _value(value: Any) -> Any:
    if isinstance(value, float):
        return None if value != value else value + 0.0
    return int(value) if isinstance(value, bool) else value


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
