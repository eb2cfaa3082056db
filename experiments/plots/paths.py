"""Risk along a path through weight space: a coefficient, a line between two experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiments.plots.panels import cell_of, checked, no_data, panel_title, panels_of, seed_text
from experiments.plots.picture import Picture
from experiments.plots.style import BLUE, GREY, INK, RED, SKY, legend_above, log_axis, panel_grid, pretty, span_of
from experiments.validation import CELL


def coefficient_sweep(coefficients: pd.DataFrame, seed: object = None) -> Picture:
    """Task arithmetic against its coefficient: measured loss, the prediction as a band, and both minima.

    Panels: regime and architecture by N; medians over the groups of a panel.
    """
    need = [*CELL, "N", "lam", "measured_loss", "pred_secant", "pred_tangent_base"]
    frame = checked(coefficients, need, "coefficient sweep")
    rows = [key for key, _ in frame.groupby(list(CELL), sort=False)]
    sizes = sorted(frame["N"].unique())
    figure, axes = panel_grid(len(rows), len(sizes), 2.5, 2.15, 0.5, sharex=True, sharey="row")
    for r, (regime, architecture) in enumerate(rows):
        spans: list[NDArray[np.float64]] = []
        for c, size in enumerate(sizes):
            ax = axes[r, c]
            part = cell_of(frame, regime, architecture)
            part = part[part["N"] == size]
            if r == 0:
                ax.set_title(f"N = {size}", fontsize=10, loc="left")
            if part.empty:
                continue
            columns = [name for name in (*need[3:], "pred_secant_tangent") if name in part]
            middle = part.groupby("lam")[columns].median()
            x = middle.index.to_numpy(float)
            low = middle[["pred_secant", "pred_tangent_base"]].min(axis=1).to_numpy(float)
            high = middle[["pred_secant", "pred_tangent_base"]].max(axis=1).to_numpy(float)
            measured = middle["measured_loss"].to_numpy(float)
            ax.fill_between(x, low, high, color=SKY, alpha=0.35, linewidth=0, zorder=1)
            if "pred_secant_tangent" in middle:
                values = middle["pred_secant_tangent"].to_numpy(float)
                ax.plot(x, values, color=BLUE, linewidth=1.5, zorder=3)
                _mark(ax, x, values, BLUE, "D")
            ax.plot(x, measured, color=INK, linewidth=1.5, marker="o", markersize=2.5, zorder=4)
            _mark(ax, x, measured, INK, "o")
            spans += [measured, low, np.minimum(high, 30 * measured.max())]
            ax.xaxis.set_major_locator(MaxNLocator(4))
            if r == len(rows) - 1:
                ax.set_xlabel("coefficient λ", fontsize=9)
        for ax in axes[r]:
            log_axis(ax, "y", *span_of(spans, 1.2))
        axes[r, 0].set_ylabel(f"{pretty(architecture)}\n{regime}\njoint test loss", fontsize=9)
    handles = [
        Line2D([], [], color=INK, marker="o", markersize=3, label="measured"),
        Patch(color=SKY, alpha=0.35, linewidth=0, label="predicted: secant to tangent"),
        Line2D([], [], color=BLUE, label="their average (logits)"),
        Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="", label="minimum"),
    ]
    legend_above(figure, handles)
    caption = (
        "Task arithmetic x₀ + λ ΣΔᵢ: joint test loss against λ, median over a panel's groups, with the prediction as a "
        "band from secant to tangent at the base (linearisation only, no sampling error); rings mark each curve's "
        f"minimum. Tier: estimated.{seed_text(frame, seed)}"
    )
    return Picture(figure, caption)


def _mark(ax: Axes, x: NDArray[np.float64], y: NDArray[np.float64], shade: str, marker: str) -> None:
    if np.isfinite(y).any():
        k = int(np.nanargmin(y))
        ax.plot(
            x[k], y[k], marker=marker, markersize=7, markerfacecolor="white", color=shade, markeredgewidth=1.6, zorder=5
        )


def loss_along_line(lines: pd.DataFrame, seed: object = None) -> Picture:
    """Loss on the line between two experts, measured and predicted; one panel per regime and architecture.

    The first pair of each panel is drawn: the mean over the two tasks with its band, and each task's own measured loss.
    """
    frame = checked(lines, [*CELL, "expert_a", "expert_b", "t", "measured_loss"], "loss along a line")
    regimes, architectures = panels_of(frame)
    figure, axes = panel_grid(len(regimes), len(architectures), 3.3, 2.7, 0.4, sharex=True)
    predicted = "pred_secant" in frame and "pred_tangent_base" in frame
    for r, regime in enumerate(regimes):
        for c, architecture in enumerate(architectures):
            ax, part = axes[r, c], cell_of(frame, regime, architecture)
            panel_title(ax, regime, architecture)
            if part.empty:
                no_data(ax)
                continue
            first = part.iloc[0]
            part = part[(part["expert_a"] == first["expert_a"]) & (part["expert_b"] == first["expert_b"])]
            for task, style in (("a", ":"), ("b", "--")):
                own = part[part["task"] == task].sort_values("t") if "task" in part else part.iloc[:0]
                ax.plot(own["t"], own["measured_loss"], color=GREY, linestyle=style, linewidth=1.3, zorder=2)
            both = part[part["task"] == "mean"] if "task" in part and (part["task"] == "mean").any() else part
            both = both.groupby("t").mean(numeric_only=True)
            x = both.index.to_numpy(float)
            spans = [part["measured_loss"].to_numpy(float)]
            if predicted:
                sides = both[["pred_secant", "pred_tangent_base"]].to_numpy(float)
                ax.fill_between(x, sides.min(axis=1), sides.max(axis=1), color=SKY, alpha=0.35, linewidth=0, zorder=1)
                ax.plot(x, sides[:, 0], color=BLUE, linewidth=1.2, zorder=3)
                ax.plot(x, sides[:, 1], color=RED, linewidth=1.2, linestyle=(0, (5, 2)), zorder=3)
                spans.append(sides)
            ax.plot(x, both["measured_loss"], color=INK, linewidth=1.8, marker="o", markersize=3.5, zorder=4)
            log_axis(ax, "y", *span_of(spans, 1.2))
            if r == len(regimes) - 1:
                ax.set_xlabel("t: from expert a to expert b", fontsize=9)
            if c == 0:
                ax.set_ylabel("test loss", fontsize=9)
    handles: list[Any] = [
        Line2D([], [], color=INK, marker="o", markersize=3.5, label="measured, mean of both tasks"),
        Line2D([], [], color=GREY, linestyle=":", label="task a"),
        Line2D([], [], color=GREY, linestyle="--", label="task b"),
    ]
    if predicted:
        handles += [
            Line2D([], [], color=BLUE, label="secant"),
            Line2D([], [], color=RED, linestyle=(0, (5, 2)), label="tangent at the base"),
        ]
    legend_above(figure, handles)
    caption = (
        "Loss along the straight line between two experts (the first pair of each panel), measured on test images and "
        f"predicted for the mean of both tasks; the band is the bracket. Tier: estimated.{seed_text(frame, seed)}"
    )
    return Picture(figure, caption)
