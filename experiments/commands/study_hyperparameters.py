"""``mergebound study hyperparameters``: what hyperparameters of experts do to their merge, beside what theory says."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from experiments.commands.options import (
    ClusterAddress,
    CountOnly,
    DataRoot,
    Download,
    ReportFolder,
    StudyEngine,
    VerdictsAsJson,
    Work,
    Workers,
    typed_command,
)
from theory.errors import MergeboundError


def register(group: typer.Typer) -> None:
    """Add the command to the group ``study``."""
    group.command("hyperparameters")(hyperparameters)


def hyperparameters(
    out: ReportFolder,
    size: Annotated[str, typer.Option("--size", help="tiny, small or paper, or a YAML file of one's own.")] = "tiny",
    work: Work = None,
    root: DataRoot = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="A stage: grids, merges, constants, predictions or report. Repeatable."),
    ] = None,
    workers: Workers = None,
    engine: StudyEngine = "local",
    address: ClusterAddress = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda: of the grids and of merging.")] = "cpu",
    download: Download = False,
    count: CountOnly = False,
    as_json: VerdictsAsJson = False,
) -> None:
    """Protocol A: fine-tune, merge matched and heterogeneous groups, predict them by every tier, and judge each factor.

    Every stage keeps what is finished: stop at any moment, and run the same command to go on. The report is one page,
    `report.html` in --out; verdicts follow the rule of the specification, which was fixed before any result.
    """
    from experiments.studies.engine import chosen_engine
    from experiments.studies.hyperparameters.run import STAGES, Hooks, Place, count_study, run_study
    from experiments.studies.hyperparameters.spec import read_study

    where = chosen_engine(engine, workers, device, address, download)
    spec = read_study(size)
    place = Place(out, work or out / "work", root)
    console = Console(stderr=True)
    if count:
        _count(spec, place, count_study(spec), as_json)
        return
    stages = tuple(stage for stage in STAGES if stage in only) if only else STAGES
    bad = [stage for stage in only or () if stage not in STAGES]
    if bad:
        raise MergeboundError(f"--only {bad[0]}: is no stage; choose from {', '.join(STAGES)}")
    from experiments.commands.grid_progress import Display

    meter = _Meter(console)
    with Display(console) as display:
        hooks = Hooks(
            say=lambda line: console.print(line, highlight=False),
            grid=display.show,
            merges=lambda p: meter.show(f"merges: {p.phase}", p.done, p.total),
            units=lambda stage: lambda done, total: meter.show(stage, done, total),
        )
        run_study(spec, place, stages=stages, engine=where, workers=workers, hooks=hooks, command=typed_command())
    if "report" in stages:
        _show(place, as_json)


class _Meter:
    """A line now and then."""

    def __init__(self, console: Console, every: float = 20.0) -> None:
        self._console, self._every, self._last = console, every, 0.0

    def show(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is."""
        import time

        now = time.monotonic()
        if now - self._last >= self._every or done == total:
            self._last = now
            self._console.print(f"{stage}: {done} of {total}", highlight=False)


def _count(spec: Any, place: Any, rows: list[dict[str, Any]], as_json: bool) -> None:
    from experiments.studies.hyperparameters.grids import study_grids, write_grids

    paths = write_grids(study_grids(spec), place.work / "grids")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row, path in zip(rows, paths, strict=True):
        typer.echo(
            f"{row['grid']}: {row['runs']:,} runs, {row['checkpoints']:,} checkpoints, {row['merges']:,} merges; "
            f"time: mergebound grid plan {path}"
        )


def _show(place: Any, as_json: bool) -> None:
    import pandas as pd

    path = place.out / "verdicts.csv"
    if not path.exists():
        typer.echo(f"nothing is measured yet; see {place.out / 'report.html'}")
        return
    verdicts = pd.read_csv(path)
    if as_json:
        typer.echo(json.dumps(json.loads(verdicts.to_json(orient="records", double_precision=15)), indent=2))
        return
    table = Table("network", "factor", "measured", "prediction", "predicted", "verdict", "heterogeneous", box=None)
    for row in verdicts.fillna("").to_dict("records"):
        table.add_row(*(str(row[n]) for n in ("architecture", "factor", "measured", "prediction", "predicted",
                                              "verdict", "heterogeneous")))  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=118)).print(table)
    typer.echo(f"report: {place.out / 'report.html'}")
