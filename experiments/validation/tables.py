"""Every predictor against the measured risk, and the bracket of two predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments import statistics as st
from experiments.validation.frames import (
    CELL,
    Resampled,
    Row,
    Settings,
    cells,
    merging_cost,
    numbers_of,
    predictors,
    put,
    resample,
)

RISK_SCALED = ("expert_risk", "base_risk", "logit_mean")
"""Trivial predictors that are losses, for which a ratio to the measured loss makes sense."""


def validation_table(
    merges: pd.DataFrame,
    settings: Settings | None = None,
    by: Sequence[str] = CELL,
    names: Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row per cell and predictor.

    Columns: the cell, ``predictor``, ``kind``, ``tier``, ``merges`` (rows with a finite prediction and measurement);
    ``{spearman,kendall}_{risk,cost}[_within]`` each with ``_low`` and ``_high``; ``ratio_q05``, ``ratio_q50``,
    ``ratio_q95`` of predicted/measured and ``median_error`` = median |predicted/measured - 1| (loss-valued predictors
    only); ``valid`` = share of merges with measured <= value, with interval, and ``vacuous`` = share of vacuous
    values (certificates and bounds only); ``seconds`` per merge and ``relative_cost`` = seconds over the seconds of
    evaluating the merge.  "_within" pools the rank correlations within each N, weighted by the number of merges.

    ``by`` may name more columns (for instance "method"); ``names`` restricts the predictors.
    """
    settings = settings or Settings()
    rows: list[Row] = []
    for key, part in cells(merges, by):
        weights = resample(part, settings)
        measured, cost = numbers_of(part, "measured_loss"), merging_cost(part)
        own = numbers_of(part, "expert_loss_calibration")
        for predictor in predictors(part):
            value = numbers_of(part, predictor.column)
            if (names is not None and predictor.name not in names) or not np.isfinite(value).any():
                continue
            keep = np.isfinite(value) & np.isfinite(measured)
            row: Row = dict(zip(by, key, strict=True))
            row |= {
                "predictor": predictor.name,
                "kind": predictor.kind,
                "tier": predictor.tier,
                "merges": int(keep.sum()),
            }
            put_ranks(row, "risk", value, measured, weights, settings)
            put_ranks(row, "cost", value if predictor.kind == "trivial" else value - own, cost, weights, settings)
            if predictor.kind != "trivial" or predictor.name in RISK_SCALED:
                put_ratios(row, value, measured)
            if predictor.kind in ("certificate", "bound") and keep.any():
                holds = (measured <= value)[keep].astype(float)
                put(row, "valid", _share(holds, weights.rows(keep), settings))
                flag = f"vacuous_{predictor.name}"
                if flag in part:
                    row["vacuous"] = float(part[flag].astype(float).mean())
            row["seconds"], row["relative_cost"] = _seconds(part, predictor.name)
            rows.append(row)
    return pd.DataFrame(rows)


def bracket_table(
    merges: pd.DataFrame,
    settings: Settings | None = None,
    lower: str = "secant",
    upper: str = "tangent_base",
    by: Sequence[str] = CELL,
) -> pd.DataFrame:
    """How often the bracket [min, max] of two predictions holds the measurement, and whether its width warns of
    collapse.

    Columns: ``inside`` (share with interval); ``inside_sampling`` (the bracket widened on either side by twice its own
    standard error from the calibration images, which is known before merging); ``inside_tolerance`` (widened by twice
    the standard error of the measurement); ``inside_same_images`` (merges measured on the calibration images, so that
    only the error of linearisation is left); ``below`` and ``above`` (shares of measurements under and over the
    bracket), ``ordered`` (share with lower <= upper), ``width`` (median max/min), ``collapsed`` (share with
    measured loss above the base's), ``auc`` of log(max/min) for collapse, with interval, and ``auc_base`` of the
    score log(upper / predicted risk of the base); ``halved`` (share of merges with less than half the experts'
    accuracy) and ``auc_halved`` of the width for it.
    """
    settings = settings or Settings()
    rows: list[Row] = []
    for key, part in cells(merges, by):
        a, b = numbers_of(part, f"pred_{lower}"), numbers_of(part, f"pred_{upper}")
        measured, base = numbers_of(part, "measured_loss"), numbers_of(part, "base_loss")
        keep = np.isfinite(a) & np.isfinite(b) & np.isfinite(measured)
        if not keep.any():
            continue
        weights = resample(part, settings).rows(keep)
        a, b, measured, base = a[keep], b[keep], measured[keep], base[keep]
        low, high = np.minimum(a, b), np.maximum(a, b)
        slack = 2.0 * np.nan_to_num(numbers_of(part, "measured_se")[keep])
        row: Row = dict(zip(by, key, strict=True)) | {"merges": int(keep.sum())}
        inside = ((low <= measured) & (measured <= high)).astype(float)
        sampling = 2.0 * np.nan_to_num(numbers_of(part, "se_secant")[keep])
        widened = ((low - sampling <= measured) & (measured <= high + sampling)).astype(float)
        tolerant = ((low - slack <= measured) & (measured <= high + slack)).astype(float)
        put(row, "inside", _share(inside, weights, settings))
        put(row, "inside_sampling", _share(widened, weights, settings))
        put(row, "inside_tolerance", _share(tolerant, weights, settings))
        same = numbers_of(part, "measured_loss_calibration")[keep]
        on_same = ((low <= same) & (same <= high)).astype(float)
        row["inside_same_images"] = float(on_same.mean()) if np.isfinite(same).all() else float("nan")
        row["below"], row["above"] = float((measured < low).mean()), float((measured > high).mean())
        row["ordered"] = float((a <= b).mean())
        width = np.log(np.maximum(high, 1e-300) / np.maximum(low, 1e-300))
        row["width"] = float(np.exp(np.median(width)))
        collapsed = measured > base
        row["collapsed"] = float(collapsed[np.isfinite(base)].mean()) if np.isfinite(base).any() else float("nan")
        known = np.isfinite(base)

        def area(
            w: NDArray[np.float64],
            score: NDArray[np.float64] = width[known],
            flag: NDArray[np.bool_] = collapsed[known],
        ) -> NDArray[np.float64]:
            return st.auc(score, flag, w)

        put(row, "auc", st.interval(area, weights.overall[:, known], settings.scale, settings.level, (0.0, 1.0)))
        reference = numbers_of(part, "trivial_base_risk")[keep][known]
        if np.isfinite(reference).all() and len(reference):
            row["auc_base"] = float(st.auc(np.log(high[known] / reference), collapsed[known])[0])
        halved = numbers_of(part, "measured_accuracy")[keep] < 0.5 * numbers_of(part, "expert_accuracy")[keep]
        row["tier"] = "estimated"
        row["halved"], row["auc_halved"] = float(halved.mean()), float(st.auc(width, halved)[0])
        rows.append(row)
    return pd.DataFrame(rows)


def put_ranks(
    row: Row,
    target: str,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weights: Resampled,
    settings: Settings,
    with_kendall: bool = True,
) -> None:
    keep = np.isfinite(x) & np.isfinite(y)
    x, y, used = x[keep], y[keep], weights.rows(keep)
    ranks: dict[str, Callable[..., NDArray[np.float64]]] = {"spearman": st.spearman}
    if with_kendall:
        ranks["kendall"] = st.kendall
    for name, function in ranks.items():

        def overall(w: NDArray[np.float64], f: Callable[..., NDArray[np.float64]] = function) -> NDArray[np.float64]:
            return f(x, y, w)

        for scope, statistic, matrix in (
            ("", overall, used.overall),
            ("_within", st.within(function, x, y, used.strata), used.within),
        ):
            estimate = st.interval(statistic, matrix, settings.scale, settings.level, (-1.0, 1.0))
            put(row, f"{name}_{target}{scope}", estimate)


def put_ratios(row: Row, value: NDArray[np.float64], measured: NDArray[np.float64]) -> None:
    keep = np.isfinite(value) & np.isfinite(measured) & (measured > 0)
    ratio = value[keep] / measured[keep]
    for q in (5, 50, 95):
        row[f"ratio_q{q:02d}"] = float(np.quantile(ratio, q / 100)) if ratio.size else float("nan")
    row["median_error"] = float(np.median(np.abs(ratio - 1.0))) if ratio.size else float("nan")


def _seconds(part: pd.DataFrame, name: str) -> tuple[float, float]:
    seconds = numbers_of(part, f"seconds_{name}")
    measure = numbers_of(part, "seconds_measure")
    cost = float(np.nanmean(seconds)) if np.isfinite(seconds).any() else float("nan")
    base = float(np.nanmean(measure)) if np.isfinite(measure).any() else float("nan")
    return cost, cost / base if base > 0 else float("nan")


def _share(flags: NDArray[np.float64], weights: Resampled, settings: Settings) -> st.Estimate:
    """A share with its interval; a share of exactly 0 or 1 gets the binomial limit for as many trials as experts.

    (Resampling cannot see what never happened; the number of experts, not of merges, is the safe count of trials.)
    """
    found = st.interval(lambda w: st.mean(flags, w), weights.overall, settings.scale, settings.level, (0.0, 1.0))
    limit = ((1.0 - settings.level) / 2.0) ** (1.0 / max(min(weights.experts, flags.size), 1))
    if found.value == 1.0:
        return st.Estimate(1.0, limit, 1.0)
    return st.Estimate(0.0, 0.0, 1.0 - limit) if found.value == 0.0 else found
