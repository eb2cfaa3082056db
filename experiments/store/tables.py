"""What a store answers as tables, and rows about merges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.store import merges, table
from experiments.store.constant import constant_fields
from experiments.store.database import Database
from experiments.store.export import export
from experiments.store.status import Status, status

if TYPE_CHECKING:
    import pandas as pd


class Tables:
    """The part of :class:`experiments.store.store.Store` that answers questions over all runs.

    Args:
        folder: of the store.
        database: of the store.
    """

    def __init__(self, folder: Path, database: Database) -> None:
        self.folder = folder
        self._database = database

    def frame(self, *, nullable: bool = False) -> pd.DataFrame:
        """One row per run that is done and checkpoint: hyperparameters, outcome and metrics (``test_accuracy``, ...).

        Args:
            nullable: metrics as pandas' ``Float64``, which tells NaN from what was not measured (``NA``).
        """
        return table.query(self._database, nullable=nullable)

    def query(
        self,
        expression: str = "",
        *,
        limit: int | None = None,
        final: bool = False,
        nullable: bool = False,
        **equal: Any,
    ) -> pd.DataFrame:
        """Rows of :meth:`frame` for which an expression holds.

        Args:
            expression: such as ``learning_rate < 0.01 and task == 'npz8:mnist'``; see
                :mod:`experiments.store.expression`.
            limit: rows at most.
            final: last checkpoints only.
            nullable: as in :meth:`frame`.
            equal: columns with the value, or a collection of values, that they must have.

        Raises:
            QueryError: unknown column (with the nearest), or something that is no comparison.
        """
        return table.query(self._database, expression, equal, limit=limit, final=final, nullable=nullable)

    def columns(self) -> tuple[str, ...]:
        """Names that expressions may use."""
        return tuple(table.known_columns(self._database))

    def constants(self) -> dict[str, Any]:
        """Fields that all runs share, with their value; see :func:`experiments.store.constant.constant_fields`."""
        return constant_fields(self._database)

    def status(self) -> Status:
        """Counts, rate, leases and time left."""
        return status(self._database, self.folder)

    def export(self, path: str | Path) -> int:
        """Write :meth:`frame` as ``.csv`` or ``.parquet``; returns the rows."""
        return export(self.frame(nullable=True), Path(path))

    def add_merges(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Store rows about merges; see :func:`experiments.store.merges.add_merges`."""
        return merges.add_merges(self._database, rows)

    def merges(self) -> pd.DataFrame:
        """One row per merge that was stored."""
        return merges.read_merges(self._database)

    def merge_keys(self) -> frozenset[str]:
        """Keys of the merges that are there."""
        return merges.merge_keys(self._database)
