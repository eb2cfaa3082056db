"""``mergebound grid``: grids of fine-tuning runs: plan them, list the presets, show what they expand to.

The group is put together from modules that each have ``register(grid_app)``: :data:`PARTS`.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from experiments.commands import grid_merge, grid_plan, grid_run, grid_store, grid_verify

PARTS: tuple[Callable[[typer.Typer], None], ...] = (
    grid_plan.register,
    grid_run.register,
    grid_store.register,
    grid_verify.register,
    grid_merge.register,
)
"""What adds commands to the group, in the order in which help shows them."""


def register(app: typer.Typer) -> None:
    """Add the group ``grid`` to the command line."""
    app.add_typer(build_group(), name="grid")


def build_group() -> typer.Typer:
    """The group with the commands of all parts."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help="Grids of fine-tuning runs: plan, run, resume, look at and query them.",
    )
    for add in PARTS:
        add(group)
    return group
