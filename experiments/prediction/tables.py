"""The tables of the study: predictors, aims, prices, images, methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.prediction.accuracies import accuracy_table, with_accuracies
from experiments.prediction.aims import aims_table, aims_without_clamped
from experiments.prediction.clamped_tables import clamped_table, reestimated_table
from experiments.prediction.judged import (
    candidates,
    flag_table,
    honest,
    interval_table,
    with_certificate,
    with_choices,
)
from experiments.prediction.runner import Frames
from experiments.validation import Settings, cells, cross_calibrated, optimal_table, validation_table

Row = dict[str, Any]
SCORES = ("gap", "over_base", "lost")
"""Of flags: the bracket's width, its upper end over the base's risk, and the share of accuracy predicted to be lost."""
CHOSEN = ("best", "best_no_tangent", "best_no_merge", "calibrated")
"""Predictions that were chosen or fitted on the other half of the experts."""


@dataclass(frozen=True)
class Tables:
    """Everything that the study reports; ``merges`` are the rows with choices and states."""

    merges: pd.DataFrame
    predictors: pd.DataFrame
    states: pd.DataFrame
    aims: pd.DataFrame
    intervals: pd.DataFrame
    flags: pd.DataFrame
    choices: pd.DataFrame
    prices: pd.DataFrame
    images: pd.DataFrame
    methods: pd.DataFrame
    duels: pd.DataFrame
    reestimated: pd.DataFrame
    clamped: pd.DataFrame
    accuracies: pd.DataFrame


def compute_tables(frames: Frames, settings: Settings) -> Tables:
    """All tables of a study, from as many rows as are finished."""
    merges = honest(frames.merges)
    merges["pred_calibrated"] = cross_calibrated(merges)
    merges = with_accuracies(with_certificate(with_choices(merges)))
    states = pd.concat([judged_states(merges, ("regime", "architecture")), judged_states(merges, ("architecture",))])
    intervals = interval_table(merges, ("secant_tangent", "best", "best_no_merge"), settings)
    flags = flag_table(merges, [score for score in SCORES if score in merges], settings)
    return Tables(
        merges,
        predictor_table(merges, settings),
        states,
        pd.concat(
            [
                aims_table(merges, intervals, flags, settings),
                *aims_without_clamped(merges, settings),
                aims_table(merges, intervals, flags.iloc[:0], settings, "best_no_merge").assign(
                    taken="all, by a predictor without passes at merges"
                ),
            ]
        ),
        intervals,
        flags,
        choice_table(merges),
        price_table(frames.prices),
        image_table(frames.curve),
        method_table(frames.comparison, settings),
        duel_table(frames.comparison, settings),
        reestimated_table(frames.merges),
        clamped_table(merges),
        accuracy_table(merges),
    )


def predictor_table(merges: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """:func:`experiments.validation.validation_table` by regime and network, then also by N, by method, by both, and by
    state; columns ``N``, ``method``, ``state`` say ``all`` where they are pooled."""
    parts = []
    for extra in ((), ("N",), ("method",), ("N", "method"), ("state",)):
        found = validation_table(merges, settings, by=("regime", "architecture", *extra))
        for name in ("N", "method", "state"):
            if name not in found:
                found[name] = "all"
        parts.append(found)
    table = pd.concat(parts, ignore_index=True)
    first = ["regime", "architecture", "N", "method", "state", "predictor", "kind", "tier"]
    table = table[[*first, *(c for c in table.columns if c not in first and "kendall" not in c)]]
    fitted = table["predictor"].isin(CHOSEN)
    table.loc[fitted, "tier"] = "calibrated"
    return table


def judged_states(merges: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Accuracy of every prediction among usable and among collapsed merges.

    Columns: cell, state, predictor, merges, ``ratio`` quantiles, ``error`` (median of |ratio - 1|), ``within_15``
    (share), ``factor`` (median of exp |log ratio|), ``same_images_error`` (against the merge on calibration images).
    """
    rows: list[Row] = []
    for key, part in cells(merges, (*by, "state")):
        names = [*candidates(part), *(n for n in CHOSEN if f"pred_{n}" in part)]
        for name in names:
            value = part[f"pred_{name}"].to_numpy(dtype=float)
            keep = np.isfinite(value) & (value > 0)
            if not keep.any():
                continue
            ratio = value[keep] / part["measured_loss"].to_numpy(dtype=float)[keep]
            same = value[keep] / part["measured_loss_calibration"].to_numpy(dtype=float)[keep]
            low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
            rows.append(
                {"regime": "all"} | dict(zip((*by, "state"), key, strict=True))
                | {
                    "predictor": name, "merges": int(keep.sum()), "ratio_q05": low, "ratio_q50": middle,
                    "ratio_q95": high, "error": float(np.median(np.abs(ratio - 1.0))),
                    "within_15": float((np.abs(ratio - 1.0) <= 0.15).mean()),
                    "factor": float(np.exp(np.median(np.abs(np.log(ratio))))),
                    "same_images_error": float(np.median(np.abs(same - 1.0))),
                    "same_images_within_15": float((np.abs(same - 1.0) <= 0.15).mean()),
                    "tier": "calibrated" if name in CHOSEN else "estimated",
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def choice_table(merges: pd.DataFrame) -> pd.DataFrame:
    """What was chosen for each cell and half, on the other half."""
    columns = [c for c in merges.columns if c.startswith("chosen_")]
    return merges.groupby(["regime", "architecture", "half"], sort=False)[columns].first().reset_index()


def price_table(prices: pd.DataFrame) -> pd.DataFrame:
    """Median prices by network, N and predictor."""
    if prices.empty:
        return prices
    columns = ["images", "seconds_collect", "seconds_price", "seconds_measure", "break_even"]
    table = prices.groupby(["architecture", "N", "predictor"], sort=False)[columns].median().reset_index()
    return table.assign(evaluations=table["seconds_collect"] / table["seconds_measure"], tier="measured")


def image_table(curve: pd.DataFrame) -> pd.DataFrame:
    """Error against the number of calibration images: by network and predictor, over groups, draws and methods.

    ``error``: median of |predicted/measured - 1| on test images; ``distance``: median of |log(predicted / prediction
    from all images)|, what more images would change; ``spread``: the latter's 90 % quantile.
    """
    if curve.empty:
        return curve
    keys = ["regime", "architecture", "half", "group", "method", "predictor"]
    full = curve[curve["images"] == curve["images"].max()].groupby(keys)["predicted"].mean().rename("full")
    joined = curve.merge(full, on=keys, how="left")
    joined["ratio"] = joined["predicted"] / joined["measured_loss"]
    joined["off"] = np.abs(np.log(joined["predicted"] / joined["full"]))
    rows = []
    for (architecture, predictor, images), part in joined.groupby(["architecture", "predictor", "images"], sort=False):
        rows.append(
            {
                "architecture": architecture, "predictor": predictor, "images": images,
                "images_used": float(part["images_used"].mean()), "predictions": len(part),
                "error": float(np.median(np.abs(part["ratio"] - 1.0))),
                "distance": float(part["off"].median()), "spread": float(part["off"].quantile(0.9)),
                "tier": "estimated",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def method_table(comparison: pd.DataFrame, settings: Settings, reference: str = "average") -> pd.DataFrame:
    """Test loss and accuracy by method with intervals, paired with ``reference``: by regime, and over all regimes.

    Columns of :func:`experiments.validation.optimal_table` for the loss, ``median_loss`` (a single merge that breaks
    can decide a mean), and the same for the accuracy: ``accuracy_low``, ``accuracy_difference`` and so on.
    """
    if comparison.empty:
        return comparison
    parts = [_method_part(comparison, settings, reference)]
    if comparison["regime"].nunique() > 1:
        parts.insert(0, _method_part(comparison.assign(regime="all"), settings, reference))
    return pd.concat(parts, ignore_index=True)


def _method_part(comparison: pd.DataFrame, settings: Settings, reference: str) -> pd.DataFrame:
    keys = ["regime", "architecture", "N", "method"]
    table = optimal_table(comparison, None, settings, reference)
    swapped = comparison.assign(measured_loss=comparison["measured_accuracy"]).drop(columns="measured_accuracy")
    other = optimal_table(swapped, None, settings, reference)
    names = {"loss_low": "accuracy_low", "loss_high": "accuracy_high"}
    names |= {f"difference{end}": f"accuracy_difference{end}" for end in ("", "_low", "_high")}
    table = table.merge(other[[*keys, *names]].rename(columns=names), on=keys, how="left")
    by_size = comparison.groupby(["regime", "architecture", "N", "method"])["measured_loss"].median()
    whole = comparison.groupby(["regime", "architecture", "method"])["measured_loss"].median()
    table["median_loss"] = [
        float(whole[r, a, m]) if n == "all" else float(by_size[r, a, n, m])
        for r, a, n, m in table[keys].itertuples(index=False)
    ]
    return table


def duel_table(comparison: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Every ``risk_optimal`` against every other method: mean paired difference of test losses over all regimes."""
    if comparison.empty:
        return comparison
    pooled, parts = comparison.assign(regime="all"), []
    for reference in [m for m in dict.fromkeys(comparison["method"]) if not m.startswith("risk_optimal")]:
        found = optimal_table(pooled, None, settings, reference)
        parts.append(found[found["method"].str.startswith("risk_optimal")].assign(against=reference))
    return pd.concat(parts, ignore_index=True)
