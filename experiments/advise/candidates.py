"""Merges that advice considers: usual methods, coefficients that minimise a prediction, and subsets of the experts.

Everything that is chosen here is chosen on one half of the calibration images; the other half judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from experiments.advise.domain import Domain
from experiments.measure.predictors.merges import Merge
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.predictors.zoo import ZOO
from theory.convex import Minimum, minimise_over
from theory.function_space import AnyField, Array, LogitField, risk_gradient, uniform_weights
from theory.subsets import best_subset
from theory.surfaces import MergingRule, PredictedMerge, Surface, averaging, optimal_coefficients, risk_surface

CONVEX = ("secant_tangent", "secant", "tangent_base")
"""Predictors whose minima and best subsets are proven, the preferred one first."""
JUDGES = ("pairs", "secant_tangent", "secant")
"""Whose price decides between merges, by availability: on the study of predictions (docs/results/prediction) `pairs`
was within 15 per cent for nine of ten usable merges on both networks."""
USUAL = 0.3
"""Customary coefficient of task arithmetic."""
SUBSETS = 12
"""Experts up to which subsets are searched."""


@dataclass(frozen=True)
class Candidate:
    """A merge that may be recommended.

    Attributes:
        merge: as predictors take it.
        method, settings: as ``mergebound merge`` takes them.
        alpha: (N,); ``None`` for methods that are not linear.
        origin: what it minimises, or ``usual``.
        gap: above the minimum of what it minimises by at most this (nats); NaN where nothing is proven.
    """

    merge: Merge
    method: str
    settings: dict[str, float]
    alpha: Array | None
    origin: str
    gap: float = float("nan")

    @property
    def label(self) -> str:
        """Name for people."""
        return self.merge.label


def judge_of(statistics: FieldStatistics) -> str:
    """The predictor that decides."""
    return next(name for name in JUDGES if ZOO[name].available(statistics))


def affine_fields(statistics: FieldStatistics, name: str) -> list[LogitField]:
    """The fields of an affine predictor in the form that proofs take."""
    found = []
    for field in ZOO[name].fields(statistics):
        zero = np.zeros(statistics.size)
        found.append(LogitField(field.at(zero), field.slopes_at(zero), field.labels, name))
    return found


def convex_surface(statistics: FieldStatistics, weights: Array | None = None) -> tuple[str, Surface]:
    """The preferred convex prediction, and its name."""
    name = next(name for name in CONVEX if ZOO[name].available(statistics))
    return name, risk_surface(affine_fields(statistics, name), weights)


def candidates(statistics: FieldStatistics, domain: Domain, *, nonlinear: bool = True) -> tuple[Candidate, ...]:
    """All merges that are considered, none twice.

    Args:
        statistics: of the images that choose.
        domain: coefficients outside it are not proposed.
        nonlinear: TIES and DARE too (left out in a hull, which they may leave).
    """
    size = statistics.size
    found = [_linear("average", "average", np.full(size, 1.0 / size), {}, "usual")]
    if domain.largest_scale() >= USUAL:
        found.append(_scaled(size, USUAL, "usual"))
    names = [name for name in (*CONVEX, "pairs") if ZOO[name].available(statistics)]
    for name in names:
        fields: Sequence[AnyField] = (
            affine_fields(statistics, name) if name != "pairs" else ZOO[name].fields(statistics)
        )
        scale = best_scale(fields, size, domain)
        if scale > 0.0:
            found.append(_scaled(size, scale, f"best scale by {name}"))
        # quadratic logits are known between base and experts only
        inside = replace(domain, hull=True) if name == "pairs" else domain
        best = minimum(fields, inside)
        gap = best.gap if name != "pairs" else float("nan")
        found.append(_linear(f"risk_optimal ({name})", "risk_optimal", best.point, {}, f"minimises {name}", gap))
    found += _subset_candidates(statistics, domain)
    if nonlinear and not domain.hull and size > 1:
        for method in ("ties", "dare"):
            found.append(Candidate(Merge(method=method), method, {}, None, "usual"))
    return _distinct(found)


def minimum(fields: Sequence[AnyField], domain: Domain) -> Minimum:
    """Coefficients (N,) that minimise a prediction over the domain; proven where the fields are affine, else a descent
    from the average."""
    size = domain.size
    p = uniform_weights(len(fields))
    start = np.full(size, min(1.0 / size, domain.bounds[1]))
    convex = all(isinstance(field, LogitField) for field in fields)
    return minimise_over(
        lambda alpha: risk_gradient(fields, alpha, p), domain.polytope(), start, max_iterations=200 if convex else 60
    )


def best_scale(fields: Sequence[AnyField], size: int, domain: Domain, members: Sequence[int] | None = None) -> float:
    """Common coefficient of task arithmetic with the smallest predicted risk: the best of 41, refined once."""
    from theory.function_space import predict_risk

    direction = np.zeros(size)
    direction[list(range(size) if members is None else members)] = 1.0
    low, high = 0.0, domain.largest_scale(int(direction.sum()))
    for _ in range(2):
        values = np.linspace(low, high, 41)
        risks = predict_risk(fields, values[:, None] * direction).risk
        k = int(np.argmin(risks))
        low, high = float(values[max(k - 1, 0)]), float(values[min(k + 1, 40)])
    return round(float(values[k]), 4)


def subsets_table(statistics: FieldStatistics, domain: Domain) -> pd.DataFrame:
    """The best merge of k of the experts for every k, by the preferred convex prediction: all tasks keep counting.

    Returns:
        ``experts`` (k), ``rule`` (averaging, optimal), ``kept``, ``left_out``, ``predicted`` (nats), ``gap`` (to the
        best subset, proven), ``predictor``, ``tier``, ``seed``; empty for more than :data:`SUBSETS` experts.
    """
    rows = []
    for name, rule_name, choice in _best_of_sizes(statistics, domain):
        out = [n for i, n in enumerate(statistics.names) if i not in choice.experts]
        rows.append(
            {
                "experts": len(choice.experts),
                "rule": rule_name,
                "kept": ";".join(statistics.names[i] for i in choice.experts),
                "left_out": ";".join(out),
                "predicted": choice.risk,
                "gap": choice.gap,
                "predictor": name,
                "tier": "estimated",
                "seed": statistics.seed,
            }
        )
    columns = ["experts", "rule", "kept", "left_out", "predicted", "gap", "predictor", "tier", "seed"]
    return pd.DataFrame(rows, columns=columns)


def _best_of_sizes(statistics: FieldStatistics, domain: Domain) -> list[tuple[str, str, PredictedMerge]]:
    if statistics.size > SUBSETS:
        return []
    name, surface = convex_surface(statistics)
    rules: dict[str, MergingRule] = {"averaging": averaging()}
    if not domain.hull:
        rules["optimal"] = optimal_coefficients(domain.bounds)
    return [
        (name, label, best_subset(surface, rule, k, max_nodes=300))
        for label, rule in rules.items()
        for k in range(1, statistics.size + 1)
    ]


def _subset_candidates(statistics: FieldStatistics, domain: Domain) -> list[Candidate]:
    """The average of the best subset, where it leaves somebody out and is predicted to be better than all."""
    found = []
    choices = [c for _, rule, c in _best_of_sizes(statistics, domain) if rule == "averaging"]
    if choices:
        best = min(choices, key=lambda choice: choice.risk)
        if len(best.experts) < statistics.size:
            label = f"average of {len(best.experts)} of {statistics.size}"
            found.append(_linear(label, "risk_optimal", best.alpha, {}, "best subset", best.gap))
    return found


def _scaled(size: int, scale: float, origin: str) -> Candidate:
    label = f"task_arithmetic({scale:g})"
    return _linear(label, "task_arithmetic", np.full(size, scale), {"coefficient": scale}, origin)


def _linear(
    label: str, method: str, alpha: Array, settings: dict[str, float], origin: str, gap: float = float("nan")
) -> Candidate:
    return Candidate(Merge(label, alpha=alpha), method, settings, np.asarray(alpha, dtype=np.float64), origin, gap)


def _distinct(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    kept: list[Candidate] = []
    for one in found:
        twin = any(
            one.alpha is not None and other.alpha is not None and np.allclose(one.alpha, other.alpha, atol=1e-3)
            for other in kept
        )
        if not twin:
            kept.append(one)
    labels: dict[str, int] = {}
    for one in kept:
        labels[one.label] = labels.get(one.label, 0) + 1
    return tuple(one for one in kept if labels[one.label] == 1 or one is next(k for k in kept if k.label == one.label))
