"""``mergebound study``: studies over grids that were run, each fixed by a specification of its own.

The group is put together from modules that each have ``register(group)``: :data:`PARTS`.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from experiments.commands import study_hyperparameters, study_prediction, study_scale

PARTS: tuple[Callable[[typer.Typer], None], ...] = (
    study_prediction.register,
    study_hyperparameters.register,
    study_scale.register,
)
"""What adds commands to the group, in the order in which help shows them."""


def register(app: typer.Typer) -> None:
    """Add the group ``study`` to the command line."""
    app.add_typer(build_group(), name="study")


def build_group() -> typer.Typer:
    """The group with the commands of all parts."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help="Studies over finished grids: what is drawn and done is fixed beforehand on a page of YAML.",
    )

    @group.callback()
    def common() -> None:
        """Studies over finished grids: what is drawn and done is fixed beforehand on a page of YAML."""

    for add in PARTS:
        add(group)
    return group
