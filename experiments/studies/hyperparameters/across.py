"""Tables over all groups of a network: elasticities of heterogeneous groups, ranks and ratios of predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from experiments import statistics as st
from experiments.studies.hyperparameters.columns import RANKING, predictions
from experiments.studies.hyperparameters.designs import JOINT
from experiments.studies.hyperparameters.spec import StudySpec
from experiments.studies.hyperparameters.trends import position, regression_slopes, sign_kind
from experiments.studies.hyperparameters.work import Row


def heterogeneous(spec: StudySpec, table: pd.DataFrame, recipes: pd.DataFrame) -> pd.DataFrame:
    """Elasticities over groups of experts with recipes of their own: log of a quantity regressed on the group's mean
    of each log hyperparameter (momentum as 1/(1 - beta)), all at once; measured and predicted the same way."""
    part = table[table["factor"] == JOINT]
    if not len(part) or not len(recipes):
        return pd.DataFrame()
    known = recipes.set_index("expert")
    rows: list[Row] = []
    for (_, architecture), own in part.groupby(["base_digest", "architecture"], sort=True):
        groups = [str(text).split(";") for text in own["experts"]]
        used = known.loc[sorted({name for group in groups for name in group})]
        usable = [f for f in spec.levels.factors if f in known.columns and f not in RANKING and used[f].nunique() > 1]
        usable = [f for f in usable if f == "momentum" or (used[f].astype(float) > 0).all()]
        logs = {f: dict(zip(used.index, np.log(position(f, list(used[f]))), strict=True)) for f in usable}
        design = np.array([[np.mean([logs[f][name] for name in group]) for f in usable] for group in groups])
        columns = {"loss": ("loss", "measured"), "error": ("error", "measured"), **predictions(spec, table)}
        for column, (name, tier) in columns.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                y = np.log(own[column].to_numpy(dtype=float))
            for factor, found in zip(usable, regression_slopes(design, y, groups, spec.rule, spec.seed), strict=True):
                rows.append(
                    {
                        "architecture": architecture,
                        "factor": factor,
                        "quantity": name,
                        "tier": tier,
                        "elasticity": found.value,
                        "elasticity_low": found.low,
                        "elasticity_high": found.high,
                        "kind": sign_kind(found),
                        "groups": int(np.isfinite(y).sum()),
                        "seed": spec.seed,
                    }
                )
    return pd.DataFrame(rows)


def ranks(spec: StudySpec, table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """How each prediction orders merges and how far off it is, for homogeneous and heterogeneous groups apart.

    ``spearman`` with the measured loss and its interval (experts resampled), median and 5 to 95 % quantiles of
    predicted / measured, and the share of merges that lie below the prediction (a bound should have all).
    """
    rows: list[Row] = []
    for base, architecture in sorted(names.items(), key=lambda item: item[1]):
        for which in ("homogeneous", "heterogeneous"):
            part = table[(table["base_digest"] == base) & ((table["factor"] == JOINT) == (which == "heterogeneous"))]
            part = part.drop_duplicates("key")
            for column, (name, tier) in predictions(spec, table).items():
                kept = part[np.isfinite(part[column].astype(float))]
                if len(kept) < 5:
                    continue
                predicted, measured = kept[column].to_numpy(float), kept["loss"].to_numpy(float)
                weights = st.expert_weights(st.membership_of(kept["experts"]), min(spec.rule.resamples, 300), spec.seed)

                def statistic(w: np.ndarray, x: np.ndarray = predicted, y: np.ndarray = measured) -> np.ndarray:
                    return st.spearman(x, y, w)

                found = st.interval(statistic, weights, level=spec.rule.level, domain=(-1.0, 1.0))
                low, middle, high = np.quantile(predicted / measured, [0.05, 0.5, 0.95])
                rows.append(
                    {
                        "architecture": architecture,
                        "groups_of": which,
                        "prediction": name,
                        "tier": tier,
                        "merges": len(kept),
                        "spearman": found.value,
                        "spearman_low": found.low,
                        "spearman_high": found.high,
                        "ratio": middle,
                        "ratio_q05": low,
                        "ratio_q95": high,
                        "above": float((predicted >= measured).mean()),
                        "seed": spec.seed,
                    }
                )
    return pd.DataFrame(rows)
