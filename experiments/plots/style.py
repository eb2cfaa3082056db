"""The look that figures share: colours, axes, legends, and names for reading.

Colours are Okabe and Ito's, told apart under the common colour-vision deficiencies; markers and line styles repeat what
colour says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)

INK, GREY, FAINT = "#222222", "#777777", "#D9D9D9"

SERIES = ((BLUE, "o"), (RED, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"), (INK, "X"))
"""Colour and marker of the k-th series."""


def pretty(name: object) -> str:
    """A name for reading: underscores to spaces, with the project's spelling of methods and architectures."""
    known = {
        "vit": "ViT",
        "resnet_gn": "ResNet (GroupNorm)",
        "resnet_bn": "ResNet (BatchNorm)",
        "ties": "TIES",
        "dare": "DARE",
        "average": "averaging",
        "task_arithmetic": "task arithmetic",
        "tangent_base": "tangent at the base",
        "tangent_expert": "tangent at the expert",
        "tangent_both": "both tangents",
        "secant_tangent": "secant and tangent averaged",
        "second_order": "second order",
    }
    text = str(name)
    if text.endswith("_tuned"):
        return f"{pretty(text.removesuffix('_tuned'))}, tuned"
    if text.startswith("risk_optimal_"):
        return f"risk optimal: {pretty(text.removeprefix('risk_optimal_'))}"
    return known.get(text, text.replace("_", " "))


def panel_grid(
    rows: int, columns: int, width: float = 3.4, height: float = 3.0, top: float = 0.0, **share: Any
) -> tuple[Figure, NDArray[np.object_]]:
    figure = Figure(
        figsize=(max(width * columns, 5.4), height * rows + top + (0.5 if rows * columns == 1 else 0.0)),
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06),
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    for ax in axes.flat:
        dress(ax)
    return figure, axes


def dress(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=8.5, colors=INK, which="both")
    ax.grid(True, color=FAINT, linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)


def plain_number(value: float, _: object = None) -> str:
    return f"{value:g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.0e}"


def log_axis(ax: Axes, which: str, low: float, high: float) -> None:
    """A log axis over [low, high] with a handful of plain labels whatever the span."""
    decades = np.log10(high / low)
    subs: tuple[float, ...] = (1.0,)
    if decades < 1.0:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    elif decades < 2.2:
        subs = (1.0, 2.0, 5.0)
    elif decades < 3.2:
        subs = (1.0, 3.0)
    if which == "x":
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        axis: Any = ax.xaxis
    else:
        ax.set_yscale("log")
        ax.set_ylim(low, high)
        axis = ax.yaxis
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(base=10, subs=(1.0,), numticks=12))


def span_of(values: Sequence[NDArray[np.float64]], margin: float = 1.15) -> tuple[float, float]:
    joined = np.concatenate([np.asarray(v, dtype=float).ravel() for v in values])
    joined = joined[np.isfinite(joined) & (joined > 0)]
    if joined.size == 0:
        return 0.1, 10.0
    return float(joined.min() / margin), float(joined.max() * margin)


def legend_above(figure: Figure, handles: Sequence[Any]) -> None:
    """A frameless legend above the panels, in as many columns as the figure's width holds."""
    widest = max(len(str(handle.get_label())) for handle in handles)
    per_entry = 0.085 * widest + 0.65
    columns = int(np.clip(figure.get_size_inches()[0] / per_entry, 1, len(handles)))
    lengths = sum(0.085 * len(str(handle.get_label())) + 0.65 for handle in handles)
    if lengths <= figure.get_size_inches()[0]:
        columns = len(handles)
    figure.legend(
        handles=list(handles),
        loc="outside upper center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.4,
    )
