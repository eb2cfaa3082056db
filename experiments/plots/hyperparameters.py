"""Merged risk against the hyperparameters that the experts were trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from experiments import statistics as st
from experiments.plots.panels import checked, distinct, seed_text
from experiments.plots.picture import Picture
from experiments.plots.style import (
    BLUE,
    INK,
    RED,
    SKY,
    legend_above,
    log_axis,
    panel_grid,
    plain_number,
    pretty,
    span_of,
)
from experiments.validation import CELL, Settings

HYPERPARAMETERS = (
    ("learning_rate", "learning rate", True),
    ("steps", "steps", True),
    ("batch_size", "batch size", True),
    ("data_share", "data share", False),
    ("momentum", "momentum", False),
    ("weight_decay", "weight decay", False),
)
"""Column of ``experts``, axis label, and whether the group's mean is geometric (log axis)."""


def group_means(merges: pd.DataFrame, experts: pd.DataFrame) -> pd.DataFrame:
    """``merges`` with the mean of each hyperparameter over the group's experts (geometric where the axis is
    logarithmic).

    Columns ``mean_<hyperparameter>``; a hyperparameter that ``experts`` lacks is skipped.
    """
    keys = [*CELL, "expert"]
    names = [name for name, _, _ in HYPERPARAMETERS if name in experts]
    out = merges.copy()
    exploded = merges[[*CELL, "experts"]].assign(row=np.arange(len(merges)), expert=merges["experts"].str.split(";"))
    joined = exploded.explode("expert").merge(experts[[*keys, *names]].drop_duplicates(keys), on=keys, how="left")
    for name, _, geometric in HYPERPARAMETERS:
        if name not in names:
            continue
        values = pd.to_numeric(joined[name], errors="coerce")
        if geometric:
            mean = np.exp(np.log(values.where(values > 0)).groupby(joined["row"]).mean())
        else:
            mean = values.groupby(joined["row"]).mean()
        out[f"mean_{name}"] = mean.reindex(range(len(merges))).to_numpy()
    return out


def risk_against_hyperparameters(
    merges: pd.DataFrame,
    experts: pd.DataFrame,
    architecture: str,
    method: str = "average",
    prediction: str = "secant_tangent",
    lower: str = "secant",
    upper: str = "tangent_base",
    bound: str = "master_checkpoints",
    bins: int = 5,
    settings: Settings | None = None,
) -> Picture:
    """Merged risk against each hyperparameter of the experts, for one architecture: a row per regime.

    Points: mean measured test loss of the merges in a bin of the group's mean hyperparameter (equal counts), with 95 %
    intervals from resampling experts.  Curves over the same bins: mean prediction, bracket (band), and bound (dashed).
    """
    settings = settings or Settings(resamples=200)
    frame = checked(merges, [*CELL, "experts", "measured_loss"], "risk against hyperparameters")
    checked(experts, [*CELL, "expert"], "risk against hyperparameters")
    frame = frame[frame["architecture"] == architecture]
    if "method" in frame and (frame["method"] == method).any():
        frame = frame[frame["method"] == method]
    frame = group_means(frame, experts)
    shown = [item for item in HYPERPARAMETERS if f"mean_{item[0]}" in frame and frame[f"mean_{item[0]}"].nunique() > 1]
    if frame.empty or not shown:
        raise ValueError(f"risk against hyperparameters: no hyperparameter of {architecture} varies")
    regimes = distinct(frame, "regime")
    figure, axes = panel_grid(len(regimes), len(shown), 2.05, 2.5, 0.4, sharey="row")
    curves = {"prediction": f"pred_{prediction}", "bound": f"bound_{bound}"}
    for r, regime in enumerate(regimes):
        part = frame[frame["regime"] == regime]
        summaries = [_bins(part, f"mean_{name}", bins, settings, curves, lower, upper) for name, _, _ in shown]
        factor = _bound_factor(summaries)
        everything: list[NDArray[np.float64]] = []
        for c, ((_, label, geometric), summary) in enumerate(zip(shown, summaries, strict=True)):
            ax = axes[r, c]
            if r == len(regimes) - 1:
                ax.set_xlabel(label, fontsize=9)
            if summary.empty:
                continue
            x = summary["x"].to_numpy(float)
            everything += [summary[k].to_numpy(float) for k in ("measured", "high")]
            everything.append(np.maximum(summary["low"].to_numpy(float), 0.4 * summary["measured"].to_numpy(float)))
            if "bottom" in summary:
                ax.fill_between(x, summary["bottom"], summary["top"], color=SKY, alpha=0.3, linewidth=0, zorder=1)
                everything += [summary["bottom"].to_numpy(float), summary["top"].to_numpy(float)]
            if "prediction" in summary:
                ax.plot(x, summary["prediction"], color=BLUE, linewidth=1.6, zorder=3)
            if "bound" in summary:
                bounds = summary["bound"].to_numpy(float) / factor
                ax.plot(x, bounds, color=RED, linewidth=1.4, linestyle="--", zorder=2)
                everything.append(bounds)
            ax.vlines(x, summary["low"], summary["high"], color=INK, linewidth=1.1, zorder=4)
            ax.plot(x, summary["measured"], color=INK, marker="o", markersize=4, linestyle="", zorder=5)
            if geometric:
                log_axis(ax, "x", *span_of([x], 1.15))
                ax.set_xticks(_few_ticks(*span_of([x], 1.1)))
                ax.xaxis.set_minor_locator(NullLocator())
            else:
                ax.xaxis.set_major_locator(MaxNLocator(3))
                ax.xaxis.set_major_formatter(FuncFormatter(plain_number))
        for ax in axes[r]:
            log_axis(ax, "y", *span_of(everything, 1.2))
        axes[r, 0].set_ylabel(f"{regime}\njoint test loss", fontsize=9)
        if factor > 1:
            axes[r, 0].text(
                0.04, 0.97, f"bound ÷ {factor:.3g}", transform=axes[r, 0].transAxes, va="top", fontsize=8.5, color=RED
            )
    handles: list[Any] = [
        Line2D([], [], color=INK, marker="o", markersize=4, linewidth=1.1, label="measured (95 % interval)"),
        Line2D([], [], color=BLUE, linewidth=1.6, label=f"prediction ({pretty(prediction)})"),
        Patch(color=SKY, alpha=0.3, linewidth=0, label="bracket"),
    ]
    if f"bound_{bound}" in frame:
        handles.append(Line2D([], [], color=RED, linestyle="--", label="master bound (binned, divided as noted)"))
    legend_above(figure, handles)
    caption = (
        f"{pretty(architecture)}: joint test loss of merges by {pretty(method)} against the mean hyperparameter of a "
        f"group's experts (means per bin of equal counts), with what the theory gives for the same merges. Other "
        f"hyperparameters vary along. Tier: estimated.{seed_text(frame)}"
    )
    return Picture(figure, caption)


def _bound_factor(summaries: Sequence[pd.DataFrame]) -> float:
    """What the bound is divided by to be seen next to the measurement.

    1 if within a factor of 4, else a round number.
    """
    bounds = [part["bound"].to_numpy(float) for part in summaries if "bound" in part]
    if not bounds:
        return 1.0
    measured = np.concatenate([part["measured"].to_numpy(float) for part in summaries if "bound" in part])
    ratio = float(np.nanmedian(np.concatenate(bounds)) / np.nanmedian(measured))
    if not np.isfinite(ratio) or ratio <= 4:
        return 1.0
    wanted = ratio / 2
    power = 10 ** np.floor(np.log10(wanted))
    return float(power * max(k for k in (1, 2, 5) if k * power <= wanted * (1 + 1e-9)))


def _bins(
    part: pd.DataFrame,
    column: str,
    bins: int,
    settings: Settings,
    curves: dict[str, str],
    lower: str,
    upper: str,
) -> pd.DataFrame:
    """Per bin: median hyperparameter x, measured mean with limits, and means of the curves; empty if nothing varies."""
    part = part[np.isfinite(part[column]) & np.isfinite(part["measured_loss"])]
    if len(part) < 2 or part[column].nunique() < 2:
        return pd.DataFrame()
    cut = pd.qcut(part[column], min(bins, max(2, len(part) // 4)), duplicates="drop")
    rows = []
    for _, group in part.groupby(cut, observed=True):
        members = st.membership_of(group["experts"])
        found = st.mean_interval(
            group["measured_loss"], members, settings.resamples, settings.seed, settings.scale, domain=(1e-12, np.inf)
        )
        low = found.low if np.isfinite(found.low) and found.low > 1e-9 else float(group["measured_loss"].min())
        row = {"x": group[column].median(), "measured": found.value, "low": low, "high": max(found.high, found.value)}
        row |= {key: group[name].mean() for key, name in curves.items() if name in group}
        if f"pred_{lower}" in group and f"pred_{upper}" in group:
            sides = sorted([group[f"pred_{lower}"].mean(), group[f"pred_{upper}"].mean()])
            row |= {"bottom": sides[0], "top": sides[1]}
        rows.append(row)
    return pd.DataFrame(rows)


def _few_ticks(low: float, high: float) -> list[float]:
    """At most three round numbers inside [low, high], spread evenly on the log scale."""
    nice: list[float] = []
    for steps in (
        (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
        tuple(k / 10 for k in range(10, 100)),
        tuple(k / 100 for k in range(100, 1000)),
    ):
        nice = [k * 10.0**e for e in range(-12, 13) for k in steps if low <= k * 10.0**e <= high]
        if len(nice) >= 3:
            break
    if len(nice) <= 3:
        return nice
    wanted = np.exp(np.quantile(np.log([nice[0], nice[-1]]), [0.0, 0.5, 1.0]))
    places = [int(np.argmin(np.abs(np.log(np.array(nice) / value)))) for value in wanted]
    return [nice[k] for k in sorted(set(places))]
