"""Frames of merges: their cells, predictors, and weights of resampled experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments import statistics as st

CELL = ("regime", "architecture")

Row = dict[str, object]


@dataclass(frozen=True)
class Settings:
    """How intervals are computed: number of expert resamples, seed, multiplier scale s, nominal level."""

    resamples: int = 500
    seed: int = 0
    scale: float = 0.1
    level: float = 0.95


@dataclass(frozen=True)
class Predictor:
    """A column that claims something about the merged risk.

    ``kind``: prediction, certificate, bound or trivial; ``tier``: estimated, calibrated or "-" (no claim).
    """

    name: str
    column: str
    kind: str
    tier: str


def predictors(merges: pd.DataFrame) -> list[Predictor]:
    """The predictors present in ``merges``, by their prefixes ``pred_``, ``cert_``, ``bound_``, ``trivial_``."""
    kinds = {
        "pred_": ("prediction", "estimated"),
        "cert_": ("certificate", "estimated"),
        "bound_": ("bound", "estimated"),
        "trivial_": ("trivial", "-"),
    }
    found = []
    for prefix, (kind, tier) in kinds.items():
        for column in merges.columns:
            if column.startswith(prefix):
                name = column.removeprefix(prefix)
                tier_of = "calibrated" if kind == "prediction" and name.startswith("calibrated") else tier
                found.append(Predictor(name, column, kind, tier_of))
    return found


def cells(frame: pd.DataFrame, by: Sequence[str] = CELL) -> Iterable[tuple[tuple[object, ...], pd.DataFrame]]:
    """Sub-frames per value of ``by``, in order of appearance."""
    for key, part in frame.groupby(list(by), sort=False, dropna=False):
        yield (key if isinstance(key, tuple) else (key,)), part


def numbers_of(frame: pd.DataFrame, column: str) -> NDArray[np.float64]:
    if column not in frame:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float)


def merging_cost(merges: pd.DataFrame) -> NDArray[np.float64]:
    """Measured merging cost: the stored column, else measured_loss - expert_loss."""
    if "merging_cost" in merges:
        return numbers_of(merges, "merging_cost")
    return numbers_of(merges, "measured_loss") - numbers_of(merges, "expert_loss")


def put(row: Row, name: str, estimate: st.Estimate) -> None:
    row[name], row[f"{name}_low"], row[f"{name}_high"] = estimate.value, estimate.low, estimate.high


@dataclass(frozen=True)
class Resampled:
    """Weights of one cell: overall, and with expert shares taken within N."""

    overall: NDArray[np.float64]
    within: NDArray[np.float64]
    strata: NDArray[np.int64]
    experts: int

    def rows(self, keep: NDArray[np.bool_]) -> Resampled:
        return Resampled(self.overall[:, keep], self.within[:, keep], self.strata[keep], self.experts)


def resample(part: pd.DataFrame, settings: Settings) -> Resampled:
    members = st.membership_of(part["experts"])
    sizes = part["N"].to_numpy() if "N" in part else members.matrix.sum(axis=1)
    strata = sizes.astype(np.int64)
    overall = st.expert_weights(members, settings.resamples, settings.seed, settings.scale)
    inside = st.expert_weights(members, settings.resamples, settings.seed, settings.scale, strata=strata)
    return Resampled(overall, inside, strata, len(members.experts))
