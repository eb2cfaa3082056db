"""What commands print and write: tables for people, JSON for machines, files for later."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_WIDTH = 118


def show(
    tables: Mapping[str, pd.DataFrame],
    *,
    headline: str = "",
    notes: Sequence[str] = (),
    figures: Mapping[str, Figure] | None = None,
    facts: Mapping[str, Any] | None = None,
    shown: Mapping[str, Sequence[str]] | None = None,
    as_json: bool = False,
    out: Path | None = None,
) -> None:
    """Print tables (or JSON) and write them to a folder.

    Args:
        tables: by name; each becomes ``NAME.csv``.
        headline: what was measured, in one line.
        notes: sentences under the tables.
        figures: by name; each becomes ``NAME.svg`` and ``NAME.png``.
        facts: single values for the JSON.
        shown: columns of a table that are printed (all are written); a table with an empty list is not printed.
        as_json: print JSON and nothing else.
        out: folder for files, made if it is not there.

    Raises:
        MergeboundError: the folder cannot be written.
    """
    written = [] if out is None else _write(out, tables, figures or {})
    if as_json:
        content: dict[str, Any] = {"headline": headline, **(facts or {})}
        content |= {name: records(frame) for name, frame in tables.items()}
        content["notes"] = list(notes)
        typer.echo(json.dumps(_clean(content), indent=2, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    if headline:
        console.print(escape(headline))
    for name, frame in tables.items():
        columns = list((shown or {}).get(name, frame.columns))
        if columns:
            console.print()
            console.print(_table(name, frame[columns]))
    for note in notes:
        console.print(f"note: {escape(note)}")
    for path in written:
        typer.echo(f"written: {path}")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON data; numbers that are not finite become null."""
    return [{str(key): _clean(value) for key, value in row.items()} for row in frame.to_dict("records")]


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if hasattr(value, "tolist"):
        return _clean(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _table(name: str, frame: pd.DataFrame) -> Table:
    table = Table(title=name.replace("_", " "), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in frame.columns:
        table.add_column(str(column).replace("_", " "), overflow="fold")
    for row in _blank_ends(frame).itertuples(index=False):
        table.add_row(*(escape(_cell(value)) for value in row))
    return table


def _blank_ends(frame: pd.DataFrame) -> pd.DataFrame:
    """Limits that are infinite (nothing bounds the number on that side) as empty cells."""
    ends = [c for c in frame.columns if str(c).split("_")[-1] in ("low", "high") and frame[c].dtype.kind == "f"]
    return frame.assign(**{str(c): frame[c].astype(object).where(~frame[c].abs().eq(math.inf), None) for c in ends})


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _write(out: Path, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, Figure]) -> list[Path]:
    written: list[Path] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, frame in tables.items():
            _blank_ends(frame).to_csv(out / f"{name}.csv", index=False)
            written.append(out / f"{name}.csv")
        if figures:
            from experiments.plots import save_png, save_svg

            for name, figure in figures.items():
                written += [save_svg(figure, out / f"{name}.svg"), save_png(figure, out / f"{name}.png")]
    except OSError as error:
        raise MergeboundError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    return written
