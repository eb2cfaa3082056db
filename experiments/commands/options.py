"""Options that several commands share, each with its help written once, and what reads a command line for all."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

# --- experts of a grid, or checkpoints -------------------------------------------------------------------------------

StoreFolder = Annotated[
    Path | None, typer.Option("--store", help="Folder of a grid that was run; with --runs or --query.")
]
Runs = Annotated[
    list[str] | None,
    typer.Option("--runs", help="Digests of runs (or their first 8 letters or more): `--runs D1 D2`, or `D1,D2`."),
]
Query = Annotated[
    str | None,
    typer.Option("--query", help="Runs for which this holds, as `learning_rate < 0.01`; see `mergebound grid query`."),
]
Base = Annotated[
    Path | None, typer.Option("--base", help="The checkpoint the experts were fine-tuned from, in place of --store.")
]
Experts = Annotated[list[Path] | None, typer.Option("--experts", help="Fine-tuned checkpoints: `--experts E1 E2 ...`.")]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", help="One data set per expert, in order: an `.npz`, or a folder with one folder per class."),
]
Model = Annotated[
    str | None, typer.Option("--model", help="A timm model name, or a digit network; default: as the checkpoints say.")
]
GridRoot = Annotated[Path | None, typer.Option("--root", help="Folder of the data sets. Default: the grid's.")]
Images = Annotated[int, typer.Option("--images", min=1, help="Calibration images per task, drawn at random.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Names every random draw.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for tables (CSV) and figures (SVG and PNG).")]

# --- parts of a measurement ------------------------------------------------------------------------------------------

TrainingSamples = Annotated[int, typer.Option("--samples", min=2, help="Training samples per expert at most.")]
Checkpoints = Annotated[
    int, typer.Option("--checkpoints", min=0, help="Kept checkpoints of each run that are measured too, at most.")
]

# --- budgets ---------------------------------------------------------------------------------------------------------

Workers = Annotated[int | None, typer.Option("--workers", min=1, help="Processes (default: one per core).")]
OneThreadWorkers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes of one thread (default: one per core).")
]

# --- studies, advice and fine-tuning ---------------------------------------------------------------------------------

ReportFolder = Annotated[Path, typer.Option("--out", help="Folder for the report, tables (CSV) and figures.")]
Work = Annotated[Path | None, typer.Option("--work", help="Folder of what is finished; default: `work` in --out.")]
DataRoot = Annotated[Path | None, typer.Option("--root", help="Folder of the data sets (default: MERGEBOUND_DATA).")]
StudyEngine = Annotated[str, typer.Option("--engine", help="Of the grids: local, or ray (a cluster).")]
ClusterAddress = Annotated[str | None, typer.Option("--address", help="Of the Ray cluster.")]
Download = Annotated[bool, typer.Option("--download", help="Published weights may be downloaded.")]
CountOnly = Annotated[bool, typer.Option("--count", help="Say what would be done, and stop.")]
VerdictsAsJson = Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")]
NetworkName = Annotated[str, typer.Option("--model", help="Network: see `mergebound models list`.")]
BaseCheckpoint = Annotated[
    Path | None, typer.Option("--base", help="Checkpoint of the base; without it, seeded random weights.")
]
BaseClasses = Annotated[int, typer.Option("--classes", help="Classes of the base's own head.")]


# --- command lines ---------------------------------------------------------------------------------------------------


def several_values(*options: str) -> type[TyperCommand]:
    """The class of a command whose named options take all values up to the next option: ``--runs A B``."""

    class SeveralValues(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, spread(args, options))

    return SeveralValues


def spread(args: Sequence[str], several: Sequence[str]) -> list[str]:
    """Repeat options that take several values before each of their values.

    >>> spread(["--experts", "a", "b", "--seed", "1"], ["--experts"])
    ['--experts', 'a', '--experts', 'b', '--seed', '1']
    """
    found: list[str] = []
    option: str | None = None
    fresh = False
    for number, token in enumerate(args):
        if token == "--":
            return found + list(args[number:])
        if token.startswith("-") and len(token) > 1:
            name = token.partition("=")[0]
            option = name if name in several else None
            fresh = option is not None and "=" not in token
            found.append(token)
        elif option is not None and not fresh:
            found += [option, token]
        else:
            found.append(token)
            fresh = False
    return found


def typed_command() -> str:
    """The command as it can be typed again, without folders of this machine: absolute paths become names."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["mergebound", *words])
