"""Merges whose running variances were clamped, and their statistics estimated again."""

from __future__ import annotations

import pandas as pd

from experiments.prediction.judged import (
    USABLE,
)
from experiments.validation import cells


def clamped_table(merges: pd.DataFrame, name: str = "best") -> pd.DataFrame:
    """Merges that clamp running variances of BatchNorm at zero, apart from the others: a way to fail that no predictor
    sees, but that the checkpoints show.

    Columns: network, method, N, ``clamped`` (whether any variance is), merges, ``usable`` (share), measured loss
    (median), and the median ratio of the prediction.
    """
    if "clamped" not in merges or not (merges["clamped"] > 0).any():
        return pd.DataFrame()
    rows = []
    frame = merges.assign(any=merges["clamped"] > 0)
    for key, part in cells(frame, ("architecture", "method", "N", "any")):
        ratio = part[f"pred_{name}"] / part["measured_loss"]
        rows.append(
            dict(zip(("architecture", "method", "N", "clamped"), key, strict=True))
            | {
                "merges": len(part), "share": float(part["clamped"].mean()),
                "usable": float((part["state"] == USABLE).mean()),
                "measured_loss": float(part["measured_loss"].median()), "ratio_q50": float(ratio.median()),
                "tier": "measured",
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def reestimated_table(merges: pd.DataFrame) -> pd.DataFrame:
    """Merges with BatchNorm statistics of the calibration images, beside the same merges with merged statistics."""
    if "reestimated_loss" not in merges:
        return pd.DataFrame()
    known = merges[merges["reestimated_loss"].notna()]
    columns = ["measured_loss", "reestimated_loss", "measured_accuracy", "reestimated_accuracy", "expert_accuracy"]
    table = known.groupby(["regime", "architecture", "N", "method"], sort=False)[columns].mean().reset_index()
    return table.assign(tier="measured")
