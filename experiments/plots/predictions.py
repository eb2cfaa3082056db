"""Predicted against measured risk, and what a bracket's width warns of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from experiments import statistics as st
from experiments.plots.panels import cell_of, checked, distinct, no_data, panel_title, panels_of, seed_text
from experiments.plots.picture import Picture
from experiments.plots.style import GREY, INK, SERIES, legend_above, log_axis, panel_grid, pretty, span_of
from experiments.validation import CELL


def predicted_against_measured(
    merges: pd.DataFrame,
    prediction: str = "secant_tangent",
    lower: str = "secant",
    upper: str = "tangent_base",
    colour: str = "method",
    tier: str = "estimated",
) -> Picture:
    """Scatter of predicted against measured joint risk, one panel per regime and architecture, log axes.

    Points: ``pred_<prediction>``, coloured by ``colour`` ("method" or "N").  The thin vertical bar of a point is its
    bracket [min, max] of ``pred_<lower>`` and ``pred_<upper>``; it crosses the identity line where the bracket holds.
    """
    column = f"pred_{prediction}"
    frame = checked(merges, [*CELL, "measured_loss", column, colour], "predicted against measured")
    regimes, architectures = panels_of(frame)
    figure, axes = panel_grid(len(regimes), len(architectures), 3.5, 3.3, 0.4)
    values = list(distinct(frame, colour)) if colour == "method" else sorted(distinct(frame, colour))
    bracketed = f"pred_{lower}" in frame and f"pred_{upper}" in frame
    for r, regime in enumerate(regimes):
        for c, architecture in enumerate(architectures):
            ax, part = axes[r, c], cell_of(frame, regime, architecture)
            part = part[np.isfinite(part[column]) & (part[column] > 0) & (part["measured_loss"] > 0)]
            panel_title(ax, regime, architecture)
            if part.empty:
                no_data(ax)
                continue
            measured, predicted = part["measured_loss"].to_numpy(float), part[column].to_numpy(float)
            limits = span_of([measured, predicted])
            if bracketed:
                sides = part[[f"pred_{lower}", f"pred_{upper}"]].to_numpy(float)
                both = np.isfinite(sides).all(axis=1)
                bottom, top = sides[both].min(axis=1), sides[both].max(axis=1)
                ax.vlines(measured[both], bottom, top, color=GREY, linewidth=0.5, alpha=0.25, zorder=2)
                reach = span_of([np.quantile(bottom, [0.02]), np.quantile(top, [0.98])], 1.0) if both.any() else limits
                limits = (min(limits[0], reach[0]), max(limits[1], reach[1]))
            ax.plot(limits, limits, color=INK, linewidth=1.0, zorder=3)
            for k, value in enumerate(values):
                rows = (part[colour] == value).to_numpy()
                shade, marker = SERIES[k % len(SERIES)]
                ax.scatter(
                    measured[rows],
                    predicted[rows],
                    s=13,
                    color=shade,
                    marker=marker,
                    alpha=0.75,
                    linewidths=0,
                    zorder=4,
                )
            span = span_of([measured])
            log_axis(ax, "x", *span)
            log_axis(ax, "y", *limits)
            if r == len(regimes) - 1:
                ax.set_xlabel("measured test loss", fontsize=9)
            if c == 0:
                ax.set_ylabel("predicted joint risk", fontsize=9)
            ratio = np.median(np.abs(predicted / measured - 1))
            rank = st.spearman(predicted, measured)[0]
            ax.text(
                0.03,
                0.97,
                f"median error {100 * ratio:.0f} %\nSpearman {rank:.2f}",
                transform=ax.transAxes,
                ha="left",
                va="top",
                fontsize=8.5,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
                zorder=6,
            )
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=SERIES[k % 7][1], color=SERIES[k % 7][0], label=_label(colour, value))
        for k, value in enumerate(values)
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.0, label="prediction = measurement"))
    if bracketed:
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, label="bracket"))
    legend_above(figure, handles)
    caption = (
        f"Predicted ({pretty(prediction)}) against measured joint test loss, one point per merge. Predictions use no "
        "merge and no test data. "
        + (f"Thin bars: bracket from {pretty(lower)} to {pretty(upper)}. " if bracketed else "")
    )
    return Picture(figure, caption + f"Tier: {tier}.{seed_text(frame)}")


def _label(column: str, value: object) -> str:
    return f"N = {value}" if column == "N" else pretty(value)


def bracket_and_collapse(merges: pd.DataFrame, lower: str = "secant", upper: str = "tangent_base") -> Picture:
    """Bracket width (max/min of two predictions) against measured loss over the base's, coloured by regime."""
    need = [*CELL, "measured_loss", "base_loss", f"pred_{lower}", f"pred_{upper}"]
    frame = checked(merges, need, "bracket width and collapse")
    regimes, architectures = panels_of(frame)
    figure, axes = panel_grid(1, len(architectures), 3.5, 3.2, 0.4, sharey=True)
    for c, architecture in enumerate(architectures):
        ax = axes[0, c]
        spans: list[list[NDArray[np.float64]]] = [[], []]
        notes = []
        for k, regime in enumerate(regimes):
            part = cell_of(frame, regime, architecture)
            sides = part[[f"pred_{lower}", f"pred_{upper}"]].to_numpy(float)
            relative = (part["measured_loss"] / part["base_loss"]).to_numpy(float)
            keep = np.isfinite(sides).all(axis=1) & (sides > 0).all(axis=1) & np.isfinite(relative) & (relative > 0)
            if not keep.any():
                continue
            width, relative = sides[keep].max(axis=1) / sides[keep].min(axis=1), relative[keep]
            shade, marker = SERIES[k % len(SERIES)]
            ax.scatter(width, relative, s=13, color=shade, marker=marker, alpha=0.6, linewidths=0, zorder=3)
            area = st.auc(np.log(width), relative > 1)[0]
            notes.append(f"{regime}: AUC {area:.2f}" if np.isfinite(area) else f"{regime}: one class only")
            spans[0].append(width)
            spans[1].append(relative)
        ax.set_title(pretty(architecture), fontsize=10, loc="left", color=INK)
        if not notes:
            no_data(ax)
            continue
        log_axis(ax, "x", *span_of(spans[0]))
        ax.axhline(1.0, color=INK, linewidth=1.0, zorder=2)
        ax.set_xlabel("bracket width (max / min)", fontsize=9)
        ax.text(
            0.97,
            0.03,
            "\n".join(notes),
            transform=ax.transAxes,
            ha="right",
            va="bottom",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
            zorder=6,
        )
    every = (frame["measured_loss"] / frame["base_loss"]).to_numpy(float)
    log_axis(axes[0, 0], "y", *span_of([every, np.array([1.0])]))
    axes[0, 0].set_ylabel("measured loss / base loss", fontsize=9)
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=SERIES[k % 7][1], color=SERIES[k % 7][0], label=str(regime))
        for k, regime in enumerate(regimes)
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.0, label="as bad as the base"))
    legend_above(figure, handles)
    caption = (
        f"Does the width of the bracket ({pretty(lower)} to {pretty(upper)}) warn of collapse? Above the line the "
        "merge is worse than the base model; AUC is the area under the ROC curve of the width for that event. "
        "Tier: estimated."
    )
    return Picture(figure, caption + seed_text(frame))
