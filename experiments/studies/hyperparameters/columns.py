"""Columns of the joined table: what each is called in tables and figures, and its tier."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.studies.hyperparameters.spec import StudySpec

RANKING = ("sampling",)
"""Factors whose levels are names: a slope over them has a sign and is no exponent."""


def predictions(spec: StudySpec, table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Columns that predict the merged risk, in order, with name and tier."""
    wanted = {f"pred_{name}": (name, "estimated") for name in spec.predictors}
    wanted["pred_calibrated"] = ("calibrated", "calibrated")
    wanted["bound_recipe"] = ("bound", "estimated")
    wanted["bound_measured_drift"] = ("bound, measured drift", "estimated")
    return {c: w for c, w in wanted.items() if c in table and np.isfinite(table[c].astype(float)).any()}


def quantities(spec: StudySpec, table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """All columns that have curves, with name and tier."""
    found = {
        "loss": ("loss", "measured"),
        "accuracy": ("accuracy", "measured"),
        "error": ("error", "measured"),
        "expert_loss": ("expert loss", "measured"),
        "merging_cost": ("merging cost", "measured"),
        **predictions(spec, table),
    }
    for name in spec.predictors:
        found[f"pred_accuracy_{name}"] = (f"accuracy, {name}", "estimated")
    parts = {"drift": ("drift", "measured"), "V": ("V", "measured"), "drift_bound": ("drift, Theorem 3", "estimated")}
    parts |= {"V_bound": ("V, Theorem 4", "estimated"), "epsilon": ("epsilon, Theorem 2", "estimated")}
    parts |= {name: (f"sqrt {name} term", "estimated") for name in ("training", "dispersion", "instability")}
    return {c: w for c, w in (found | parts).items() if c in table and np.isfinite(table[c].astype(float)).any()}
