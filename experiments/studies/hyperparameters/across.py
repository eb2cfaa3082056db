"""Tables over all groups of a network: elasticities of heterogeneous groups, ranks and ratios of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments import statistics as st
from experiments.studies.hyperparameters.columns import RANKING, predictions
from experiments.studies.hyperparameters.designs import JOINT
from experiments.studies.hyperparameters.spec import StudySpec
from experiments.studies.hyperparameters.trends import position, regression_slopes, sign_kind, verdict
from experiments.studies.hyperparameters.work import Row

TIME = ("learning_rate", "step", "momentum")
"""What the training time eta K / (1 - beta) is made of."""
UNKNOWN = "not identified"
"""An elasticity that the recipes do not determine: fewer of them than hyperparameters, say."""


@dataclass(frozen=True)
class Regressors:
    """Groups of experts with recipes of their own as regressors, each (G,).

    Attributes:
        means: over a group's experts of every log hyperparameter that varies (momentum as 1/(1 - beta)), by factor.
        time: mean of the log training time.
        spreads: how unlike a group's recipes are: standard deviations over its experts of the log learning rate
            (``spread_learning_rate``) and of the log training time (``spread_training_time``).
    """

    means: dict[str, np.ndarray]
    time: np.ndarray
    spreads: dict[str, np.ndarray]


def regressors(spec: StudySpec, groups: Sequence[Sequence[str]], recipes: pd.DataFrame) -> Regressors:
    """Regressors of groups.

    Args:
        spec: the study.
        groups: experts of each.
        recipes: one row for each ``expert``.
    """
    used = recipes.set_index("expert").loc[sorted({name for group in groups for name in group})]
    usable = [f for f in spec.levels.factors if f in used.columns and f not in RANKING and used[f].nunique() > 1]
    usable = [f for f in usable if f == "momentum" or (used[f].astype(float) > 0).all()]
    place = {name: k for k, name in enumerate(used.index)}
    members = [[place[name] for name in group] for group in groups]
    logs = {f: np.log(position(f, list(used[f]))) for f in usable}
    time = np.sum([np.zeros(len(used)), *(logs[f] for f in TIME if f in logs)], axis=0)
    spread = {"spread_learning_rate": logs.get("learning_rate", np.zeros(len(used))), "spread_training_time": time}
    return Regressors(
        {f: np.array([own[m].mean() for m in members]) for f, own in logs.items()},
        np.array([time[m].mean() for m in members]),
        {name: np.array([own[m].std() for m in members]) for name, own in spread.items()},
    )


def heterogeneous(spec: StudySpec, table: pd.DataFrame, recipes: pd.DataFrame) -> pd.DataFrame:
    """Elasticities over groups of experts with recipes of their own, measured and predicted the same way.

    The log of a quantity is regressed on the group's mean of each log hyperparameter, all at once (``given`` "other
    means"); for heterogeneity itself on these means and one spread of the recipes (``given`` "all means"; the row of
    the spread alone is kept); and, with few regressors, on mean and spread of the log training time (``training_time``
    ``given`` "its spread", and ``heterogeneity`` ``given`` "mean training time": unlike recipes against like ones at
    the same mean training time, other hyperparameters not held).  ``verdict``: of a prediction's sign against the
    loss's; :data:`UNKNOWN` where the recipes do not determine the elasticity.
    """
    part = table[table["factor"] == JOINT]
    if not len(part) or not len(recipes):
        return pd.DataFrame()
    rows: list[Row] = []
    for (_, architecture), own in part.groupby(["base_digest", "architecture"], sort=True):
        groups = [str(text).split(";") for text in own["experts"]]
        made = regressors(spec, groups, recipes)
        columns = {"loss": ("loss", "measured"), "error": ("error", "measured"), **predictions(spec, table)}
        kinds: dict[str, str] = {}
        for column, (name, tier) in columns.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                y = np.log(own[column].to_numpy(dtype=float))
            for factor, given, found in _elasticities(spec, made, y, groups):
                kind: str = sign_kind(found) if np.isfinite(found.value) else UNKNOWN
                if name == "loss":
                    kinds[factor] = kind
                both = (kinds[factor], kind)
                said = UNKNOWN if UNKNOWN in both else verdict(*both)  # type: ignore[arg-type]
                rows.append(
                    {
                        "architecture": architecture,
                        "factor": factor,
                        "given": given,
                        "quantity": name,
                        "tier": tier,
                        "elasticity": found.value,
                        "elasticity_low": found.low,
                        "elasticity_high": found.high,
                        "kind": kind,
                        "verdict": "" if tier == "measured" else said,
                        "groups": int(np.isfinite(y).sum()),
                        "seed": spec.seed,
                    }
                )
    return pd.DataFrame(rows)


def _elasticities(
    spec: StudySpec, made: Regressors, y: np.ndarray, groups: Sequence[Sequence[str]]
) -> list[tuple[str, str, st.Estimate]]:
    """Factor, what is held, and the elasticity with its interval."""

    def slopes(columns: Mapping[str, np.ndarray]) -> dict[str, st.Estimate]:
        X = np.column_stack(list(columns.values()))
        return dict(zip(columns, regression_slopes(X, y, groups, spec.rule, spec.seed), strict=True))

    found = [(factor, "other means", slope) for factor, slope in slopes(made.means).items()] if made.means else []
    for name, values in made.spreads.items():
        found.append((name, "all means", slopes(made.means | {name: values})[name]))
    two = slopes({"training_time": made.time, "heterogeneity": made.spreads["spread_training_time"]})
    held = {"training_time": "its spread", "heterogeneity": "mean training time"}
    return found + [(name, held[name], slope) for name, slope in two.items()]


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
