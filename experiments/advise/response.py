"""The response of merged risk to hyperparameters, in the theory's coordinates: a Gaussian process fitted to a pilot.

Training time, noise time and shrinkage (:func:`experiments.advise.pilot.coordinates`) stand for learning rate, steps,
batch size, momentum and decay: recipes that agree in them are taken to be alike, which is how short runs speak for
longer ones with smaller learning rates.  That is an assumption, exact for plain linear dynamics; it is checked by
leaving out one recipe at a time, and the interval is widened until nine of ten left-out recipes lie inside with all
their merges (*calibrated*): merges of one recipe are no independent draws, and what is recommended was chosen because
its prediction is low, which an interval for single merges would not survive.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from theory.errors import MergeboundError

Array = npt.NDArray[np.float64]
FEATURES = ("log_time", "log_noise", "shrink", "scale", "log_experts")
"""Coordinates of a merge."""
COVERAGE = 0.9
_LARGEST = 240
"""Rows that are fitted at most (evenly spread)."""


@dataclass(frozen=True)
class Quality:
    """How well recipes that were left out are predicted.

    Attributes:
        spearman: rank correlation of predicted and measured, over all left-out rows.
        median_error: median of |log(predicted / measured)|.
        widening: factor on the process' own standard deviation with which 90 % of left-out recipes lie inside with all
            of their merges (conformal over recipes; all of them where there are fewer than ten).
        rows, recipes: fitted.
    """

    spearman: float
    median_error: float
    widening: float
    rows: int
    recipes: int
    tier: str = "calibrated"


@dataclass(frozen=True)
class Response:
    """A fitted response of ``log`` of a column, or of the column itself.

    Attributes:
        column: of the pilot's rows.
        log: whether its logarithm was fitted.
        centre, width: of the features, (F,).
        models: all rows first, then without each recipe in turn.
        quality: of left-out predictions.
        low, high: smallest and largest features seen, (F,).
    """

    column: str
    log: bool
    centre: Array
    width: Array
    models: tuple[Any, ...]
    quality: Quality
    low: Array
    high: Array

    def mean_and_deviation(self, points: Array, model: int = 0) -> tuple[Array, Array]:
        """Mean and standard deviation at features (m, F), in the fitted unit; ``model`` 0 knows all recipes."""
        mean, deviation = self.models[model].predict((points - self.centre) / self.width, return_std=True)
        return np.asarray(mean), np.asarray(deviation)

    def predict(self, points: Array) -> tuple[Array, Array, Array]:
        """Value, low and high end of the calibrated 90 % interval at features (m, F), in the column's unit."""
        mean, deviation = self.mean_and_deviation(points)
        half = self.quality.widening * deviation
        ends = mean, mean - half, mean + half
        a, b, c = (np.exp(v) if self.log else v for v in ends)
        return np.asarray(a), np.asarray(b), np.asarray(c)


def features(rows: pd.DataFrame) -> Array:
    """Coordinates of rows with ``time``, ``noise``, ``shrink``, ``scale`` and ``experts``: (m, F)."""
    columns = [
        np.log(rows["time"].to_numpy(dtype=float)),
        np.log(rows["noise"].to_numpy(dtype=float)),
        rows["shrink"].to_numpy(dtype=float),
        rows["scale"].to_numpy(dtype=float),
        np.log(rows["experts"].to_numpy(dtype=float)),
    ]
    return np.stack(columns, axis=1)


def fit_response(rows: pd.DataFrame, column: str, *, log: bool = True, seed: int = 0) -> Response:
    """Fit a response to a pilot's rows.

    Args:
        rows: of :func:`experiments.advise.pilot.pilot_rows`.
        column: what is fitted.
        log: fit its logarithm.
        seed: of the process.

    Raises:
        MergeboundError: fewer than three recipes, or a value whose logarithm does not exist.
    """
    recipes = sorted(set(rows["recipe"]))
    if len(recipes) < 3:
        raise MergeboundError(f"pilot: {len(recipes)} recipes are too few to fit a response; give 3 or more")
    if len(rows) > _LARGEST:
        rows = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, _LARGEST).round().astype(int))]
    x, y = features(rows), rows[column].to_numpy(dtype=float)
    if log:
        if not (y > 0.0).all():
            raise MergeboundError(f"pilot: {column} is not positive everywhere; fit it without its logarithm")
        y = np.log(y)
    centre, spread = x.mean(axis=0), x.std(axis=0)
    width = np.where(spread > 1e-9, spread, 1.0)
    scaled = (x - centre) / width
    whole = _process(scaled, y, None, seed)
    number = rows["recipe"].to_numpy()
    models, left, truth = [whole], [], []
    for one in recipes:
        kept = number != one
        model = _process(scaled[kept], y[kept], whole.kernel_, seed)
        models.append(model)
        mean, deviation = model.predict(scaled[~kept], return_std=True)
        left.append(np.stack([mean, np.maximum(deviation, 1e-9)]))
        truth.append(y[~kept])
    return Response(
        column, log, centre, width, tuple(models), _quality(left, truth, len(rows)), x.min(axis=0), x.max(axis=0)
    )


def _process(x: Array, y: Array, kernel: Any, seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    made = kernel
    if kernel is None:
        lengths = Matern(np.full(x.shape[1], 2.0), (0.3, 30.0), nu=2.5)
        made = ConstantKernel(1.0, (0.05, 50.0)) * lengths + WhiteKernel(0.02, (1e-4, 1.0))
    model = GaussianProcessRegressor(
        made,
        optimizer="fmin_l_bfgs_b" if kernel is None else None,
        normalize_y=True,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound says that a coordinate is flat
        return model.fit(x, y)


def _quality(left: Sequence[Array], truth: Sequence[Array], rows: int) -> Quality:
    from scipy.stats import spearmanr

    found, y = np.concatenate(left, axis=1), np.concatenate(truth)
    worst = np.sort([float((np.abs(t - m[0]) / m[1]).max()) for m, t in zip(left, truth, strict=True)])
    place = min(int(np.ceil(COVERAGE * (len(worst) + 1))), len(worst)) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant columns have no rank
        rank = float(spearmanr(found[0], y).statistic)
    return Quality(
        0.0 if np.isnan(rank) else rank, float(np.median(np.abs(y - found[0]))), float(max(worst[place], 1.645)), rows,
        len(truth),
    )  # fmt: skip


def sensitivity(response: Response, point: Array, direction: Array, step: float = 0.2) -> tuple[float, float, float]:
    """Derivative of the response at one point (F,) along a direction (F,), with a jackknife interval over recipes.

    Returns:
        Value, low, high (90 %, normal): d(response)/dt at ``point + t direction``, by a central difference.
    """
    ends = np.stack([point - step * direction, point + step * direction])
    slopes = []
    for model in range(len(response.models)):
        mean, _ = response.mean_and_deviation(ends, model)
        slopes.append(float((mean[1] - mean[0]) / (2.0 * step)))
    value, others = slopes[0], np.array(slopes[1:])
    m = len(others)
    error = float(np.sqrt((m - 1) / m * ((others - others.mean()) ** 2).sum()))
    return value, value - 1.645 * error, value + 1.645 * error
