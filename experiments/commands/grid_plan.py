"""``mergebound grid plan``, ``presets``, ``schema`` and ``expand``: what a grid is before anything runs."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.grid.estimate import Estimate, Row
    from experiments.grid.pretraining_time import Pretraining
    from experiments.grid.run_spec import RunSpec

NOT_HERE = 1
"""Exit code of ``grid plan`` where the grid is sound but cannot be run here."""
_WIDTH = 118

Source = Annotated[str, typer.Argument(help="A preset of `mergebound grid presets`, or a .yaml or .json file.")]
Root = Annotated[
    Path | None,
    typer.Option("--root", help="Folder of the data sets. Default: MERGEBOUND_DATA.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group ``grid``."""
    group.command("presets")(show_presets)
    group.command("plan")(plan)
    group.command("expand")(expand_command)
    group.command("schema")(schema)


def show_presets(as_json: AsJson = False) -> None:
    """List the grids that come with the toolkit: what each is for, and how many runs it has."""
    from experiments.grid.expand import expand
    from experiments.grid.yaml_source import grid_presets, read_grid

    rows: list[dict[str, Any]] = []
    for name in grid_presets():
        file = read_grid(name)
        runs = expand(file.spec)
        rows.append(
            {
                "name": name,
                "runs": len(runs),
                "checkpoints": sum(len(run.checkpoints) for run in runs),
                "about": head_comment(file.text),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("preset", "runs", "checkpoints", "about", box=None, pad_edge=False)
    for row in rows:
        table.add_row(str(row["name"]), f"{row['runs']:,}", f"{row['checkpoints']:,}", escape(str(row["about"])))
    _console().print(table)


def plan(
    source: Source,
    root: Root = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of the results, to see whether they fit.", show_default=False)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu or cuda (default: what the file says, or cpu).", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes (default: one per core; one on a GPU).")
    ] = None,
    do_calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Time a few steps of each network.")
    ] = True,
    seconds: Annotated[
        float, typer.Option("--calibrate-seconds", min=0.1, help="For all networks together, about.")
    ] = 20.0,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Look for data, weights, store and device.")] = True,
    download: Annotated[
        bool, typer.Option("--download", help="Published weights may be downloaded when the grid runs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a grid is and costs: runs, checkpoints, samples, operations, disk, time, and what would stop it here.

    Exit code 0: it can be run; 1: something is missing on this machine (each problem is listed with its line); 2: the
    specification is wrong. The time is that of `grid run` on a quiet machine: the planner's probe, cohorts in the way
    that it would choose, evaluation and storing; where steps take too long to try cohorts, that of the plain loop.
    """
    from experiments.grid.estimate import estimate
    from experiments.grid.yaml_source import read_grid

    file = read_grid(source)
    place = store if store is not None or file.spec.store is None else Path(file.spec.store)
    found = estimate(
        file,
        root=root,
        store=place,
        device=device or file.spec.device or "cpu",
        workers=workers,
        seconds=seconds if do_calibrate else 0.0,
        download=download,
        check=check,
    )
    if as_json:
        content = asdict(found) | {"problems": [_problem(error) for error in found.problems]}
        typer.echo(json.dumps(content, indent=2))
    else:
        _show(found, place is not None)
    if found.problems:
        raise typer.Exit(NOT_HERE)


def expand_command(
    source: Source,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", help="Write a table here instead of to standard output.", show_default=False),
    ] = None,
) -> None:
    """List the runs of a grid as a table (CSV): one row per run with all its hyperparameters.

    What was left out or merged is told on standard error.
    """
    from experiments.atomic import write_atomically
    from experiments.grid.yaml_source import read_grid, read_runs

    expansion = read_runs(read_grid(source))
    rows = [flat(run) for run in expansion.runs]
    for note in expansion.notes:
        typer.echo(f"note: {note}", err=True)
    if csv_file is None:
        _write_csv(rows, sys.stdout)
        return
    import io

    text = io.StringIO()
    _write_csv(rows, text)
    try:
        write_atomically(csv_file, text.getvalue().encode())
    except OSError as error:
        raise MergeboundError(f"{csv_file}: cannot be written ({error.strerror}); give another file") from error
    typer.echo(f"{len(rows):,} runs written to {csv_file}", err=True)


def schema() -> None:
    """Print the JSON schema of a grid's file, for editors that check and complete YAML."""
    from experiments.grid.schema import grid_schema

    typer.echo(json.dumps(grid_schema(), indent=2))


def flat(run: RunSpec) -> dict[str, Any]:
    """A run as one row: the task, the base, and every hyperparameter."""
    content = run.model_dump(mode="json", exclude={"base"})
    base = {f"base.{name}": getattr(run.base, name) for name in ("kind", "seed")}
    quality = run.base.quality if isinstance(run.base.quality, str) else "custom"
    head = {"task": content.pop("task"), "architecture": run.architecture, **base, "base.quality": quality}
    marks = " ".join(str(step) for step in content.pop("checkpoints"))
    return {**head, **content, "checkpoints": marks}


def _write_csv(rows: list[dict[str, Any]], target: Any) -> None:
    writer = csv.DictWriter(target, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def head_comment(text: str) -> str:
    """The first sentence of a file's head comment, without the name before the colon.

    >>> head_comment("# a: Some runs.\\n# More.\\nname: a\\n")
    'Some runs.'
    """
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    joined = " ".join(lines).partition(": ")[2]
    first, stop, _ = joined.partition(". ")
    return first + "." * bool(stop) if stop else joined


def _problem(error: Any) -> dict[str, Any]:
    return {"message": str(error), "place": list(error.place), "line": error.line}


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _show(found: Estimate, stored: bool) -> None:
    console = _console()
    total = found.total
    typer.echo(
        f"{found.name}: {found.runs:,} runs on {found.tasks} tasks, {total.checkpoints:,} checkpoints, "
        f"{total.steps:,} steps, {total.samples:,} samples"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("architecture", overflow="fold")
    table.add_column("base")
    for name in ("parameters", "runs", "checkpoints", "steps", "samples", "operations", "disk", "1 worker"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        cost = row.cost
        table.add_row(
            row.architecture,
            row.kind,
            f"{row.parameters:,}",
            f"{cost.runs:,}",
            f"{cost.checkpoints:,}",
            f"{cost.steps:,}",
            f"{cost.samples:,}",
            f"{cost.flops:.2e}",
            size_text(cost.bytes),
            "-" if row.seconds is None else time_text(row.seconds),
        )
    console.print(table)
    typer.echo(
        f"operations: {total.flops:.2e} of training and {total.evaluation_flops:.2e} of evaluation (validation and "
        f"test images at every checkpoint: {total.evaluated:,} images)"
    )
    where = "on the store's disk" if stored else "on the disk here"
    typer.echo(f"disk: at most {size_text(total.bytes)} for weights ({size_text(found.free_bytes)} free {where})")
    if found.seconds is None or found.low is None or found.high is None:
        typer.echo("time: not estimated (--no-calibrate)")
    else:
        plural = "s" * (found.workers > 1)
        typer.echo(
            f"time: about {time_text(found.seconds)} with {found.workers} worker{plural} on {found.machine} "
            f"({found.device}), {time_text(found.low)} to {time_text(found.high)} where nothing else runs; without "
            "reading the data"
        )
        for each in found.pretraining:
            typer.echo(f"      {_pretraining_text(each)}")
        for row in found.rows:
            typer.echo(f"      {row.architecture}: {_way_text(row)}")
        for row in found.rows:
            timing = row.timing
            if timing is not None and not set(timing.batches) & set(row.batch_sizes):
                said = ", ".join(str(batch) for batch in timing.batches)
                typer.echo(
                    f"      {row.architecture}: scaled from steps with batches of {said}; a guess within a factor"
                )
    if found.published:
        said = f"{len(found.published)} tasks are" if len(found.published) > 1 else "1 task is"
        typer.echo(f"note: {said} counted as published, not as on disk: {', '.join(found.published[:5])}", nl=False)
        typer.echo(" and more" if len(found.published) > 5 else "")
    for note in found.notes:
        typer.echo(f"note: {note}")
    if found.problems:
        typer.echo(f"\nthis grid cannot be run here: {len(found.problems)} problem(s)")
        for error in found.problems:
            typer.echo(f"- {error}")


def _pretraining_text(each: Pretraining) -> str:
    """What making bases costs, which the total has in it."""
    bases = f"{each.bases} bases" if each.bases > 1 else "the base"
    return (
        f"of which pretraining {bases} {each.architecture} ({each.quality}) on {each.data}: "
        f"about {time_text(each.seconds or 0.0)} ({each.steps:,} steps{' each' * (each.bases > 1)}, batches of "
        f"{each.batch_size}, before the first run, unless the store has "
        f"{'them' if each.bases > 1 else 'it'})"
    )


def _way_text(row: Row) -> str:
    """How the runs of a network will be trained, as far as the calibration tells."""
    if row.cohorts is None or row.work is None:
        return "a plain loop, the network's arithmetic only (steps take too long to try cohorts)"
    found, work = row.cohorts, row.work
    way = "one after the other" if found.way == "loop" else f"{found.way}, {found.chunk} experts at a time"
    gain = "" if found.way == "loop" else f", {found.speed_up:.1f} times the loop"
    return f"{way}{gain}; {work.cohorts:,} cohorts, about {time_text(work.planning)} to choose"


def size_text(size: float) -> str:
    """Bytes for people.

    >>> size_text(2_500_000), size_text(12)
    ('2.5 MB', '12 B')
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def time_text(seconds: float) -> str:
    """Seconds for people.

    >>> time_text(40), time_text(600), time_text(9000), time_text(8e5)
    ('40 s', '10 min', '2.5 h', '9.3 days')
    """
    for unit, scale, least in (("years", 365.25 * 86400, 2e7 * 2), ("days", 86400, 172800), ("h", 3600, 7200)):
        if seconds >= least:
            return f"{seconds / scale:,.3g} {unit}" if unit != "days" else f"{seconds / scale:.1f} days"
    return f"{seconds / 60:.3g} min" if seconds >= 120 else f"{seconds:.3g} s"
