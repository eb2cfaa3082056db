"""The one family of exceptions that users of the toolkit see.

Every message says what was wrong, where, and what to do about it, in one sentence.  The command line prints that
sentence and exits with code 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(value: object, options: Iterable[str]) -> str:
    """``did you mean 'ties'?`` where a name is close to a known one, else the list of those to choose from.

    >>> nearest("Ties-", ["ties", "dare"]), nearest("x", ["ties", "dare"])
    ("did you mean 'ties'?", 'choose one of ties, dare')
    """
    known = list(options)
    close = get_close_matches(str(value).lower().replace("-", "_"), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"


class MergeboundError(ValueError):
    """Base class: input that the toolkit cannot use (message: what, where, remedy)."""


class RecipeError(MergeboundError):
    """A recipe field is missing, out of its domain, or outside what a bound covers."""


class AssumptionError(RecipeError):
    """A bound was asked for a recipe that violates one of its assumptions."""
