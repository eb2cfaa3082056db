"""Merging methods, with coefficients chosen by a prediction among them, on the same groups."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments import statistics as st
from experiments.validation.frames import CELL, Row, Settings, cells, put


def with_experts(optimal: pd.DataFrame, merges: pd.DataFrame | None) -> pd.DataFrame:
    """``optimal`` with the column ``experts`` of its groups, taken from ``merges`` where it is missing.

    A group that is not found there counts as one expert of its own, so that intervals resample groups.
    """
    if "experts" in optimal:
        return optimal
    keys = ["regime", "architecture", "group"]
    out = optimal.copy()
    if merges is not None and set(keys) <= set(merges.columns):
        out = out.merge(merges[[*keys, "experts"]].drop_duplicates(keys), on=keys, how="left")
    else:
        out["experts"] = np.nan
    own = "group " + out["group"].astype(str)
    out["experts"] = out["experts"].astype(object).where(out["experts"].notna(), own)
    return out


def optimal_table(
    optimal: pd.DataFrame,
    merges: pd.DataFrame | None = None,
    settings: Settings | None = None,
    reference: str = "average",
) -> pd.DataFrame:
    """Mean test loss per method and its paired difference to ``reference``, by N and over all N.

    Columns: regime, architecture, ``N`` (a number, or "all"), method, ``groups``, ``loss`` and ``accuracy`` (means),
    ``difference`` = mean of (loss - reference's loss) over the same groups, all with expert-bootstrap intervals where
    computed, and ``wins`` = share of groups where the method's loss is below the reference's.
    """
    settings = settings or Settings()
    frame = with_experts(optimal, merges)
    rows: list[Row] = []
    for key, part in cells(frame):
        sizes: list[object] = ["all", *sorted(part["N"].unique())] if "N" in part else ["all"]
        for size in sizes:
            chosen = part if size == "all" else part[part["N"] == size]
            losses = chosen.pivot_table(index="group", columns="method", values="measured_loss", sort=False)
            members = st.membership_of(chosen.drop_duplicates("group").set_index("group")["experts"].loc[losses.index])
            accuracies = (
                chosen.pivot_table(index="group", columns="method", values="measured_accuracy", sort=False)
                if "measured_accuracy" in chosen
                else None
            )
            for method in [name for name in dict.fromkeys(chosen["method"]) if name in losses]:
                values = losses[method].to_numpy(dtype=float)
                row: Row = dict(zip(CELL, key, strict=True))
                row |= {"tier": "measured", "N": size, "method": method, "groups": int(np.isfinite(values).sum())}
                put(row, "loss", _mean(values, members, settings, (0.0, np.inf)))
                if accuracies is not None and method in accuracies:
                    row["accuracy"] = float(np.nanmean(accuracies[method].to_numpy(dtype=float)))
                if reference in losses:
                    difference = values - losses[reference].to_numpy(dtype=float)
                    put(row, "difference", _mean(difference, members, settings))
                    known = difference[np.isfinite(difference)]
                    row["wins"] = float((known < 0).mean()) if known.size else float("nan")
                rows.append(row)
    return pd.DataFrame(rows)


def _mean(
    values: NDArray[np.float64],
    members: st.Membership,
    settings: Settings,
    domain: tuple[float, float] = (-np.inf, np.inf),
) -> st.Estimate:
    return st.mean_interval(values, members, settings.resamples, settings.seed, settings.scale, settings.level, domain)
