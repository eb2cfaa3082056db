"""Predicting merges from logits and their derivatives: collecting, the predictors, certificates and intervals."""

from __future__ import annotations

from experiments.measure.predictors.collect import collect_fields
from experiments.measure.predictors.kinds import KINDS, STANDARD
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import ZOO, Predictor, bracket, kinds_for, predictors

__all__ = [
    "KINDS",
    "STANDARD",
    "ZOO",
    "FieldStatistics",
    "Predictor",
    "bracket",
    "collect_fields",
    "kinds_for",
    "predictors",
]
