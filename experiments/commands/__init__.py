"""One module per command; each has ``register(app)``."""

from __future__ import annotations

from collections.abc import Callable

import typer

from experiments.commands import bound, demo, merge

COMMANDS: tuple[Callable[[typer.Typer], None], ...] = (demo.register, merge.register, bound.register)
