"""Predicting merges from logits and their derivatives: collecting, the predictors, certificates and intervals."""

from __future__ import annotations

from experiments.measure.predictors.break_even import BreakEven, break_even
from experiments.measure.predictors.calibration import (
    Combination,
    Flag,
    Interval,
    calibrate_flag,
    calibrate_interval,
    fit_combination,
)
from experiments.measure.predictors.certificates import (
    Bracket,
    Certificate,
    bracket_of,
    output_certificate,
    remainder_certificate,
)
from experiments.measure.predictors.collect import collect_fields, point_at
from experiments.measure.predictors.kinds import KINDS, STANDARD
from experiments.measure.predictors.layers import LayeredField, layer_fields, layered_fields
from experiments.measure.predictors.losses import Estimates, Loss, estimate, label_bias
from experiments.measure.predictors.merges import Merge, form, merged_vector
from experiments.measure.predictors.predict import predict_merge
from experiments.measure.predictors.predictor import Predictor, bracket
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import ZOO, kinds_for, predictors

__all__ = [
    "KINDS",
    "STANDARD",
    "ZOO",
    "Bracket",
    "BreakEven",
    "Certificate",
    "Combination",
    "Estimates",
    "FieldStatistics",
    "Flag",
    "Interval",
    "LayeredField",
    "Loss",
    "Merge",
    "Predictor",
    "bracket",
    "bracket_of",
    "break_even",
    "calibrate_flag",
    "calibrate_interval",
    "collect_fields",
    "estimate",
    "fit_combination",
    "form",
    "kinds_for",
    "label_bias",
    "layer_fields",
    "layered_fields",
    "merged_vector",
    "output_certificate",
    "point_at",
    "predict_merge",
    "predictors",
    "remainder_certificate",
]
