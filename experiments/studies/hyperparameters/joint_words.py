"""What heterogeneous groups say, in words: verdicts counted, and heterogeneity itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from experiments.plots import pretty
from experiments.studies.hyperparameters.across import UNKNOWN
from experiments.studies.hyperparameters.spec import StudySpec

HETEROGENEOUS = (
    "Every expert has a recipe of its own. Elasticities: log loss regressed on the group's mean of every log "
    "hyperparameter at once (given 'other means'); an elasticity that the recipes do not determine is *not identified* "
    "and left empty. Heterogeneity: log loss regressed on mean and standard deviation within the group of the log "
    "training time eta K / (1 - beta), two regressors (other hyperparameters are not held); and one spread at a time "
    "given all means. Slopes of a spread are in log loss per unit of standard deviation. Intervals resample experts; "
    "in simulations on the groups of size tiny they covered 99 % and more of planted slopes (about twice too wide)."
)


def joint_lines(spec: StudySpec, table: pd.DataFrame) -> list[str]:
    """Sentences about :func:`experiments.studies.hyperparameters.across.heterogeneous`: how many verdicts are which,
    and for each network what heterogeneity does to the loss, measured and predicted."""
    if table.empty:
        return []
    predicted = table[table["tier"] != "measured"]
    found = []
    of_means = predicted[predicted["given"] == "other means"]
    if len(of_means):
        found.append(f"Heterogeneous groups, signs of elasticities (hyperparameter, network, prediction): "
                     f"{_count(of_means)}.{_why(spec, of_means)}")  # fmt: skip
    others = predicted[predicted["given"] != "other means"]
    if len(others):
        found.append(f"Heterogeneous groups, signs of slopes over training time and spreads: {_count(others)}.")
    for network, part in table.groupby("architecture", sort=True):
        own = part[part["factor"] == "heterogeneity"].to_dict("records")
        own = [row for row in own if row["quantity"] != "error"]
        if not own:
            continue
        told = [_slope(row) for row in own]
        spreads = part[part["factor"].isin(["spread_learning_rate", "spread_training_time"])]
        given = [
            f"{str(row['factor']).replace('_', ' ').replace('spread', 'spread of')} {_ends(row)} {row['kind']}"
            for row in spreads[spreads["quantity"] == "loss"].to_dict("records")
        ]
        found.append(
            f"Heterogeneity, {pretty(str(network))}: log loss per unit of standard deviation of log training times in "
            f"a group, at the same mean training time: {'; '.join(told)}. "
            f"Measured, given all means: {'; '.join(given)}. Over the mean log training time itself: "
            f"{_time(part)}."
        )
    return found


def _time(part: pd.DataFrame) -> str:
    rows = part[(part["factor"] == "training_time") & (part["quantity"] != "error")].to_dict("records")
    return "; ".join(_slope(row) for row in rows)


def _count(part: pd.DataFrame) -> str:
    verdicts = part["verdict"].value_counts()
    words = {"agrees": "agree", "disagrees": "disagree", "undecided": "undecided", UNKNOWN: UNKNOWN}
    many = [f"{int(verdicts.get(word, 0))} {said}" for word, said in words.items()]
    return f"of {len(part)}, {', '.join(many)}"


def _why(spec: StudySpec, part: pd.DataFrame) -> str:
    count = spec.heterogeneous.count if spec.heterogeneous is not None and spec.tasks else None
    many = part["factor"].nunique()
    if count is None or count > many or not (part["verdict"] == UNKNOWN).any():
        return ""
    return f" {count} recipes cannot tell {many} hyperparameters apart: that takes {many + 1} or more."


def _slope(row: Mapping[Any, Any]) -> str:
    name = "measured" if row["quantity"] == "loss" else pretty(row["quantity"])
    said = row["kind"] if row["quantity"] == "loss" else row["verdict"]
    return f"{name} {_ends(row)} {said}"


def _ends(row: Mapping[Any, Any]) -> str:
    if not np.isfinite(row["elasticity"]):
        return "–"
    return f"{row['elasticity']:.2f} ({row['elasticity_low']:.2f} to {row['elasticity_high']:.2f})"
