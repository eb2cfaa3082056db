"""Exceptions of :mod:`merging`; messages say what was wrong, where, and what to do about it, in one sentence."""

from __future__ import annotations

from theory.errors import MergeboundError


class CheckpointError(MergeboundError):
    """A checkpoint cannot be read, written, or merged with the others."""


class MethodError(MergeboundError):
    """A merging method is unknown, or was given settings outside their domain."""
