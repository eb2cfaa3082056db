"""Commands that pages name without running them: in backticks within a sentence, or in a block that is marked.

Each must exist: every word down to a command of the command line, and every option of that command.  Nothing is run.
``...``, words in CAPITALS (they stand for what the reader has) and alternatives (``collect fisher|gram``) are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docs.building.blocks import FENCE, ROOT, blocks_of, commands

_SPAN = re.compile(r"(?<!`)(`+)(?!`)([^`]+)(?<!`)\1(?!`)")
_NAME = re.compile(r"[a-z][a-z0-9-]*(?:\|[a-z][a-z0-9-]*)*")
_PLACEHOLDER = re.compile(r"\.\.\.|…|[A-Z][A-Z0-9_]*")


def command_line() -> Any:
    """The application as click knows it: groups with ``commands``, commands with ``params``."""
    from typer.main import get_command

    from experiments.cli import build_app

    return get_command(build_app())


def inline_commands(page: str, app: Any, text: str | None = None) -> Iterator[tuple[int, str]]:
    """(line, command) of every command of ours that a page names, in backticks or in a block of ``sh``.

    ``text`` takes the place of the file's.  Blocks that must be refused are left out.  In backticks commands are spans
    that begin with ``mergebound``, with a group and another word (``study scale``), or with a command and hold an
    option (``merge --coef 0.3``).
    """
    content = (ROOT / page).read_text() if text is None else text
    prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), content)
    for match in _SPAN.finditer(prose):
        words = match[2].split()
        if words and _is_command(words, app):
            yield prose.count("\n", 0, match.start()) + 1, " ".join(words)
    for block in blocks_of(page, content):
        if block.language == "sh" and not block.marked("refused"):
            for line in commands(block.code):
                if line.split()[0] == "mergebound":
                    yield block.line, line


def _is_command(words: list[str], app: Any) -> bool:
    if words[0] == "mergebound":
        return True
    first = app.commands.get(words[0])
    if first is None:
        return False
    grouped = hasattr(first, "commands") and len(words) > 1 and _NAME.fullmatch(words[1]) is not None
    return grouped or any(word.startswith("--") for word in words[1:])


def fault_of(command: str, app: Any) -> str:
    """What the command line does not have of a command; nothing where it has all of it.

    Args:
        command: with or without ``mergebound`` in front.
        app: as :func:`command_line` gives it.
    """
    words = command.split()
    words = words[1:] if words and words[0] == "mergebound" else words
    known, path = {"--help"}, ["mergebound"]
    nodes = [app]
    while words and hasattr(nodes[0], "commands") and not words[0].startswith("-"):
        if _PLACEHOLDER.fullmatch(words[0]):
            return ""
        names = words.pop(0).split("|")
        missing = [name for name in names if name not in nodes[0].commands]
        if missing:
            return f"`{' '.join(path)}` has no command {missing[0]!r}"
        known |= _options(nodes[0])
        nodes = [nodes[0].commands[name] for name in names]
        path.append("|".join(names))
    for word in words:
        if word in ("|", ">", ">>", "&&", ";"):
            break
        name = word.split("=")[0].rstrip(",")
        for node in nodes:
            if re.match(r"--?[A-Za-z]", name) and name not in known | _options(node):
                return f"`{' '.join(path)}` has no option {name}"
    return ""


def _options(node: Any) -> set[str]:
    return {name for one in node.params for name in (*one.opts, *one.secondary_opts) if name.startswith("-")}


def inline_faults(page: str, app: Any, text: str | None = None) -> Iterator[str]:
    """What is wrong with the commands that a page names, each with its place."""
    for line, command in inline_commands(page, app, text):
        if fault := fault_of(command, app):
            yield f"{page}:{line}: {fault}: `{command}`"
