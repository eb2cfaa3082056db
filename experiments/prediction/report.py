"""Writing a study: tables as CSV, figures as PNG, and a page that says what came out."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.atomic import write_atomically
from experiments.plots import png_bytes
from experiments.prediction.figures import study_figures
from experiments.prediction.judged import COLLAPSED, USABLE
from experiments.prediction.runner import Frames
from experiments.prediction.spec import StudySpec, label
from experiments.prediction.tables import CHOSEN, Tables, compute_tables
from experiments.validation import Settings, format_number

PAGE = "README.md"
_HULL = (
    "Entries that end in `_hull` keep coefficients nonnegative with sum at most one (`_layers_hull`: in every block of "
    "layers). They were added after the results of the others had been looked at, `_layers_hull` last of all; their "
    "images, blocks and objectives are those of the entries without the hull."
)
_TRIVIAL = ("expert_risk", "base_risk", "logit_mean", "V", "task_vector_norm", "cosine")


def write_study(
    spec: StudySpec, frames: Frames, out: Path, *, resamples: int = 300, finished: tuple[int, int] | None = None
) -> Tables:
    """Compute all tables and write them under ``out``: ``merges.csv`` (one row per merge), ``comparison.csv``,
    ``table_*.csv``, figures and ``README.md``.

    Args:
        spec: the study.
        frames: its rows, as many as are finished.
        out: folder.
        resamples: of experts, behind intervals.
        finished: groups done and in all, for the page.
    """
    settings = Settings(resamples=resamples, seed=spec.seed)
    tables = compute_tables(frames, settings)
    for entry in fields(tables):
        frame: pd.DataFrame = getattr(tables, entry.name)
        if len(frame):
            name = "merges.csv" if entry.name == "merges" else f"table_{entry.name}.csv"
            write_atomically(out / name, _csv(frame))
    if len(frames.comparison):
        write_atomically(out / "comparison.csv", _csv(frames.comparison))
    pictures = study_figures(tables)
    for name, picture in pictures.items():
        write_atomically(out / f"{name}.png", png_bytes(picture.figure, 110))
    captions = {name: picture.caption for name, picture in pictures.items()}
    write_atomically(out / PAGE, page(spec, frames, tables, captions, finished).encode())
    return tables


def _csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False, float_format="%.6g").encode()


def page(
    spec: StudySpec, frames: Frames, tables: Tables, captions: dict[str, str], finished: tuple[int, int] | None
) -> str:
    """The page in Markdown."""
    merges = tables.merges
    usable = int((merges["state"] == USABLE).sum())
    parts = [
        f"# Predicted against measured merges: {spec.name}",
        _what(spec, frames, merges, usable, finished),
        "## The ambitions, line by line",
        "Judged is the predictor that was best on the *other* half of the experts (`table_choices.csv` names it), on "
        "both regimes together. No predictor counts where it has evaluated the very merge that it predicts; the chosen "
        "ones evaluate averages of *pairs* of the group's experts (on calibration images), so the last block judges "
        "the best predictor and the best certificate that pass at single experts and the base only. A certificate is "
        "chosen in the same way, and judged on every merge: where the chosen one is not given, the best of those that "
        "are given everywhere stands in (`chosen_cert_best_else`). An interval is worth no more than its width. Usable "
        "and collapsed are told apart on all test images; flags are fitted and judged on halves of them, which makes a "
        "few merges change sides.",
        markdown(tables.aims, ["taken", "architecture", "aim", "value", "target", "met", "merges"]),
        "## Every predictor",
        "Predicted over measured test loss: median with 5 and 95 % quantiles; share of merges within 15 %; for "
        "collapsed merges the median factor. Both regimes; by regime, N and method, with rank correlations and their "
        "intervals (experts resampled), in `table_predictors.csv` and `table_states.csv`.",
        _states(tables.states),
        "## Ranks, beside trivial predictors",
        "Spearman correlation with the measured joint risk and with the merging cost, 95 % intervals from resampling "
        "experts.",
        _ranks(tables.predictors),
        "## Certificates",
        _certificates(tables.predictors),
    ]
    if len(tables.intervals):
        parts += [
            "## Prediction intervals and flags",
            markdown(
                tables.intervals,
                [
                    "regime",
                    "architecture",
                    "prediction",
                    "covered",
                    "covered_by_group",
                    "covered_se",
                    "width",
                    "unbounded",
                ],
            ),
            "A flag is fitted to miss a tenth of collapsed merges at most; `missed` and `alarms` count merges of "
            "the other half, `_either` with every merge flagged too that clamps a running variance of BatchNorm. "
            "`gap`: the bracket's width; `over_base`: its upper end over the base's risk; `lost`: the share of the "
            "experts' accuracy that the predicted logits lose (added after the others' results had been looked at).",
            markdown(
                tables.flags,
                [
                    "regime",
                    "architecture",
                    "score",
                    "merges",
                    "collapsed",
                    "missed",
                    "alarms",
                    "missed_either",
                    "alarms_either",
                ],
            ),
        ]
    if len(tables.accuracies):
        parts += [
            "## Predicted accuracies",
            "From the same predicted logits: mean absolute error and mean difference on test images, rank correlation, "
            'and how often "more than half of the experts\' accuracy is lost" tells collapsed from usable merges. '
            "Added after the first results had been looked at.",
            markdown(
                tables.accuracies,
                ["architecture", "state", "predictor", "merges", "error", "off", "spearman", "told"],
            ),
        ]
    if len(tables.prices):
        parts += [
            "## Price",
            "Processor seconds on the same images: to collect for one group, to price one coefficient vector, to "
            "evaluate one merge; `break_even` is the number of coefficient vectors from which on predicting pays.",
            markdown(
                tables.prices,
                ["architecture", "N", "predictor", "seconds_collect", "seconds_price", "seconds_measure", "break_even"],
            ),
        ]
    if len(tables.images):
        shown = tables.images[tables.images["predictor"].isin(["secant", "secant_tangent", "pairs"])]
        parts += [
            "## How many calibration images",
            markdown(shown, ["architecture", "predictor", "images", "images_used", "error", "distance", "spread"]),
        ]
    if len(tables.methods):
        parts += ["## `risk_optimal` against other methods"]
        if tables.methods["method"].str.endswith("_hull").any():
            parts.append(_HULL)
        parts += [winners(tables), _methods(tables.methods)]
    if len(tables.reestimated):
        parts += [
            "## BatchNorm statistics re-estimated",
            "The same merges with running statistics of the calibration images: measured, not covered by predictions.",
            markdown(
                tables.reestimated,
                ["regime", "N", "measured_loss", "reestimated_loss", "measured_accuracy", "reestimated_accuracy"],
            ),
        ]
    if len(tables.clamped):
        parts += [
            "## Running variances clamped at zero",
            "Where coefficients sum to more than one, x_0 + Σ αᵢ Δᵢ can make running variances of BatchNorm negative; "
            "merging clamps them at zero, and the network breaks. Checkpoints show it before any pass; the table was "
            "added after the results had been looked at.",
            markdown(
                tables.clamped,
                ["architecture", "method", "N", "clamped", "merges", "share", "usable", "measured_loss", "ratio_q50"],
            ),
        ]
    parts.append("## Figures")
    parts += [f"![{name}]({name}.png)\n\n{caption}" for name, caption in captions.items()]
    return "\n\n".join(parts) + "\n"


def _what(spec: StudySpec, frames: Frames, merges: pd.DataFrame, usable: int, finished: tuple[int, int] | None) -> str:
    grids = ", ".join(f"`{grid}` ({regime})" for regime, grid in spec.regimes.items())
    methods = ", ".join(f"`{label(method)}`" for method in spec.methods)
    lines = [
        f"Experts of the grids {grids}; {len(merges)} merges of {merges['group'].nunique()} groups "
        f"(N = {', '.join(map(str, spec.groups))}), each within one half of the experts; methods {methods}. "
        f"{spec.calibration_images} calibration images per task from its validation part, {spec.test_images} test "
        f"images from its test part; seed {spec.seed}; specification {spec.digest()}. {usable} merges are usable "
        f"(accuracy above half the experts'), {len(merges) - usable} collapsed. Tier of predictions: estimated; of "
        "what is fitted on the other half: calibrated; of losses: measured."
    ]
    if finished is not None and finished[0] < finished[1]:
        lines.append(f"**Not finished: {finished[0]} of {finished[1]} groups of all stages.**")
    if frames.left_out:
        lines.append(f"Diverged and left out: {', '.join(frames.left_out)}.")
    return " ".join(lines)


def _states(states: pd.DataFrame) -> str:
    pooled = states[states["regime"] == "all"]
    columns = [
        "architecture",
        "state",
        "predictor",
        "merges",
        "ratio_q50",
        "ratio_q05",
        "ratio_q95",
        "within_15",
        "factor",
    ]
    return markdown(pooled.sort_values(["architecture", "state"], ascending=[True, False], kind="stable"), columns)


def _ranks(table: pd.DataFrame) -> str:
    whole = table[(table["N"] == "all") & (table["method"] == "all") & (table["state"] == "all")]
    kept = whole[whole["kind"].isin(["prediction", "trivial"])]
    kept = kept[(kept["kind"] == "prediction") | kept["predictor"].isin(_TRIVIAL)].copy()
    for target in ("risk", "cost"):
        kept[target] = [
            f"{_short(v)} ({_short(low)} to {_short(high)})"
            for v, low, high in zip(
                kept[f"spearman_{target}"], kept[f"spearman_{target}_low"], kept[f"spearman_{target}_high"], strict=True
            )
        ]
    return markdown(kept, ["regime", "architecture", "predictor", "tier", "merges", "risk", "cost"])


def _certificates(table: pd.DataFrame) -> str:
    whole = table[(table["N"] == "all") & (table["method"] == "all") & (table["state"] == "all")]
    kept = whole[whole["kind"] == "certificate"]
    columns = [
        "regime",
        "architecture",
        "predictor",
        "merges",
        "valid",
        "valid_low",
        "valid_high",
        "ratio_q50",
        "ratio_q95",
    ]
    return markdown(kept, columns)


def _methods(table: pd.DataFrame) -> str:
    kept = table[table["N"] != "all"]
    columns = [
        "regime", "architecture", "N", "method", "groups", "loss", "loss_low", "loss_high", "median_loss", "wins",
        "accuracy", "accuracy_low", "accuracy_high", "accuracy_difference", "accuracy_difference_low",
        "accuracy_difference_high",
    ]  # fmt: skip
    return markdown(kept, columns)


def winners(tables: Tables) -> str:
    """Who has the smallest mean test loss and who the largest accuracy, by regime, network and N."""
    lines = []
    methods = tables.methods[tables.methods["N"] != "all"]
    for (regime, architecture, size), part in methods.groupby(["regime", "architecture", "N"], sort=False):
        by_loss, by_accuracy = part.sort_values("loss"), part.sort_values("accuracy", ascending=False)
        one, two = by_loss.iloc[0], by_loss.iloc[min(1, len(part) - 1)]
        average = part[part["method"] == "average"].iloc[0]
        ours = by_loss[by_loss["method"].str.startswith("risk_optimal")].iloc[0]
        lines.append(
            f"* {regime}, {architecture}, N = {size} ({int(one['groups'])} groups): smallest mean loss "
            f"**{one['method']}** ({_short(one['loss'])}), then {two['method']} ({_short(two['loss'])}); best "
            f"of ours {ours['method']} ({_short(ours['loss'])}); averaging {_short(average['loss'])}. Largest accuracy "
            f"**{by_accuracy.iloc[0]['method']}** ({_short(by_accuracy.iloc[0]['accuracy'])}; averaging "
            f"{_short(average['accuracy'])})."
        )
    return "\n".join(lines)


def markdown(frame: pd.DataFrame, columns: list[str]) -> str:
    """A table in Markdown, numbers with three digits."""
    known = [name for name in columns if name in frame]
    if frame.empty or not known:
        return "(nothing yet)"
    head = "| " + " | ".join(known) + " |"
    line = "|" + "|".join("---" for _ in known) + "|"
    rows = ["| " + " | ".join(_cell(v) for v in row) + " |" for row in frame[known].itertuples(index=False)]
    return "\n".join([head, line, *rows])


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return str(value) if isinstance(value, str) else format_number(value)


def _short(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "–"


__all__ = ["CHOSEN", "COLLAPSED", "markdown", "page", "winners", "write_study"]
