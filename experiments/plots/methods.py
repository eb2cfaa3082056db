"""Merging methods on the same groups."""

from __future__ import annotations

import pandas as pd
from matplotlib.lines import Line2D

from experiments.plots.panels import cell_of, checked, distinct, no_data, panel_title, panels_of, seed_text
from experiments.plots.picture import Picture
from experiments.plots.style import FAINT, INK, SERIES, legend_above, panel_grid, pretty
from experiments.validation import CELL, Settings, optimal_table


def method_comparison(
    optimal: pd.DataFrame,
    merges: pd.DataFrame | None = None,
    reference: str = "average",
    settings: Settings | None = None,
    seed: object = None,
) -> Picture:
    """Test loss per merging method, paired with the reference: one panel per regime and architecture.

    The mean over all groups with its interval in black, the means by N in colour.
    """
    frame = checked(optimal, [*CELL, "group", "method", "measured_loss"], "comparison of methods")
    table = optimal_table(frame, merges, settings or Settings(resamples=300), reference)
    sizes = [size for size in dict.fromkeys(table["N"]) if size != "all"]
    methods = [name for name in distinct(frame, "method") if name != reference]
    regimes, architectures = panels_of(frame)
    figure, axes = panel_grid(len(regimes), len(architectures), 3.5, 0.3 * len(methods) + 0.8, 0.4, sharey=True)
    for r, regime in enumerate(regimes):
        for c, architecture in enumerate(architectures):
            ax, part = axes[r, c], cell_of(table, regime, architecture)
            panel_title(ax, regime, architecture)
            ax.set_ylim(len(methods) - 0.5, -0.5)
            if part.empty or "difference" not in part:
                no_data(ax)
                continue
            ax.axvline(0.0, color=INK, linewidth=1.0, zorder=2)
            for k, size in enumerate(sizes):
                rows = part[part["N"] == size].set_index("method")
                present = [m for m in methods if m in rows.index]
                shade, marker = SERIES[k % len(SERIES)]
                ax.plot(
                    rows.loc[present, "difference"],
                    [methods.index(m) for m in present],
                    color=shade,
                    marker=marker,
                    markersize=4.0,
                    alpha=0.75,
                    linestyle="",
                    zorder=3,
                )
            rows = part[part["N"] == "all"].set_index("method")
            present = [m for m in methods if m in rows.index]
            y = [methods.index(m) for m in present]
            low, high = rows.loc[present, "difference_low"], rows.loc[present, "difference_high"]
            ax.hlines(y, low, high, color=INK, linewidth=1.6, zorder=4)
            ax.plot(rows.loc[present, "difference"], y, color=INK, marker="|", markersize=9, linestyle="", zorder=5)
            for m, name in enumerate(methods):
                if name.startswith("risk_optimal"):
                    ax.axhspan(m - 0.5, m + 0.5, color=FAINT, alpha=0.4, linewidth=0, zorder=0)
            ax.set_yticks(range(len(methods)), [pretty(m) for m in methods])
            ax.grid(False, axis="y")
            if r == len(regimes) - 1:
                ax.set_xlabel(f"test loss minus that of {pretty(reference)}", fontsize=9)
    handles = [
        Line2D([], [], color=SERIES[k % 7][0], marker=SERIES[k % 7][1], linestyle="", label=f"N = {s}")
        for k, s in enumerate(sizes)
    ]
    handles.append(Line2D([], [], color=INK, marker="|", markersize=9, label="all N, 95 % interval"))
    legend_above(figure, handles)
    caption = (
        "Merging with coefficients that minimise the predicted risk (risk optimal, shaded) against other methods: "
        f"joint test loss minus that of {pretty(reference)} on the same groups, mean over groups (left is better), "
        "95 % intervals from resampling experts. Tuned methods chose their coefficient by evaluating merges on the "
        "calibration images; risk optimal evaluated none. Tier: estimated (coefficients), measured (losses)."
        f"{seed_text(frame, seed)}"
    )
    return Picture(figure, caption)
