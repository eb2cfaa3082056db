"""``mergebound advise``: how to merge experts that exist, and how to fine-tune experts that shall be merged.

The group is put together from modules that each have ``register(group)``: :data:`PARTS`.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from experiments.commands import advise_compare, advise_merge, advise_training

PARTS: tuple[Callable[[typer.Typer], None], ...] = (
    advise_merge.register,
    advise_training.register,
    advise_compare.register,
)
"""What adds commands to the group, in the order in which help shows them."""
HELP = "Advice with intervals: how to merge experts, and how to fine-tune experts that shall be merged."


def register(app: typer.Typer) -> None:
    """Add the group ``advise`` to the command line."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, help=HELP)

    @group.callback(help=HELP)
    def common() -> None:
        pass

    for add in PARTS:
        add(group)
    app.add_typer(group, name="advise")
