"""What the comparison of advice with customary recipes says in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd


def words(
    training: pd.DataFrame,
    differences: pd.DataFrame,
    merging: pd.DataFrame,
    covered: pd.DataFrame,
    advice: pd.DataFrame,
) -> tuple[str, list[str]]:
    """The main sentence, and further ones."""
    lines = []
    for (network, samples), part in training.groupby(["network", "samples"], sort=True):
        means = part.groupby(["recipe", "method"], sort=False)[["loss", "accuracy"]].mean().reset_index()
        told = [
            f"{row['recipe']}, {row['method']}: {row['loss']:.2f} ({row['accuracy']:.0%})"
            for row in means.to_dict("records")
        ]
        lines.append(f"{network}, {samples:g} samples, mean loss (accuracy) on judged tasks: {'; '.join(told)}.")
    whole = differences[differences["network"] == "all"]
    usual = whole[whole["recipe"] != "advice"]
    for row in usual.to_dict("records"):
        lines.append(f"Against {row['recipe']} with {row['method']}: {_verdict(row)}.")
    same = whole[whole["recipe"] == "advice"]
    for row in same.to_dict("records"):
        lines.append(f"Advised coefficients against {row['method']} of the same experts: {_verdict(row)}.")
    if len(merging):
        for row in merging[merging["network"] == "all"].to_dict("records"):
            lines.append(f"advise merge against {row['method']} on the same experts: {_verdict(row)}.")
    for row in covered.to_dict("records"):
        lines.append(
            f"{row['what']}: {row['inside']:.0%} of {row['merges']} inside, {row['below']:.0%} below, "
            f"{row['above']:.0%} above; predicted over measured {row['median_ratio']:.2f} in the median."
        )
    if len(advice):
        counted = advice["theory"].value_counts()
        lines.append("Theory: " + ", ".join(f"{name} {count}" for name, count in counted.items()) + ".")
        used = (advice["training_samples"] + advice["pilot_samples"]) / advice["samples"]
        shares = "; ".join(f"{name} {part.median():.0%}" for name, part in used.groupby(advice["network"], sort=True))
        lines.append(
            f"Samples used by the advice, pilot included, median share of the budget: {shares}; customary recipes use "
            "all of it."
        )
        lines.append("Source: " + ", ".join(f"{n} {c}" for n, c in advice["source"].value_counts().items()) + ".")
    better = usual.loc[usual["difference_high"] < 0, "recipe"].unique().tolist()
    worse = usual.loc[usual["difference_low"] > 0, "recipe"].unique().tolist()
    rest = [name for name in usual["recipe"].unique() if name not in {*better, *worse}]
    first = (
        f"Of {usual['recipe'].nunique()} customary recipes, experts by `advise training` merge better than "
        f"{_names(better)}, worse than {_names(worse)}, and the interval holds zero for {_names(rest)} (by any method; "
        "tasks that the advice did not see)."
    )
    return first, lines


def _names(names: Sequence[str]) -> str:
    return " and ".join(str(name) for name in names) if len(names) else "none"


def _verdict(row: Mapping[Any, Any]) -> str:
    return (
        f"{row['difference']:+.3f} nats ({row['difference_low']:+.3f} to {row['difference_high']:+.3f}), accuracy "
        f"{row['difference_accuracy']:+.1%} ({row['difference_accuracy_low']:+.1%} to "
        f"{row['difference_accuracy_high']:+.1%}), lower loss in {row['wins']:.0%} of {row['pairs']}"
    )
