"""``mergebound study prediction``: every predictor of merged risk, judged on merges of a grid's experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from experiments.commands.options import CountOnly, DataRoot, OneThreadWorkers, Work, several_values
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

    from experiments.prediction.runner import Status
    from experiments.prediction.spec import StudySpec


def register(group: typer.Typer) -> None:
    """Add the command to the group ``study``."""
    group.command("prediction", cls=several_values("--stores"))(prediction)


def prediction(
    study: Annotated[str, typer.Argument(help="A preset (npz8-prediction), or a YAML file.")],
    stores: Annotated[
        list[str], typer.Option("--stores", help="Folder of each regime's grid: `--stores mild=FOLDER harsh=FOLDER`.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for tables (CSV), figures (PNG) and a page.")],
    work: Work = None,
    root: DataRoot = None,
    workers: OneThreadWorkers = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            help="Only one of merges, variances, accuracies, prices, comparison, hull, hull_layers, curve. Repeatable.",
        ),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Tables of what is finished; run nothing.")
    ] = False,
    count: CountOnly = False,
    resamples: Annotated[int, typer.Option("--resamples", min=50, help="Resamples of experts behind intervals.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ambitions as JSON.")] = False,
) -> None:
    """Predict merges of heterogeneous experts, measure them, and judge every predictor.

    Predictions use calibration images of the validation parts, test images are for measuring only. Every finished group
    is kept: stop at any moment, and run the same command to go on.
    """
    from experiments.prediction.job import STAGES
    from experiments.prediction.report import write_study
    from experiments.prediction.runner import plan_study, read_frames, run_study
    from experiments.prediction.runner import status as status_of
    from experiments.prediction.spec import read_study

    spec = read_study(study)
    folders = _stores(stores)
    place = work or out / "work"
    plan = plan_study(spec, folders)
    if count:
        _count(spec, len(plan), sum(len(pool.groups) for pool, _ in plan))
        return
    if report_only:
        frames = read_frames(spec, plan, place / spec.digest())
    else:
        with Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        ) as bar:  # fmt: skip
            task = bar.add_task("groups", total=None)

            def watch(now: Status) -> None:
                bar.update(task, completed=now.done, total=now.total, description=", ".join(now.working) or "groups")

            frames = run_study(
                spec, folders, place, root=root, workers=workers, stages=tuple(stage or STAGES), watch=watch
            )
    if frames.merges.empty:
        raise MergeboundError(f"{place}: nothing is finished yet; run without --report-only")
    done = status_of(spec, plan, place / spec.digest())
    tables = write_study(spec, frames, out, resamples=resamples, finished=(done.done, done.total))
    if as_json:
        typer.echo(json.dumps(json.loads(tables.aims.to_json(orient="records")), indent=2))
        return
    _show(tables.aims, Console(width=118))
    typer.echo(f"{len(tables.merges)} merges; {done.done} of {done.total} groups of all stages; tables in {out}")


def _stores(texts: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in texts:
        regime, equals, folder = text.partition("=")
        if not equals or not folder or regime in found:
            raise MergeboundError(f"--stores {text}: give one folder per regime, as mild=FOLDER")
        found[regime] = Path(folder)
    return found


def _count(spec: StudySpec, pools: int, groups: int) -> None:
    per_pool = sum(number * sum(m.merges(size) for m in spec.methods) for size, number in spec.groups.items())
    typer.echo(f"{pools} pools, {groups} groups, {pools * per_pool} merges")


def _show(aims: pd.DataFrame, console: Console) -> None:
    table = Table(title="Ambitions (chosen or fitted on one half of the experts, judged on the other)")
    for name in ("network", "ambition", "value", "target", "met", "merges"):
        table.add_column(name, justify="right" if name in ("value", "merges") else "left")
    for row in aims[aims["taken"] == "all"].to_dict("records"):
        met = "yes" if row["met"] else "no"
        table.add_row(
            str(row["architecture"]),
            str(row["aim"]),
            f"{row['value']:.3g}",
            str(row["target"]),
            met,
            str(row["merges"]),
        )
    console.print(table)
