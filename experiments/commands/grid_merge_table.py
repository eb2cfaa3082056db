"""What ``mergebound grid merge`` prints: means, paired differences, and what the grid lacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from experiments.combine.designs import Design
    from experiments.combine.finished import Finished

_WIDTH = 118


def show(table: pd.DataFrame, metric: str, design: Design, as_json: bool, finished: Finished) -> None:
    """Print means and paired differences, with what the grid lacks.

    Args:
        table: rows of merges.
        metric: column that is shown.
        design: that was merged.
        as_json: print JSON, with what was clamped too.
        finished: what the grid lacks.
    """
    from experiments.combine.clamped import clamped_counts
    from experiments.combine.effects import factor_differences, factor_means

    means = factor_means(table.assign(level=table.get("level", ""), factor=design.factor), metric)
    paired = design.kind == "factor" and bool(table["matched"].all())
    differences = factor_differences(table, metric) if paired else None
    if as_json:
        parts = {"means": means} | ({} if differences is None else {"differences": differences})
        found = {name: json.loads(part.to_json(orient="records", double_precision=15)) for name, part in parts.items()}
        clamped = [asdict(one) for one in clamped_counts(table)]
        content = {"merges": len(table), **finished.to_row(), **found, "clamped": clamped}
        typer.echo(json.dumps(content, indent=2, default=str))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    bases = _bases(table)
    console.print(_table(means, f"{metric} of {len(table)} merges (measured, 95 % over experts)", design.factor, bases))
    if differences is not None:
        both = bool(table["matched_seeds"].all())
        what = "the same tasks and seeds" if both else "the same tasks, other seeds"
        title = f"paired differences of {metric} ({what} at every level)"
        console.print(_table(differences, title, design.factor, bases))
    console.print(finished.words, highlight=False)


def _bases(table: pd.DataFrame) -> dict[str, str]:
    """What to call each base: its network, with the beginning of its digest where a network has several bases."""
    pairs = table[["base_digest", "architecture"]].drop_duplicates()
    several = pairs["architecture"].duplicated(keep=False)
    return {
        digest: f"{name} ({digest[:8]})" if twice else str(name)
        for digest, name, twice in zip(pairs["base_digest"], pairs["architecture"], several, strict=True)
    }


def _held(stratum: str, bases: Mapping[str, str]) -> str:
    """What the groups of a row have in common, in words."""
    fields: dict[str, Any] = json.loads(stratum) if stratum else {}
    base = str(fields.pop("base_digest", ""))
    return ", ".join([bases.get(base, base[:8]), *(f"{name}={value}" for name, value in fields.items())])


def _table(rows: pd.DataFrame, title: str, factor: str, bases: Mapping[str, str]) -> Table:
    paired = "reference" in rows.columns
    names = ["base", "method", "size", *([factor] if factor else []), *(["minus"] if paired else [])]
    found = Table(*names, "groups", "experts", "mean", "95 %", title=title)
    for row in rows.to_dict("records"):
        cells = [
            _held(row["stratum"], bases),
            str(row["label"]),
            f"{row['size']:g}",
            *([str(row["level"])] if factor else []),
        ]
        cells += [str(row["reference"])] if paired else []
        found.add_row(
            *cells,
            str(row["groups"]),
            str(row["experts"]),
            f"{row['mean']:.4f}",
            f"{row['low']:.4f} to {row['high']:.4f}",
        )
    return found
