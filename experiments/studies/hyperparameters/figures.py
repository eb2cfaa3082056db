"""Figures of the study; each is a :class:`experiments.plots.Picture`, drawn without pyplot."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.plots import Picture, pretty
from experiments.plots.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SERIES,
    SKY,
    legend_above,
    log_axis,
    panel_grid,
    span_of,
)

LABELS = {
    "learning_rate": "learning rate",
    "batch_size": "batch size",
    "data_share": "share of the data",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "sampling": "sampling",
    "step": "steps",
    "experts": "number of experts",
    "coefficient": "coefficient λ",
    "training_time": "training time",
    "heterogeneity": "heterogeneity",
    "spread_learning_rate": "spread of learning rates",
    "spread_training_time": "spread of training times",
}
STYLES = {
    "loss": (INK, "o", "-"),
    "secant": (BLUE, "s", "--"),
    "tangent_base": (RED, "^", "--"),
    "secant_tangent": (GREEN, "D", "--"),
    "calibrated": (ORANGE, "v", "--"),
    "bound": (PURPLE, "P", ":"),
    "bound, measured drift": (SKY, "X", ":"),
}
SHADES = {"agrees": "#BFE3D3", "disagrees": "#F3C3A5", "undecided": "#ECECEF", "": "#FFFFFF"}


def label(factor: str) -> str:
    """A factor in words."""
    return LABELS.get(factor, factor.replace("_", " "))


def _style(name: str, number: int) -> tuple[str, str, Any]:
    return STYLES.get(name, (*SERIES[number % len(SERIES)], "--"))


def _places(ax: Axes, factor: str, levels: Sequence[Any]) -> np.ndarray:
    """Evenly spaced places with the levels as labels: factors are read by level, not by distance."""
    names = [str(level).replace("_", " ").replace(" replacement", "") if isinstance(level, str) else f"{level:g}"
             for level in levels]  # fmt: skip
    places = np.arange(float(len(levels)))
    ax.set_xticks(places, names, fontsize=8)
    ax.set_xlim(-0.35, len(levels) - 0.65)
    ax.set_xlabel(label(factor), fontsize=9)
    return places


def curves_figure(
    levels: pd.DataFrame,
    architecture: str,
    quantities: Sequence[str],
    caption: str,
    *,
    log: bool = True,
    text: str = "",
    cut: float = np.inf,
) -> Picture:
    """One panel per factor: means over matched groups with their intervals, measured and predicted; axes end at
    ``cut``, and the caption says where curves leave them.

    Raises:
        ValueError: nothing to draw.
    """
    own = levels[(levels["architecture"] == architecture) & levels["quantity"].isin(list(quantities))]
    own = own[np.isfinite(own["value"].astype(float))]
    factors = list(dict.fromkeys(own["factor"]))
    if not factors:
        raise ValueError(f"curves of {architecture}: there are no rows to draw")
    beyond = own[own["value"].astype(float) > cut]
    if len(beyond):
        where = "; ".join(
            f"{label(str(factor))} {', '.join(str(level) for level in dict.fromkeys(part['level']))}"
            for factor, part in beyond.groupby("factor", sort=False)
        )
        caption = f"{caption} Means above {cut:g} are not shown ({where}; up to {beyond['value'].max():.2g})."
    columns = min(3, len(factors))
    rows = -(-len(factors) // columns)
    figure, axes = panel_grid(rows, columns, 3.3, 2.5, 0.5)
    shown = [name for name in quantities if (own["quantity"] == name).any()]
    panels: list[Any] = list(axes.flat)
    for k, ax in enumerate(panels):
        if k >= len(factors):
            ax.set_visible(False)
            continue
        part = own[own["factor"] == factors[k]]
        all_levels = list(dict.fromkeys(part["level"]))
        places = _places(ax, factors[k], all_levels)
        spans = []
        for number, name in enumerate(shown):
            line = part[part["quantity"] == name]
            at = [places[all_levels.index(level)] for level in line["level"]]
            value = line["value"].to_numpy(float)
            low, high = line["value_low"].to_numpy(float), line["value_high"].to_numpy(float)
            colour, marker, style = _style(name, number)
            ax.plot(at, value, color=colour, marker=marker, linestyle=style, markersize=4, linewidth=1.3)
            ax.fill_between(at, low, high, color=colour, alpha=0.14 if name == shown[0] else 0.07, linewidth=0)
            spans += [value, low[low > 0] if log else low, high]
        if log:
            log_axis(ax, "y", *span_of([np.minimum(span, cut) for span in spans], 1.08))
        if k % columns == 0 and text:
            ax.set_ylabel(text, fontsize=9)
    handles = []
    for number, name in enumerate(shown):
        colour, marker, style = _style(name, number)
        word = "measured" if name in ("loss", "accuracy") else pretty(name.removeprefix("accuracy, "))
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=style, markersize=5, label=word))
    legend_above(figure, handles)
    return Picture(figure, caption)


def verdict_figure(verdicts: pd.DataFrame, caption: str) -> Picture:
    """A field of verdicts: factors by predictions, a panel per network, one below the other; the predicted kind is
    written in it.

    Raises:
        ValueError: nothing to draw.
    """
    if verdicts.empty:
        raise ValueError("verdicts: there are no rows to draw")
    networks = list(dict.fromkeys(verdicts["architecture"]))
    factors = list(dict.fromkeys(verdicts["factor"]))
    names = list(dict.fromkeys(verdicts["prediction"]))
    figure, axes = panel_grid(len(networks), 1, 1.2 * (len(names) + 1), 0.36 * len(factors) + 1.0, 0.4)
    for c, network in enumerate(networks):
        ax, part = axes[c, 0], verdicts[verdicts["architecture"] == network]
        for row in part.to_dict("records"):
            x, y = names.index(row["prediction"]) + 1, factors.index(row["factor"])
            ax.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, color=SHADES[row["verdict"]], linewidth=0)
            ax.text(x, y, row["predicted"].replace("undecided", "–"), ha="center", va="center", fontsize=9)
        for row in part.drop_duplicates("factor").to_dict("records"):
            word = row["measured"].replace("undecided", "–")
            ax.text(0, factors.index(row["factor"]), word, ha="center", va="center", fontsize=9, weight="bold")
        heads = ["measured", *("\n".join(textwrap.wrap(pretty(n), 12)) for n in names)]
        ax.set_xticks(range(len(names) + 1), heads, fontsize=8)
        ax.xaxis.tick_top()
        ax.set_yticks(range(len(factors)), [label(f) for f in factors], fontsize=9)
        ax.set_xlim(-0.5, len(names) + 0.5)
        ax.set_ylim(len(factors) - 0.5, -0.5)
        ax.grid(False)
        ax.tick_params(length=0)
        ax.set_title(pretty(network), fontsize=10, loc="left")
    legend_above(figure, [Patch(color=SHADES[v], label=v) for v in ("agrees", "disagrees", "undecided")])
    return Picture(figure, caption)


SOURCES: Mapping[str, tuple[str, str]] = {
    "law": (GREY, "|"),
    "formula, constants of the centre": (PURPLE, "P"),
    "formula, constants of each level": (BLUE, "s"),
    "measured": (INK, "o"),
}


def exponents_figure(table: pd.DataFrame, caption: str) -> Picture:
    """Exponents with intervals: a column per quantity, a row of panels per network; hollow marks disagree with the
    law, and formulas that are no power of their factor have no mark.

    Raises:
        ValueError: nothing to draw.
    """
    if table.empty:
        raise ValueError("exponents: there are no rows to draw")
    table = table[~table["verdict"].astype(str).str.startswith("exponential")]
    networks = list(dict.fromkeys(table["architecture"]))
    quantities = list(dict.fromkeys(table["quantity"]))
    factors = list(dict.fromkeys(table["factor"]))
    words = {"drift": "drift d (Theorem 3)", "V": "dispersion V (Theorem 4)", "epsilon": "stability ε (Theorem 2)"}
    figure, axes = panel_grid(len(networks), len(quantities), 3.3, 0.42 * len(factors) + 0.8, 0.4, sharex="col")
    for r, network in enumerate(networks):
        for c, quantity in enumerate(quantities):
            ax = axes[r, c]
            ax.axvline(0, color=FAINT, linewidth=1.0)
            part = table[(table["architecture"] == network) & (table["quantity"] == quantity)]
            for k, (source, (colour, marker)) in enumerate(SOURCES.items()):
                own = part[(part["source"] == source) & np.isfinite(part["exponent"].astype(float))]
                y = np.array([factors.index(f) for f in own["factor"]]) + 0.18 * (k - 1.5)
                wide = 5.0 if source == "law" else 1.2
                alpha = 0.45 if source == "law" else 1.0
                ax.hlines(y, own["exponent_low"], own["exponent_high"], color=colour, linewidth=wide, alpha=alpha)
                hollow = (own["verdict"] == "disagrees").to_numpy()
                for some, style in ((hollow, "none"), (~hollow, "full")):
                    ax.plot(own["exponent"][some], y[some], linestyle="", marker=marker, color=colour, markersize=4,
                            fillstyle=style)  # fmt: skip
            ax.set_yticks(range(len(factors)), [label(f) for f in factors] if c == 0 else [""] * len(factors))
            ax.set_ylim(len(factors) - 0.5, -0.5)
            if r == len(networks) - 1:
                ax.set_xlabel("exponent", fontsize=9)
            ax.set_title(f"{words[quantity]}, {pretty(network)}", fontsize=9, loc="left")
    legend_above(
        figure,
        [Line2D([], [], color=colour, marker=marker, label=name) for name, (colour, marker) in SOURCES.items()],
    )
    return Picture(figure, caption)


def elasticities_figure(table: pd.DataFrame, caption: str) -> Picture:
    """Elasticities of the loss over heterogeneous groups, measured and predicted.

    Raises:
        ValueError: nothing to draw.
    """
    own = table[table["quantity"].isin(list(STYLES))] if len(table) else table
    own = own[np.isfinite(own["elasticity"].astype(float))] if len(own) else own
    if own.empty:
        raise ValueError("elasticities: there are no rows to draw")
    networks, factors = list(dict.fromkeys(own["architecture"])), list(dict.fromkeys(own["factor"]))
    names = list(dict.fromkeys(own["quantity"]))
    figure, axes = panel_grid(1, len(networks), max(4.2, 8.4 / len(networks)), 0.5 * len(factors) + 0.8, 0.5)
    for c, network in enumerate(networks):
        ax = axes[0, c]
        ax.axvline(0, color=FAINT, linewidth=1.0)
        for k, name in enumerate(names):
            part = own[(own["architecture"] == network) & (own["quantity"] == name)]
            colour, marker, _ = _style(name, k)
            y = np.array([factors.index(f) for f in part["factor"]]) + 0.12 * (k - (len(names) - 1) / 2)
            ax.hlines(y, part["elasticity_low"], part["elasticity_high"], color=colour, linewidth=1.2)
            ax.plot(part["elasticity"], y, linestyle="", marker=marker, color=colour, markersize=4)
        ax.set_yticks(range(len(factors)), [label(f) for f in factors] if c == 0 else [""] * len(factors))
        ax.set_ylim(len(factors) - 0.5, -0.5)
        ax.set_xlabel("d log loss / d regressor", fontsize=9)
        ax.set_title(pretty(network), fontsize=10, loc="left")
    handles = []
    for k, name in enumerate(names):
        colour, marker, _ = _style(name, k)
        word = "measured" if name == "loss" else pretty(name)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=word))
    legend_above(figure, handles)
    return Picture(figure, caption)


def scatter_figure(table: pd.DataFrame, columns: Mapping[str, str], caption: str, *, cut: float = np.inf) -> Picture:
    """Predicted against measured loss of every merge, heterogeneous groups filled; one panel per network.  Merges with
    a larger loss than ``cut`` are counted in the caption.

    Raises:
        ValueError: nothing to draw.
    """
    there = {column: name for column, name in columns.items() if column in table}
    if table.empty or not there:
        raise ValueError("scatter: there are no rows to draw")
    networks = sorted(set(table["architecture"]))
    beyond = table[table["loss"] > cut].drop_duplicates("key")
    if len(beyond):
        told = "; ".join(f"{pretty(str(name))} {len(part)}" for name, part in beyond.groupby("architecture"))
        caption = f"{caption} Not shown: merges with a loss above {cut:g} ({told})."
    table = table[~(table["loss"] > cut)]
    figure, axes = panel_grid(1, len(networks), 3.9, 3.6, 0.4)
    for c, network in enumerate(networks):
        ax, part = axes[0, c], table[table["architecture"] == network].drop_duplicates("key")
        spans = [part["loss"].to_numpy(float)]
        for k, (column, name) in enumerate(there.items()):
            colour, marker, _ = _style(name, k)
            value = part[column].to_numpy(float)
            mixed = (part["factor"] == "heterogeneous").to_numpy()
            x = part["loss"].to_numpy(float)
            ax.plot(x[~mixed], value[~mixed], marker=marker, linestyle="", markersize=3, color=colour, fillstyle="none",
                    markeredgewidth=0.6)  # fmt: skip
            ax.plot(x[mixed], value[mixed], marker=marker, linestyle="", markersize=4, color=colour)
            spans.append(value)
        low, high = span_of(spans, 1.05)
        ax.plot([low, high], [low, high], color=INK, linewidth=0.8)
        log_axis(ax, "x", low, high)
        log_axis(ax, "y", low, high)
        ax.set_xlabel("measured test loss", fontsize=9)
        ax.set_ylabel("predicted" if c == 0 else "", fontsize=9)
        ax.set_title(pretty(network), fontsize=10, loc="left")
    handles = []
    for k, name in enumerate(there.values()):
        colour, marker, _ = _style(name, k)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=pretty(name)))
    legend_above(figure, handles)
    return Picture(figure, caption)


__all__ = [
    "curves_figure",
    "elasticities_figure",
    "exponents_figure",
    "label",
    "scatter_figure",
    "verdict_figure",
]
