"""The page of advice on existing experts, its figures and its words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.advise.numbers import between
from experiments.page import Page, Section, write_page

if TYPE_CHECKING:
    from experiments import plots
    from experiments.advise.merge_advice import MergeAdvice

CANDIDATES = {
    "label": "Name",
    "origin": "chosen as",
    "coefficients": "coefficients",
    "predicted": "predicted",
    "low": "low",
    "high": "high",
    "measured": "measured",
    "measured_error": "standard error",
    "measured_accuracy": "accuracy",
    "flag": "flagged",
    "tier": "Tier",
}


def summary(advice: MergeAdvice) -> tuple[str, list[str]]:
    """The main sentence, and further ones."""
    shown = ", ".join(f"{n} {a:.3g}" for n, a in zip(advice.experts, advice.alpha, strict=True))
    first = f"Merge by {advice.label}: joint risk {advice.risk} nats, averaging {advice.average} nats."
    lines = [
        f"Coefficients: {shown}; {advice.domain.words}.",
        f"Experts in the merge: {len(advice.kept)} of {len(advice.experts)}"
        + (f"; left out: {', '.join(advice.left_out)}." if advice.left_out else "."),
        f"The experts alone: {advice.own} nats; the base: {advice.base} nats.",
        f"Predicted: {advice.predicted} nats ({advice.predicted.note}).",
    ]
    found = advice.account
    if found.why:
        lines.append(f"Theory: no bound ({found.why}).")
    else:
        word = "vacuous, so only its terms say something" if found.vacuous else "informative"
        lines.append(
            f"Theory: master bound {found.bound:.3g} nats (estimated; {word}); active term: {found.active}. Measured: "
            f"{found.measured_active} costs most."
        )
    for k, change in enumerate(advice.changes):
        gain = f"{change.gain:.3g} nats, {between(change.low, change.high)}, {change.tier}"
        gain = "not priced" if np.isnan(change.gain) else gain
        lines.append(f"{'First change' if k == 0 else 'Then'}: {change.what} ({gain}; {change.why}).")
    lines += [f"Not collected: {text}." for text in advice.skipped]
    lines += [f"Note: {text}." for text in advice.notes]
    lines.append(f"Cost: {advice.samples:,.0f} images through the network, {advice.seconds:.1f} s; seed {advice.seed}.")
    return first, lines


def merge_figure(advice: MergeAdvice) -> plots.Picture:
    """Predicted intervals of all candidates with the measured ones, lines at base and experts."""
    from matplotlib.figure import Figure

    from experiments.plots import Picture, pretty
    from experiments.plots.style import BLUE, FAINT, GREEN, GREY, RED

    table = advice.candidates.iloc[::-1].reset_index(drop=True)
    figure = Figure(figsize=(8.4, 0.34 * len(table) + 1.3), layout="constrained")
    ax = figure.add_subplot()
    y = np.arange(len(table))
    ax.hlines(y, table["low"], table["high"], color=BLUE, linewidth=1.6)
    ax.plot(table["predicted"], y, "o", color=BLUE, markersize=4, label="predicted (interval: predictors and images)")
    real = table["measured"].notna().to_numpy()
    if real.any():
        ax.plot(table["measured"][real], y[real], "D", color=RED, markersize=5, label="measured on the judging images")
    ax.axvline(advice.base.value, color=GREY, linestyle="--", linewidth=1.0, label="base")
    ax.axvline(advice.own.value, color=GREEN, linestyle=":", linewidth=1.2, label="experts alone")
    ax.set_yticks(y, [pretty(label) for label in table["label"]], fontsize=8)
    ax.set_xlabel("joint risk (nats)", fontsize=8)
    ax.set_xscale("log")
    ax.tick_params(labelsize=8)
    ax.grid(axis="x", color=FAINT, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False)
    caption = f"Every merge that was considered. Tiers: estimated (predicted), measured. Seed {advice.seed}."
    return Picture(figure, caption)


def merge_page(advice: MergeAdvice, meta: Mapping[str, Any] | None = None) -> Page:
    """The report of advice on existing experts."""
    first, lines = summary(advice)
    sections = [
        Section(
            "Merges that were considered",
            "Chosen on one half of the calibration images; predicted and measured on the other.",
            {"candidates": advice.candidates},
            {"candidates": CANDIDATES},
            {"candidates": merge_figure(advice)},
        ),
        Section(
            "How many experts, and which",
            "The best merge of k experts by a convex prediction, proven up to `gap`; all tasks keep counting, also "
            "those whose expert is left out.",
            {"subsets": advice.subsets},
        ),
        Section(
            "Experts",
            "Share in the dispersion of the recommended merge, and what averaging the others would change for their "
            "tasks (nats; negative is better).",
            {"experts": advice.account.per_expert},
        ),
        Section(
            "What to change",
            "By gain in joint risk, with 95 % intervals over images (paired where both merges saw the same ones).",
            {"changes": changes_table(advice)},
        ),
    ]
    return Page("How to merge these experts", first, tuple(lines), tuple(sections), (), dict(meta or {}))


def changes_table(advice: MergeAdvice) -> pd.DataFrame:
    """Changes as rows."""
    rows = [asdict(change) | {"seed": advice.seed} for change in advice.changes]
    return pd.DataFrame(rows, columns=["what", "gain", "low", "high", "tier", "why", "seed"])


def write_merge_advice(
    out: Path, advice: MergeAdvice, *, command: str = "", files: Sequence[str] = (), merge: str = ""
) -> Path:
    """Page, tables, figure and ``advice.json`` below ``out``; returns the page's path.

    Args:
        out: folder.
        advice: what to write.
        command: that made it.
        files: names of base and experts, for the page.
        merge: command that makes the merge.
    """
    from experiments.atomic import write_atomically
    from experiments.demo import versions

    settings = {"experts": "; ".join(files or advice.experts), "judge": advice.judge, "domain": advice.domain.words}
    if merge:
        settings["merge"] = merge
    meta = {"command": command, "seed": advice.seed, "versions": versions(), "settings": settings}
    write_atomically(out / "advice.json", (json.dumps(plain(advice, merge), indent=2) + "\n").encode())
    return write_page(out, merge_page(advice, meta))


def plain(advice: MergeAdvice, merge: str = "") -> dict[str, Any]:
    """The advice as JSON data (without seconds, which differ from run to run)."""
    content = asdict(advice)
    del content["seconds"]
    found: dict[str, Any] = clean(content)
    return found | ({"merge": merge} if merge else {})


def clean(value: Any) -> Any:
    """JSON data: tables become rows, numbers that are not finite become null."""
    if isinstance(value, pd.DataFrame):
        return [clean(row) for row in value.to_dict("records")]
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [clean(v) for v in value]
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
