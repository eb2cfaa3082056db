"""The name of a file above its content: the mark ``<!-- file: NAME -->`` of a block becomes the block's caption."""

from __future__ import annotations

import re
from typing import Any

_FILE = re.compile(
    r"(?P<before>(?:^<!-- [a-z]+: [^\n]* -->\n)*)^<!-- file: (?P<name>[^\n]*?) -->\n"
    r"(?P<after>(?:^<!-- [a-z]+: [^\n]* -->\n)*)^```(?P<language>[a-z]+)\n",
    re.M,
)


def setup_captions(app: Any) -> None:
    """Have every page pass through :func:`captioned` before it is read."""
    app.connect("source-read", _read)


def _read(app: Any, page: str, source: list[str]) -> None:
    source[0] = captioned(source[0])


def captioned(text: str) -> str:
    """A page whose blocks that are files show the file's name."""
    return _FILE.sub(
        lambda m: f"{m['before']}{m['after']}```{{code-block}} {m['language']}\n:caption: {m['name']}\n\n", text
    )
