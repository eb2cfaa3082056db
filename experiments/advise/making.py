"""From advice to the merge itself."""

from __future__ import annotations

from dataclasses import replace

from experiments.advise.merge_advice import MergeAdvice
from experiments.measure.predictors.merges import Merge
from theory.errors import MergeboundError


def merge_arguments(advice: MergeAdvice) -> list[str]:
    """Arguments of ``mergebound merge`` that make the recommended merge, without files."""
    parts = ["--method", advice.method]
    if advice.method == "risk_optimal":
        parts.append("--alpha=" + ",".join(repr(round(a, 6)) for a in advice.alpha))
    for name, value in advice.settings.items():
        parts += ["--set", f"{name}={value:g}"]
    return parts


def with_merge(advice: MergeAdvice, label: str) -> Merge:
    """The merge behind a row of ``candidates`` whose method is linear (for evaluation elsewhere).

    Raises:
        MergeboundError: no such linear row.
    """
    rows = advice.candidates[(advice.candidates["label"] == label) & (advice.candidates["coefficients"] != "")]
    if rows.empty:
        raise MergeboundError(f"{label!r}: is no linear candidate; see the column label of candidates")
    alpha = [float(v) for v in str(rows.iloc[0]["coefficients"]).split(";")]
    return replace(Merge("given", alpha=alpha), label=label)
