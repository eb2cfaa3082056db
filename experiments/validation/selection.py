"""Choices and fits made on one half of the experts and judged on the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments import statistics as st
from experiments.validation.combination import FUNCTION_SPACE, choose, fit_combination, log_error
from experiments.validation.frames import CELL, Row, Settings, cells, merging_cost, numbers_of, resample
from experiments.validation.tables import put_ranks, put_ratios


def _halves(part: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame, pd.DataFrame]]:
    """(fit half, judged half, fit rows, judged rows) for both directions; empty without two halves."""
    if "half" not in part:
        return []
    names = [name for name in ("A", "B") if (part["half"] == name).any()]
    if len(names) < 2:
        return []
    return [(a, b, part[part["half"] == a], part[part["half"] == b]) for a, b in (("A", "B"), ("B", "A"))]


def _judge(row: Row, judged: pd.DataFrame, value: NDArray[np.float64], settings: Settings) -> None:
    weights = resample(judged, settings)
    measured = numbers_of(judged, "measured_loss")
    row["merges"] = int((np.isfinite(value) & np.isfinite(measured)).sum())
    put_ratios(row, value, measured)
    keep = np.isfinite(value) & np.isfinite(measured) & (measured > 0)
    error = np.abs(value[keep] / measured[keep] - 1.0)
    used = weights.overall[:, keep]
    median = st.interval(
        lambda w: np.log(np.maximum(st.quantile(error, 0.5, w), 1e-9)), used, settings.scale, settings.level
    )
    row["median_error_low"], row["median_error_high"] = float(np.exp(median.low)), float(np.exp(median.high))
    same = numbers_of(judged, "measured_loss_calibration")[keep]
    if np.isfinite(same).all():
        row["same_images_error"] = float(np.median(np.abs(value[keep] / same - 1.0)))
    put_ranks(row, "risk", value, measured, weights, settings, with_kendall=False)
    own = numbers_of(judged, "expert_loss_calibration")
    put_ranks(row, "cost", value - own, merging_cost(judged), weights, settings, with_kendall=False)


def selection_table(
    merges: pd.DataFrame,
    settings: Settings | None = None,
    candidates: Sequence[str] = FUNCTION_SPACE,
    lower: str = "secant",
    upper: str = "tangent_base",
) -> pd.DataFrame:
    """Choices and fits made on one half of the experts and judged on the other, in both directions.

    Per regime x architecture x direction two rows: ``tier`` "estimated" (the best of ``candidates``, chosen by
    :func:`choose`) and "calibrated" (:func:`fit_combination`).  Columns: ``fit_half``, ``judged_half``, ``chosen``,
    ``fit_error`` (median |log(predicted/measured)| on the fit half), then ratio quantiles, ``median_error`` and
    Spearman correlations, with intervals, on the judged half.
    """
    settings = settings or Settings()
    rows: list[Row] = []
    for key, part in cells(merges):
        for fit_half, judged_half, fit, judged in _halves(part):
            head: Row = dict(zip(CELL, key, strict=True)) | {"fit_half": fit_half, "judged_half": judged_half}
            try:
                name = choose(fit, candidates)
            except ValueError:
                continue
            row = head | {"tier": "estimated", "chosen": name, "fit_error": log_error(fit, name)}
            _judge(row, judged, numbers_of(judged, f"pred_{name}"), settings)
            rows.append(row)
            try:
                combination = fit_combination(fit, lower, upper, seed=settings.seed)
            except ValueError:
                continue
            fitted = np.abs(np.log(combination.predict(fit) / numbers_of(fit, "measured_loss")))
            row = head | {
                "tier": "calibrated",
                "chosen": combination.describe(),
                "fit_error": float(np.nanmedian(fitted)),
            }
            _judge(row, judged, combination.predict(judged), settings)
            rows.append(row)
    return pd.DataFrame(rows)


def cross_calibrated(merges: pd.DataFrame, lower: str = "secant", upper: str = "tangent_base") -> pd.Series:
    """The calibrated combination for every merge, its weight fitted on the other half of the experts.

    NaN where impossible.
    """
    out = pd.Series(np.nan, index=merges.index, name="pred_calibrated")
    for _, part in cells(merges):
        for _, _, fit, judged in _halves(part):
            try:
                out.loc[judged.index] = fit_combination(fit, lower, upper).predict(judged)
            except ValueError:
                continue
    return out


def aims_table(selection: pd.DataFrame, brackets: pd.DataFrame, gentle: str = "mild") -> pd.DataFrame:
    """The project's stated aims with the value reached: columns regime, architecture, aim, value, target, met, kind.

    Accuracy and rank aims concern the ``gentle`` regime and take the worse of the two directions; bracket aims concern
    every regime.  Rows of kind ``also`` are not stated aims: they show, against the same target, what a reader would
    ask next (the bracket widened by its own sampling error, all regimes together, collapse by another definition).
    """
    rows: list[Row] = []

    def add(
        cell: tuple[object, ...], aim: str, value: float, limit: float, *, below: bool = False, also: bool = False
    ) -> None:
        met = value <= limit if below else value >= limit
        rows.append(
            {
                "regime": cell[0],
                "architecture": cell[1],
                "aim": aim,
                "value": value,
                "target": f"{'<=' if below else '>='} {limit:g}",
                "met": met,
                "kind": "also" if also else "stated",
            }
        )

    if len(selection):
        chosen = selection[(selection["tier"] == "estimated") & (selection["regime"] == gentle)]
        for cell, part in cells(chosen):
            error = float(part["median_error"].max())
            add(cell, "median error of the best function-space prediction", error, 0.2, below=True)
            for target, label in (("risk", "joint risk"), ("cost", "merging cost")):
                rank = float(part[f"spearman_{target}"].min(skipna=False))
                add(cell, f"Spearman, {label}", rank, 0.9)
    for row in brackets.to_dict("records"):
        cell = (row["regime"], row["architecture"])
        pooled = row["regime"] == "all"
        add(cell, "bracket holds the measurement", float(row["inside"]), 0.9, also=pooled)
        if np.isfinite(float(row["auc"])):
            add(cell, "bracket width warns of collapse (AUC)", float(row["auc"]), 0.9, also=pooled)
        for name, aim in (
            ("inside_sampling", "bracket widened by its sampling error holds the measurement"),
            ("inside_same_images", "bracket holds the loss on the calibration images"),
            ("auc_base", "upper end over the base's risk warns of collapse (AUC)"),
            ("auc_halved", "bracket width warns of less than half the experts' accuracy (AUC)"),
        ):
            value = float(row.get(name, np.nan))
            if np.isfinite(value):
                add(cell, aim, value, 0.9, also=True)
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).sort_values("kind", ascending=False, kind="stable", ignore_index=True)
