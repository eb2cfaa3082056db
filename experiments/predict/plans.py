"""The merges to price: their coefficients, chosen ones among them, or their vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from experiments.measure.function_space import GroupStatistics, MergePoint, project
from experiments.predict.collecting import product_at
from experiments.predict.options import Options, in_hull
from experiments.predict.report import KINDS, Objective
from experiments.predict_group import Group
from merging.flat import FlatSpace
from merging.merge import merge_flat
from merging.method import Method
from merging.registry import get
from merging.variances import clamped_share, zero_share
from theory.function_space import Array, LogitField, minimise_risk


@dataclass(frozen=True)
class Plan:
    """One merge to price: ``point`` has everything for predictions, ``bound`` the theory's name of the method."""

    label: str
    method: str
    settings: Mapping[str, Any]
    point: MergePoint
    linear: bool
    gap: float | None = None
    alpha: tuple[float, ...] | None = None
    clamped: float = 0.0


def plans_of(
    group: Group, stats: GroupStatistics, methods: Sequence[str], options: Options, objective: Objective
) -> list[Plan]:
    n, fields = group.size, stats.fields(KINDS[objective])
    plans: list[Plan] = []
    hull = in_hull(group, options)
    space, deltas = group.networks[0].space, group.vectors - group.base

    def linear(label: str, name: str, alpha: Array, settings: Mapping[str, Any], gap: float | None = None) -> None:
        point = MergePoint(alpha, None, None, _dispersion(alpha, stats.gram))
        given = tuple(float(v) for v in alpha) if name in ("risk_optimal", "weighted") else None
        clamped = clamped_share(space, group.base, deltas, alpha)
        plans.append(Plan(label, name, settings, point, True, gap, given, clamped))

    for name in methods:
        method, settings = get(name), dict(options.settings.get(name, {}))
        if name == "task_arithmetic":
            scales = (settings["coefficient"],) if "coefficient" in settings else options.coefficients
            for scale in scales:
                linear(f"task_arithmetic({scale:g})", name, np.full(n, float(scale)), {"coefficient": float(scale)})
            summed = [LogitField(f.constant, f.slopes.sum(axis=0)[None], f.labels, f.kind) for f in fields]
            best = minimise_risk(summed, bounds=(0.0, 1.0 / n) if hull else options.bounds)
            scale = float(best.alpha[0])
            linear(f"task_arithmetic(best {scale:.3g})", name, np.full(n, scale), {"coefficient": scale}, best.gap)
        elif name == "risk_optimal":
            best = minimise_risk(fields, bounds=options.bounds, simplex=options.simplex, hull=hull)
            linear("risk_optimal", name, best.alpha, settings, best.gap)
        elif method.coefficients == "required":
            for alpha in options.alphas:
                shown = ", ".join(f"{value:g}" for value in alpha)
                filled = method.settings(settings)
                linear(f"{name}({shown})", name, _linear_alpha(method, n, {**filled, "coefficients": alpha}), settings)
                plans[-1] = replace(plans[-1], alpha=alpha)
        elif method.linear:
            linear(name, name, _linear_alpha(method, n, method.settings(settings)), settings)
        else:
            plans.append(_curved(group, name, settings, options.seed))
    if "weighted" not in methods:
        for alpha in options.alphas:
            linear(
                f"given({', '.join(f'{v:g}' for v in alpha)})", "risk_optimal", np.array(alpha, dtype=np.float64), {}
            )
    return plans


def _linear_alpha(method: Method, size: int, settings: Mapping[str, Any]) -> Array:
    """Coefficients of a linear method: what it does to N unit vectors."""
    rows = list(torch.eye(size, dtype=torch.float64))
    space = FlatSpace(("unit",), ((size,),), (0, size), torch.float64)
    return np.asarray(method.on_rows(rows, space, **settings).numpy())


def _dispersion(alpha: Array, gram: Array) -> float:
    """V = mean_j |M - x_j|^2 from the inner products of the task vectors."""
    apart = alpha[None] - np.eye(len(alpha))
    return float(max(np.einsum("ji,ik,jk->j", apart, gram, apart).mean(), 0.0))


def _curved(group: Group, name: str, settings: Mapping[str, Any], seed: int) -> Plan:
    deltas = group.vectors - group.base
    network = group.networks[0]
    vector = merge_flat(
        name, group.base, deltas, network.space, network.partition, names=group.names, seed=seed, **settings
    )
    alpha, residual = project(vector - group.base, deltas)
    products = tuple(product_at(group, group.base, residual, j) for j in range(group.size))
    V = float((vector - group.vectors).double().square().sum(dim=1).mean())
    shown = ", ".join(f"{key}={value}" for key, value in settings.items())
    clamped = zero_share(network.space, group.base, vector, deltas)
    point = MergePoint(alpha, products, None, V)
    return Plan(f"{name}({shown})" if shown else name, name, settings, point, False, clamped=clamped)
