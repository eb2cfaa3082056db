"""Coefficients: the sweep of task arithmetic, the loss along lines, and coefficients that minimise a prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.measure.function_space import MergePoint, predicted_logits, sweep
from experiments.measured import clamp_variances, measure
from experiments.merges import Bench, merge_vector
from experiments.pool import PlannedGroup
from experiments.spec import MethodSpec
from merging.registry import get
from merging.variances import stays_in_hull
from theory.function_space import cross_entropy, minimise_risk

Row = dict[str, Any]

TUNING_GRID = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Coefficients lambda among which the tuned methods choose, by the measured loss on the calibration images."""

TUNED = ("task_arithmetic", "ties")
"""Methods whose coefficient lambda is also tuned (DARE equals task arithmetic in expectation)."""

RISK_OPTIMAL = ("secant", "tangent_base", "secant_tangent", "second_order")
"""Predictions that ``risk_optimal`` minimises."""


def sweep_rows(bench: Bench, group: PlannedGroup) -> list[Row]:
    pool = bench.pool
    members, size = list(group.members), len(group.members)
    values = np.array(bench.spec.sweep_values)
    alphas = np.repeat(values[:, None], size, axis=1)
    stats = pool.group(members)
    predicted = sweep(stats, alphas, ("secant", "tangent_base", "secant_tangent", "second_order"))
    total = pool.deltas[members].sum(dim=0)
    rows = []
    for k, value in enumerate(values):
        measured = measure(pool, clamp_variances(pool, pool.base + float(value) * total), members, pool.test)
        rows.append(
            {
                "group": group.number,
                "half": group.half,
                "N": size,
                "experts": ";".join(bench.names(members)),
                "lam": float(value),
                "measured_loss": measured.loss,
                "measured_accuracy": measured.accuracy,
                **{f"pred_{kind}": float(risk[k]) for kind, risk in predicted.items()},
            }
        )
    return rows


def line_rows(bench: Bench, a: int, b: int) -> list[Row]:
    pool = bench.pool
    members = [a, b]
    stats = pool.group(members)
    rows = []
    for t in np.linspace(0.0, 1.0, 11):
        point = MergePoint(np.array([1.0 - t, t]), None, None, 0.0)
        measured = measure(
            pool, pool.vectors[a] + float(t) * (pool.vectors[b] - pool.vectors[a]), members, dict(pool.test)
        )
        risks = {
            kind: [
                float(cross_entropy(h, y).mean())
                for h, y in zip(predicted_logits(stats, point, kind), stats.labels, strict=True)
            ]
            for kind in ("secant", "tangent_base")
        }
        for label, pick in (("a", slice(0, 1)), ("b", slice(1, 2)), ("mean", slice(0, 2))):
            rows.append(
                {
                    "expert_a": bench.experts[a].plan.name,
                    "expert_b": bench.experts[b].plan.name,
                    "t": float(t),
                    "task": label,
                    "measured_loss": float(measured.losses[pick].mean()),
                    **{f"pred_{kind}": float(np.mean(risk[pick])) for kind, risk in risks.items()},
                }
            )
    return rows


def optimal_rows(bench: Bench, group: PlannedGroup) -> list[Row]:
    """Methods compared on test sets; every choice is made on the calibration images that the predictions use."""
    pool = bench.pool
    members, size = list(group.members), len(group.members)
    names = bench.names(members)
    stats = pool.group(members)
    rows = []

    def add(label: str, vector: Tensor, alpha: np.ndarray | None = None, predicted: float | None = None) -> None:
        measured = measure(pool, vector, members, pool.test)
        rows.append(
            {
                "group": group.number,
                "half": group.half,
                "N": size,
                "experts": ";".join(names),
                "method": label,
                "measured_loss": measured.loss,
                "measured_accuracy": measured.accuracy,
                "predicted": predicted,
                "alpha": None if alpha is None else ";".join(f"{v:.4f}" for v in alpha),
            }
        )

    for method in bench.spec.methods:
        vector = merge_vector(bench, members, method)
        add(method.name, vector)
        if method.name not in TUNED or "coefficient" not in {p.name for p in get(method.name).parameters}:
            continue
        best, best_loss = vector, np.inf
        for value in TUNING_GRID:
            tuned = replace_setting(method, value)
            candidate = merge_vector(bench, members, tuned)
            loss = measure(pool, candidate, members, pool.calibration).loss
            if loss < best_loss:
                best, best_loss = candidate, loss
        add(f"{method.name}_tuned", best)
    for kind in RISK_OPTIMAL:
        optimum = minimise_risk(stats.fields(kind), hull=stays_in_hull(pool.backbone.space.names))
        alpha = torch.as_tensor(optimum.alpha, dtype=pool.deltas.dtype)
        vector = clamp_variances(pool, pool.base + alpha @ pool.deltas[members])
        add(f"risk_optimal_{kind}", vector, optimum.alpha, optimum.risk)
    return rows


def replace_setting(method: MethodSpec, coefficient: float) -> MethodSpec:
    """The same method with another coefficient lambda."""
    return method.model_copy(update={"settings": {**method.settings, "coefficient": coefficient}})
