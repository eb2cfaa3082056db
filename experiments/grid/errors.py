"""Errors of a grid's specification, with the place in the file that they speak of."""

from __future__ import annotations

from theory.errors import MergeboundError

Place = tuple[str | int, ...]
"""Keys and positions from the top of the specification, as ``("overrides", 0, "set", "steps")``."""


class GridError(MergeboundError):
    """A grid cannot be read, expanded or run.

    Attributes:
        message: what is wrong and what to do, without file and line.
        place: in the specification.
        source: file or preset; empty where there is none.
        line: from 1; None where there is none.
    """

    def __init__(self, message: str, place: Place = (), *, source: str = "", line: int | None = None) -> None:
        self.message, self.place, self.source, self.line = message, tuple(place), source, line
        where = [source] * bool(source) + [f"line {line}"] * (line is not None)
        parts = [", ".join(where)] * bool(where) + [dotted(self.place)] * bool(place) + [message]
        super().__init__(": ".join(parts))

    def at(self, place: Place) -> GridError:
        """The same below another place."""
        return GridError(self.message, (*place, *self.place), source=self.source, line=self.line)


def dotted(place: Place) -> str:
    """A place in words: ``overrides[0].set.steps``.

    >>> dotted(("overrides", 0, "set", "steps"))
    'overrides[0].set.steps'
    """
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
