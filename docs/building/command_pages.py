"""Pages of the command line: every command with its arguments and options, from the application itself."""

from __future__ import annotations

import inspect
from typing import Any

from docs.building.theory_pages import plain


def command_pages() -> dict[str, str]:
    """Pages by file name: one per command or group of the first level, and one for all."""
    from typer.main import get_command

    from docs.building.generate import toctree
    from experiments.cli import build_app

    app: Any = get_command(build_app())
    pages = {f"{name}.md": "\n".join(section(app, ("mergebound", name), found)) for name, found in app.commands.items()}
    pages["index.md"] = "\n".join(
        [
            "# Command line",
            "",
            "Written from the application: what `--help` of each command says. An error is one line, and exit code 2.",
            "Where a page says that a command can be stopped, the same command goes on.",
            "",
            "| command | what it does |",
            "|---|---|",
            *(f"| [`mergebound {name}`]({name}.md) | {_first(found)} |" for name, found in app.commands.items()),
            "",
            toctree(list(app.commands), hidden=True),
        ]
    )
    return pages


def section(app: Any, words: tuple[str, ...], command: Any) -> list[str]:
    """A command with its usage, arguments and options, and below it the commands of its group."""
    context = app.context_class(command, info_name=" ".join(words))
    usage = " ".join([*words, *command.collect_usage_pieces(context)])
    lines = [f"{'#' * (len(words) - 1)} `{' '.join(words)}`", "", _text(command), "", "```text", usage, "```", ""]
    shown = [(p.param_type_name, p.get_help_record(context)) for p in command.get_params(context) if p.name != "help"]
    for kind in ("argument", "option"):
        records = [record for found, record in shown if record and found == kind]
        if records:
            lines += [f"| {kind} | meaning |", "|---|---|"]
            lines += [f"| {cell(f'`{name}`')} | {cell(meaning)} |" for name, meaning in records]
            lines.append("")
    for name, found in getattr(command, "commands", {}).items():
        lines += section(app, (*words, name), found)
    return lines


def cell(text: str) -> str:
    """Help in a cell of a table: what is between backticks stays code, the rest loses its special characters."""
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0:
        return plain(text)
    marked = [f"`{part}`".replace("|", r"\|") if index % 2 else plain(part) for index, part in enumerate(parts)]
    return "".join(marked)


def _text(command: Any) -> str:
    """The help of a command, which is Markdown."""
    return inspect.cleandoc(command.help or "").replace("\f", "")


def _first(command: Any) -> str:
    """Its first paragraph, as a cell."""
    return cell(_text(command).split("\n\n")[0])
