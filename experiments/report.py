"""One self-contained HTML report of a study: summary, tables, figures, assumptions, how to reproduce.

The page needs no network: style is inline, figures are inline SVG.  Next to it the frames are written as CSV and the
figures as PNG and SVG.  Every file is written atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments import plots
from experiments import validation as v
from experiments.atomic import write_atomically
from experiments.page import (
    assumptions_table,
    document,
    escape,
    figure_html,
    html_table,
    reproduce,
    section,
    summary_box,
)


@dataclass(frozen=True)
class Tables:
    """What the report prints and the headline quotes; empty frames where the data do not allow a table."""

    validation: pd.DataFrame
    brackets: pd.DataFrame
    brackets_by_method: pd.DataFrame
    selection: pd.DataFrame
    aims: pd.DataFrame
    optimal: pd.DataFrame
    reestimated: pd.DataFrame


@dataclass(frozen=True)
class Drawn:
    """The figures by file name, and for those that could not be drawn the reason."""

    pictures: Mapping[str, plots.Picture]
    skipped: Mapping[str, str] = field(default_factory=dict)


def compute_tables(
    merges: pd.DataFrame, optimal: pd.DataFrame | None = None, settings: v.Settings | None = None
) -> Tables:
    """All tables of the report from the result frames."""
    settings = settings or v.Settings()
    has_bracket = {"pred_secant", "pred_tangent_base"} <= set(merges.columns)
    brackets = v.bracket_table(merges, settings) if has_bracket else pd.DataFrame()
    if has_bracket and merges["regime"].nunique() > 1:
        pooled = v.bracket_table(merges, settings, by=("architecture",)).assign(regime="all")
        brackets = pd.concat([brackets, pooled], ignore_index=True)
    selection = v.selection_table(merges, settings)
    best = pd.DataFrame()
    if optimal is not None and len(optimal):
        best = v.optimal_table(optimal, merges, settings)
    by_method = pd.DataFrame()
    if has_bracket and "method" in merges:
        by_method = v.bracket_table(merges, settings, by=("regime", "architecture", "method"))
    if has_bracket and "half" in merges:
        merges = merges.assign(pred_calibrated=v.cross_calibrated(merges))
    return Tables(
        v.validation_table(merges, settings),
        brackets,
        by_method,
        selection,
        v.aims_table(selection, brackets),
        best,
        reestimated_table(merges),
    )


def reestimated_table(merges: pd.DataFrame) -> pd.DataFrame:
    """Merges whose BatchNorm statistics were re-estimated on the group's calibration images, by method: measured only,
    and not covered by predictions or bounds.  Empty for networks without BatchNorm."""
    if "reestimated_loss" not in merges or merges["reestimated_loss"].isna().all():
        return pd.DataFrame()
    part = merges[merges["reestimated_loss"].notna()]
    columns = ["measured_loss", "reestimated_loss", "measured_accuracy", "reestimated_accuracy"]
    means = part.groupby(["regime", "architecture", "method"], sort=False)[columns].mean().reset_index()
    return means.assign(tier="measured", verdict="not covered")


def _several(values: Sequence[float], digits: int = 2, percent: bool = False) -> str:
    """One number, or a range from the smallest to the largest."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "unknown"

    def show(value: float) -> str:
        return f"{100 * value:.0f} %" if percent else f"{value:.{digits}f}"

    low, high = show(min(known)), show(max(known))
    return low if low == high else f"{low} to {high}"


def headline(merges: pd.DataFrame, tables: Tables) -> list[str]:
    """Plain sentences that say what was predicted and how well, from the tables alone; the first is the summary."""
    cells = merges[list(v.CELL)].drop_duplicates()
    architectures, regimes = cells["architecture"].nunique(), cells["regime"].nunique()
    found = [
        f"The joint test risk of {len(merges)} merged models ({architectures} architecture"
        f"{'s' if architectures > 1 else ''}, {regimes} regime{'s' if regimes > 1 else ''}) was predicted without "
        "evaluating a merge and without test data."
    ]
    chosen = tables.selection
    for regime in dict.fromkeys(cells["regime"]):
        sentences = []
        for tier in ("estimated", "calibrated"):
            part = chosen[(chosen["regime"] == regime) & (chosen["tier"] == tier)] if len(chosen) else chosen
            if not len(part):
                continue
            error = _several(list(part["median_error"]), percent=True)
            risk, cost = _several(list(part["spearman_risk"])), _several(list(part["spearman_cost"]))
            if tier == "estimated":
                names = ", ".join(dict.fromkeys(plots.pretty(name) for name in part["chosen"]))
                worst = part.iloc[int(part["spearman_risk"].fillna(np.inf).argmin())]
                limits = f"lowest {worst['spearman_risk']:.2f} [{worst['spearman_risk_low']:.2f}, "
                limits += f"{worst['spearman_risk_high']:.2f}]"
                if "same_images_error" in part:
                    same = _several(list(part["same_images_error"]), percent=True)
                    error += f" (against merges measured on the calibration images themselves: {same})"
                sentences.append(
                    f"the prediction chosen on the other half of the experts ({names}) is off by "
                    f"{error} in the median; Spearman {risk} for the joint risk ({limits}) and "
                    f"{cost} for the merging cost"
                )
            else:
                sentences.append(f"a combination fitted on the other half is off by {error} (tier calibrated)")
        part = tables.brackets[tables.brackets["regime"] == regime] if len(tables.brackets) else tables.brackets
        if len(part):
            share = _several(list(part["inside"]), percent=True)
            text = f"the bracket from secant to tangent holds the measurement in {share} of merges"
            if np.isfinite(part["auc"]).any():
                text += f", and its width tells collapse with AUC {_several(list(part['auc']))}"
            sentences.append(text)
        if sentences:
            found.append(f"Regime {regime}: " + "; ".join(sentences) + ".")
    pooled = tables.brackets[tables.brackets["regime"] == "all"] if len(tables.brackets) else tables.brackets
    if len(pooled):
        found.append(
            f"Over all regimes the bracket holds the measurement in {_several(list(pooled['inside']), percent=True)} "
            "of merges, and in "
            f"{_several(list(pooled['inside_sampling']), percent=True)} when widened by twice its own "
            f"standard error; its width tells merges worse than the base with AUC {_several(list(pooled['auc']))}, "
            f"merges below half the experts' accuracy with AUC {_several(list(pooled['auc_halved']))}."
        )
    found += _bound_sentence(tables.validation) + _optimal_sentence(tables.optimal)
    if len(tables.aims):
        stated = tables.aims[tables.aims["kind"] == "stated"]
        met = int(stated["met"].sum())
        missed = stated[~stated["met"].astype(bool)]
        text = f"{met} of {len(stated)} stated aims are met"
        if len(missed):
            listed = [
                f"{row['aim']} ({plots.pretty(row['architecture'])}, {row['regime']}: {row['value']:.2f}, aim "
                f"{row['target']})"
                for row in missed.to_dict("records")
            ]
            text += "; not met: " + "; ".join(listed)
        found.append(text + ".")
    return found


def _bound_sentence(validation: pd.DataFrame) -> list[str]:
    if not len(validation) or "valid" not in validation:
        return []
    out = []
    for name, words in (("master_checkpoints", "from the checkpoints"), ("master_logs", "from the training logs")):
        part = validation[(validation["kind"] == "bound") & (validation["predictor"] == name)]
        if not len(part):
            continue
        text = f"The master bound {words} (constants measured on the networks, so not certified) lies above "
        text += "the measurement "
        text += f"in {_several(list(part['valid']), percent=True)} of merges"
        if "vacuous" in part and part["vacuous"].notna().any():
            text += f" and is vacuous in {_several(list(part['vacuous']), percent=True)}"
        out.append(text + ".")
    return out


def _optimal_sentence(optimal: pd.DataFrame) -> list[str]:
    if not len(optimal) or "difference" not in optimal:
        return []
    part = optimal[(optimal["N"] == "all") & optimal["method"].astype(str).str.startswith("risk_optimal")]
    found = []
    for method in dict.fromkeys(part["method"]):
        rows = part[part["method"] == method].to_dict("records")
        better = sum(row["difference_high"] < 0 for row in rows)
        worse = sum(row["difference_low"] > 0 for row in rows)
        name = plots.pretty(method).removeprefix("risk optimal: ")
        found.append(
            f"{name} {better} better, {worse} worse of {len(rows)} "
            f"(mean differences {_several([row['difference'] for row in rows])})"
        )
    if not found:
        return []
    return [
        "Coefficients that minimise a prediction (risk optimal) against averaging, test loss paired over groups, "
        f"number of settings decided by the 95 % interval: {'; '.join(found)}."
    ]


def draw_all(
    merges: pd.DataFrame,
    experts: pd.DataFrame | None,
    coefficients: pd.DataFrame | None,
    lines: pd.DataFrame | None,
    optimal: pd.DataFrame | None,
    prediction: str = "secant_tangent",
    seed: object = None,
    settings: v.Settings | None = None,
) -> Drawn:
    """Every figure that the frames allow; the others are listed with the reason.

    ``settings``: those of the tables, so that figures show the same intervals.
    """
    none = pd.DataFrame()
    compared = none if optimal is None else optimal
    jobs: dict[str, Callable[[], plots.Picture]] = {
        "predicted_against_measured": lambda: plots.predicted_against_measured(merges, prediction),
        "predicted_against_measured_by_n": lambda: plots.predicted_against_measured(merges, prediction, colour="N"),
        "bracket_and_collapse": lambda: plots.bracket_and_collapse(merges),
        "method_comparison": lambda: plots.method_comparison(compared, merges, settings=settings, seed=seed),
        "coefficient_sweep": lambda: plots.coefficient_sweep(none if coefficients is None else coefficients, seed),
        "loss_along_line": lambda: plots.loss_along_line(none if lines is None else lines, seed),
    }
    for name in dict.fromkeys(merges["architecture"]):
        jobs[f"risk_against_hyperparameters_{name}"] = lambda name=name: plots.risk_against_hyperparameters(  # type: ignore[misc]
            merges, none if experts is None else experts, name, prediction=prediction, settings=settings
        )
    jobs["bound_terms"] = lambda: plots.bound_terms(merges)
    pictures, skipped = {}, {}
    for name, job in jobs.items():
        try:
            pictures[name] = job()
        except ValueError as reason:
            skipped[name] = str(reason)
    return Drawn(pictures, skipped)


def default_prediction(merges: pd.DataFrame) -> str:
    """The prediction that the figures show: the average of secant and tangent, else the first one present."""
    names = [p.name for p in v.predictors(merges) if p.kind == "prediction"]
    return next((name for name in ("secant_tangent", *v.FUNCTION_SPACE, *names) if name in names), "secant_tangent")


# ---------------------------------------------------------------------------------------------- HTML


_CELL: dict[str, str] = {"regime": "Regime", "architecture": "Architecture"}
_AIMS: dict[str, str] = _CELL | {"aim": "Aim", "value": "Reached", "target": "Target", "met": "Met", "kind": "Kind"}
_SELECTION: dict[str, str] = _CELL | {
    "judged_half": "Judged on half",
    "tier": "Tier",
    "chosen": "Chosen or fitted on the other half",
    "merges": "Merges",
    "ratio_q05": "Pred/meas 5 %",
    "ratio_q50": "50 %",
    "ratio_q95": "95 %",
    "median_error": "Median error",
    "same_images_error": "on the same images",
    "spearman_risk": "Spearman risk",
    "spearman_risk_within": "within N",
    "spearman_cost": "Spearman cost",
    "spearman_cost_within": "cost within N",
}
_BRACKETS: dict[str, str] = _CELL | {
    "merges": "Merges",
    "inside": "Inside",
    "inside_sampling": "Inside, ± 2 s.e. of the bracket",
    "inside_tolerance": "Inside, ± 2 s.e. of the measurement",
    "inside_same_images": "Inside, same images",
    "below": "Below",
    "above": "Above",
    "width": "Median width",
    "collapsed": "Worse than base",
    "auc": "AUC of the width",
    "auc_base": "AUC of upper/base",
    "halved": "Below half the experts' accuracy",
    "auc_halved": "AUC of the width for that",
}
_BY_METHOD: dict[str, str] = _CELL | {
    "method": "Method",
    "merges": "Merges",
    "inside": "Inside",
    "inside_sampling": "Inside, ± 2 s.e. of the bracket",
    "inside_same_images": "Inside, same images",
    "below": "Below",
    "above": "Above",
    "width": "Median width",
}
_RANKS: dict[str, str] = _CELL | {
    "predictor": "Predictor",
    "kind": "Kind",
    "tier": "Tier",
    "spearman_risk": "Spearman risk",
    "spearman_risk_within": "Spearman risk within N",
    "kendall_risk": "Kendall risk",
    "kendall_risk_within": "Kendall risk within N",
    "spearman_cost": "Spearman cost",
    "spearman_cost_within": "Spearman cost within N",
    "kendall_cost": "Kendall cost",
    "kendall_cost_within": "Kendall cost within N",
}
_ERRORS: dict[str, str] = _CELL | {
    "predictor": "Predictor",
    "kind": "Kind",
    "tier": "Tier",
    "merges": "Merges",
    "ratio_q05": "Pred/meas 5 %",
    "ratio_q50": "50 %",
    "ratio_q95": "95 %",
    "median_error": "Median error",
    "valid": "Measured ≤ value",
    "vacuous": "Vacuous",
    "seconds": "Seconds per merge",
    "relative_cost": "Time / evaluating",
}
_OPTIMAL: dict[str, str] = _CELL | {
    "N": "N",
    "method": "Method",
    "groups": "Groups",
    "loss": "Mean test loss",
    "accuracy": "Accuracy",
    "difference": "Loss − averaging (paired)",
    "wins": "Better in",
}


def render_html(
    merges: pd.DataFrame,
    tables: Tables,
    drawn: Drawn,
    meta: Mapping[str, Any],
    svgs: Mapping[str, bytes] | None = None,
) -> str:
    """The report as one HTML string.

    ``meta`` may hold: title, command, seed, versions (mapping), hashes (mapping), settings (mapping), assumptions
    (sequence of (assumption, verdict, why)), notes (sequence of sentences).  ``svgs``: figures already rendered.
    """
    ready = svgs or {}
    lead, *rest = headline(merges, tables)
    title = str(meta.get("title", "Predicted and measured risk of merged models"))
    rank_note = (
        "Joint risk: measured test loss of the merge, mean over its tasks. Merging cost: that minus "
        "the experts' own loss. "
        "“Within N” pools the rank correlations inside each number of experts, weighted by the "
        "number of merges. Intervals "
        "(95 %) resample experts, because merges share them; they lean to the wide side. Trivial "
        "predictors keep their sign."
    )
    sections = [
        summary_box(title, lead, [*rest, *(str(note) for note in meta.get("notes", ()))]),
        section(
            "Aims",
            html_table(tables.aims, _AIMS) if len(tables.aims) else "",
            "Stated: the aims of the project. Also: what a reader would ask next, held against the same target.",
        ),
        section(
            "Chosen on one half of the experts, judged on the other",
            html_table(tables.selection, _SELECTION) if len(tables.selection) else "",
            "Choices and fits see one half's merges on the calibration images, judgements the other half's on the test "
            "images. Estimated: the best function-space prediction on the fit half. Calibrated: log "
            "prediction = (1 − w) log secant + "
            "w log tangent, w fitted on the fit half and kept in [0, 1], gap = log(tangent/secant).",
        ),
        section(
            "The bracket from secant to tangent",
            html_table(tables.brackets, _BRACKETS) if len(tables.brackets) else "",
            "Inside: secant ≤ measured ≤ tangent, or the reverse order. The width is max/min of the two. Same images: "
            "merges measured on the calibration images themselves, so that only the error of linearisation is left. "
            "Worse than base: measured loss above the base's under the experts' final heads.",
        ),
        section(
            "The bracket by merging method",
            html_table(tables.brackets_by_method, _BY_METHOD) if len(tables.brackets_by_method) else "",
            "TIES leaves the span of the experts, where the secant knows nothing.",
        ),
        section(
            "Figures", "".join(figure_html(name, picture, ready.get(name)) for name, picture in drawn.pictures.items())
        ),
        section(
            "Merging methods on held-out test sets", html_table(tables.optimal, _OPTIMAL) if len(tables.optimal) else ""
        ),
        section(
            "BatchNorm statistics re-estimated on the calibration images",
            html_table(tables.reestimated) if len(tables.reestimated) else "",
            "Measured only: predictions and bounds cover the merged statistics, not re-estimated ones (verdict: not "
            "covered).",
        ),
        section(
            "All predictors: ranks", html_table(tables.validation, _RANKS) if len(tables.validation) else "", rank_note
        ),
        section(
            "All predictors: errors, validity, time",
            html_table(tables.validation, _ERRORS) if len(tables.validation) else "",
            "A certificate or bound is meant to lie above the measurement. On networks its constants "
            "are measured, so its tier "
            "is estimated and violations are possible.",
        ),
        section("Assumptions", assumptions_table(list(meta.get("assumptions", ())))),
        section("How to reproduce", reproduce(meta)),
    ]
    if drawn.skipped:
        reasons = "".join(f"<li>{escape(f'{name}: {why}')}</li>" for name, why in drawn.skipped.items())
        sections.append(section("Not drawn", f"<ul>{reasons}</ul>"))
    return document(title, sections)


# ---------------------------------------------------------------------------------------------- files


def write_report(
    out_dir: Path | str,
    merges: pd.DataFrame,
    experts: pd.DataFrame | None = None,
    coefficients: pd.DataFrame | None = None,
    lines: pd.DataFrame | None = None,
    optimal: pd.DataFrame | None = None,
    meta: Mapping[str, Any] | None = None,
    settings: v.Settings | None = None,
    tables: Tables | None = None,
) -> Path:
    """Write report.html, results.csv, the other frames and tables as CSV, figures/*.png and figures/*.svg; return the
    page.

    ``meta`` is described at :func:`render_html`.  ``tables`` may be passed if already computed.  Empty or absent
    frames are skipped, and what could not be drawn is listed at the end of the page.  Raises ValueError if ``merges``
    is empty or lacks regime, architecture, experts or measured_loss.
    """
    missing = [name for name in (*v.CELL, "experts", "measured_loss") if name not in merges]
    if missing or merges.empty:
        raise ValueError(
            f"results.csv: column {missing[0]} is missing; run the study again"
            if missing
            else "results.csv has no rows"
        )
    out, meta = Path(out_dir), dict(meta or {})
    tables = tables or compute_tables(merges, optimal, settings)
    prediction = default_prediction(merges)
    drawn = draw_all(merges, experts, coefficients, lines, optimal, prediction, meta.get("seed"), settings)
    frames = {
        "results": merges,
        "experts": experts,
        "coefficients": coefficients,
        "lines": lines,
        "optimal": optimal,
        "table_validation": tables.validation,
        "table_bracket": tables.brackets,
        "table_bracket_by_method": tables.brackets_by_method,
        "table_selection": tables.selection,
        "table_aims": tables.aims,
        "table_optimal": tables.optimal,
        "table_reestimated": tables.reestimated,
    }
    for name, frame in frames.items():
        if frame is not None and len(frame):
            if name.startswith("table_") and meta.get("seed") is not None:
                frame = frame.assign(seed=meta["seed"])
            write_atomically(out / f"{name}.csv", frame.to_csv(index=False).encode())
    svgs = {name: plots.svg_bytes(picture.figure) for name, picture in drawn.pictures.items()}
    for name, picture in drawn.pictures.items():
        write_atomically(out / "figures" / f"{name}.png", plots.png_bytes(picture.figure))
        write_atomically(out / "figures" / f"{name}.svg", svgs[name])
    return write_atomically(out / "report.html", render_html(merges, tables, drawn, meta, svgs).encode())
