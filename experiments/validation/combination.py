"""Choosing a prediction, or combining two, against merges that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linprog

from experiments.validation.frames import numbers_of

FUNCTION_SPACE = ("secant", "tangent_base", "tangent_expert", "tangent_both", "secant_tangent", "second_order")
"""Names of the function-space predictions among which the best is chosen."""


def fit_target(merges: pd.DataFrame) -> NDArray[np.float64]:
    """What choices and fits are made against: the merges' measured loss on the calibration images, so that they see no
    test image and no difference between two samples of images; the test loss where the former was not measured."""
    on_calibration = numbers_of(merges, "measured_loss_calibration")
    return np.where(np.isfinite(on_calibration), on_calibration, numbers_of(merges, "measured_loss"))


def log_error(merges: pd.DataFrame, name: str) -> float:
    """Median |log(predicted / :func:`fit_target`)| of a prediction; infinite where it is absent."""
    predicted, measured = numbers_of(merges, f"pred_{name}"), fit_target(merges)
    keep = np.isfinite(predicted) & np.isfinite(measured) & (predicted > 0) & (measured > 0)
    return float(np.median(np.abs(np.log(predicted[keep] / measured[keep])))) if keep.any() else float("inf")


def choose(merges: pd.DataFrame, candidates: Sequence[str] = FUNCTION_SPACE) -> str:
    """The candidate with the smallest :func:`log_error`.

    Raises ValueError if no candidate has a usable column.
    """
    errors = {name: log_error(merges, name) for name in candidates}
    best = min(errors, key=lambda name: errors[name])
    if not np.isfinite(errors[best]):
        raise ValueError(f"none of the predictions {', '.join(candidates)} has finite values; add a pred_<name> column")
    return best


@dataclass(frozen=True)
class Combination:
    """Log-linear combination: log predicted = (1 - w) log lower + w log upper, w = clip(a + b phi(gap), 0, 1).

    gap = |log(upper/lower)|; ``form`` names phi: "constant" (0), "linear" (gap), "saturating" (gap/(1+gap)).
    """

    lower: str
    upper: str
    form: str
    intercept: float
    slope: float

    def predict(self, merges: pd.DataFrame) -> NDArray[np.float64]:
        """Predicted joint risk per merge; NaN where one of the two predictions is missing."""
        low, high = _logs(merges, self.lower), _logs(merges, self.upper)
        weight = np.clip(self.intercept + self.slope * _phi(self.form, np.abs(high - low)), 0.0, 1.0)
        return np.asarray(np.exp((1.0 - weight) * low + weight * high), dtype=float)

    def describe(self) -> str:
        """The fitted weight as a short formula."""
        terms = {"constant": "", "linear": f" {self.slope:+.2f} gap", "saturating": f" {self.slope:+.2f} gap/(1+gap)"}
        return f"w = {self.intercept:.2f}{terms[self.form]}"


def _logs(frame: pd.DataFrame, name: str) -> NDArray[np.float64]:
    values = numbers_of(frame, f"pred_{name}")
    return np.log(np.where(values > 0, values, np.nan))


def _phi(form: str, gap: NDArray[np.float64]) -> NDArray[np.float64]:
    if form == "linear":
        return gap
    return gap / (1.0 + gap) if form == "saturating" else np.zeros_like(gap)


def _least_absolute(design: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients that minimise sum |target - design @ coefficients| (a linear programme)."""
    rows, columns = design.shape
    cost = np.concatenate([np.zeros(columns), np.ones(2 * rows)])
    equality = np.hstack([design, np.eye(rows), -np.eye(rows)])
    bounds = [(-10.0, 10.0)] * columns + [(0.0, None)] * (2 * rows)
    solution = linprog(cost, A_eq=equality, b_eq=target, bounds=bounds, method="highs")
    if solution.x is None:
        raise ValueError("the calibrated combination could not be fitted; check the predictions for extreme values")
    return np.asarray(solution.x[:columns], dtype=float)


def _fit_form(merges: pd.DataFrame, lower: str, upper: str, form: str) -> Combination:
    low, high = _logs(merges, lower), _logs(merges, upper)
    target = np.log(fit_target(merges)) - low
    keep = np.isfinite(low) & np.isfinite(high) & np.isfinite(target)
    low, high, target = low[keep], high[keep], target[keep]
    if keep.sum() < 4:
        raise ValueError(
            f"fitting the combination of {lower} and {upper} needs at least 4 merges, got {int(keep.sum())}"
        )
    gap = (high - low)[:, None]
    design = gap if form == "constant" else np.hstack([gap, gap * _phi(form, np.abs(gap))])
    coefficients = _least_absolute(design, target)
    return Combination(
        lower, upper, form, float(coefficients[0]), float(coefficients[1]) if len(coefficients) > 1 else 0.0
    )


def fit_combination(
    merges: pd.DataFrame, lower: str = "secant", upper: str = "tangent_base", folds: int = 5, seed: int = 0
) -> Combination:
    """Fit the weight by least absolute error in log risk; the form is chosen by cross-validation over groups.

    Uses nothing but ``merges`` (pass one half of the experts).  A form with two parameters must beat the constant
    weight by more than 2 % of its error.
    """
    groups = merges["group"].to_numpy() if "group" in merges else np.arange(len(merges))
    names = np.unique(groups)
    fold_of = dict(zip(np.random.default_rng(seed).permutation(names), np.arange(names.size) % folds, strict=True))
    fold = np.array([fold_of[name] for name in groups])
    best, best_error = "constant", np.inf
    if names.size >= 2 * folds:
        for form in ("constant", "linear", "saturating"):
            errors = []
            for k in range(folds):
                fitted = _fit_form(merges[fold != k], lower, upper, form)
                held = merges[fold == k]
                errors.append(np.abs(np.log(fitted.predict(held) / fit_target(held))))
            error = float(np.nanmean(np.concatenate(errors)))
            if error < best_error * 0.98:
                best, best_error = form, error
    return _fit_form(merges, lower, upper, best)
