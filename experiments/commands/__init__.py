"""One module per command; each has ``register(app)``."""

from __future__ import annotations

from collections.abc import Callable

import typer

from experiments.commands import (
    advise,
    base,
    bound,
    collect,
    data,
    demo,
    design,
    diff,
    finetune,
    grid,
    inspect,
    measure,
    merge,
    methods,
    models,
    predict,
    study,
)

COMMANDS: tuple[Callable[[typer.Typer], None], ...] = (
    demo.register,
    finetune.register,
    grid.register,
    predict.register,
    measure.register,
    study.register,
    advise.register,
    merge.register,
    methods.register,
    models.register,
    base.register,
    data.register,
    collect.register,
    inspect.register,
    diff.register,
    bound.register,
    design.register,
)
