"""Result frames laid out as panels: a row per regime, a column per architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from experiments.plots.style import GREY, INK, pretty


def checked(frame: pd.DataFrame | None, columns: Sequence[str], what: str) -> pd.DataFrame:
    if frame is None or frame.empty:
        raise ValueError(f"{what}: there are no rows to draw")
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ValueError(f"{what}: column {missing[0]} is missing")
    return frame


def distinct(frame: pd.DataFrame, column: str) -> list[Any]:
    return list(dict.fromkeys(frame[column]))


def seed_text(frame: pd.DataFrame, seed: object = None) -> str:
    seeds = distinct(frame, "seed") if "seed" in frame else ([] if seed is None else [seed])
    return f" Seed {', '.join(str(s) for s in seeds)}." if seeds else ""


def panels_of(frame: pd.DataFrame) -> tuple[list[Any], list[Any]]:
    return distinct(frame, "regime"), distinct(frame, "architecture")


def cell_of(frame: pd.DataFrame, regime: object, architecture: object) -> pd.DataFrame:
    return frame[(frame["regime"] == regime) & (frame["architecture"] == architecture)]


def panel_title(ax: Axes, regime: object, architecture: object) -> None:
    ax.set_title(f"{pretty(architecture)} · {regime}", fontsize=10, color=INK, loc="left")


def no_data(ax: Axes) -> None:
    ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
