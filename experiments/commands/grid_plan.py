"""``mergebound grid plan``, ``presets``, ``schema`` and ``expand``: what a grid is before anything runs."""

from __future__ import annotations

import typer


def register(group: typer.Typer) -> None:
    """Add the commands to the group ``grid``."""
    group.command("presets")(show_presets)


def show_presets() -> None:
    """List the grids that come with the toolkit."""
    from experiments.grid.yaml_source import grid_presets

    for name in grid_presets():
        typer.echo(name)
