"""Tables of the study: curves over levels, trends, exponents, verdicts, heterogeneous groups, ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from experiments.studies.hyperparameters.across import heterogeneous, ranks
from experiments.studies.hyperparameters.columns import RANKING, predictions, quantities
from experiments.studies.hyperparameters.joined import Curve, curves
from experiments.studies.hyperparameters.law import QUANTITIES, Law, centre_curves, law_of
from experiments.studies.hyperparameters.powers import power_verdict
from experiments.studies.hyperparameters.spec import StudySpec
from experiments.studies.hyperparameters.trends import Trend, at_every_level, estimate, position, trend, verdict
from experiments.studies.hyperparameters.work import Row


@dataclass(frozen=True)
class Tables:
    """Every table of the study, see :func:`compute`."""

    verdicts: pd.DataFrame
    levels: pd.DataFrame
    trends: pd.DataFrame
    exponents: pd.DataFrame
    heterogeneous: pd.DataFrame
    ranks: pd.DataFrame

    def items(self) -> dict[str, pd.DataFrame]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def compute(spec: StudySpec, table: pd.DataFrame, experts: Mapping[str, Row], recipes: pd.DataFrame) -> Tables:
    """All tables.

    Args:
        spec: the study.
        table: :func:`experiments.studies.hyperparameters.joined.joined`.
        experts: constants by ``run@step`` (empty where the study has none).
        recipes: one row per ``expert`` (``run@step``) with its hyperparameters and ``step``.
    """
    names = dict(zip(table["base_digest"], table["architecture"], strict=True))
    factors = [name for name in spec.levels.factors if (table["factor"] == name).any()]
    kinds: dict[tuple[str, str, str], Trend] = {}
    drawn: dict[tuple[str, str, str], Curve] = {}
    levels, rows = [], []
    for factor in factors:
        for column, (name, tier) in quantities(spec, table).items():
            for base, curve in _curves(spec, table, factor, column):
                about = {"architecture": names[base], "factor": factor, "quantity": name, "tier": tier}
                levels += _levels(about, curve, spec)
                places = position(factor, curve.levels)
                found = trend(places, curve.values, curve.tasks, spec.rule, spec.seed, curve.groups)
                kinds[base, factor, column] = found
                drawn[base, factor, column] = curve
                rows.append(_trend_row(about, found, curve.levels, spec))
    hetero = heterogeneous(spec, table, recipes)
    return Tables(
        verdicts(spec, table, kinds, drawn, hetero, names, factors),
        pd.DataFrame(levels),
        pd.DataFrame(rows),
        exponents(spec, table, kinds, experts, names, factors),
        hetero,
        ranks(spec, table, names),
    )


def _curves(spec: StudySpec, table: pd.DataFrame, factor: str, column: str) -> list[tuple[str, Curve]]:
    """Curves over the levels of the specification that have at least two of them."""
    found = curves(table, factor, column, spec.levels.of(factor))
    return [(base, curve) for base, curve in found.items() if len(curve.levels) > 1]


def _levels(about: dict[str, Any], curve: Curve, spec: StudySpec) -> list[Row]:
    share = str(about["quantity"]).startswith(("accuracy", "error"))
    least = -np.inf if about["quantity"] == "merging cost" else 0.0
    rows = []
    for k, level in enumerate(curve.levels):
        own = [row[k] for row in curve.tasks]
        found = estimate(curve.values[:, k], own, list(curve.groups[:, k]), spec.rule, spec.seed)
        draws = int(np.isfinite(curve.values[:, k]).sum())
        low, high = np.clip([found.low, found.high], least, 1.0 if share else np.inf)
        rows.append(about | {"level": level, "value": found.value, "value_low": low, "value_high": high,
                             "groups": curve.distinct[k], "draws": draws, "seed": spec.seed})  # fmt: skip
    return rows


def _trend_row(about: dict[str, Any], found: Trend, levels: Sequence[object], spec: StudySpec) -> Row:
    row = about | {"kind": found.kind, "turn": levels[found.turn] if found.turn >= 0 else ""}
    row |= {"exponent": found.slope.value, "exponent_low": found.slope.low, "exponent_high": found.slope.high}
    row |= {"change": found.change.value, "change_low": found.change.low, "change_high": found.change.high}
    if about["factor"] in RANKING:
        row |= dict.fromkeys(("exponent", "exponent_low", "exponent_high"), np.nan)
    return row | {"groups": found.groups, "draws": found.draws, "left_out": _left_out(found), "seed": spec.seed}


def _left_out(found: Trend) -> str:
    """Levels (of the number of experts) that a trend leaves out, since all draws are the same group there."""
    return ";".join(f"{place:g}" for place in found.left_out)


def verdicts(
    spec: StudySpec,
    table: pd.DataFrame,
    kinds: Mapping[tuple[str, str, str], Trend],
    drawn: Mapping[tuple[str, str, str], Curve],
    hetero: pd.DataFrame,
    names: Mapping[str, str],
    factors: Sequence[str],
) -> pd.DataFrame:
    """One row per network, factor and prediction: measured and predicted kind, and the verdict; homogeneous groups by
    the trend over levels, heterogeneous ones by the sign of the regression's slope.

    ``measured_there`` is the measured kind over the levels and draws for which the prediction has a number (it has none
    where merged running variances are negative): the verdict is about those.
    """
    rows = []
    for base, architecture in sorted(names.items(), key=lambda item: item[1]):
        for factor in factors:
            measured = kinds.get((base, factor, "loss"))
            if measured is None:
                continue
            for column, (name, tier) in predictions(spec, table).items():
                found = kinds.get((base, factor, column))
                if found is None:
                    continue
                there = trend_where(drawn[base, factor, "loss"], drawn[base, factor, column], factor, measured, spec)
                own = (
                    hetero[(hetero["architecture"] == architecture) & (hetero["factor"] == factor)]
                    if len(hetero)
                    else hetero
                )
                joint = dict(zip(own["quantity"], own["verdict"], strict=True)) if len(own) else {}
                rows.append(
                    {
                        "architecture": architecture,
                        "factor": factor,
                        "prediction": name,
                        "tier": tier,
                        "measured": measured.kind,
                        "measured_there": there.kind,
                        "measured_exponent": measured.slope.value,
                        "measured_exponent_low": measured.slope.low,
                        "measured_exponent_high": measured.slope.high,
                        "measured_change": measured.change.value,
                        "predicted": found.kind,
                        "predicted_exponent": found.slope.value,
                        "predicted_exponent_low": found.slope.low,
                        "predicted_exponent_high": found.slope.high,
                        "verdict": verdict(there.kind, found.kind),
                        "heterogeneous": joint.get(name, ""),
                        "groups": found.groups,
                        "draws": found.draws,
                        "left_out": _left_out(found),
                        "seed": spec.seed,
                    }
                )
    return pd.DataFrame(rows)


def trend_where(measured: Curve, predicted: Curve, factor: str, whole: Trend, spec: StudySpec) -> Trend:
    """The measured trend over the levels and draws that a prediction has numbers for; ``whole`` where it has all."""
    missing = ~np.isfinite(predicted.values)
    if not (missing & np.isfinite(measured.values)).any():
        return whole
    values = np.where(missing, np.nan, measured.values)
    places = position(factor, measured.levels)
    return trend(places, values, measured.tasks, spec.rule, spec.seed, measured.groups)


def exponents(
    spec: StudySpec,
    table: pd.DataFrame,
    kinds: Mapping[tuple[str, str, str], Trend],
    experts: Mapping[str, Row],
    names: Mapping[str, str],
    factors: Sequence[str],
) -> pd.DataFrame:
    """Fitted exponents beside the theory's: the law, the formula with constants of the centre, with constants measured
    at every level, and what was measured on checkpoints (drift and V; epsilon needs twins, which the study has not).

    Each has its verdict (:func:`~experiments.studies.hyperparameters.powers.power_verdict`) and ``bend``, by how much
    it grows from the first two levels to the last two."""
    columns = {"drift": ("drift_bound", "drift"), "V": ("V_bound", "V"), "epsilon": ("epsilon", "")}
    rows: list[Row] = []
    for base, architecture in sorted(names.items(), key=lambda item: item[1]):
        for factor in factors:
            if factor in (*RANKING, "coefficient"):
                continue
            levels = spec.levels.of(factor)
            formula = {} if factor == "experts" else _formula(spec, table, experts, base, factor, levels)
            for quantity in QUANTITIES:
                about = {"architecture": architecture, "factor": factor, "quantity": quantity, "seed": spec.seed}
                fitted = kinds.get((base, factor, "V")) if factor == "experts" else None
                law = law_of(factor, quantity, levels if fitted is None else list(fitted.used))
                if law is not None:
                    ends = {"exponent": (law.low + law.high) / 2, "exponent_low": law.low, "exponent_high": law.high}
                    rows.append(about | {"source": "law", "tier": "theory", **ends, "verdict": "", "note": law.source})
                if quantity in formula:
                    rows.append(
                        _exponent(about, "formula, constants of the centre", "estimated", formula[quantity], law)
                    )
                estimated, measured = columns[quantity]
                for source, column, tier in (
                    ("formula, constants of each level", estimated, "estimated"),
                    ("measured", measured, "measured"),
                ):
                    if (base, factor, column) in kinds and not (factor == "experts" and quantity == "epsilon"):
                        rows.append(_exponent(about, source, tier, kinds[base, factor, column], law))
    return pd.DataFrame(rows)


def _exponent(about: Row, source: str, tier: str, found: Trend, law: Law | None) -> Row:
    slope, bend = found.slope, found.bend
    ends = {"exponent": slope.value, "exponent_low": slope.low, "exponent_high": slope.high}
    bends = {"bend": bend.value, "bend_low": bend.low, "bend_high": bend.high}
    said = power_verdict(slope, bend, law, formula=source != "measured")
    return about | {"source": source, "tier": tier, **ends, **bends, "verdict": said, "note": ""}


def _formula(
    spec: StudySpec, table: pd.DataFrame, experts: Mapping[str, Row], base: str, factor: str, levels: Sequence[object]
) -> dict[str, Trend]:
    """Trends of the theorems' formulas for the centre's experts, constants held."""
    centre = spec.centre.steps if factor == "step" else getattr(spec.centre, factor)
    part = table[(table["base_digest"] == base) & (table["factor"] == factor) & (table["level"] == centre)]
    own = sorted({name for text in part["experts"] for name in str(text).split(";")} & set(experts))
    if not own:
        return {}
    x = position(factor, levels)
    made = centre_curves([experts[name] for name in own], factor, levels, spec)
    one_each = at_every_level([[name] for name in own], len(levels))
    return {q: trend(x, values, one_each, spec.rule, spec.seed) for q, values in made.items()}
