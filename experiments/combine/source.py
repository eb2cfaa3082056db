"""What merging needs of a store of finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import pandas as pd
from torch import Tensor

from experiments.bases.base import Base


class Source(Protocol):
    """Finished runs and a table for merges; :class:`experiments.store.Store` is one."""

    def frame(self) -> pd.DataFrame:
        """One row per run and checkpoint: hyperparameters, outcome and metrics."""

    def base(self, digest: str) -> Base:
        """A base of the runs."""

    def state(self, digest: str, step: int | None = None) -> dict[str, Tensor]:
        """Full state dict of a run at a checkpoint."""

    def merges(self) -> pd.DataFrame:
        """Rows that were added."""

    def add_merges(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Add rows, all or none; a row whose ``key`` is there is passed over.  Returns how many were new."""
