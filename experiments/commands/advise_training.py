"""``mergebound advise training``: how to fine-tune experts that shall be merged, from a pilot and the theory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from experiments.commands.options import (
    AsJson,
    BaseCheckpoint,
    BaseClasses,
    DataRoot,
    NetworkName,
    Workers,
    typed_command,
)
from theory.errors import MergeboundError

LARGEST = 1 << 16


def register(group: typer.Typer) -> None:
    """Add the command to the group ``advise``."""
    group.command("training")(training)


def training(
    tasks: Annotated[list[str], typer.Argument(help="Two or more data sets, as `mergebound finetune` takes them.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the page, tables (CSV) and the pilot's runs.")],
    model: NetworkName = "cifar_resnet20",
    base: BaseCheckpoint = None,
    pretrain: Annotated[
        str | None,
        typer.Option("--pretrain", help="Data set on which the base is made, in place of --base."),
    ] = None,
    classes: BaseClasses = 10,
    samples: Annotated[
        float | None,
        typer.Option("--samples", help="Budget of each expert: gradients of samples, pilot included."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Budget of all experts together: minutes of one core.")
    ] = None,
    pilot: Annotated[Path | None, typer.Option("--pilot", help="YAML with settings of the pilot.")] = None,
    keep: Annotated[float, typer.Option("--keep", help="Share of the experts' accuracy that a merge must keep.")] = 0.5,
    theory: Annotated[bool, typer.Option("--theory/--no-theory", help="Measure constants and ask the bound.")] = True,
    root: DataRoot = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Names the pilot's draws, and the base's weights.")] = 0,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """A short pilot (a quarter of the budget by default), then a recipe for the rest: learning rate, batch size, steps,
    momentum, decay, how to merge, and how many experts, with the predicted risk.

    The theory's own advice stands beside it; where it says "do not train" or nothing, the page says so. Stop at any
    moment: the same command goes on.
    """
    from experiments.advise.budget import samples_of
    from experiments.advise.pilot_spec import pilot_of
    from experiments.advise.training import advise_training
    from experiments.advise.training_page import finetune_command, plain, summary, write_training_advice
    from experiments.tasks.named import expand

    if (samples is None) == (minutes is None):
        raise MergeboundError("budget: give --samples (of each expert) or --minutes (of all experts together)")
    names = expand(tasks)
    spec = base_of(model, base, pretrain, classes, seed)
    content = {"seed": seed} | (_read(pilot) if pilot is not None else {})
    settings = pilot_of(content, str(pilot or "pilot"))
    console = Console(stderr=True)
    say = lambda line: console.print(line, highlight=False)  # noqa: E731
    folder = out / "pilot"
    count = samples if samples is not None else samples_of(minutes or 0.0, names, spec, settings, folder, root=root)
    advice = advise_training(
        names, spec, count, folder, pilot=settings, keep=keep, theory=theory, root=root, workers=workers, say=say
    )
    command = finetune_command(advice, "" if base is None else str(base))
    page = write_training_advice(out, advice, command=typed_command(), finetune=command)
    if as_json:
        typer.echo(json.dumps(plain(advice, command), indent=2, allow_nan=False))
        return
    first, lines = summary(advice)
    typer.echo("\n".join([first, *(f"  {line}" for line in lines)]))
    typer.echo(f"train them: {command}")
    typer.echo(f"written: {page}")


def base_of(model: str, base: Path | None, pretrain: str | None, classes: int, seed: int) -> Any:
    """The base as a specification.

    Raises:
        MergeboundError: a checkpoint and a data set to pretrain on, or a file that is not there.
    """
    from experiments.bases.spec import BaseSpec

    if base is not None and pretrain is not None:
        raise MergeboundError("--base and --pretrain: give one of them")
    if base is not None:
        if not base.is_file():
            raise MergeboundError(f"--base {base}: there is no such file")
        return BaseSpec(kind="checkpoint", architecture=model, classes=classes, weights=base.absolute(), seed=seed)
    if pretrain is not None:
        return BaseSpec(kind="pretrain", architecture=model, data=pretrain, seed=seed)
    return BaseSpec(kind="random", architecture=model, classes=classes, seed=seed)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise MergeboundError(f"{path}: more than {LARGEST} bytes; settings of a pilot fit on a page")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MergeboundError(f"{path}: cannot be read ({error}); check --pilot") from error
    except yaml.YAMLError as error:
        raise MergeboundError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise MergeboundError(f"{path}: write settings as `recipes: 8`, one a line")
    return content
