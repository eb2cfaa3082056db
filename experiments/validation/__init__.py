"""The validation table: predicted against measured risk of merged models, whole and with intervals.

Every function takes the ``merges`` frame (one row per merge) and returns a DataFrame; nothing is dropped silently:
``merges`` counts the rows that entered.  Two targets: the joint risk (measured test loss) and the merging cost
(measured test loss minus the experts' own); a prediction's cost is the prediction minus the experts' own loss on the
calibration images.  A choice or a fit is made on one half of the experts and judged on the other.
"""

from __future__ import annotations

from experiments.validation.combination import (
    FUNCTION_SPACE,
    Combination,
    choose,
    fit_combination,
    fit_target,
    log_error,
)
from experiments.validation.frames import CELL, Predictor, Settings, cells, merging_cost, predictors
from experiments.validation.optimal import optimal_table, with_experts
from experiments.validation.selection import aims_table, cross_calibrated, selection_table
from experiments.validation.showing import format_number, readable, rich_table, summary, to_markdown
from experiments.validation.tables import RISK_SCALED, bracket_table, validation_table

__all__ = [
    "CELL",
    "FUNCTION_SPACE",
    "RISK_SCALED",
    "Combination",
    "Predictor",
    "Settings",
    "aims_table",
    "bracket_table",
    "cells",
    "choose",
    "cross_calibrated",
    "fit_combination",
    "fit_target",
    "format_number",
    "log_error",
    "merging_cost",
    "optimal_table",
    "predictors",
    "readable",
    "rich_table",
    "selection_table",
    "summary",
    "to_markdown",
    "validation_table",
    "with_experts",
]
