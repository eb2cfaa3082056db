"""``mergebound advise compare``: advice against customary recipes, on tasks that it did not see."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from experiments.commands.options import DataRoot, ReportFolder, Work, Workers, typed_command


def register(group: typer.Typer) -> None:
    """Add the command to the group ``advise``."""
    group.command("compare")(compare)


def compare(
    out: ReportFolder,
    size: Annotated[str, typer.Option("--size", help="tiny, or a YAML file of one's own.")] = "tiny",
    work: Work = None,
    root: DataRoot = None,
    workers: Workers = None,
) -> None:
    """Advise on some tasks, fine-tune and merge the others by it, and compare with customary recipes and methods.

    Units that are finished are kept: stop at any moment, and run the same command to go on.
    """
    from experiments.advise.compare import frames, run_comparison, units
    from experiments.advise.compare_page import write_comparison
    from experiments.advise.compare_spec import read_comparison

    spec = read_comparison(size)
    console = Console(stderr=True)
    found = run_comparison(
        spec, work or out / "work", root=root, workers=workers,
        say=lambda line: console.print(line, highlight=False),
    )  # fmt: skip
    total = len(units(spec))
    page = write_comparison(
        spec, frames(found), out, command=typed_command(), planned=total, done=total
    )  # fmt: skip
    typer.echo((out / "README.md").read_text().partition("Specification")[0])
    typer.echo(f"report: {page}")
