"""Pictures of lines, planes and flatness, in the style of :mod:`experiments.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from experiments.measure.landscape.flatness import Flatness
from experiments.measure.landscape.lines import JOINT, Line
from experiments.measure.landscape.planes import Mark, Surface
from experiments.plots import Picture, pretty
from experiments.plots.style import INK, ORANGE, RED, SERIES, legend_above, panel_grid
from theory.errors import MergeboundError

_STATISTICS = {
    "merged": "running statistics are merged like parameters",
    "reestimated": "running statistics are estimated again at every point, on the calibration images of all tasks",
    "task": "running statistics are estimated again at every point, on the calibration images of the task",
}
_COLUMNS = 3
_ROOM = 13
"""Letters of an end's name beside which the middle of a panel's axis has room for its own label."""


def lines_figure(lines: Sequence[Line], quantity: str = "loss") -> Picture:
    """One panel per line: each task's ``loss`` or ``error`` with its band, and the joint one in black.

    The dotted line joins the joint ends: the barrier is what rises above it.

    Raises:
        MergeboundError: no line, or another quantity.
    """
    if not lines or quantity not in ("loss", "error"):
        raise MergeboundError(f"{len(lines)} lines, quantity {quantity!r}: give a line or more, and loss or error")
    names = list(dict.fromkeys(p.task for line in lines for p in line.profiles if p.task != JOINT))
    columns = min(_COLUMNS, len(lines))
    rows = -(-len(lines) // columns)
    figure, axes = panel_grid(rows, columns, 3.1, 2.5, 0.5)
    for ax in axes.flat[len(lines) :]:
        ax.set_visible(False)
    panels: list[Any] = list(axes.flat)
    for ax, line in zip(panels, lines, strict=False):
        for profile in line.profiles:
            curve = getattr(profile, quantity)
            joint = profile is line.joint
            shade = INK if profile.task == JOINT else SERIES[names.index(profile.task) % len(SERIES)][0]
            ax.fill_between(line.t, curve.low, curve.high, color=shade, alpha=0.18, linewidth=0, zorder=2)
            ax.plot(line.t, curve.value, color=shade, linewidth=1.8 if joint else 1.3, zorder=4 if joint else 3)
        curve = getattr(line.joint, quantity)
        ax.plot([0.0, 1.0], curve.value[[0, -1]], color=INK, linewidth=1.0, linestyle=":", zorder=3)
        ends = line.joint
        rises = f"+{ends.loss_barrier.value:.2g} nats, +{100 * ends.error_barrier.value:.1f} % error"
        ax.set_title(f"{rises}: {ends.verdict}", fontsize=8.5, loc="left", color=INK)
        first, last = _short(line.start), _short(line.end)
        middle = "½" if max(len(first), len(last)) <= _ROOM else ""
        ax.set_xticks([0.0, 0.5, 1.0], [first, middle, last], fontsize=8.5)
        for label, side in zip(ax.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set_horizontalalignment(side)
        ax.set_ylim(bottom=0.0)
        if quantity == "error":
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for ax in axes[:, 0]:
        ax.set_ylabel("loss (nats)" if quantity == "loss" else "error", fontsize=9)
    handles: list[Any] = [Line2D([], [], color=SERIES[k % len(SERIES)][0], label=name) for k, name in enumerate(names)]
    if any(len(line.profiles) > 1 for line in lines):
        handles.append(Line2D([], [], color=INK, linewidth=1.8, label="mean of the tasks"))
    handles.append(Line2D([], [], color=INK, linestyle=":", label="straight line between the ends"))
    legend_above(figure, handles)
    one = lines[0]
    caption = (
        f"{quantity.capitalize()} along straight lines on {one.part} images, bands: 95 % intervals from resampling "
        f"images; {_STATISTICS[one.batchnorm]}. Above each panel: the largest rises of loss and error over the "
        f"straight line between the ends; connected where the error's is surely at most {100 * one.tolerance:g} %, a "
        f"barrier where it is surely more. Tier: {one.tier}. Seed: {one.seed}."
    )
    return Picture(figure, caption)


def contour_figure(surface: Surface, quantity: str = "loss", levels: int = 12) -> Picture:
    """Contours of the joint ``loss`` or ``error`` on a plane, with base, experts and merges marked.

    Marks are feet on the plane; hollow ones lie off it by more than a tenth of their distance from the base.

    Raises:
        MergeboundError: another quantity.
    """
    if quantity not in ("loss", "error"):
        raise MergeboundError(f"quantity {quantity!r}: choose loss or error")
    merges = [mark for mark in surface.marks if mark.kind == "merge"]
    width, tall = float(np.ptp(surface.u)), float(np.ptp(surface.v))
    figure, axes = panel_grid(1, 1, 6.4, float(np.clip(5.2 * tall / width, 2.6, 6.4)), 0.07 * len(surface.marks))
    ax: Axes = axes[0, 0]
    ax.grid(False)
    values = getattr(surface, quantity)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise MergeboundError("no point of the plane has a finite value: make it smaller (margin)")
    known = [getattr(mark, quantity) for mark in surface.marks if mark.kind != "merge"]
    scale = _levels(finite, known, levels, quantity == "loss")
    beyond = 1.5 * float(scale[-1])
    shown = np.minimum(np.nan_to_num(values, nan=beyond, posinf=beyond), beyond)
    filled = ax.contourf(surface.u, surface.v, shown, levels=scale, cmap="Blues", alpha=0.9, zorder=1,
                         norm=_norm(scale), extend="max")  # fmt: skip
    drawn = ax.contour(surface.u, surface.v, shown, levels=scale, colors=INK, linewidths=0.4, alpha=0.5, zorder=2)
    fmt = (lambda value: f"{100 * value:.0f} %") if quantity == "error" else _short_number
    ax.clabel(drawn, scale[::2], fontsize=7, fmt=fmt)
    bar = figure.colorbar(filled, ax=ax, shrink=0.85, pad=0.02)
    bar.set_ticks([float(v) for v in scale[::2]], labels=[fmt(float(v)) for v in scale[::2]])
    bar.set_label("joint loss (nats)" if quantity == "loss" else "joint error", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    handles: list[Any] = []
    outline = [withStroke(linewidth=2.2, foreground="white")]
    for mark in surface.marks:
        if mark.kind != "merge":
            base = mark.kind == "base"
            style = _style(ORANGE if base else RED, "*" if base else "^", _off(mark))
            ax.plot(mark.u, mark.v, linestyle="", zorder=6, **(style | {"markersize": 14 if base else 10}))
            ax.annotate(mark.name, (mark.u, mark.v), xytext=(-7, -9) if base else (7, 6), textcoords="offset points",
                        ha="right" if base else "left", va="top" if base else "bottom", fontsize=8.5, color=INK,
                        path_effects=outline, zorder=7)  # fmt: skip
    for k, mark in enumerate(merges):
        style = _merge_style(k, _off(mark))
        ax.plot(mark.u, mark.v, linestyle="", zorder=5, **style)
        value = mark.loss if quantity == "loss" else mark.error
        text = _short_number(value) if quantity == "loss" else f"{100 * value:.0f} %"
        handles.append(Line2D([], [], linestyle="", label=f"{pretty(mark.name)} {text}", **style))
    ax.set_aspect("equal")
    ax.set_xlabel("first axis (distance in parameters)", fontsize=9)
    ax.set_ylabel("second axis", fontsize=9)
    if handles:
        legend_above(figure, handles)
    kind = "the plane through three points" if surface.plane.kind == "three points" else (
        f"the principal plane, which holds {100 * surface.plane.explained:.0f} % of the squared distances"
    )  # fmt: skip
    caption = (
        f"Joint {quantity} on {kind}, on {surface.images} {surface.part} images of {len(surface.tasks)} tasks; "
        f"{_STATISTICS[surface.batchnorm]}. Numbers beside methods are those of the merge itself; hollow marks lie off "
        "the plane by more than a tenth of their distance from the base, and are shown at their foot; the darkest "
        "colour is everything above the scale. "
        f"Tier: {surface.tier}. Seed: {surface.seed}."
    )
    return Picture(figure, caption)


def flatness_figure(found: Flatness) -> Picture:
    """The loss along filter-normalised random directions around each point: mean and band over directions.

    Raises:
        MergeboundError: no curve was measured.
    """
    points = [point for point in found.points if point.rise is not None]
    if not points:
        raise MergeboundError("no curves along filter-normalised directions were measured; ask for directions")
    figure, axes = panel_grid(1, 1, 5.4, 3.2, 0.4)
    ax = axes[0, 0]
    handles = []
    for k, point in enumerate(points):
        rise = point.rise
        assert rise is not None
        shade, marker = SERIES[k % len(SERIES)]
        style: Any = "-" if k < len(SERIES) else "--"
        ax.fill_between(rise.steps, rise.low, rise.high, color=shade, alpha=0.12, linewidth=0)
        ax.plot(rise.steps, rise.mean, color=shade, marker=marker, markersize=3.5, linewidth=1.3, linestyle=style)
        label = f"{pretty(point.point)}, {'all tasks' if point.task == JOINT else 'its task'}"
        handles.append(Line2D([], [], color=shade, marker=marker, linestyle=style, markersize=4, label=label))
    ax.set_xlabel("step along filter-normalised directions", fontsize=9)
    ax.set_ylabel("loss (nats)", fontsize=9)
    ax.set_ylim(bottom=0.0)
    legend_above(figure, handles)
    one = points[0]
    assert one.rise is not None
    caption = (
        f"Loss along {len(one.rise.values)} random directions whose filters have the norms of the network's own (1 "
        "moves a filter by its norm; biases and normalisation do not move), the same draws for all points; bands: 95 % "
        f"intervals of the mean over directions; {one.part} images. Tier: estimated. Seed: {one.rise.seed}."
    )
    return Picture(figure, caption)


def _short(name: str, most: int = 18) -> str:
    text = pretty(name)
    return text if len(text) <= most else text[: most - 1] + "…"


def _off(mark: Mark) -> bool:
    return mark.relative > 0.1


def _merge_style(k: int, off: bool) -> dict[str, Any]:
    shade, marker = SERIES[k % len(SERIES)]
    return _style(shade, "osDPXvphd<>8"[k % 12] if k >= len(SERIES) else marker, off)


def _style(shade: str, marker: str, off: bool) -> dict[str, Any]:
    fill = {"markerfacecolor": "white" if off else shade, "markeredgecolor": shade if off else "white"}
    return {"marker": marker, "markersize": 7, "markeredgewidth": 1.3 if off else 0.8, **fill}


def _levels(values: np.ndarray, known: Sequence[float], count: int, logarithmic: bool) -> np.ndarray:
    """Levels from the lowest value to somewhat above the base and the experts; what is higher is one colour."""
    finite = [height for height in known if np.isfinite(height)]
    low = float(values.min())
    high = min(float(values.max()), low + 2.0 * (max(finite) - low) if finite else np.inf)
    high = max(high, low + 1e-6)
    if logarithmic and low > 0 and high / low > 4.0:
        return np.geomspace(low, high, count + 1)
    return np.linspace(low, high, count + 1)


def _norm(levels: np.ndarray) -> Any:
    from matplotlib.colors import BoundaryNorm

    return BoundaryNorm(levels, 256, extend="max")


def _short_number(value: float, _: object = None) -> str:
    return f"{value:.3g}"
