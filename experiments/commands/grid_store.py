"""``mergebound grid status``, ``query``, ``export`` and ``gc``: what a store holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from experiments.store import Status, Store

_WIDTH = 118
_SHORT = 12

Folder = Annotated[Path, typer.Argument(help="Folder of the store, as `mergebound grid run` was given it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group ``grid``."""
    group.command("status")(show_status)
    group.command("query")(query)
    group.command("export")(export)
    group.command("gc")(gc)


def show_status(folder: Folder, as_json: AsJson = False) -> None:
    """Show how far a grid is: runs by outcome, who is at work, the rate and the time left."""
    from experiments.store import Store

    with Store.open(folder, "r") as store:
        found = store.status()
    if as_json:
        typer.echo(json.dumps(found.to_row(), indent=2))
        return
    console = _console()
    for name, text in _summary(found):
        console.print(f"[bold]{name:11s}[/] {escape(text)}", highlight=False)
    for lease in found.leases:
        text = f"{lease.owner}: {lease.cohort}, {lease.missing:,} runs left, lease ends in {lease.seconds:.0f} s"
        console.print(f"[bold]{'at work':11s}[/] {escape(text)}", highlight=False)
    for each in found.given_up:
        tries = "once" if each.attempts == 1 else f"{each.attempts} times"
        text = f"{each.cohort}, tried {tries}, {each.missing:,} runs left: {each.error}"
        console.print(f"[bold]{'given up':11s}[/] {escape(text)}", highlight=False)


def query(
    folder: Folder,
    expression: Annotated[
        str, typer.Argument(help="Such as \"learning_rate < 0.01 and task == 'npz8:mnist'\"; all rows without one.")
    ] = "",
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            help="Names, separated by commas; `all` for all; default: what varies in the grid.",
            show_default=False,
        ),
    ] = None,
    final: Annotated[bool, typer.Option("--final", help="Last checkpoints only.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="Rows at most.", show_default=False)] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print as CSV.")] = False,
    as_json: AsJson = False,
    list_columns: Annotated[bool, typer.Option("--list-columns", help="Print the names that may be used.")] = False,
) -> None:
    """Print the runs and checkpoints for which an expression holds.

    Comparisons (`<`, `<=`, `==`, `!=`, `in`), `and`, `or`, `not`, `between(x, a, b)`, `startswith(task, 'npz8:')`,
    `isnan(test_loss)`, `x is None`, over any hyperparameter, outcome, step or metric (`test_accuracy`).
    """
    from experiments.store import Store

    with Store.open(folder, "r") as store:
        if list_columns:
            typer.echo("\n".join(store.columns()))
            return
        frame = store.query(expression, limit=limit, final=final, nullable=True)
        shared = store.constants()
    brief = columns is None and not (as_csv or as_json)
    frame = frame[_varying(frame, shared)] if brief else _picked(frame, columns)
    if as_csv:
        typer.echo(frame.to_csv(index=False, na_rep="").rstrip("\n"))
    elif as_json:
        typer.echo(json.dumps(_records(frame), indent=2))
    else:
        table = Table(*frame.columns, box=None, pad_edge=False)
        for row in frame.itertuples(index=False):
            table.add_row(*(escape(_cell(value)) for value in row))
        _console().print(table)
        _console().print(f"{len(frame):,} rows", highlight=False)
        same = ", ".join(f"{name} {_cell(value)}" for name, value in shared.items() if value is not None)
        if brief and same:
            _console().print(f"the same in all runs: {escape(same)}", highlight=False)


def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="File to write: *.csv or *.parquet.")],
) -> None:
    """Write one row per run and checkpoint to a CSV or Parquet file."""
    from experiments.store import Store

    with Store.open(folder, "r") as store:
        rows = store.export(out)
    typer.echo(f"{rows:,} rows written to {out}")


def gc(
    folder: Folder,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", min=0, help="Seconds since a file was written, for it to go.")
    ] = 3600.0,
    as_json: AsJson = False,
) -> None:
    """Delete files that no run needs: what killed runners left. Safe while others run."""
    from experiments.store import Store

    with Store.open(folder, "r" if dry_run else "w") as store:
        found = store.gc(dry_run=dry_run, older_than=older_than)
    if as_json:
        typer.echo(json.dumps({"files": found.files, "bytes": found.bytes, "young": found.young}, indent=2))
        return
    if dry_run:
        typer.echo("".join(f"{name}\n" for name in found.files), nl=False)
    what = "would be deleted" if dry_run else "deleted"
    typer.echo(f"{len(found.files):,} files {what} ({_size(found.bytes)}); {found.young:,} too young to judge")
    for name in found.strangers:
        typer.echo(f"not the store's: {name}")


def data_root(store: Store, given: Path | None) -> str | Path | None:
    """The folder of the data sets: the one that is given, or else the one that the grid was given."""
    return given if given is not None else store.meta.get("root")


def _summary(found: Status) -> list[tuple[str, str]]:
    done = found.finished + found.diverged
    share = f" ({100 * done / found.runs:.1f} %)" if found.runs else ""
    rows = [
        ("runs", f"{found.runs:,}, {done:,} done{share}"),
        ("finished", f"{found.finished:,}"),
        ("diverged", f"{found.diverged:,}"),
        ("missing", f"{found.missing:,}" + (f", {found.unplanned:,} not in the plan" if found.unplanned else "")),
        ("cohorts", f"{found.cohorts_done:,} of {found.cohorts:,} done"),
        ("size", f"{_size(found.bytes)}, {_time(found.training_seconds)} of training"),
        ("rate", "unknown" if found.rate is None else f"{60 * found.rate:.2f} runs a minute"),
        ("time left", "unknown" if found.seconds_left is None else _time(found.seconds_left)),
    ]
    if found.ended:
        rows.append(("abandoned", f"{found.ended:,} cohorts whose runner is gone; the next one takes them"))
    if found.other_machines:
        others = "; ".join(found.other_machines)
        rows.append(("machines", f"the plan was made on {found.machine}; runs were trained on {others} too"))
    if found.conflicts:
        rows.append(("conflicts", f"{found.conflicts:,} runs gave other bits when done twice; the first is kept"))
    if found.merges:
        clamped = f"; in {found.clamped:,} of them BatchNorm variances were set to 0" if found.clamped else ""
        rows.append(("merges", f"{found.merges:,} rows{clamped}"))
    return rows


def _varying(frame: pd.DataFrame, shared: Mapping[str, Any]) -> list[str]:
    """What a table shows where nothing was asked for: the fields that vary in the grid, and how its runs ended."""
    from experiments.store.constant import FIELDS

    known = [str(name) for name in frame.columns]
    fields = [name for name in FIELDS if name not in shared and name in known]
    measured = [name for name in known if name in ("test_accuracy", "test_loss")]
    return ["digest", *fields, "outcome", "step", *measured]


def _picked(frame: pd.DataFrame, columns: str | None) -> pd.DataFrame:
    """The columns that were asked for."""
    from experiments.store.errors import QueryError
    from theory.errors import nearest

    known = [str(name) for name in frame.columns]
    if columns is None or columns.strip() == "all":
        return frame
    names = [name.strip() for name in columns.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise QueryError(f"--columns: there is no column {name!r}; {nearest(name, known)}")
    return frame[names]


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON data: what was not measured is null, NaN and infinities are texts."""
    import pandas as pd

    found = []
    for row in frame.to_dict("records"):
        found.append({str(key): None if value is pd.NA else _json(value) for key, value in row.items()})
    return found


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value.item() if hasattr(value, "item") else value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    text = "" if value is None or str(value) == "<NA>" else str(value)
    return text[:_SHORT] if len(text) == 64 else text


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
