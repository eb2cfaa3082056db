"""What a store refuses."""

from __future__ import annotations

from theory.errors import MergeboundError


class StoreError(MergeboundError):
    """A store cannot be opened, read or written (message: what, which file, remedy)."""


class StoreBusy(StoreError):
    """Other processes held the store for longer than the patience that was granted."""


class StoreConflict(StoreError):
    """A run is stored already with other bits."""


class QueryError(MergeboundError):
    """An expression of ``grid query`` cannot be understood."""
