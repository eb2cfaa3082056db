"""``mergebound measure``: what the theory needs, measured on a base and its experts.

The group has one command per part, each in a module ``measure_<part>`` with ``register(group)``: :data:`PARTS`.  Every
command is :func:`experiments.commands.about_experts.about_experts` and writes tables, JSON (``--json``) or files
(``--out``) through :func:`experiments.commands.showing.show`.
"""

from __future__ import annotations

import importlib
import importlib.util

import typer

PARTS = ("function_space", "curvature", "noise", "twins", "landscape", "verdicts")
"""Commands of the group, in the order in which help shows them."""


def register(app: typer.Typer) -> None:
    """Add the group ``measure`` to the command line."""
    app.add_typer(build_group(), name="measure")


def build_group() -> typer.Typer:
    """The group with the commands of all parts that are there."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        help="Measure what the theory needs on a base and its experts, each number with tier and interval.",
    )

    @group.callback()
    def common() -> None:
        """Measure what the theory needs on a base and its experts, each number with tier and interval."""

    for part in PARTS:
        name = f"experiments.commands.measure_{part}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name).register(group)
    return group
