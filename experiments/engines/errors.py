"""What an engine refuses."""

from __future__ import annotations

from theory.errors import MergeboundError


class EngineError(MergeboundError):
    """A grid cannot be run or go on (message: what, where, remedy)."""
