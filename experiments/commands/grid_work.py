"""What ``mergebound grid run`` and ``grid resume`` do once the plan is frozen: the engine, the mirror, what is said."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from experiments.engines.progress import Outcome

GIVEN_UP = 1
"""Exit code where some cohorts were given up, and everything else is stored."""


def work(
    store: Path,
    root: str | Path | None,
    device: str,
    engine: str,
    options: dict[str, Any],
    console: Console,
    mirror: str | None = None,
    mirror_every: float = 5.0,
    mirror_replace: bool = False,
) -> None:
    """Do what is missing, and say what there is then.

    Args:
        store: whose plan is frozen.
        root: of the data sets.
        device: where runs are trained.
        engine: ``local`` or ``ray``.
        options: what the engine is called with.
        console: for people.
        mirror: where a copy of the store is kept.
        mirror_every: minutes between two copies.
        mirror_replace: whether the first copy may replace what is there, whatever it is.

    Raises:
        typer.Exit: some cohorts were given up.
    """
    from experiments.commands.grid_progress import Display
    from experiments.engines.local import stoppable
    from experiments.engines.mirror import Mirror
    from experiments.engines.prepare import tidy

    logging.getLogger("experiments.engines").setLevel(logging.WARNING)
    if engine == "local":
        check_machine(store, device)
    with ExitStack() as stack:
        if mirror is not None:
            stack.enter_context(stoppable())  # a copy is made on SIGTERM too
            copy = Mirror(
                store,
                mirror,
                every=60.0 * mirror_every,
                tell=lambda line: console.print(line, highlight=False),
                replace=mirror_replace,
            )
            stack.enter_context(copy)
        with Display(console) as display:
            if engine == "local":
                from experiments.engines.local import run_local

                outcome = run_local(store, root, device=device, watch=display.show, **options)
            else:
                from experiments.engines.ray import Share, run_ray

                cpus, gpus, memory = options.pop("share")
                share = Share(
                    cpus,
                    gpus if gpus is not None else 0.0 if device == "cpu" else 1.0,
                    None if memory is None else int(memory * 2**30),
                )
                outcome = run_ray(store, root, device=device, share=share, watch=display.show, **options)
        if outcome.complete:
            tidy(store)
    _say(outcome, store, console)


def check_machine(store: Path, device: str) -> None:
    """Refuse a device that is not here; say and remember where the plan was made for another machine.

    Raises:
        GridError: the device is not here.
    """
    from experiments.engines.machines import Machines
    from experiments.finetune.cohort.planner import machine
    from experiments.grid.errors import GridError
    from experiments.grid.preflight import check_device
    from experiments.store import Store

    if problems := check_device(device):
        said = problems[0].message.removeprefix(f"--device {device}: ").partition(";")[0]
        raise GridError(
            f"{store}: its plan was made for {device}: {said}; go on where there is one, or begin again in an empty "
            "folder with another --device"
        )
    with Store.open(store) as kept:
        Machines(kept).heard(machine(device))


def _say(outcome: Outcome, store: Path, console: Console) -> None:
    """What there is now, and what to do with it."""
    for name, error in outcome.failed.items():
        console.print(f"[bold red]given up:[/] cohort {escape(name)}: {escape(error)}", highlight=False, soft_wrap=True)
    diverged = f", {outcome.diverged} of them diverged" if outcome.diverged else ""
    console.print(
        f"{outcome.new} runs done in {outcome.seconds:.0f} s{diverged}; {outcome.done} of {outcome.total} are stored",
        highlight=False,
    )
    if outcome.complete:
        console.print(
            f"complete: see `mergebound grid status {store}` and `grid query`", highlight=False, soft_wrap=True
        )
        return
    console.print(f"go on with `mergebound grid resume {store}`", highlight=False, soft_wrap=True)
    raise typer.Exit(GIVEN_UP)
