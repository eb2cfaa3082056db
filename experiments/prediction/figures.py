"""Figures of the study; each is a :class:`experiments.plots.Picture`, drawn without pyplot."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from experiments.plots import Picture, predicted_against_measured, pretty
from experiments.plots.style import GREY, INK, SERIES, dress, legend_above, log_axis, panel_grid, span_of
from experiments.prediction.tables import Tables

SHOWN = ("secant", "tangent_base", "secant_tangent", "second_order", "pairs", "pairs_halves", "pairs_tangent")
"""Predictors that figures with one line each show."""


def study_figures(tables: Tables) -> dict[str, Picture]:
    """Every figure for which there are rows, by file name without ending."""
    whole = tables.merges
    clamped = whole["clamped"] > 0 if "clamped" in whole else pd.Series(False, index=whole.index)
    merges = whole[~clamped]
    note = f" Left out: {int(clamped.sum())} merges that clamp running variances of BatchNorm." if clamped.any() else ""

    def scatter(prediction: str, tier: str, colour: str = "method") -> Picture:
        known = merges[np.isfinite(merges[f"pred_{prediction}"])]
        picture = predicted_against_measured(known, prediction, tier=tier, colour=colour)
        caption = picture.caption.replace(
            "Predictions use no merge and no test data",
            "Predictions use no test data and not the merge itself"
            + (", but averages of pairs of experts" if prediction == "best" else ""),
        )
        return Picture(picture.figure, caption + note)

    makers: dict[str, Callable[[], Picture]] = {
        "predicted_against_measured": lambda: scatter("best", "calibrated"),
        "predicted_against_measured_middle": lambda: scatter("secant_tangent", "estimated", "N"),
        "coverage": lambda: coverage(tables.intervals),
        "images": lambda: images(tables.images),
        "break_even": lambda: break_even(tables.prices),
        "methods": lambda: methods(tables.methods),
    }
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ValueError:  # a table without rows
            continue
    return found


def coverage(intervals: pd.DataFrame) -> Picture:
    """Share of merges inside their prediction interval, by cell and prediction, with twice the standard error."""
    if intervals.empty:
        raise ValueError("coverage: there are no rows to draw")
    cells = list(dict.fromkeys(zip(intervals["regime"], intervals["architecture"], strict=True)))
    names = list(dict.fromkeys(intervals["prediction"]))
    figure, axes = panel_grid(1, 1, 6.0, 0.42 * len(cells) + 0.6, 0.4)
    ax = axes[0, 0]
    asked = float(intervals["asked"].iloc[0])
    ax.axvline(asked, color=INK, linewidth=1.0)
    for k, name in enumerate(names):
        shade, marker = SERIES[k % len(SERIES)]
        part = intervals[intervals["prediction"] == name]
        places = [cells.index(cell) for cell in zip(part["regime"], part["architecture"], strict=True)]
        y = np.array(places) + 0.22 * (k - (len(names) - 1) / 2)
        value, error = part["covered_by_group"].to_numpy(float), 2 * part["covered_se"].to_numpy(float)
        ax.hlines(y, np.clip(value - error, 0, 1), np.clip(value + error, 0, 1), color=shade, linewidth=1.2)
        ax.plot(value, y, linestyle="", marker=marker, color=shade, markersize=5)
    ax.set_yticks(range(len(cells)), [f"{pretty(a)} · {r}" for r, a in cells])
    ax.set_ylim(len(cells) - 0.5, -0.5)
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("share of merges inside their interval", fontsize=9)
    legend_above(figure, _handles(names))
    caption = (
        f"Coverage of prediction intervals asked to cover {asked:.0%}, calibrated on merges of one half of the experts "
        "and judged on the other half's merges and on other test images; every group counts the same, bars are two "
        "standard errors over groups. Tier: calibrated."
    )
    return Picture(figure, caption)


def methods(table: pd.DataFrame, reference: str = "average") -> Picture:
    """Accuracy of every method minus that of averaging on the same groups, by network and N, both regimes together."""
    if table.empty:
        raise ValueError("methods: there are no rows to draw")
    regime = "all" if (table["regime"] == "all").any() else table["regime"].iloc[0]
    table = table[(table["regime"] == regime) & (table["N"] != "all") & (table["method"] != reference)]
    names = list(dict.fromkeys(table["method"]))
    networks, sizes = list(dict.fromkeys(table["architecture"])), sorted(set(table["N"]))
    figure, axes = panel_grid(len(networks), len(sizes), 3.6, 0.24 * len(names) + 0.8, 0.0, sharey=True)
    for r, network in enumerate(networks):
        for c, size in enumerate(sizes):
            ax, part = axes[r, c], table[(table["architecture"] == network) & (table["N"] == size)]
            ax.set_title(f"{pretty(network)} · N = {size}", fontsize=10, loc="left")
            if part.empty:
                ax.text(0.5, 0.5, "not measured yet", transform=ax.transAxes, ha="center", color=GREY, fontsize=9)
            ax.axvline(0.0, color=INK, linewidth=1.0)
            for name in names:
                if name not in set(part["method"]):
                    continue
                row = part[part["method"] == name].iloc[0]
                ours = name.startswith("risk_optimal")
                shade, marker = SERIES[0 if ours else 4]
                y = names.index(name)
                ax.hlines(
                    y, row["accuracy_difference_low"], row["accuracy_difference_high"], color=shade, linewidth=1.4
                )
                ax.plot(row["accuracy_difference"], y, marker=marker, color=shade, markersize=5)
            ax.set_yticks(range(len(names)), [pretty(name) for name in names], fontsize=8)
            ax.set_ylim(len(names) - 0.5, -0.5)
            if r == len(networks) - 1:
                ax.set_xlabel("accuracy minus averaging's", fontsize=9)
    caption = (
        "Merging methods on the same groups, both regimes: mean test accuracy minus that of averaging (right is "
        "better), with 95 % intervals from resampling experts. Every choice was made on calibration images. "
        "Tier: measured."
    )
    return Picture(figure, caption)


def images(table: pd.DataFrame) -> Picture:
    """Error of predictions against the number of calibration images: on test images, and from more images."""
    if table.empty:
        raise ValueError("images: there are no rows to draw")
    networks = list(dict.fromkeys(table["architecture"]))
    names = [name for name in SHOWN if name in set(table["predictor"])]
    figure, axes = panel_grid(2, len(networks), 3.6, 2.6, 0.4, sharex=True)
    rows = (("error", "median error on test images"), ("spread", "90 % of predictions move less"))
    for r, (column, text) in enumerate(rows):
        spans = []
        for c, network in enumerate(networks):
            ax, part = axes[r, c], table[table["architecture"] == network]
            for k, name in enumerate(names):
                line = part[part["predictor"] == name].sort_values("images")
                if column == "spread":
                    line = line[line["images"] < line["images"].max()]
                shade, marker = SERIES[k % len(SERIES)]
                values = line[column].to_numpy(float)
                ax.plot(line["images"], values, color=shade, marker=marker, markersize=4, linewidth=1.2)
                spans.append(values)
            if r == 0:
                ax.set_title(pretty(network), fontsize=10, loc="left")
            else:
                ax.set_xlabel("calibration images per task", fontsize=9)
            if c == 0:
                ax.set_ylabel(text, fontsize=9)
            counts = sorted(set(part["images"]))
            ax.set_xscale("log")
            ax.set_xticks(counts, [str(v) for v in counts], fontsize=8)
            ax.minorticks_off()
        for c in range(len(networks)):
            log_axis(axes[r, c], "y", *span_of(spans))
    legend_above(figure, _handles(names))
    caption = (
        "Predictions from more and more calibration images. Above: median of |predicted/measured - 1| against the loss "
        "on test images. Below: the 90 % quantile of how far (in log) a prediction is from the one that uses all of "
        "them. "
        "Tasks with fewer validation images give all that they have. Tier: estimated."
    )
    return Picture(figure, caption)


def break_even(prices: pd.DataFrame) -> Picture:
    """From how many coefficient vectors on predicting is cheaper than evaluating merges, by number of experts."""
    if prices.empty:
        raise ValueError("break even: there are no rows to draw")
    networks = list(dict.fromkeys(prices["architecture"]))
    names = [name for name in SHOWN if name in set(prices["predictor"])]
    figure, axes = panel_grid(1, len(networks), 3.6, 2.8, 0.4, sharey=True)
    for c, network in enumerate(networks):
        ax, part = axes[0, c], prices[prices["architecture"] == network]
        for k, name in enumerate(names):
            line = part[part["predictor"] == name].sort_values("N")
            shade, marker = SERIES[k % len(SERIES)]
            ax.plot(line["N"], line["break_even"], color=shade, marker=marker, markersize=4, linewidth=1.2)
        ax.set_title(pretty(network), fontsize=10, loc="left")
        ax.set_xticks(sorted(set(part["N"])))
        ax.set_xlabel("experts N", fontsize=9)
        dress(ax)
    finite = prices["break_even"].replace(np.inf, np.nan).dropna().to_numpy(float)
    log_axis(axes[0, 0], "y", *span_of([finite]))
    axes[0, 0].set_ylabel("coefficient vectors", fontsize=9)
    legend_above(figure, _handles(names))
    caption = (
        "The number of coefficient vectors from which on collecting once and predicting each is cheaper than "
        "evaluating each merge on as many images, from measured processor seconds. Tier: measured."
    )
    return Picture(figure, caption)


def _handles(names: list[str]) -> list[Line2D]:
    return [
        Line2D([], [], color=SERIES[k % len(SERIES)][0], marker=SERIES[k % len(SERIES)][1], label=pretty(name))
        for k, name in enumerate(names)
    ] or [Line2D([], [], color=GREY, label="nothing")]
