"""``mergebound study scale``: what matters for merging at scale (protocol B), at a size that this machine can bear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from experiments.commands.options import (
    ClusterAddress,
    CountOnly,
    DataRoot,
    Download,
    OneThreadWorkers,
    ReportFolder,
    StudyEngine,
    VerdictsAsJson,
    Work,
)

if TYPE_CHECKING:
    import pandas as pd

    from experiments.studies.scale.spec import ScaleSpec

PACKAGES = ("mergebound", "torch", "timm", "numpy", "scipy")


def register(group: typer.Typer) -> None:
    """Add the command to the group ``study``."""
    group.command("scale")(scale)


def scale(
    out: ReportFolder,
    size: Annotated[str, typer.Option("--size", help="tiny, small, paper, or a YAML file.")] = "tiny",
    work: Work = None,
    root: DataRoot = None,
    workers: OneThreadWorkers = None,
    engine: StudyEngine = "local",
    address: ClusterAddress = None,
    device: Annotated[str, typer.Option("--device", help="Where experts are trained: cpu or cuda.")] = "cpu",
    download: Download = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report on what is finished; run nothing.")
    ] = False,
    count: CountOnly = False,
    resamples: Annotated[int, typer.Option("--resamples", min=50, help="Resamples of test images.")] = 300,
    as_json: VerdictsAsJson = False,
) -> None:
    """Model size, base quality, number of experts and method: five findings with effects, intervals and verdicts.

    Experts are trained as a grid, merged, and scored on the tasks of the merge and, with frozen features, on tasks
    that nobody was trained on; multitask models, barriers, flatness and the theory's terms go with them. Every
    finished part is kept: stop at any moment, and run the same command to go on. `--engine ray` trains the experts'
    grids on a cluster; cells (merging and measuring) always stay on the machine where the command runs.
    """
    from experiments.studies.engine import chosen_engine
    from experiments.studies.scale.report import write_report
    from experiments.studies.scale.runner import read_study, run_study
    from experiments.studies.scale.spec import read_scale

    where = chosen_engine(engine, workers, device, address, download)
    spec = read_scale(size)
    place = work or out / "work"
    if count:
        _count(spec)
        return
    if report_only:
        measured = read_study(spec, place)
    else:
        with Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bar:
            task = bar.add_task("study", total=None)
            measured = run_study(
                spec,
                place,
                root=root,
                workers=workers,
                engine=where,
                watch=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            )
    command = f"mergebound study scale --size {Path(size).name} --out FOLDER"
    tables = write_report(spec, measured, out, command=command, versions=_versions(), resamples=resamples)
    findings = tables.frames["findings"]
    own = findings[findings["papers_own"].isin(["yes", "optimised multitask", "other family"])]
    if as_json:
        typer.echo(json.dumps(json.loads(own.to_json(orient="records")), indent=2))
        return
    _show(own, Console(width=140))
    typer.echo(f"{measured.done} of {measured.total} parts; report and tables in {out}")


def _count(spec: ScaleSpec) -> None:
    from experiments.studies.scale.cells import cells, chains

    every, groups = cells(spec), chains(spec)
    experts = len(every) * len(spec.held_in) * len(spec.seeds)
    typer.echo(
        f"{len(every)} cells, {experts} experts, {len(every) * len(groups) * len(spec.methods)} merges of "
        f"{len(groups)} groups by {len(spec.methods)} methods"
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _show(findings: pd.DataFrame, console: Console) -> None:
    table = Table(title="Findings (95 % intervals over merged tasks, test images and held-out tasks)")
    for name in ("finding", "scope", "verdict", "measure", "effect", "interval", "unit", "paper", "experts"):
        table.add_column(name, justify="right" if name in ("effect", "interval", "experts") else "left")
    for row in findings.to_dict("records"):
        table.add_row(
            str(row["finding"]),
            str(row["scope"]),
            str(row["verdict"]) + (" (borderline)" if row["borderline"] == "yes" else ""),
            str(row["measure"]),
            f"{row['effect']:+.3g}",
            f"{row['effect_low']:+.3g} to {row['effect_high']:+.3g}",
            str(row["unit"]),
            str(row["paper"]),
            f"{row['experts_accuracy']:.0%}",
        )
    console.print(table)
