"""The validation table: predicted against measured risk of merged models, whole and with intervals.

Every function takes the ``merges`` frame (one row per merge) and returns a DataFrame; nothing is dropped silently:
``merges`` counts the rows that entered.  Two targets: the joint risk (measured test loss) and the merging cost
(measured test loss minus the experts' own); a prediction's cost is the prediction minus the experts' own loss on the
calibration images.  A choice or a fit is made on one half of the experts and judged on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.table import Table
from scipy.optimize import linprog

from experiments import statistics as st

CELL = ("regime", "architecture")
FUNCTION_SPACE = ("secant", "tangent_base", "tangent_expert", "tangent_both", "secant_tangent", "second_order")
"""Names of the function-space predictions among which the best is chosen."""
RISK_SCALED = ("expert_risk", "base_risk", "logit_mean")
"""Trivial predictors that are losses, for which a ratio to the measured loss makes sense."""

Row = dict[str, object]


@dataclass(frozen=True)
class Settings:
    """How intervals are computed: number of expert resamples, seed, multiplier scale s, nominal level."""

    resamples: int = 500
    seed: int = 0
    scale: float = 0.1
    level: float = 0.95


@dataclass(frozen=True)
class Predictor:
    """A column that claims something about the merged risk.

    ``kind``: prediction, certificate, bound or trivial; ``tier``: estimated, calibrated or "-" (no claim).
    """

    name: str
    column: str
    kind: str
    tier: str


def predictors(merges: pd.DataFrame) -> list[Predictor]:
    """The predictors present in ``merges``, by their prefixes ``pred_``, ``cert_``, ``bound_``, ``trivial_``."""
    kinds = {
        "pred_": ("prediction", "estimated"),
        "cert_": ("certificate", "estimated"),
        "bound_": ("bound", "estimated"),
        "trivial_": ("trivial", "-"),
    }
    found = []
    for prefix, (kind, tier) in kinds.items():
        for column in merges.columns:
            if column.startswith(prefix):
                name = column.removeprefix(prefix)
                tier_of = "calibrated" if kind == "prediction" and name.startswith("calibrated") else tier
                found.append(Predictor(name, column, kind, tier_of))
    return found


def cells(frame: pd.DataFrame, by: Sequence[str] = CELL) -> Iterable[tuple[tuple[object, ...], pd.DataFrame]]:
    """Sub-frames per value of ``by``, in order of appearance."""
    for key, part in frame.groupby(list(by), sort=False, dropna=False):
        yield (key if isinstance(key, tuple) else (key,)), part


def _numbers(frame: pd.DataFrame, column: str) -> NDArray[np.float64]:
    if column not in frame:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype=float)


def merging_cost(merges: pd.DataFrame) -> NDArray[np.float64]:
    """Measured merging cost: the stored column, else measured_loss - expert_loss."""
    if "merging_cost" in merges:
        return _numbers(merges, "merging_cost")
    return _numbers(merges, "measured_loss") - _numbers(merges, "expert_loss")


def _put(row: Row, name: str, estimate: st.Estimate) -> None:
    row[name], row[f"{name}_low"], row[f"{name}_high"] = estimate.value, estimate.low, estimate.high


@dataclass(frozen=True)
class _Resampled:
    """Weights of one cell: overall, and with expert shares taken within N."""

    overall: NDArray[np.float64]
    within: NDArray[np.float64]
    strata: NDArray[np.int64]
    experts: int

    def rows(self, keep: NDArray[np.bool_]) -> _Resampled:
        return _Resampled(self.overall[:, keep], self.within[:, keep], self.strata[keep], self.experts)


def _resample(part: pd.DataFrame, settings: Settings) -> _Resampled:
    members = st.membership_of(part["experts"])
    sizes = part["N"].to_numpy() if "N" in part else members.matrix.sum(axis=1)
    strata = sizes.astype(np.int64)
    overall = st.expert_weights(members, settings.resamples, settings.seed, settings.scale)
    inside = st.expert_weights(members, settings.resamples, settings.seed, settings.scale, strata=strata)
    return _Resampled(overall, inside, strata, len(members.experts))


def _rank_rows(
    row: Row,
    target: str,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weights: _Resampled,
    settings: Settings,
    with_kendall: bool = True,
) -> None:
    keep = np.isfinite(x) & np.isfinite(y)
    x, y, used = x[keep], y[keep], weights.rows(keep)
    ranks: dict[str, Callable[..., NDArray[np.float64]]] = {"spearman": st.spearman}
    if with_kendall:
        ranks["kendall"] = st.kendall
    for name, function in ranks.items():

        def overall(w: NDArray[np.float64], f: Callable[..., NDArray[np.float64]] = function) -> NDArray[np.float64]:
            return f(x, y, w)

        for scope, statistic, matrix in (
            ("", overall, used.overall),
            ("_within", st.within(function, x, y, used.strata), used.within),
        ):
            estimate = st.interval(statistic, matrix, settings.scale, settings.level, (-1.0, 1.0))
            _put(row, f"{name}_{target}{scope}", estimate)


def _ratio_rows(row: Row, value: NDArray[np.float64], measured: NDArray[np.float64]) -> None:
    keep = np.isfinite(value) & np.isfinite(measured) & (measured > 0)
    ratio = value[keep] / measured[keep]
    for q in (5, 50, 95):
        row[f"ratio_q{q:02d}"] = float(np.quantile(ratio, q / 100)) if ratio.size else float("nan")
    row["median_error"] = float(np.median(np.abs(ratio - 1.0))) if ratio.size else float("nan")


def _seconds(part: pd.DataFrame, name: str) -> tuple[float, float]:
    seconds = _numbers(part, f"seconds_{name}")
    measure = _numbers(part, "seconds_measure")
    cost = float(np.nanmean(seconds)) if np.isfinite(seconds).any() else float("nan")
    base = float(np.nanmean(measure)) if np.isfinite(measure).any() else float("nan")
    return cost, cost / base if base > 0 else float("nan")


def validation_table(
    merges: pd.DataFrame,
    settings: Settings | None = None,
    by: Sequence[str] = CELL,
    names: Sequence[str] | None = None,
) -> pd.DataFrame:
    """One row per cell and predictor.

    Columns: the cell, ``predictor``, ``kind``, ``tier``, ``merges`` (rows with a finite prediction and measurement);
    ``{spearman,kendall}_{risk,cost}[_within]`` each with ``_low`` and ``_high``; ``ratio_q05``, ``ratio_q50``,
    ``ratio_q95`` of predicted/measured and ``median_error`` = median |predicted/measured - 1| (loss-valued predictors
    only); ``valid`` = share of merges with measured <= value, with interval, and ``vacuous`` = share of vacuous
    values (certificates and bounds only); ``seconds`` per merge and ``relative_cost`` = seconds over the seconds of
    evaluating the merge.  "_within" pools the rank correlations within each N, weighted by the number of merges.

    ``by`` may name more columns (for instance "method"); ``names`` restricts the predictors.
    """
    settings = settings or Settings()
    rows: list[Row] = []
    for key, part in cells(merges, by):
        weights = _resample(part, settings)
        measured, cost = _numbers(part, "measured_loss"), merging_cost(part)
        own = _numbers(part, "expert_loss_calibration")
        for predictor in predictors(part):
            value = _numbers(part, predictor.column)
            if (names is not None and predictor.name not in names) or not np.isfinite(value).any():
                continue
            keep = np.isfinite(value) & np.isfinite(measured)
            row: Row = dict(zip(by, key, strict=True))
            row |= {
                "predictor": predictor.name,
                "kind": predictor.kind,
                "tier": predictor.tier,
                "merges": int(keep.sum()),
            }
            _rank_rows(row, "risk", value, measured, weights, settings)
            _rank_rows(row, "cost", value if predictor.kind == "trivial" else value - own, cost, weights, settings)
            if predictor.kind != "trivial" or predictor.name in RISK_SCALED:
                _ratio_rows(row, value, measured)
            if predictor.kind in ("certificate", "bound") and keep.any():
                holds = (measured <= value)[keep].astype(float)
                _put(row, "valid", _share(holds, weights.rows(keep), settings))
                flag = f"vacuous_{predictor.name}"
                if flag in part:
                    row["vacuous"] = float(part[flag].astype(float).mean())
            row["seconds"], row["relative_cost"] = _seconds(part, predictor.name)
            rows.append(row)
    return pd.DataFrame(rows)


def _share(flags: NDArray[np.float64], weights: _Resampled, settings: Settings) -> st.Estimate:
    """A share with its interval; a share of exactly 0 or 1 gets the binomial limit for as many trials as experts.

    (Resampling cannot see what never happened; the number of experts, not of merges, is the safe count of trials.)
    """
    found = st.interval(lambda w: st.mean(flags, w), weights.overall, settings.scale, settings.level, (0.0, 1.0))
    limit = ((1.0 - settings.level) / 2.0) ** (1.0 / max(min(weights.experts, flags.size), 1))
    if found.value == 1.0:
        return st.Estimate(1.0, limit, 1.0)
    return st.Estimate(0.0, 0.0, 1.0 - limit) if found.value == 0.0 else found


def bracket_table(
    merges: pd.DataFrame,
    settings: Settings | None = None,
    lower: str = "secant",
    upper: str = "tangent_base",
    by: Sequence[str] = CELL,
) -> pd.DataFrame:
    """How often the bracket [min, max] of two predictions holds the measurement, and whether its width warns of
    collapse.

    Columns: ``inside`` (share with interval); ``inside_sampling`` (the bracket widened on either side by twice its own
    standard error from the calibration images, which is known before merging); ``inside_tolerance`` (widened by twice
    the standard error of the measurement); ``inside_same_images`` (merges measured on the calibration images, so that
    only the error of linearisation is left); ``below`` and ``above`` (shares of measurements under and over the
    bracket), ``ordered`` (share with lower <= upper), ``width`` (median max/min), ``collapsed`` (share with
    measured loss above the base's), ``auc`` of log(max/min) for collapse, with interval, and ``auc_base`` of the
    score log(upper / predicted risk of the base); ``halved`` (share of merges with less than half the experts'
    accuracy) and ``auc_halved`` of the width for it.
    """
    settings = settings or Settings()
    rows: list[Row] = []
    for key, part in cells(merges, by):
        a, b = _numbers(part, f"pred_{lower}"), _numbers(part, f"pred_{upper}")
        measured, base = _numbers(part, "measured_loss"), _numbers(part, "base_loss")
        keep = np.isfinite(a) & np.isfinite(b) & np.isfinite(measured)
        if not keep.any():
            continue
        weights = _resample(part, settings).rows(keep)
        a, b, measured, base = a[keep], b[keep], measured[keep], base[keep]
        low, high = np.minimum(a, b), np.maximum(a, b)
        slack = 2.0 * np.nan_to_num(_numbers(part, "measured_se")[keep])
        row: Row = dict(zip(by, key, strict=True)) | {"merges": int(keep.sum())}
        inside = ((low <= measured) & (measured <= high)).astype(float)
        sampling = 2.0 * np.nan_to_num(_numbers(part, "se_secant")[keep])
        widened = ((low - sampling <= measured) & (measured <= high + sampling)).astype(float)
        tolerant = ((low - slack <= measured) & (measured <= high + slack)).astype(float)
        _put(row, "inside", _share(inside, weights, settings))
        _put(row, "inside_sampling", _share(widened, weights, settings))
        _put(row, "inside_tolerance", _share(tolerant, weights, settings))
        same = _numbers(part, "measured_loss_calibration")[keep]
        on_same = ((low <= same) & (same <= high)).astype(float)
        row["inside_same_images"] = float(on_same.mean()) if np.isfinite(same).all() else float("nan")
        row["below"], row["above"] = float((measured < low).mean()), float((measured > high).mean())
        row["ordered"] = float((a <= b).mean())
        width = np.log(np.maximum(high, 1e-300) / np.maximum(low, 1e-300))
        row["width"] = float(np.exp(np.median(width)))
        collapsed = measured > base
        row["collapsed"] = float(collapsed[np.isfinite(base)].mean()) if np.isfinite(base).any() else float("nan")
        known = np.isfinite(base)

        def area(
            w: NDArray[np.float64],
            score: NDArray[np.float64] = width[known],
            flag: NDArray[np.bool_] = collapsed[known],
        ) -> NDArray[np.float64]:
            return st.auc(score, flag, w)

        _put(row, "auc", st.interval(area, weights.overall[:, known], settings.scale, settings.level, (0.0, 1.0)))
        reference = _numbers(part, "trivial_base_risk")[keep][known]
        if np.isfinite(reference).all() and len(reference):
            row["auc_base"] = float(st.auc(np.log(high[known] / reference), collapsed[known])[0])
        halved = _numbers(part, "measured_accuracy")[keep] < 0.5 * _numbers(part, "expert_accuracy")[keep]
        row["tier"] = "estimated"
        row["halved"], row["auc_halved"] = float(halved.mean()), float(st.auc(width, halved)[0])
        rows.append(row)
    return pd.DataFrame(rows)


def fit_target(merges: pd.DataFrame) -> NDArray[np.float64]:
    """What choices and fits are made against: the merges' measured loss on the calibration images, so that they see no
    test image and no difference between two samples of images; the test loss where the former was not measured."""
    on_calibration = _numbers(merges, "measured_loss_calibration")
    return np.where(np.isfinite(on_calibration), on_calibration, _numbers(merges, "measured_loss"))


def log_error(merges: pd.DataFrame, name: str) -> float:
    """Median |log(predicted / :func:`fit_target`)| of a prediction; infinite where it is absent."""
    predicted, measured = _numbers(merges, f"pred_{name}"), fit_target(merges)
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
    values = _numbers(frame, f"pred_{name}")
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


def _halves(part: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame, pd.DataFrame]]:
    """(fit half, judged half, fit rows, judged rows) for both directions; empty without two halves."""
    if "half" not in part:
        return []
    names = [name for name in ("A", "B") if (part["half"] == name).any()]
    if len(names) < 2:
        return []
    return [(a, b, part[part["half"] == a], part[part["half"] == b]) for a, b in (("A", "B"), ("B", "A"))]


def _judge(row: Row, judged: pd.DataFrame, value: NDArray[np.float64], settings: Settings) -> None:
    weights = _resample(judged, settings)
    measured = _numbers(judged, "measured_loss")
    row["merges"] = int((np.isfinite(value) & np.isfinite(measured)).sum())
    _ratio_rows(row, value, measured)
    keep = np.isfinite(value) & np.isfinite(measured) & (measured > 0)
    error = np.abs(value[keep] / measured[keep] - 1.0)
    used = weights.overall[:, keep]
    median = st.interval(
        lambda w: np.log(np.maximum(st.quantile(error, 0.5, w), 1e-9)), used, settings.scale, settings.level
    )
    row["median_error_low"], row["median_error_high"] = float(np.exp(median.low)), float(np.exp(median.high))
    same = _numbers(judged, "measured_loss_calibration")[keep]
    if np.isfinite(same).all():
        row["same_images_error"] = float(np.median(np.abs(value[keep] / same - 1.0)))
    _rank_rows(row, "risk", value, measured, weights, settings, with_kendall=False)
    own = _numbers(judged, "expert_loss_calibration")
    _rank_rows(row, "cost", value - own, merging_cost(judged), weights, settings, with_kendall=False)


def selection_table(
    merges: pd.DataFrame,
    settings: Settings | None = None,
    candidates: Sequence[str] = FUNCTION_SPACE,
    lower: str = "secant",
    upper: str = "tangent_base",
) -> pd.DataFrame:
    """Choices and fits made on one half of the experts and judged on the other, in both directions.

    Per regime x architecture x direction two rows: ``tier`` "estimated" (the best of ``candidates``, chosen by
    :func:`choose`) and "calibrated" (:func:`fit_combination`).  Columns: ``fit_half``, ``judged_half``, ``chosen``,
    ``fit_error`` (median |log(predicted/measured)| on the fit half), then ratio quantiles, ``median_error`` and
    Spearman correlations, with intervals, on the judged half.
    """
    settings = settings or Settings()
    rows: list[Row] = []
    for key, part in cells(merges):
        for fit_half, judged_half, fit, judged in _halves(part):
            head: Row = dict(zip(CELL, key, strict=True)) | {"fit_half": fit_half, "judged_half": judged_half}
            try:
                name = choose(fit, candidates)
            except ValueError:
                continue
            row = head | {"tier": "estimated", "chosen": name, "fit_error": log_error(fit, name)}
            _judge(row, judged, _numbers(judged, f"pred_{name}"), settings)
            rows.append(row)
            try:
                combination = fit_combination(fit, lower, upper, seed=settings.seed)
            except ValueError:
                continue
            fitted = np.abs(np.log(combination.predict(fit) / _numbers(fit, "measured_loss")))
            row = head | {
                "tier": "calibrated",
                "chosen": combination.describe(),
                "fit_error": float(np.nanmedian(fitted)),
            }
            _judge(row, judged, combination.predict(judged), settings)
            rows.append(row)
    return pd.DataFrame(rows)


def cross_calibrated(merges: pd.DataFrame, lower: str = "secant", upper: str = "tangent_base") -> pd.Series:
    """The calibrated combination for every merge, its weight fitted on the other half of the experts.

    NaN where impossible.
    """
    out = pd.Series(np.nan, index=merges.index, name="pred_calibrated")
    for _, part in cells(merges):
        for _, _, fit, judged in _halves(part):
            try:
                out.loc[judged.index] = fit_combination(fit, lower, upper).predict(judged)
            except ValueError:
                continue
    return out


def aims_table(selection: pd.DataFrame, brackets: pd.DataFrame, gentle: str = "mild") -> pd.DataFrame:
    """The project's stated aims with the value reached: columns regime, architecture, aim, value, target, met, kind.

    Accuracy and rank aims concern the ``gentle`` regime and take the worse of the two directions; bracket aims concern
    every regime.  Rows of kind ``also`` are not stated aims: they show, against the same target, what a reader would
    ask next (the bracket widened by its own sampling error, all regimes together, collapse by another definition).
    """
    rows: list[Row] = []

    def add(
        cell: tuple[object, ...], aim: str, value: float, limit: float, *, below: bool = False, also: bool = False
    ) -> None:
        met = value <= limit if below else value >= limit
        rows.append(
            {
                "regime": cell[0],
                "architecture": cell[1],
                "aim": aim,
                "value": value,
                "target": f"{'<=' if below else '>='} {limit:g}",
                "met": met,
                "kind": "also" if also else "stated",
            }
        )

    if len(selection):
        chosen = selection[(selection["tier"] == "estimated") & (selection["regime"] == gentle)]
        for cell, part in cells(chosen):
            error = float(part["median_error"].max())
            add(cell, "median error of the best function-space prediction", error, 0.2, below=True)
            for target, label in (("risk", "joint risk"), ("cost", "merging cost")):
                rank = float(part[f"spearman_{target}"].min(skipna=False))
                add(cell, f"Spearman, {label}", rank, 0.9)
    for row in brackets.to_dict("records"):
        cell = (row["regime"], row["architecture"])
        pooled = row["regime"] == "all"
        add(cell, "bracket holds the measurement", float(row["inside"]), 0.9, also=pooled)
        if np.isfinite(float(row["auc"])):
            add(cell, "bracket width warns of collapse (AUC)", float(row["auc"]), 0.9, also=pooled)
        for name, aim in (
            ("inside_sampling", "bracket widened by its sampling error holds the measurement"),
            ("inside_same_images", "bracket holds the loss on the calibration images"),
            ("auc_base", "upper end over the base's risk warns of collapse (AUC)"),
            ("auc_halved", "bracket width warns of less than half the experts' accuracy (AUC)"),
        ):
            value = float(row.get(name, np.nan))
            if np.isfinite(value):
                add(cell, aim, value, 0.9, also=True)
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).sort_values("kind", ascending=False, kind="stable", ignore_index=True)


def with_experts(optimal: pd.DataFrame, merges: pd.DataFrame | None) -> pd.DataFrame:
    """``optimal`` with the column ``experts`` of its groups, taken from ``merges`` where it is missing.

    A group that is not found there counts as one expert of its own, so that intervals resample groups.
    """
    if "experts" in optimal:
        return optimal
    keys = ["regime", "architecture", "group"]
    out = optimal.copy()
    if merges is not None and set(keys) <= set(merges.columns):
        out = out.merge(merges[[*keys, "experts"]].drop_duplicates(keys), on=keys, how="left")
    else:
        out["experts"] = np.nan
    own = "group " + out["group"].astype(str)
    out["experts"] = out["experts"].astype(object).where(out["experts"].notna(), own)
    return out


def optimal_table(
    optimal: pd.DataFrame,
    merges: pd.DataFrame | None = None,
    settings: Settings | None = None,
    reference: str = "average",
) -> pd.DataFrame:
    """Mean test loss per method and its paired difference to ``reference``, by N and over all N.

    Columns: regime, architecture, ``N`` (a number, or "all"), method, ``groups``, ``loss`` and ``accuracy`` (means),
    ``difference`` = mean of (loss - reference's loss) over the same groups, all with expert-bootstrap intervals where
    computed, and ``wins`` = share of groups where the method's loss is below the reference's.
    """
    settings = settings or Settings()
    frame = with_experts(optimal, merges)
    rows: list[Row] = []
    for key, part in cells(frame):
        sizes: list[object] = ["all", *sorted(part["N"].unique())] if "N" in part else ["all"]
        for size in sizes:
            chosen = part if size == "all" else part[part["N"] == size]
            losses = chosen.pivot_table(index="group", columns="method", values="measured_loss", sort=False)
            members = st.membership_of(chosen.drop_duplicates("group").set_index("group")["experts"].loc[losses.index])
            accuracies = (
                chosen.pivot_table(index="group", columns="method", values="measured_accuracy", sort=False)
                if "measured_accuracy" in chosen
                else None
            )
            for method in [name for name in dict.fromkeys(chosen["method"]) if name in losses]:
                values = losses[method].to_numpy(dtype=float)
                row: Row = dict(zip(CELL, key, strict=True))
                row |= {"tier": "measured", "N": size, "method": method, "groups": int(np.isfinite(values).sum())}
                _put(row, "loss", _mean(values, members, settings, (0.0, np.inf)))
                if accuracies is not None and method in accuracies:
                    row["accuracy"] = float(np.nanmean(accuracies[method].to_numpy(dtype=float)))
                if reference in losses:
                    difference = values - losses[reference].to_numpy(dtype=float)
                    _put(row, "difference", _mean(difference, members, settings))
                    known = difference[np.isfinite(difference)]
                    row["wins"] = float((known < 0).mean()) if known.size else float("nan")
                rows.append(row)
    return pd.DataFrame(rows)


def _mean(
    values: NDArray[np.float64],
    members: st.Membership,
    settings: Settings,
    domain: tuple[float, float] = (-np.inf, np.inf),
) -> st.Estimate:
    return st.mean_interval(values, members, settings.resamples, settings.seed, settings.scale, settings.level, domain)


def format_number(value: object, digits: int = 3) -> str:
    """A number for reading: ``digits`` significant digits, no exponent for ordinary sizes, "–" for missing."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if not isinstance(value, int | float | np.integer | np.floating):
        return str(value)
    number = float(value)
    if np.isnan(number):
        return "–"
    if number.is_integer() and not isinstance(value, float | np.floating):
        return str(int(number))
    if number != 0 and not 1e-3 <= abs(number) < 1e5:
        return f"{number:.{digits - 1}e}" if np.isfinite(number) else str(number)
    places = 0 if number == 0 else max(0, digits - 1 - int(np.floor(np.log10(abs(number)))))
    return f"{number:.{min(places, digits)}f}"


def readable(
    table: pd.DataFrame, columns: Mapping[str, str] | Sequence[str] | None = None, digits: int = 3
) -> pd.DataFrame:
    """``table`` as text: every interval folded into its value ("0.93 [0.90, 0.96]"), missing values as "–".

    ``columns`` selects and orders columns; a mapping also renames them.  Columns that are missing are left out.
    """
    names = [name for name in table.columns if not _is_limit(name, table)]
    if columns is not None:
        names = [name for name in columns if name in table.columns]
    labels = columns if isinstance(columns, Mapping) else {}
    out: dict[str, list[str]] = {}
    for name in names:
        texts = [format_number(value, digits) for value in table[name]]
        low, high = f"{name}_low", f"{name}_high"
        if low in table and high in table:
            limits = zip(table[low], table[high], strict=True)
            texts = [
                text if pd.isna(a) else f"{text} [{format_number(float(a), digits)}, {format_number(float(b), digits)}]"
                for text, (a, b) in zip(texts, limits, strict=True)
            ]
        out[labels.get(name, name)] = texts
    return pd.DataFrame(out)


def _is_limit(name: str, table: pd.DataFrame) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in table.columns for end in ("_low", "_high"))


def to_markdown(table: pd.DataFrame, columns: Mapping[str, str] | Sequence[str] | None = None, digits: int = 3) -> str:
    """``table`` as a Markdown table (plain text, aligned), through :func:`readable`."""
    text = readable(table, columns, digits)
    if text.shape[1] == 0:
        return "(empty)"
    widths = [max([len(name), *(len(value) for value in text[name])]) for name in text.columns]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    body = [line([str(value) for value in row]) for row in text.itertuples(index=False)]
    return "\n".join([line(list(text.columns)), rule, *body])


def rich_table(
    table: pd.DataFrame,
    title: str = "",
    columns: Mapping[str, str] | Sequence[str] | None = None,
    digits: int = 3,
) -> Table:
    """``table`` for the terminal; numbers right-aligned, a repeated regime or architecture shown once."""
    text = readable(table, columns, digits)
    out = Table(title=title or None, title_justify="left", header_style="bold")
    words = {"regime", "architecture", "network", "predictor", "kind", "tier", "method", "chosen", "aim", "target"}
    names = list(text.columns)
    for name in names:
        out.add_column(str(name), justify="left" if str(name).lower() in words else "right", overflow="fold")
    previous: list[str] = []
    for values in text.itertuples(index=False):
        row = [str(value) for value in values]
        shown = list(row)
        for k, name in enumerate(names):
            if str(name).lower() not in ("regime", "architecture", "network") or row[: k + 1] != previous[: k + 1]:
                break
            shown[k] = ""
        out.add_row(*shown)
        previous = row
    return out


def summary(table: pd.DataFrame, *, wide: bool = True) -> pd.DataFrame:
    """The validation table for a terminal: one line per predictor, quantiles and intervals folded into their value.

    ``wide`` adds the intervals of the correlations, the quantiles, and the last two columns (about 140 characters).
    """
    from experiments.plots import pretty

    def number(value: object) -> str:
        if value is None or pd.isna(value):  # type: ignore[call-overload]
            return "–"
        size = abs(float(value))  # type: ignore[arg-type]
        return f"{value:.2f}" if size < 10 else f"{value:.0f}" if size < 1e5 else f"{value:.0e}"

    def folded(row: Mapping[Any, Any], name: str) -> str:
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        known = wide and low is not None and not pd.isna(low)
        return number(row.get(name)) + (f" [{number(low)}, {number(high)}]" if known else "")

    lines = []
    for row in table.to_dict("records"):
        kind = "" if row["kind"] == "prediction" else f"{row['kind']}: "
        ratio = number(row.get("ratio_q50"))
        if wide and ratio != "–":
            ratio += f" ({number(row.get('ratio_q05'))}–{number(row.get('ratio_q95'))})"
        line = {
            "Regime": str(row["regime"]),
            "Network": pretty(row["architecture"]),
            "Predictor": kind + pretty(row["predictor"]),
            "Tier": str(row["tier"]),
            "Pred/meas": ratio,
            "Error": number(row.get("median_error")),
            "Spearman risk": folded(row, "spearman_risk"),
            "Spearman cost": folded(row, "spearman_cost"),
        }
        if wide:
            line |= {"Valid": number(row.get("valid")), "Cost/eval": number(row.get("relative_cost"))}
        lines.append(line)
    return pd.DataFrame(lines)
