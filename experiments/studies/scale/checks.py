"""The three open checks: barriers and flatness against size, an optimised multitask model, the other family."""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.studies.scale.comparisons import scalar_slopes
from experiments.studies.scale.effects import Effects, estimate
from experiments.studies.scale.findings import seeds_words
from experiments.studies.scale.spec import ScaleSpec
from experiments.studies.scale.verdicts import borderline, verdict

CHECKS = {
    "barriers": "Loss barriers between experts, against size (are larger models flatter?).",
    "flatness": "Rise of the loss around the average, against size.",
    "optimised multitask": "Finding 4 against a multitask model with an optimised budget and early stopping.",
    "other family": "The five findings in the other family.",
}
_QUANTITIES = (
    ("loss_barrier", None), ("error_barrier", None), ("average_filters", "average"), ("sam", "average"),
    ("average_filters", "base"),
)  # fmt: skip


def open_checks(findings: pd.DataFrame, shape: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """All open checks in one table: ``check`` names which, the other columns are those of the findings.

    Args:
        findings: all rows of ``findings_table``.
        shape: barriers and flatness of all cells.
        spec: the study.
    """
    optimised = findings["scope"].str.endswith("optimised multitask")
    own = findings["papers_own"] == "other family"
    parts = [
        findings[optimised].assign(check="optimised multitask"),
        findings[own].assign(check="other family"),
        shape_table(shape, spec),
    ]
    frame = pd.concat([part for part in parts if len(part)], ignore_index=True) if any(map(len, parts)) else findings
    if frame.empty:
        return pd.DataFrame()
    return frame[["check", *(name for name in frame.columns if name != "check")]]


def shape_table(shape: pd.DataFrame, spec: ScaleSpec) -> pd.DataFrame:
    """Slope of barriers and flatness per tenfold number of parameters.

    The paper supposes that larger models are flatter: the supposed direction is below zero.
    """
    rows: list[dict[str, Any]] = []
    if shape.empty:
        return pd.DataFrame()
    for family in spec.families:
        for base in spec.bases_of(family)[::-1]:
            own = shape[(shape["family"] == family.name) & (shape["base"] == base)]
            for quantity, at in _QUANTITIES:
                part = own[own["quantity"] == quantity]
                part = part if at is None else part[part["place"] == at]
                effects = scalar_slopes(part, ("place",), seed=spec.seed)
                if not len(effects):
                    continue
                found = estimate(effects, seed=spec.seed)
                name = "barriers" if at is None else "flatness"
                rows.append(
                    {
                        "check": name,
                        "finding": name,
                        "scope": f"{family.name}: {base} base",
                        "verdict": verdict(found, -1),
                        "measure": quantity if at is None else f"{quantity} at the {at}",
                        "effect": found.value,
                        "effect_low": found.low,
                        "effect_high": found.high,
                        "unit": "per tenfold size",
                        "paper": "below 0",
                        "borderline": "yes" if borderline(found, spec.rule.borderline) else "no",
                        "comparisons": int(effects.value.size),
                        "interval_over": f"{_over(effects)}; {seeds_words(spec)}",
                        "papers_own": "open check",
                        "tier": "measured",
                        "seed": spec.seed,
                        "mean": float(part["value"].mean()),
                    }
                )
    return pd.DataFrame(rows)


def _over(effects: Effects) -> str:
    return "tasks, test images" if len(set(effects.members)) > 1 else "test images"
