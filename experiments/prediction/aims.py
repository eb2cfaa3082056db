"""The stated ambitions of the study, line by line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments import statistics as st
from experiments.prediction.judged import COLLAPSED, COVERAGE, USABLE, flag_table, interval_table
from experiments.validation import Settings, cells

Row = dict[str, Any]


def aims_table(
    merges: pd.DataFrame, intervals: pd.DataFrame, flags: pd.DataFrame, settings: Settings, name: str = "best"
) -> pd.DataFrame:
    """The stated ambitions line by line, by network and over both: aim, value, target, met.

    ``name`` is the prediction and the certificate judged (chosen on the other half of the experts); both regimes are
    taken together. A merge without a certificate has none that is valid, and its ratio is infinite.
    """
    rows: list[Row] = []
    groups: list[tuple[object, pd.DataFrame]] = [(key[0], part) for key, part in cells(merges, ("architecture",))]
    if len(groups) > 1:
        groups.append(("both", merges))
    for architecture, part in groups:

        def add(
            aim: str, value: float, target: str, met: bool, count: int, architecture: object = architecture
        ) -> None:
            rows.append(
                {"architecture": architecture, "aim": aim, "value": value, "target": target, "met": met, "taken": "all",
                 "merges": count, "tier": "calibrated", "seed": settings.seed}
            )  # fmt: skip

        for state in (USABLE, COLLAPSED):
            some = part[(part["state"] == state) & np.isfinite(part[f"pred_{name}"])]
            if len(some) < 3:
                continue
            predicted = some[f"pred_{name}"].to_numpy(dtype=float)
            measured = some["measured_loss"].to_numpy(dtype=float)
            ratio = predicted / measured
            ranks = float(st.spearman(predicted, measured)[0])
            cost = float(st.spearman(predicted - some["expert_loss_calibration"], some["merging_cost"])[0])
            if state == USABLE:
                middle = float(np.median(ratio))
                within = float((np.abs(ratio - 1.0) <= 0.15).mean())
                add("usable: median of predicted/measured within 5 %", middle, "0.95 to 1.05", abs(middle - 1) <= 0.05,
                    len(some))  # fmt: skip
                add("usable: 90 % of merges within 15 %", within, ">= 0.9", within >= 0.9, len(some))
                add("usable: Spearman, joint risk", ranks, ">= 0.97", ranks >= 0.97, len(some))
                add("usable: Spearman, merging cost", cost, ">= 0.95", cost >= 0.95, len(some))
            else:
                factor = float(np.exp(np.median(np.abs(np.log(ratio)))))
                add("collapse: right within a factor of 1.5 in the median", factor, "<= 1.5", factor <= 1.5, len(some))
                add("collapse: Spearman, joint risk", ranks, ">= 0.85", ranks >= 0.85, len(some))
        for score, told in (("gap", ""), ("lost", ", by predicted accuracy")):
            flag = flags[(flags["regime"] == "all") & (flags["score"] == score)] if len(flags) else flags
            flag = flag if architecture == "both" or flag.empty else flag[flag["architecture"] == architecture]
            if len(flag) and flag["collapsed"].sum():
                missed, bad = int(flag["missed"].sum()), int(flag["collapsed"].sum())
                add(f"collapse: flagged without fail (share missed){told}", missed / bad, "0", missed == 0, bad)
        cover = (
            intervals[(intervals["regime"] != "all") & (intervals["prediction"] == name)]
            if len(intervals)
            else intervals
        )
        cover = cover if architecture == "both" or cover.empty else cover[cover["architecture"] == architecture]
        if len(cover):
            share = float(np.average(cover["covered"], weights=cover["merges"]))
            widths = " to ".join(f"{w:.3g}" for w in sorted({cover["width"].min(), cover["width"].max()}))
            add(
                f"prediction interval covers 90 % (median high/low, by cell: {widths})",
                share,
                f">= {COVERAGE}",
                share >= COVERAGE,
                int(cover["merges"].sum()),
            )
        given = np.isfinite(part[f"cert_{name}"])
        if given.any():
            ratio = (part[f"cert_{name}"] / part["measured_loss"]).where(given, np.inf)
            valid, middle = float((given & (ratio >= 1.0)).mean()), float(ratio.median())
            have = f"{int(given.sum())} of {len(part)} merges have one"
            add(f"best certificate valid in 95 % ({have})", valid, ">= 0.95", valid >= 0.95, len(part))
            add("best certificate: median ratio", middle, "<= 1.5", middle <= 1.5, len(part))
    return pd.DataFrame(rows)


def aims_without_clamped(merges: pd.DataFrame, settings: Settings) -> list[pd.DataFrame]:
    """The ambitions once more for merges that clamp no running variance, intervals and flags fitted on such only."""
    if "clamped" not in merges or not (merges["clamped"] > 0).any():
        return []
    some = merges[merges["clamped"] == 0]
    intervals = interval_table(some, ("best",), settings)
    flags = flag_table(some, [score for score in ("gap", "lost") if score in some], settings)
    found = aims_table(some, intervals, flags, settings)
    return [found.assign(taken="no variance clamped")]
