"""Predict the risk of merging the user's own checkpoints, without forming or evaluating a merge.

    group = load_group(base, experts, data)
    report = predict(group, Options())

The secant needs N + 1 forward passes on each of the N data sets; the tangent at the base as many Jacobian products.
Every predicted number is of tier *estimated*: in nats, with a standard error that says how much it would change with
other calibration images (not how far the linearisation is off: that is what the bracket from secant to tangent shows).
"""

from __future__ import annotations

from experiments.predict.collecting import collect_group
from experiments.predict.options import Options
from experiments.predict.predicting import predict
from experiments.predict.report import Estimate, MasterBound, MethodPrediction, Report
from experiments.predict_group import Group, load_group

__all__ = [
    "Estimate",
    "Group",
    "MasterBound",
    "MethodPrediction",
    "Options",
    "Report",
    "collect_group",
    "load_group",
    "predict",
]
