"""``mergebound advise merge``: method, coefficients and experts for a merge of checkpoints or of a grid's experts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.commands.about_experts import Chosen, ExpertsCommand, about_experts, telling
from experiments.commands.options import AsJson, typed_command
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.advise.merge_advice import MergeAdvice

Out = Annotated[Path | None, typer.Option("--out", help="Folder for the page, tables (CSV), figure and advice.json.")]


def register(group: typer.Typer) -> None:
    """Add the command to the group ``advise``."""
    group.command("merge", cls=ExpertsCommand)(merge)


@about_experts(images=128)
def merge(
    about: Chosen,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Budget: minutes of one core (measured speed).")
    ] = None,
    samples: Annotated[
        float | None, typer.Option("--samples", help="Budget: images through the network; the same on every machine.")
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option("--kinds", help="What to collect, in place of a budget: `secant,pairs,tangent_base`."),
    ] = None,
    verify: Annotated[int, typer.Option("--verify", min=0, help="Merges to evaluate before deciding; 0: none.")] = 4,
    bounds: Annotated[str, typer.Option("--bounds", help="Lowest and highest coefficient.")] = "0,1",
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Which method, coefficients and experts: chosen on half of the calibration images, judged on the other half.

    `mergebound advise merge --base B.safetensors --experts E1.safetensors E2.safetensors --data D1.npz D2.npz`, or
    `--store FOLDER --runs D1 D2` for experts of a grid. Prints the risk with its interval, the theory's active term,
    and what to change first. `--images`: 16 or more, so that both halves give an interval.
    """
    from experiments.advise.collecting import MergeBudget
    from experiments.advise.merge_page import plain, summary, write_merge_advice
    from experiments.advise.merging import advise_merge
    from experiments.commands.predict import read_numbers

    limits = read_numbers("--bounds", bounds)
    if len(limits) != 2:
        raise MergeboundError(f"--bounds {bounds}: give two numbers, as 0,1")
    chosen = None if kinds is None else tuple(k.strip() for k in kinds.split(",") if k.strip())
    if chosen is not None and (minutes is not None or samples is not None):
        raise MergeboundError("--kinds: says what is collected; leave --minutes and --samples out")
    subject = about.open(at_least=2)
    with telling() as tell:
        advice = advise_merge(
            subject, budget=MergeBudget(samples, minutes), kinds=chosen, bounds=(limits[0], limits[1]), verify=verify,
            seed=about.seed, progress=tell,
        )  # fmt: skip
    command = merge_command(advice, about.base, about.experts or ())
    if out is not None:
        page = write_merge_advice(out, advice, command=typed_command(), merge=command)
    if as_json:
        typer.echo(json.dumps(plain(advice, command), indent=2, allow_nan=False))
        return
    first, lines = summary(advice)
    typer.echo("\n".join([first, *(f"  {line}" for line in lines)]))
    if command:
        typer.echo(f"make it: {command}")
    if out is not None:
        typer.echo(f"written: {page}")


def merge_command(advice: MergeAdvice, base: Path | None, experts: Sequence[Path]) -> str:
    """The command that makes the merge from checkpoints; empty for experts of a grid."""
    from experiments.advise.making import merge_arguments

    if base is None:
        return ""
    parts = ["mergebound", "merge", *merge_arguments(advice), "--base", str(base), "--out", "merged.safetensors"]
    return shlex.join([*parts, *map(str, experts)])
