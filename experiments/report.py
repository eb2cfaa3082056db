"""One self-contained HTML report of a study: summary, tables, figures, assumptions, how to reproduce.

The page needs no network: style is inline, figures are inline SVG.  Next to it the frames are written as CSV and the
figures as PNG and SVG.  Every file is written atomically.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments import plots
from experiments import validation as v
from experiments.atomic import write_atomically

Columns = Mapping[str, str]


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

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #5d5d63; --paper: #ffffff; --line: #d8d8dc; --tint: #f4f4f6;
  --accent: #0072B2; --bad: #b34700; --good: #00704f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a5a5ad; --paper: #17181b; --line: #3a3b40;
  --tint: #222328; --accent: #6db9ec; --bad: #ff9b57; --good: #4fd0a5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 74rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; } p { max-width: 52rem; } a { color: var(--accent); }
.summary { background: var(--tint); border-left: 4px solid var(--accent); padding: .9rem 1.2rem; border-radius: 4px; }
.summary li { margin: .35rem 0; max-width: 62rem; } .lead { font-size: 1.1rem; margin: .2rem 0 .6rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; } td.free { white-space: normal; min-width: 14rem; }
tr.new td { border-top: 2px solid var(--line); } .ci { color: var(--soft); font-size: .88em; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
figure { margin: 1.6rem 0 2.2rem; } .paper { background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem; } figure svg { display: block; width: 100%; height: auto; max-height: 120vh; }
figcaption, .note { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 58rem; }
code, pre { font: .88em ui-monospace, Menlo, Consolas, monospace; } pre { background: var(--tint); padding: .8rem 1rem;
  border-radius: 4px; overflow-x: auto; } details summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } figure, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .wide { overflow: visible; } table { font-size: 6.5pt; } th, td { padding: 1pt 3pt; } }
"""

_WORDS = frozenset(
    [
        "Regime",
        "Architecture",
        "Predictor",
        "Kind",
        "Tier",
        "Method",
        "Aim",
        "Target",
        "Assumption",
        "Verdict",
        "Why",
        "Judged on half",
        "Met",
        "File",
        "Version",
        "Chosen or fitted on the other half",
        "Package",
        "SHA-256",
        "Name",
        "Value",
    ]
)


def _escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _td(name: str, text: str) -> str:
    classes = ["text"] if name in _WORDS else []
    if name in ("Why", "Assumption", "Aim"):
        classes.append("free")
    body = _escape(text)
    body = re.sub(r" (\[[^\]]*\])$", r' <span class="ci">\1</span>', body)
    good, bad = ("yes", "holds", "met"), ("no", "violated", "not met")
    if name in ("Met", "Verdict"):
        first = text.lower().strip()
        classes += ["yes"] if first in good else ["no"] if first in bad else []
    return f'<td class="{" ".join(classes)}">{body}</td>' if classes else f"<td>{body}</td>"


def html_table(table: pd.DataFrame, columns: Columns | None = None, digits: int = 3) -> str:
    """An HTML table of ``table`` through :func:`experiments.validation.readable`; a rule separates the settings."""
    shown = table.copy()
    for name in ("architecture", "predictor", "method", "chosen"):
        if name in shown:
            shown[name] = [plots.pretty(value) for value in shown[name]]
    text = v.readable(shown, columns, digits)
    text = text.loc[:, [name for name in text.columns if name in _WORDS or not (text[name] == "–").all()]]
    head = "".join(f'<th class="{"text" if name in _WORDS else "num"}">{_escape(name)}</th>' for name in text.columns)
    body, previous = [], None
    marks = [name for name in ("Regime", "Architecture", "N") if name in text.columns]
    for values in text.to_dict("records"):
        mark = tuple(values[name] for name in marks)
        row = "".join(_td(str(name), str(value)) for name, value in values.items())
        body.append(f'<tr class="{"new" if marks and mark != previous else "same"}">{row}</tr>')
        previous = mark
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def inline_svg(svg: bytes, prefix: str) -> str:
    """An SVG document as an element for HTML.

    No prologue, metadata or namespaces, identifiers made unique by ``prefix``.
    """
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r"^<svg ", '<svg role="img" ', text)
    return re.sub(r"\n\s*", "\n", text).strip()


def _section(title: str, body: str, note: str = "") -> str:
    if not body:
        return ""
    about = f'<p class="note">{_escape(note)}</p>' if note else ""
    return f"<h2>{_escape(title)}</h2>{about}{body}"


def _assumptions(items: Sequence[Sequence[object]]) -> str:
    if not items:
        return ""
    frame = pd.DataFrame([[str(part) for part in item[:3]] for item in items], columns=["Assumption", "Verdict", "Why"])
    return html_table(frame)


def _reproduce(meta: Mapping[str, Any]) -> str:
    parts = []
    if meta.get("command"):
        parts.append(f"<pre>{_escape(meta['command'])}</pre>")
    if meta.get("seed") is not None:
        parts.append(f"<p>Seed {_escape(meta['seed'])}. The same seed and versions give the same numbers.</p>")
    for key, title, columns in (
        ("versions", "Versions", ("Package", "Version")),
        ("hashes", "Hashes", ("File", "SHA-256")),
        ("settings", "Settings", ("Name", "Value")),
    ):
        values = meta.get(key)
        if values:
            frame = pd.DataFrame([[str(a), str(b)] for a, b in dict(values).items()], columns=list(columns))
            parts.append(f"<h3>{title}</h3>{html_table(frame)}")
    return "".join(parts)


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
    items = "".join(f"<li>{_escape(line)}</li>" for line in [*rest, *(str(note) for note in meta.get("notes", ()))])
    rank_note = (
        "Joint risk: measured test loss of the merge, mean over its tasks. Merging cost: that minus "
        "the experts' own loss. "
        "“Within N” pools the rank correlations inside each number of experts, weighted by the "
        "number of merges. Intervals "
        "(95 %) resample experts, because merges share them; they lean to the wide side. Trivial "
        "predictors keep their sign."
    )
    sections = [
        f'<h1>{_escape(title)}</h1><div class="summary"><p class="lead">{_escape(lead)}</p><ul>{items}</ul></div>',
        _section(
            "Aims",
            html_table(tables.aims, _AIMS) if len(tables.aims) else "",
            "Stated: the aims of the project. Also: what a reader would ask next, held against the same target.",
        ),
        _section(
            "Chosen on one half of the experts, judged on the other",
            html_table(tables.selection, _SELECTION) if len(tables.selection) else "",
            "Choices and fits see one half's merges on the calibration images, judgements the other half's on the test "
            "images. Estimated: the best function-space prediction on the fit half. Calibrated: log "
            "prediction = (1 − w) log secant + "
            "w log tangent, w fitted on the fit half and kept in [0, 1], gap = log(tangent/secant).",
        ),
        _section(
            "The bracket from secant to tangent",
            html_table(tables.brackets, _BRACKETS) if len(tables.brackets) else "",
            "Inside: secant ≤ measured ≤ tangent, or the reverse order. The width is max/min of the two. Same images: "
            "merges measured on the calibration images themselves, so that only the error of linearisation is left. "
            "Worse than base: measured loss above the base's under the experts' final heads.",
        ),
        _section(
            "The bracket by merging method",
            html_table(tables.brackets_by_method, _BY_METHOD) if len(tables.brackets_by_method) else "",
            "TIES leaves the span of the experts, where the secant knows nothing.",
        ),
        _section(
            "Figures", "".join(_figure(name, picture, ready.get(name)) for name, picture in drawn.pictures.items())
        ),
        _section(
            "Merging methods on held-out test sets", html_table(tables.optimal, _OPTIMAL) if len(tables.optimal) else ""
        ),
        _section(
            "BatchNorm statistics re-estimated on the calibration images",
            html_table(tables.reestimated) if len(tables.reestimated) else "",
            "Measured only: predictions and bounds cover the merged statistics, not re-estimated ones (verdict: not "
            "covered).",
        ),
        _section(
            "All predictors: ranks", html_table(tables.validation, _RANKS) if len(tables.validation) else "", rank_note
        ),
        _section(
            "All predictors: errors, validity, time",
            html_table(tables.validation, _ERRORS) if len(tables.validation) else "",
            "A certificate or bound is meant to lie above the measurement. On networks its constants "
            "are measured, so its tier "
            "is estimated and violations are possible.",
        ),
        _section("Assumptions", _assumptions(list(meta.get("assumptions", ())))),
        _section("How to reproduce", _reproduce(meta)),
    ]
    if drawn.skipped:
        reasons = "".join(f"<li>{_escape(f'{name}: {why}')}</li>" for name, why in drawn.skipped.items())
        sections.append(_section("Not drawn", f"<ul>{reasons}</ul>"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _figure(name: str, picture: plots.Picture, svg: bytes | None = None) -> str:
    drawing = inline_svg(svg or plots.svg_bytes(picture.figure), name.replace("_", "-"))
    return (
        f'<figure id="{_escape(name)}"><div class="paper">{drawing}</div>'
        f"<figcaption>{_escape(picture.caption)}</figcaption></figure>"
    )


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
