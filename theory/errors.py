"""The one family of exceptions that users of the toolkit see.

Every message says what was wrong, where, and what to do about it, in one sentence.  The command line prints that
sentence and exits with code 2.
"""

from __future__ import annotations


class MergeboundError(ValueError):
    """Base class: input that the toolkit cannot use (message: what, where, remedy)."""


class RecipeError(MergeboundError):
    """A recipe field is missing, out of its domain, or outside what a bound covers."""


class AssumptionError(RecipeError):
    """A bound was asked for a recipe that violates one of its assumptions."""
