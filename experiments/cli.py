"""The command line: one thin module per command in :mod:`experiments.commands`.

Errors of the toolkit become one line on standard error and exit code 2; nothing below this layer prints.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from theory.errors import MergeboundError

HELP = """Predict how well merged fine-tuned models will do, before merging them, and why.

Start with **mergebound demo** (embedded data, about five minutes), go on with **mergebound predict** on checkpoints of
your own, and **mergebound merge** them with the coefficients that it prints."""

INTERRUPTED = "interrupted: what was finished is kept; run the same command again to continue"
NOTHING_KEPT = "interrupted: nothing is kept to go on from; the same command begins anew"
KEEPING = (
    ("demo",), ("finetune",), ("grid",), ("study",), ("merge",), ("base",), ("data",), ("advise", "training"),
    ("advise", "compare"),
)  # fmt: skip
"""Commands of which the next run goes on where an interrupted one stopped."""


def build_app() -> typer.Typer:
    """Assemble the typer application from the command modules."""
    from experiments.commands import COMMANDS

    app = typer.Typer(
        name="mergebound",
        help=HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode="markdown",
    )

    @app.callback()
    def common(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
        ] = False,
    ) -> None:
        """Options of the whole command."""

    for register in COMMANDS:
        register(app)
    return app


@cache
def _command() -> Any:
    """The application as click runs it, built once: that takes a tenth of a second, and programs call :func:`main`."""
    return typer.main.get_command(build_app())


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mergebound {importlib.metadata.version('mergebound')}")
        raise typer.Exit


class _OneLine(logging.Handler):
    """Log records as errors are shown: one line each, without time and place."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        level = record.levelname.lower()
        self._console.print(f"[bold]{level}:[/] {escape(self.format(record))}", highlight=False, soft_wrap=True)


def interruption(words: Sequence[str]) -> str:
    """What to say of a command that was interrupted, given the words behind ``mergebound``."""
    return INTERRUPTED if any(tuple(words[: len(kept)]) == kept for kept in KEEPING) else NOTHING_KEPT


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``mergebound`` command."""
    errors = Console(stderr=True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # timm scripts functions at import
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_OneLine(errors)])
    try:
        _command()(args=argv, prog_name="mergebound")
    except MergeboundError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # typer turns Ctrl-C into this
            errors.print(interruption(sys.argv[1:] if argv is None else argv), highlight=False)
        raise
    except KeyboardInterrupt:
        errors.print(interruption(sys.argv[1:] if argv is None else argv), highlight=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
