"""The results of a store as a table: one row per run that is done and checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.store.columns import BOOLEANS, RUN_COLUMNS
from experiments.store.database import Database
from experiments.store.errors import QueryError
from experiments.store.expression import Column, Metric, compile_expression

if TYPE_CHECKING:
    import pandas as pd

_TEXTS = ("digest", "architecture", "base_kind", "base_digest", "split_digest", "task", "base", "optimizer", "schedule",
          "augment", "sampling", "precision", "trained", "checkpoints")  # fmt: skip
_RESULT = {
    "cohort": Column("h.name", "text"),
    "outcome": Column("s.outcome", "text"),
    "seconds": Column("s.seconds", "number"),
    "bytes": Column("s.bytes", "number"),
    "owner": Column("s.owner", "text"),
    "committed": Column("s.committed", "number"),
    "step": Column("c.step", "number"),
    "final": Column("c.final", "bool"),
}
_FIELDS = ("value", "low", "high")
_NAN_BITS = {"value": 1, "low": 2, "high": 4}
_FROM = (
    "FROM runs r JOIN results s ON s.run = r.id JOIN checkpoints c ON c.run = r.id "
    "LEFT JOIN cohorts h ON h.id = r.cohort"
)


def known_columns(database: Database) -> dict[str, Column | Metric]:
    """What expressions may name: columns of runs and results, and the metrics that were stored."""
    found: dict[str, Column | Metric] = {name: Column(f"r.{name}", _kind(name)) for name in RUN_COLUMNS}
    found |= _RESULT
    for part, name in _measured(database):
        label = f"{part}_{name}"
        found.setdefault(label, Metric(part, name))
        for field in ("low", "high", "n"):
            found.setdefault(f"{label}_{field}", Metric(part, name, field))
    return found


def query(
    database: Database,
    expression: str = "",
    equal: Mapping[str, Any] | None = None,
    *,
    limit: int | None = None,
    final: bool = False,
    nullable: bool = False,
) -> pd.DataFrame:
    """Rows for which an expression holds, in the order in which runs were added; see ``Store.query``."""
    import pandas as pd

    if limit is not None and limit < 0:
        raise QueryError(f"limit: {limit} is negative; give 0 or more rows")
    columns = known_columns(database)
    where, values = _where(expression, equal or {}, columns, final)
    names = [*RUN_COLUMNS, *_RESULT]
    picked = ", ".join(f"{columns[name].sql} AS {name}" for name in names)  # type: ignore[union-attr]
    tail = "" if limit is None else f" LIMIT {int(limit)}"
    rows = database.read_tuples(f"SELECT c.id, {picked} {_FROM}{where} ORDER BY r.id, c.step{tail}", values)
    numbers, *content = zip(*rows, strict=True) if rows else [()] * (len(names) + 1)
    frame = pd.DataFrame(dict(zip(names, map(list, content), strict=True)), columns=names)
    for name in (*BOOLEANS, "final"):
        frame[name] = frame[name].astype(bool)
    for name in ("clip_norm", "rank"):
        frame[name] = frame[name].astype("Float64" if nullable else float)
    measured = _metrics(database, np.array(numbers, dtype=np.int64), nullable)
    return pd.concat([frame, pd.DataFrame(measured, index=frame.index)], axis=1)


def metric_rows(database: Database, run: int) -> list[dict[str, Any]]:
    """The metrics of a run as they were committed."""
    rows = database.read(
        "SELECT c.step, m.* FROM metrics m JOIN checkpoints c ON c.id = m.checkpoint WHERE c.run = ? "
        "ORDER BY c.step, m.part, m.name",
        (run,),
    )
    found = []
    for row in rows:
        numbers = {name: math.nan if row["nan"] & _NAN_BITS[name] else row[name] for name in _FIELDS}
        found.append({k: row[k] for k in ("step", "part", "name")} | numbers | {k: row[k] for k in ("n", "tier")})
    return found


def _kind(name: str) -> str:
    return "bool" if name in BOOLEANS else "text" if name in _TEXTS else "number"


def _measured(database: Database) -> list[tuple[str, str]]:
    rows = database.read("SELECT part, name FROM measures ORDER BY part, name")
    return [(row["part"], row["name"]) for row in rows]


def _where(
    expression: str, equal: Mapping[str, Any], columns: Mapping[str, Column | Metric], final: bool
) -> tuple[str, list[Any]]:
    parts: list[str] = []
    values: list[Any] = []
    if expression.strip():
        sql, values = compile_expression(expression, columns)
        parts.append(sql)
    for name, wanted in equal.items():
        several = isinstance(wanted, Collection) and not isinstance(wanted, str)
        choices = list(wanted) if several else [wanted]
        texts = [repr(item.item() if isinstance(item, np.generic) else item) for item in choices]
        sql, more = compile_expression(f"{name} in [{', '.join(texts)}]", columns)
        parts.append(sql)
        values += more
    if final:
        parts.append("c.final = 1")
    return (" WHERE " + " AND ".join(parts) if parts else ""), values


def _metrics(database: Database, checkpoints: np.ndarray, nullable: bool) -> dict[str, Any]:
    """Columns of metrics for some checkpoints."""
    import pandas as pd

    place = {int(number): index for index, number in enumerate(checkpoints)}
    values: dict[tuple[str, str], tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for checkpoint, part, name, nan, *numbers in _metric_source(database, checkpoints):
        index = place.get(checkpoint)
        if index is None:
            continue
        if (part, name) not in values:
            empty = [np.full(len(checkpoints), math.nan) for _ in _FIELDS]
            values[part, name] = (empty, [np.zeros(len(checkpoints), dtype=bool) for _ in _FIELDS])
        column, there = values[part, name]
        for k, number in enumerate(numbers):
            if number is not None:
                column[k][index] = number
                there[k][index] = True
            elif nan & (1 << k):
                there[k][index] = True
    found: dict[str, Any] = {}
    for (part, name), (column, there) in sorted(values.items()):
        for field, data, mask in zip(_FIELDS, column, there, strict=True):
            if mask.any():
                label = f"{part}_{name}" + ("" if field == "value" else f"_{field}")
                found[label] = pd.arrays.FloatingArray(data, ~mask) if nullable else data
    return found


def _metric_source(database: Database, checkpoints: np.ndarray) -> Iterator[tuple[Any, ...]]:
    sql = "SELECT checkpoint, part, name, nan, value, low, high FROM metrics"
    if len(checkpoints) > 20_000:
        yield from database.read_tuples(sql)
        return
    for start in range(0, len(checkpoints), 500):
        part = [int(number) for number in checkpoints[start : start + 500]]
        yield from database.read_tuples(f"{sql} WHERE checkpoint IN ({', '.join('?' * len(part))})", part)
