"""Docstrings on the pages of the programming interface: bars are norms, and fields may be described together."""

from __future__ import annotations

import re
from typing import Any

_TOGETHER = re.compile(r"^(:(?:param|ivar) )(\*{0,2}\w+(?:, \*{0,2}\w+)+)(?=:)")
_LITERAL = re.compile(r"(``.*?``)", re.S)


def setup_docstrings(app: Any) -> None:
    """Have every docstring corrected after napoleon has turned its sections into fields."""
    app.connect("autodoc-process-docstring", _process, priority=600)


def _process(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    lines[:] = escape_bars([together(line) for line in lines])


def together(line: str) -> str:
    """``:ivar a, b:`` without the blank: Sphinx would read a field ``b`` of the type ``a,`` and look for a class."""
    return _TOGETHER.sub(lambda m: m[1] + m[2].replace(" ", ""), line)


def escape_bars(lines: list[str]) -> list[str]:
    """``|x|`` as it stands in plain text; what is in double backticks or indented below a ``::`` is left alone."""
    if not lines:
        return []
    prose, literal, block = [], [], None
    for line in "\n".join(lines).split("\n"):  # an entry may hold several lines
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        prose.append("" if block is not None else line)
        literal.append(line if block is not None else "")
        if block is None and line.rstrip().endswith("::"):
            block = indent
    parts = _LITERAL.split("\n".join(prose))
    parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
    return [kept or escaped for kept, escaped in zip(literal, "".join(parts).split("\n"), strict=True)]
