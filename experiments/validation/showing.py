"""Tables as text: for pages, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table


def format_number(value: object, digits: int = 3) -> str:
    """A number for reading: ``digits`` significant digits, no exponent for ordinary sizes, "–" for missing."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, int | float | np.integer | np.floating):
        return str(value)
    number = float(value)
    if np.isnan(number):
        return "–"
    if number.is_integer() and not isinstance(value, float | np.floating):
        return str(int(number))
    if number != 0 and not 1e-3 <= abs(number) < 1e5:
        return f"{number:.{digits - 1}e}" if np.isfinite(number) else str(number)
    places = 0 if number == 0 else max(0, digits - 1 - int(np.floor(np.log10(abs(number)))))
    return f"{number:.{min(places, digits)}f}"


def readable(
    table: pd.DataFrame, columns: Mapping[str, str] | Sequence[str] | None = None, digits: int = 3
) -> pd.DataFrame:
    """``table`` as text: every interval folded into its value ("0.93 [0.90, 0.96]"), missing values as "–".

    ``columns`` selects and orders columns; a mapping also renames them.  Columns that are missing are left out.
    """
    names = [name for name in table.columns if not _is_limit(name, table)]
    if columns is not None:
        names = [name for name in columns if name in table.columns]
    labels = columns if isinstance(columns, Mapping) else {}
    out: dict[str, list[str]] = {}
    for name in names:
        texts = [format_number(value, digits) for value in table[name]]
        low, high = f"{name}_low", f"{name}_high"
        if low in table and high in table:
            limits = zip(table[low], table[high], strict=True)
            texts = [
                text if pd.isna(a) else f"{text} [{format_number(float(a), digits)}, {format_number(float(b), digits)}]"
                for text, (a, b) in zip(texts, limits, strict=True)
            ]
        out[labels.get(name, name)] = texts
    return pd.DataFrame(out)


def _is_limit(name: str, table: pd.DataFrame) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in table.columns for end in ("_low", "_high"))


def to_markdown(table: pd.DataFrame, columns: Mapping[str, str] | Sequence[str] | None = None, digits: int = 3) -> str:
    """``table`` as a Markdown table (plain text, aligned), through :func:`readable`."""
    text = readable(table, columns, digits)
    if text.shape[1] == 0:
        return "(empty)"
    widths = [max([len(name), *(len(value) for value in text[name])]) for name in text.columns]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    body = [line([str(value) for value in row]) for row in text.itertuples(index=False)]
    return "\n".join([line(list(text.columns)), rule, *body])


def rich_table(
    table: pd.DataFrame,
    title: str = "",
    columns: Mapping[str, str] | Sequence[str] | None = None,
    digits: int = 3,
) -> Table:
    """``table`` for the terminal; numbers right-aligned, a repeated regime or architecture shown once."""
    text = readable(table, columns, digits)
    out = Table(title=title or None, title_justify="left", header_style="bold")
    words = {"regime", "architecture", "network", "predictor", "kind", "tier", "method", "chosen", "aim", "target"}
    names = list(text.columns)
    for name in names:
        out.add_column(str(name), justify="left" if str(name).lower() in words else "right", overflow="fold")
    previous: list[str] = []
    for values in text.itertuples(index=False):
        row = [str(value) for value in values]
        shown = list(row)
        for k, name in enumerate(names):
            if str(name).lower() not in ("regime", "architecture", "network") or row[: k + 1] != previous[: k + 1]:
                break
            shown[k] = ""
        out.add_row(*shown)
        previous = row
    return out


def summary(table: pd.DataFrame, *, wide: bool = True) -> pd.DataFrame:
    """The validation table for a terminal: one line per predictor, quantiles and intervals folded into their value.

    ``wide`` adds the intervals of the correlations, the quantiles, and the last two columns (about 140 characters).
    """
    from experiments.plots.style import pretty

    def number(value: object) -> str:
        if value is None or pd.isna(value):  # type: ignore[call-overload]
            return "–"
        size = abs(float(value))  # type: ignore[arg-type]
        return f"{value:.2f}" if size < 10 else f"{value:.0f}" if size < 1e5 else f"{value:.0e}"

    def folded(row: Mapping[Any, Any], name: str) -> str:
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        known = wide and low is not None and not pd.isna(low)
        return number(row.get(name)) + (f" [{number(low)}, {number(high)}]" if known else "")

    lines = []
    for row in table.to_dict("records"):
        kind = "" if row["kind"] == "prediction" else f"{row['kind']}: "
        ratio = number(row.get("ratio_q50"))
        if wide and ratio != "–":
            ratio += f" ({number(row.get('ratio_q05'))}–{number(row.get('ratio_q95'))})"
        line = {
            "Regime": str(row["regime"]),
            "Network": pretty(row["architecture"]),
            "Predictor": kind + pretty(row["predictor"]),
            "Tier": str(row["tier"]),
            "Pred/meas": ratio,
            "Error": number(row.get("median_error")),
            "Spearman risk": folded(row, "spearman_risk"),
            "Spearman cost": folded(row, "spearman_cost"),
        }
        if wide:
            line |= {"Valid": number(row.get("valid")), "Cost/eval": number(row.get("relative_cost"))}
        lines.append(line)
    return pd.DataFrame(lines)
