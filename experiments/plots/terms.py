"""What the master bound is made of."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from experiments.plots.panels import cell_of, checked, no_data, panel_title, panels_of, seed_text
from experiments.plots.picture import Picture
from experiments.plots.style import BLUE, GREEN, INK, ORANGE, legend_above, panel_grid
from experiments.validation import CELL


def bound_terms(merges: pd.DataFrame) -> Picture:
    """Shares of the master bound's three terms (square-root scale).

    Stacked, by N, one panel per regime and architecture.
    """
    names = ("training", "dispersion", "instability")
    frame = checked(merges, [*CELL, "N", *(f"term_{name}" for name in names)], "bound terms")
    regimes, architectures = panels_of(frame)
    figure, axes = panel_grid(len(regimes), len(architectures), 3.2, 2.5, 0.4, sharey=True)
    shades = (GREEN, ORANGE, BLUE)
    for r, regime in enumerate(regimes):
        for c, architecture in enumerate(architectures):
            ax, part = axes[r, c], cell_of(frame, regime, architecture)
            panel_title(ax, regime, architecture)
            terms = part[[f"term_{name}" for name in names]].astype(float)
            total = terms.to_numpy().sum(axis=1)
            keep = np.isfinite(total) & (total > 0)
            part, terms = part[keep], terms[keep]
            if part.empty:
                no_data(ax)
                continue
            shares = terms.div(terms.sum(axis=1), axis=0).groupby(part["N"]).mean()
            positions, bottom = np.arange(len(shares)), np.zeros(len(shares))
            for name, shade in zip(names, shades, strict=True):
                height = shares[f"term_{name}"].to_numpy(float)
                ax.bar(positions, height, 0.72, bottom=bottom, color=shade, edgecolor="white", linewidth=0.8, zorder=3)
                for x, h, b in zip(positions, height, bottom, strict=True):
                    if h >= 0.09:
                        ax.text(
                            x,
                            b + h / 2,
                            f"{100 * h:.0f} %",
                            ha="center",
                            va="center",
                            fontsize=8,
                            color=_on(shade),
                            zorder=4,
                        )
                bottom = bottom + height
            bound = (terms.sum(axis=1) ** 2).groupby(part["N"]).median()
            ax.set_xticks(positions, [f"N = {n}\n({_short(bound[n])})" for n in shares.index], fontsize=8.5)
            ax.set_ylim(0, 1)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
            ax.grid(False)
            if c == 0:
                ax.set_ylabel("share of √bound", fontsize=9)
    labels = (
        "training risk of the experts",
        "dispersion (optimization)",
        "instability (generalization)",
    )
    legend_above(figure, [Patch(color=shade, label=label) for shade, label in zip(shades, labels, strict=True)])
    caption = (
        "What the master bound from the training logs is made of: mean share of its three terms on the square-root "
        "scale, by number of merged experts N; in brackets the bound's median before any cap. "
        f"Tier: estimated.{seed_text(frame)}"
    )
    return Picture(figure, caption)


def _on(shade: str) -> str:
    return "white" if shade in (BLUE, GREEN) else INK


def _short(value: float) -> str:
    return f"{value:.2g}" if 0.01 <= value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"
