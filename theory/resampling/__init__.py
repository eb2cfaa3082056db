"""How sure a prediction is: resampling the calibration images, and the optimism of coefficients chosen on them.

The images are the only random thing here: experts, merges and statistics are held fixed, so the intervals speak about
other images of the same tasks, not about training again.  Images are drawn with replacement within *strata*: all images
that occur in the same tasks the same number of times (strata of fewer than 20 images are pooled: a stratum of m images
shows only (m - 1)/m of its variance).  Tasks with images of their own are therefore resampled one by
one with their sizes kept; an image that several tasks share (one data set under several transformations) is drawn for
all of them at once.

*Traps.* (1) Treating shared images as independent makes the joint risk's interval wrong, usually too short.  (2) Two
merges priced on the same images must be compared by the interval of their difference
(:func:`difference_interval`), not by whether their intervals overlap.  (3) The predicted risk *at its own minimiser* is
biased downwards on the images that chose it: report :func:`cross_fitted_risk`.
"""

from __future__ import annotations

from theory.resampling.chosen import (
    CrossFitted,
    Fit,
    MinimiserInterval,
    asymptotic_optimism,
    cross_fitted_risk,
    minimiser_interval,
    risk_optimal_fit,
)
from theory.resampling.images import Images, take
from theory.resampling.intervals import (
    Interval,
    Method,
    difference_interval,
    prediction_interval,
    risk_interval,
    share_below_zero,
)

__all__ = [
    "CrossFitted",
    "Fit",
    "Images",
    "Interval",
    "Method",
    "MinimiserInterval",
    "asymptotic_optimism",
    "cross_fitted_risk",
    "difference_interval",
    "minimiser_interval",
    "prediction_interval",
    "risk_interval",
    "risk_optimal_fit",
    "share_below_zero",
    "take",
]
