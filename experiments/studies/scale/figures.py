"""Figures of the study of scale: what grows or falls with size, base and number of experts, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.plots import Picture, pretty
from experiments.plots.style import FAINT, GREY, INK, SERIES, legend_above
from experiments.studies.scale.laws import LAWS
from experiments.studies.scale.spec import ScaleSpec

STYLES = ("-", "--", ":", "-.")
APART = 1.3
"""Sizes that are closer together than this factor share a tick."""


def _panels(count: int, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    across = min(count, 3)
    down = -(-count // across)
    figure = Figure(figsize=(3.7 * across + 0.4, height * down), layout="constrained")
    axes = [figure.add_subplot(down, across, k + 1) for k in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    return figure, axes


def _sizes(ax: Axes, values: Sequence[float]) -> None:
    ax.set_xscale("log")
    shown: list[float] = []
    for value in sorted(set(values)):
        if not shown or value >= APART * shown[-1]:
            shown.append(value)
    ax.set_xticks(shown)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1e6:.2g}M" if v >= 1e5 else f"{v / 1e3:.0f}k"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()
    ax.set_xlabel("parameters", fontsize=8)


def _line(ax: Axes, x: Sequence[float], part: pd.DataFrame, k: int, label: str, style: str = "-") -> None:
    colour, marker = SERIES[k % len(SERIES)]
    y = part["value"].to_numpy(dtype=float)
    band = "on_these_tasks" if (part["held_out_tasks"] > 0).all() else "value"
    low, high = part[f"{band}_low"].to_numpy(dtype=float), part[f"{band}_high"].to_numpy(dtype=float)
    ax.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, linestyle=style, label=label)
    if np.isfinite(low).any():
        ax.fill_between(np.asarray(x, dtype=float), low, high, color=colour, alpha=0.13, linewidth=0)


def _base_label(spec: ScaleSpec, base: str) -> str:
    return "random weights" if spec.bases[base].get("kind") == "random" else f"{base} base"


def _of_strongest(frame: pd.DataFrame, spec: ScaleSpec) -> tuple[pd.DataFrame, str]:
    """Rows of every family's strongest base, and what to call it."""
    last = {family.name: spec.bases_of(family)[-1] for family in spec.families}
    names = tuple(dict.fromkeys(last.values()))
    words = f"{names[0]} base" if len(names) == 1 else f"strongest base of each family ({', '.join(names)})"
    if frame.empty:
        return frame, words
    return frame[frame["base"] == frame["family"].map(last)], words


def _bands(measure: str, spec: ScaleSpec) -> str:
    """What the bands of a figure are over."""
    if not measure.startswith("held_out"):
        return "Bands: 95 % over merged tasks and test images."
    return f"Bands: 95 % over merged tasks and test images; the {len(spec.held_out)} held-out tasks stay as they are."


def against_size(table: pd.DataFrame, spec: ScaleSpec, measure: str, what: str) -> Picture:
    """A measure against size: panels by family, colours by base; mean over merges of all methods and N."""
    part = table[table["measure"] == measure]
    if part.empty:
        raise ValueError(f"{what}: no merges")
    families = [f for f in spec.families if (part["family"] == f.name).any()]
    figure, axes = _panels(len(families))
    for ax, family in zip(axes, families, strict=True):
        own = part[part["family"] == family.name]
        for k, base in enumerate(spec.bases_of(family)):
            line = own[own["base"] == base].sort_values("parameters")
            if len(line):
                _line(ax, list(line["parameters"]), line, k, _base_label(spec, base), STYLES[k % 4])
        _sizes(ax, list(own["parameters"]))
        ax.axhline(1.0, color=GREY, linewidth=0.8)
        ax.set_title(family.name, fontsize=9, color=INK)
        ax.set_ylabel(what, fontsize=8)
        ax.legend(fontsize=7, frameon=False)
    caption = (
        f"{what[:1].upper()}{what[1:]} against the number of parameters, mean over all groups and methods. "
        f"{_bands(measure, spec)} Tier: measured; seed {spec.seed}."
    )
    return Picture(figure, caption)


def against_number(table: pd.DataFrame, spec: ScaleSpec, measure: str, what: str) -> Picture:
    """A measure against N for the strongest base of each family: panels by network, colours by method."""
    part, base = _of_strongest(table[table["measure"] == measure], spec)
    if part.empty:
        raise ValueError(f"{what}: no merges of the {base}")
    networks = list(dict.fromkeys(part["architecture"]))
    figure, axes = _panels(len(networks), 2.7)
    for ax, network in zip(axes, networks, strict=True):
        own = part[part["architecture"] == network]
        for k, method in enumerate(dict.fromkeys(own["method"])):
            line = own[own["method"] == method].sort_values("experts")
            _line(ax, list(line["experts"]), line, k, pretty(str(method).split(" ")[0]))
        ax.axhline(1.0, color=GREY, linewidth=0.8)
        ax.set_xticks(list(spec.experts))
        ax.set_xlabel("experts", fontsize=8)
        ax.set_ylabel(what, fontsize=8)
        ax.set_title(network, fontsize=9, color=INK)
    axes[0].legend(fontsize=7, frameon=False)
    caption = (
        f"{what[:1].upper()}{what[1:]} against the number of merged experts, {base}. {_bands(measure, spec)} Tier: "
        f"measured; seed {spec.seed}."
    )
    return Picture(figure, caption)


def effects_figure(findings: pd.DataFrame, spec: ScaleSpec) -> Picture:
    """Every finding's own effects with intervals, in units of their larger end, and the paper's direction."""
    part = findings[findings["papers_own"].isin(["yes", "optimised multitask", "other family"])].reset_index(drop=True)
    if part.empty:
        raise ValueError("effects: no finding was measured")
    height = 0.42 * len(part) + 0.9
    figure = Figure(figsize=(9.4, height))
    ax = figure.add_axes((0.36, 0.55 / height, 0.34, 1 - 0.75 / height))
    ax.spines[["top", "right", "left"]].set_visible(False)
    colours = {"agrees": SERIES[2][0], "disagrees": SERIES[1][0], "undecided": GREY}
    labels = []
    for k, row in enumerate(part.to_dict("records")):
        ends = [abs(v) for v in (row["effect"], row["effect_low"], row["effect_high"]) if np.isfinite(v)]
        scale = max(ends, default=1.0) or 1.0
        sign = -1.0 if row["paper"] == "below 0" else 1.0
        y = len(part) - 1 - k
        colour = colours.get(str(row["verdict"]), GREY)
        if np.isfinite(row["effect_low"]):
            bar = [sign * row["effect_low"] / scale, sign * row["effect_high"] / scale]
            ax.plot(bar, [y, y], color=colour, linewidth=1.0 if row["held_out_tasks"] else 2.6)
        if np.isfinite(row["on_these_tasks_low"]):
            bar = [sign * row["on_these_tasks_low"] / scale, sign * row["on_these_tasks_high"] / scale]
            ax.plot(bar, [y, y], color=colour, linewidth=2.6)
        said = "not measured"
        if np.isfinite(row["effect"]):
            ax.plot(sign * row["effect"] / scale, y, "o", color=colour, markersize=5)
            edge = " (borderline)" if row["borderline"] == "yes" else ""
            said = f"{row['effect']:+.3g} {row['unit']}: {row['verdict']}{edge}"
        ax.annotate(said, (1.1, y), fontsize=7, va="center", color=colour, annotation_clip=False)
        labels.append(f"{row['finding']}\n{row['scope']}")
    ax.set_yticks(range(len(part))[::-1], labels, fontsize=7)
    ax.axvline(0.0, color=INK, linewidth=0.8)
    ax.set_xlim(-1.05, 1.05)
    ax.set_ylim(-0.6, len(part) - 0.4)
    ax.set_xticks([-0.55, 0.55], ["against the paper", "as the paper says"], fontsize=7)
    ax.tick_params(length=0)
    caption = (
        "Effects of the five findings, each scaled by the far end of its interval; right of the line is the paper's "
        "direction. Thick bars: 95 % over merged tasks and test images; thin bars: over held-out tasks as well. Tier: "
        f"measured; seed {spec.seed}."
    )
    return Picture(figure, caption)


def methods_figure(table: pd.DataFrame, spec: ScaleSpec) -> Picture:
    """Normalised held-in performance by method against size, strongest bases: do the lines come together?"""
    part, base = _of_strongest(table[table["measure"] == "held_in"], spec)
    if part.empty:
        raise ValueError(f"methods: no merges of the {base}")
    families = [f.name for f in spec.families if (part["family"] == f.name).any()]
    figure, axes = _panels(len(families))
    for ax, name in zip(axes, families, strict=True):
        own = part[part["family"] == name]
        for k, method in enumerate(dict.fromkeys(own["method"])):
            line = own[own["method"] == method].sort_values("parameters")
            _line(ax, list(line["parameters"]), line, k, pretty(str(method).split(" ")[0]))
        _sizes(ax, list(own["parameters"]))
        ax.set_title(name, fontsize=9, color=INK)
        ax.set_ylabel("held-in: merged / expert", fontsize=8)
        ax.legend(fontsize=7, frameon=False)
    caption = (
        f"Normalised held-in performance of every method against size, {base}, mean over groups of all sizes. "
        f"{_bands('held_in', spec)} Tier: measured; seed {spec.seed}."
    )
    return Picture(figure, caption)


def shape_figure(shape: pd.DataFrame, spec: ScaleSpec) -> Picture:
    """Barriers and flatness against size: every pair a dot, means as lines."""
    wanted = [("loss_barrier", None, "loss barrier, nats"), ("error_barrier", None, "error barrier"),
              ("average_filters", "average", "rise under noise at the average")]  # fmt: skip
    if shape.empty:
        raise ValueError("shape: nothing was measured")
    figure, axes = _panels(len(wanted))
    for ax, (quantity, place, title) in zip(axes, wanted, strict=True):
        part = shape[shape["quantity"] == quantity]
        part = part if place is None else part[part["place"] == place]
        number = 0
        for family in spec.families:
            for base in spec.bases_of(family):
                own = part[(part["family"] == family.name) & (part["base"] == base)]
                if own.empty:
                    continue
                colour, marker = SERIES[number % len(SERIES)]
                number += 1
                means = own.groupby("parameters")["value"].mean()
                ax.plot(list(means.index), list(means), color=colour, marker=marker, markersize=4, linewidth=1.4,
                        label=f"{family.name}, {_base_label(spec, base)}")  # fmt: skip
                if place is None:
                    ax.plot(own["parameters"], own["value"], ".", color=colour, alpha=0.3, markersize=3)
        _sizes(ax, list(part["parameters"]))
        ax.set_ylabel(title, fontsize=8)
    legend_above(figure, axes[0].get_legend_handles_labels()[0])
    caption = (
        "Barriers along lines between experts (dots: pairs) and rise of the loss under noise of a fixed share of the "
        f"filters' norms, against size. Tier: measured (barriers), estimated (rise); seed {spec.seed}."
    )
    return Picture(figure, caption)


def terms_figure(terms: pd.DataFrame, spec: ScaleSpec) -> Picture:
    """The theory's terms against size, by base."""
    wanted = ["relative_drift", "dispersion", "noise", "curvature", "curved", "gap"]
    titles = {
        "relative_drift": "relative drift", "dispersion": "dispersion V", "noise": "gradient noise at the base",
        "curvature": "curvature along a task vector", "curved": "curved dispersion, nats", "gap": "linearisation gap",
    }  # fmt: skip
    if terms.empty:
        raise ValueError("terms: nothing was measured")
    figure, axes = _panels(len(wanted), 2.6)
    for ax, name in zip(axes, wanted, strict=True):
        part = terms[terms["term"] == name]
        number = 0
        for family in spec.families:
            for base in spec.bases_of(family):
                own = part[(part["family"] == family.name) & (part["base"] == base)]
                if own.empty:
                    continue
                colour, marker = SERIES[number % len(SERIES)]
                number += 1
                middle = own.groupby("parameters")["value"].median()
                ax.plot(list(middle.index), list(middle), color=colour, marker=marker, markersize=4, linewidth=1.3,
                        label=f"{family.name}, {_base_label(spec, base)}")  # fmt: skip
        _sizes(ax, list(part["parameters"]))
        if (part["value"] > 0).all() and len(part):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylabel(titles[name], fontsize=8)
    legend_above(figure, axes[0].get_legend_handles_labels()[0])
    caption = (
        "Terms of the theory against size: medians over tasks (drift, noise, curvature) or groups (the others). Tier: "
        f"measured (drift, dispersion), estimated (the others); seed {spec.seed}."
    )
    return Picture(figure, caption)


def laws_figure(curves: pd.DataFrame, spec: ScaleSpec) -> Picture:
    """Losses against k for the strongest base of each family, and the laws fitted to all but the largest k."""
    part, base = _of_strongest(curves, spec)
    if part.empty:
        raise ValueError("laws: no losses")
    networks = list(dict.fromkeys(part["architecture"]))
    chosen = networks if len(networks) <= 3 else [networks[0], networks[len(networks) // 2], networks[-1]]
    figure, axes = _panels(2 * len(chosen) if len(chosen) > 1 else 2, 2.6)
    place = 0
    for target, title in (("joint", "loss on all held-in tasks"), ("own", "loss on the merged tasks")):
        for network in chosen:
            ax = axes[place]
            place += 1
            own = part[(part["architecture"] == network) & (part["target"] == target)].sort_values("k")
            k, y = own["k"].to_numpy(dtype=float), own["loss"].to_numpy(dtype=float)
            ax.plot(k[:-1], y[:-1], "o", color=INK, markersize=4, label="fitted")
            ax.plot(k[-1:], y[-1:], "o", color=INK, markerfacecolor="white", markersize=5, label="held out")
            at = np.linspace(1.0, k.max(), 50)
            for number, (name, law) in enumerate(LAWS.items()):
                if name == "constant" or len(k) < 4:
                    continue
                ax.plot(at, law(k[:-1], y[:-1], spec.seed)(at), color=SERIES[number][0], linestyle=STYLES[number],
                        linewidth=1.3, label=name)  # fmt: skip
            ax.set_xlabel("experts k", fontsize=8)
            ax.set_ylabel(title, fontsize=8)
            ax.set_title(network, fontsize=9, color=INK)
    axes[0].legend(fontsize=6.5, frameon=False)
    caption = (
        f"Mean loss of averages of k experts ({base}) and laws fitted without the largest k. Measured "
        f"dots, calibrated lines; seed {spec.seed}."
    )
    return Picture(figure, caption)
