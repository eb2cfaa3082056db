"""Figures of predicted against measured merged risk.

Every function takes result frames and returns a :class:`Picture` (a matplotlib figure drawn without pyplot or global
state, and a caption that names tier and seed).  Colours are Okabe and Ito's, told apart under the common
colour-vision deficiencies; markers and line styles repeat what colour says.  A function raises ValueError when its
frame lacks what it draws.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter
from numpy.typing import NDArray

from experiments import statistics as st
from experiments.validation import CELL, Settings, optimal_table

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


class Picture(NamedTuple):
    """A figure and the sentence printed under it."""

    figure: Figure
    caption: str


def save_svg(figure: Figure, path: Path | str) -> Path:
    """Write ``figure`` as SVG; the bytes depend on the drawing only (no date, no random identifiers)."""
    target = Path(path)
    target.write_bytes(svg_bytes(figure))
    return target


def svg_bytes(figure: Figure) -> bytes:
    """``figure`` as deterministic SVG."""
    return _render(figure, "svg", {"Date": None, "Creator": None})


def save_png(figure: Figure, path: Path | str, dpi: int = 150) -> Path:
    """Write ``figure`` as PNG without software metadata."""
    target = Path(path)
    target.write_bytes(png_bytes(figure, dpi))
    return target


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """``figure`` as PNG without software metadata."""
    return _render(figure, "png", {"Software": None}, dpi)


def _render(figure: Figure, kind: str, metadata: dict[str, Any], dpi: int = 150) -> bytes:
    buffer = io.BytesIO()
    if figure.get_layout_engine() is not None:  # solve the layout once, not at every rendering
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    with mpl.rc_context({"svg.hashsalt": "mergebound", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata, facecolor="white")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- shared small parts


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


def _need(frame: pd.DataFrame | None, columns: Sequence[str], what: str) -> pd.DataFrame:
    if frame is None or frame.empty:
        raise ValueError(f"{what}: there are no rows to draw")
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ValueError(f"{what}: column {missing[0]} is missing")
    return frame


def _unique(frame: pd.DataFrame, column: str) -> list[Any]:
    return list(dict.fromkeys(frame[column]))


def _grid(
    rows: int, columns: int, width: float = 3.4, height: float = 3.0, top: float = 0.0, **share: Any
) -> tuple[Figure, NDArray[np.object_]]:
    figure = Figure(
        figsize=(max(width * columns, 5.4), height * rows + top + (0.5 if rows * columns == 1 else 0.0)),
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06),
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    for ax in axes.flat:
        _dress(ax)
    return figure, axes


def _dress(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(labelsize=8.5, colors=INK, which="both")
    ax.grid(True, color=FAINT, linewidth=0.5, zorder=0)
    ax.set_axisbelow(True)


def _plain(value: float, _: object = None) -> str:
    return f"{value:g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.0e}"


def _log_axis(ax: Axes, which: str, low: float, high: float) -> None:
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
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(base=10, subs=(1.0,), numticks=12))


def _span(values: Sequence[NDArray[np.float64]], margin: float = 1.15) -> tuple[float, float]:
    joined = np.concatenate([np.asarray(v, dtype=float).ravel() for v in values])
    joined = joined[np.isfinite(joined) & (joined > 0)]
    if joined.size == 0:
        return 0.1, 10.0
    return float(joined.min() / margin), float(joined.max() * margin)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
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


def _seed_text(frame: pd.DataFrame, seed: object = None) -> str:
    seeds = _unique(frame, "seed") if "seed" in frame else ([] if seed is None else [seed])
    return f" Seed {', '.join(str(s) for s in seeds)}." if seeds else ""


def _panels(frame: pd.DataFrame) -> tuple[list[Any], list[Any]]:
    return _unique(frame, "regime"), _unique(frame, "architecture")


def _cell(frame: pd.DataFrame, regime: object, architecture: object) -> pd.DataFrame:
    return frame[(frame["regime"] == regime) & (frame["architecture"] == architecture)]


def _title(ax: Axes, regime: object, architecture: object) -> None:
    ax.set_title(f"{pretty(architecture)} · {regime}", fontsize=10, color=INK, loc="left")


def _empty(ax: Axes) -> None:
    ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center", va="center", color=GREY, fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])


# ---------------------------------------------------------------------------------------------- the figures


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
    frame = _need(merges, [*CELL, "measured_loss", column, colour], "predicted against measured")
    regimes, architectures = _panels(frame)
    figure, axes = _grid(len(regimes), len(architectures), 3.5, 3.3, 0.4)
    values = list(_unique(frame, colour)) if colour == "method" else sorted(_unique(frame, colour))
    bracketed = f"pred_{lower}" in frame and f"pred_{upper}" in frame
    for r, regime in enumerate(regimes):
        for c, architecture in enumerate(architectures):
            ax, part = axes[r, c], _cell(frame, regime, architecture)
            part = part[np.isfinite(part[column]) & (part[column] > 0) & (part["measured_loss"] > 0)]
            _title(ax, regime, architecture)
            if part.empty:
                _empty(ax)
                continue
            measured, predicted = part["measured_loss"].to_numpy(float), part[column].to_numpy(float)
            limits = _span([measured, predicted])
            if bracketed:
                sides = part[[f"pred_{lower}", f"pred_{upper}"]].to_numpy(float)
                both = np.isfinite(sides).all(axis=1)
                bottom, top = sides[both].min(axis=1), sides[both].max(axis=1)
                ax.vlines(measured[both], bottom, top, color=GREY, linewidth=0.5, alpha=0.25, zorder=2)
                reach = _span([np.quantile(bottom, [0.02]), np.quantile(top, [0.98])], 1.0) if both.any() else limits
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
            span = _span([measured])
            _log_axis(ax, "x", *span)
            _log_axis(ax, "y", *limits)
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
    _legend(figure, handles)
    caption = (
        f"Predicted ({pretty(prediction)}) against measured joint test loss, one point per merge. Predictions use no "
        "merge and no test data. "
        + (f"Thin bars: bracket from {pretty(lower)} to {pretty(upper)}. " if bracketed else "")
    )
    return Picture(figure, caption + f"Tier: {tier}.{_seed_text(frame)}")


def _label(column: str, value: object) -> str:
    return f"N = {value}" if column == "N" else pretty(value)


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
    frame = _need(merges, [*CELL, "experts", "measured_loss"], "risk against hyperparameters")
    _need(experts, [*CELL, "expert"], "risk against hyperparameters")
    frame = frame[frame["architecture"] == architecture]
    if "method" in frame and (frame["method"] == method).any():
        frame = frame[frame["method"] == method]
    frame = group_means(frame, experts)
    shown = [item for item in HYPERPARAMETERS if f"mean_{item[0]}" in frame and frame[f"mean_{item[0]}"].nunique() > 1]
    if frame.empty or not shown:
        raise ValueError(f"risk against hyperparameters: no hyperparameter of {architecture} varies")
    regimes = _unique(frame, "regime")
    figure, axes = _grid(len(regimes), len(shown), 2.05, 2.5, 0.4, sharey="row")
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
                _log_axis(ax, "x", *_span([x], 1.15))
                ax.set_xticks(_few_ticks(*_span([x], 1.1)))
                ax.xaxis.set_minor_locator(NullLocator())
            else:
                ax.xaxis.set_major_locator(MaxNLocator(3))
                ax.xaxis.set_major_formatter(FuncFormatter(_plain))
        for ax in axes[r]:
            _log_axis(ax, "y", *_span(everything, 1.2))
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
    _legend(figure, handles)
    caption = (
        f"{pretty(architecture)}: joint test loss of merges by {pretty(method)} against the mean hyperparameter of a "
        f"group's experts (means per bin of equal counts), with what the theory gives for the same merges. Other "
        f"hyperparameters vary along. Tier: estimated.{_seed_text(frame)}"
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


def bound_terms(merges: pd.DataFrame) -> Picture:
    """Shares of the master bound's three terms (square-root scale).

    Stacked, by N, one panel per regime and architecture.
    """
    names = ("training", "dispersion", "instability")
    frame = _need(merges, [*CELL, "N", *(f"term_{name}" for name in names)], "bound terms")
    regimes, architectures = _panels(frame)
    figure, axes = _grid(len(regimes), len(architectures), 3.2, 2.5, 0.4, sharey=True)
    shades = (GREEN, ORANGE, BLUE)
    for r, regime in enumerate(regimes):
        for c, architecture in enumerate(architectures):
            ax, part = axes[r, c], _cell(frame, regime, architecture)
            _title(ax, regime, architecture)
            terms = part[[f"term_{name}" for name in names]].astype(float)
            total = terms.to_numpy().sum(axis=1)
            keep = np.isfinite(total) & (total > 0)
            part, terms = part[keep], terms[keep]
            if part.empty:
                _empty(ax)
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
    _legend(figure, [Patch(color=shade, label=label) for shade, label in zip(shades, labels, strict=True)])
    caption = (
        "What the master bound from the training logs is made of: mean share of its three terms on the square-root "
        "scale, by number of merged experts N; in brackets the bound's median before any cap. "
        f"Tier: estimated.{_seed_text(frame)}"
    )
    return Picture(figure, caption)


def _on(shade: str) -> str:
    return "white" if shade in (BLUE, GREEN) else INK


def _short(value: float) -> str:
    return f"{value:.2g}" if 0.01 <= value < 100 else f"{value:.0f}" if value < 1e5 else f"{value:.0e}"


def coefficient_sweep(coefficients: pd.DataFrame, seed: object = None) -> Picture:
    """Task arithmetic against its coefficient: measured loss, the prediction as a band, and both minima.

    Panels: regime and architecture by N; medians over the groups of a panel.
    """
    need = [*CELL, "N", "lam", "measured_loss", "pred_secant", "pred_tangent_base"]
    frame = _need(coefficients, need, "coefficient sweep")
    rows = [key for key, _ in frame.groupby(list(CELL), sort=False)]
    sizes = sorted(frame["N"].unique())
    figure, axes = _grid(len(rows), len(sizes), 2.5, 2.15, 0.5, sharex=True, sharey="row")
    for r, (regime, architecture) in enumerate(rows):
        spans: list[NDArray[np.float64]] = []
        for c, size in enumerate(sizes):
            ax = axes[r, c]
            part = _cell(frame, regime, architecture)
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
            _log_axis(ax, "y", *_span(spans, 1.2))
        axes[r, 0].set_ylabel(f"{pretty(architecture)}\n{regime}\njoint test loss", fontsize=9)
    handles = [
        Line2D([], [], color=INK, marker="o", markersize=3, label="measured"),
        Patch(color=SKY, alpha=0.35, linewidth=0, label="predicted: secant to tangent"),
        Line2D([], [], color=BLUE, label="their average (logits)"),
        Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle="", label="minimum"),
    ]
    _legend(figure, handles)
    caption = (
        "Task arithmetic x₀ + λ ΣΔᵢ: joint test loss against λ, median over a panel's groups, with the prediction as a "
        "band from secant to tangent at the base (linearisation only, no sampling error); rings mark each curve's "
        f"minimum. Tier: estimated.{_seed_text(frame, seed)}"
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
    frame = _need(lines, [*CELL, "expert_a", "expert_b", "t", "measured_loss"], "loss along a line")
    regimes, architectures = _panels(frame)
    figure, axes = _grid(len(regimes), len(architectures), 3.3, 2.7, 0.4, sharex=True)
    predicted = "pred_secant" in frame and "pred_tangent_base" in frame
    for r, regime in enumerate(regimes):
        for c, architecture in enumerate(architectures):
            ax, part = axes[r, c], _cell(frame, regime, architecture)
            _title(ax, regime, architecture)
            if part.empty:
                _empty(ax)
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
            _log_axis(ax, "y", *_span(spans, 1.2))
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
    _legend(figure, handles)
    caption = (
        "Loss along the straight line between two experts (the first pair of each panel), measured on test images and "
        f"predicted for the mean of both tasks; the band is the bracket. Tier: estimated.{_seed_text(frame, seed)}"
    )
    return Picture(figure, caption)


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
    frame = _need(optimal, [*CELL, "group", "method", "measured_loss"], "comparison of methods")
    table = optimal_table(frame, merges, settings or Settings(resamples=300), reference)
    sizes = [size for size in dict.fromkeys(table["N"]) if size != "all"]
    methods = [name for name in _unique(frame, "method") if name != reference]
    regimes, architectures = _panels(frame)
    figure, axes = _grid(len(regimes), len(architectures), 3.5, 0.3 * len(methods) + 0.8, 0.4, sharey=True)
    for r, regime in enumerate(regimes):
        for c, architecture in enumerate(architectures):
            ax, part = axes[r, c], _cell(table, regime, architecture)
            _title(ax, regime, architecture)
            ax.set_ylim(len(methods) - 0.5, -0.5)
            if part.empty or "difference" not in part:
                _empty(ax)
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
    _legend(figure, handles)
    caption = (
        "Merging with coefficients that minimise the predicted risk (risk optimal, shaded) against other methods: "
        f"joint test loss minus that of {pretty(reference)} on the same groups, mean over groups (left is better), "
        "95 % intervals from resampling experts. Tuned methods chose their coefficient by evaluating merges on the "
        "calibration images; risk optimal evaluated none. Tier: estimated (coefficients), measured (losses)."
        f"{_seed_text(frame, seed)}"
    )
    return Picture(figure, caption)


def bracket_and_collapse(merges: pd.DataFrame, lower: str = "secant", upper: str = "tangent_base") -> Picture:
    """Bracket width (max/min of two predictions) against measured loss over the base's, coloured by regime."""
    need = [*CELL, "measured_loss", "base_loss", f"pred_{lower}", f"pred_{upper}"]
    frame = _need(merges, need, "bracket width and collapse")
    regimes, architectures = _panels(frame)
    figure, axes = _grid(1, len(architectures), 3.5, 3.2, 0.4, sharey=True)
    for c, architecture in enumerate(architectures):
        ax = axes[0, c]
        spans: list[list[NDArray[np.float64]]] = [[], []]
        notes = []
        for k, regime in enumerate(regimes):
            part = _cell(frame, regime, architecture)
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
            _empty(ax)
            continue
        _log_axis(ax, "x", *_span(spans[0]))
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
    _log_axis(axes[0, 0], "y", *_span([every, np.array([1.0])]))
    axes[0, 0].set_ylabel("measured loss / base loss", fontsize=9)
    handles: list[Any] = [
        Line2D([], [], linestyle="", marker=SERIES[k % 7][1], color=SERIES[k % 7][0], label=str(regime))
        for k, regime in enumerate(regimes)
    ]
    handles.append(Line2D([], [], color=INK, linewidth=1.0, label="as bad as the base"))
    _legend(figure, handles)
    caption = (
        f"Does the width of the bracket ({pretty(lower)} to {pretty(upper)}) warn of collapse? Above the line the "
        "merge is worse than the base model; AUC is the area under the ROC curve of the width for that event. "
        "Tier: estimated."
    )
    return Picture(figure, caption + _seed_text(frame))
