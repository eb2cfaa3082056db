"""Code blocks of the pages, and the marks above them that say how `make docs` treats each.

A block of ``python`` is run, all of a page in one namespace; a block of ``sh`` is run command by command; a block of
``yaml`` or ``toml`` needs a mark.  Marks are comments right above a block, which the site does not show:

* ``<!-- file: NAME -->``: the block is the content of this file, which later commands of the page read;
* ``<!-- prints: WORDS -->``: what the block prints contains these words (repeat it for several);
* ``<!-- refused: WORDS -->``: the command must end with an error that contains these words;
* ``<!-- placeholder: WHY -->``: not run, because names in it stand for what only the reader has;
* ``<!-- elsewhere: WHERE -->``: not run here, because another command or test runs it.

Blocks in other languages (``text``, ``bibtex``) are not code.  Commands that a page only names, in backticks or in a
block that is marked, are checked by :mod:`docs.building.inline`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("python", "sh", "yaml", "toml", "json")
"""Languages that are run, written to a file, or marked."""
NOT_CODE = ("text", "bibtex", "")
MARKS = ("file", "prints", "refused", "placeholder", "elsewhere")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w{}-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```\s*$", re.M | re.S)
"""A fenced block with its language and code."""
_MARK = re.compile(r"<!-- (?P<name>[a-z]+): (?P<value>.*?) -->")
_GROUP = re.compile(r"(?:<!-- [a-z]+: [^\n]*? -->\s*)+\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: path of the page, relative to the root of the repository.
        line: of the page, from 1.
        language: as written after the fence.
        code: without the fences.
        marks: (name, value) pairs of the comments above it.
    """

    page: str
    line: int
    language: str
    code: str
    marks: tuple[tuple[str, str], ...] = ()

    def marked(self, name: str) -> tuple[str, ...]:
        """Values of the marks of this name."""
        return tuple(value for mark, value in self.marks if mark == name)

    @property
    def place(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether `make docs` runs the block, or writes it to the file that a later command reads."""
        if self.marked("placeholder") or self.marked("elsewhere"):
            return False
        return self.language in ("python", "sh") or bool(self.marked("file"))


def pages() -> tuple[str, ...]:
    """The README and every page under ``docs`` that is written by hand, in the order in which they are run."""
    docs = ROOT / "docs"
    skipped = (docs / "generated", docs / "building")
    found = sorted(
        path.relative_to(ROOT).as_posix()
        for path in docs.rglob("*.md")
        if not any(folder in path.parents for folder in skipped)
    )
    return ("README.md", *found)


def blocks_of(page: str, text: str | None = None) -> tuple[Block, ...]:
    """The fenced blocks of a page; ``text`` in place of the file's."""
    content = (ROOT / page).read_text() if text is None else text
    found = []
    for match in FENCE.finditer(content):
        above = _GROUP.search(content[: match.start()].rstrip(" "))
        marks = tuple((m["name"], m["value"].strip()) for m in _MARK.finditer(above[0])) if above else ()
        line = content.count("\n", 0, match.start()) + 1
        indent = match["indent"]
        code = "".join(row.removeprefix(indent) for row in match["code"].splitlines(keepends=True))
        found.append(Block(page, line, match["language"], code, marks))
    return tuple(found)


def faults(block: Block) -> Iterator[str]:
    """What is wrong with a block's language or marks."""
    for name, _ in block.marks:
        if name not in MARKS:
            yield f"{block.place}: mark {name!r} is unknown; choose from {', '.join(MARKS)}"
    if block.language not in (*CODE, *NOT_CODE) and not block.language.startswith("{"):
        yield f"{block.place}: language {block.language!r}; choose from {', '.join((*CODE, 'text'))}"
    if block.language in CODE and not block.runs and not (block.marked("placeholder") or block.marked("elsewhere")):
        yield f"{block.place}: {block.language} is neither run nor marked; see docs/building/blocks.py"


def commands(code: str) -> tuple[str, ...]:
    """The command lines of a block of shell: continued lines joined, comments and empty lines left out."""
    joined = re.sub(r"\s*\\\n\s*", " ", code)
    lines = (line.strip() for line in joined.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))
