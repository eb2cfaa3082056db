"""Merging every group with every method, pricing each merge, and measuring it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.bounds import bound_columns
from experiments.collected import PoolStatistics
from experiments.experts import Expert
from experiments.measure.function_space import MergePoint, Midpoint, price, project, trivial
from experiments.measured import dispersion, measure, measure_on
from experiments.pool import PlannedGroup
from experiments.spec import MethodSpec, ValidationSpec
from merging.batchnorm import reestimate_batchnorm
from merging.merge import merge_flat

Row = dict[str, Any]
Key = tuple[int, int]
"""Group number and position of the method in the spec."""


@dataclass(frozen=True)
class Bench:
    """What every stage after collection works with: the spec, the experts and their collected statistics."""

    spec: ValidationSpec
    pool: PoolStatistics
    experts: Sequence[Expert]
    table: pd.DataFrame
    model: nn.Module
    base: Mapping[str, Tensor]

    def names(self, members: Sequence[int]) -> list[str]:
        """Names of experts by their index."""
        return [self.experts[i].plan.name for i in members]


def merge_vector(bench: Bench, members: Sequence[int], method: MethodSpec) -> Tensor:
    """The merged coordinates M of a group, (P,)."""
    pool = bench.pool
    settings: dict[str, Any] = dict(method.settings)
    return merge_flat(
        method.name,
        pool.base,
        pool.deltas[list(members)],
        pool.backbone.space,
        pool.backbone.partition,
        names=bench.names(members),
        seed=bench.spec.seed,
        **settings,
    )


def linear_coefficients(method: MethodSpec, size: int) -> np.ndarray | None:
    """alpha of a method that is linear with fixed coefficients, else ``None``."""
    if method.name == "average":
        return np.full(size, 1.0 / size)
    if method.name == "task_arithmetic":
        return np.full(size, float(method.settings.get("coefficient", 0.3)))
    return None


@dataclass(frozen=True)
class Merge:
    """A merged vector, how predictions see it, and the seconds it took to form."""

    vector: Tensor
    point: MergePoint
    seconds: float


@dataclass(frozen=True)
class _NonLinear:
    group: PlannedGroup
    vector: Tensor
    alpha: np.ndarray
    residual: Tensor
    seconds: float


def form_merges(
    bench: Bench, groups: Sequence[PlannedGroup], progress: Callable[[str, int, int], None]
) -> dict[Key, Merge]:
    """Merge every group with every method.

    The residual products of non-linear methods are batched by anchor over all groups: one pass per task at the base,
    one per expert at the expert.
    """
    pool = bench.pool
    formed: dict[Key, Merge] = {}
    waiting: dict[Key, _NonLinear] = {}
    for group in groups:
        for m, method in enumerate(bench.spec.methods):
            started = time.perf_counter()
            vector = merge_vector(bench, group.members, method)
            seconds = time.perf_counter() - started
            alpha = linear_coefficients(method, len(group.members))
            if alpha is not None:
                point = MergePoint(alpha, None, None, dispersion(pool, vector, group.members))
                formed[group.number, m] = Merge(vector, point, seconds)
            else:
                projected, residual = project(vector - pool.base, pool.deltas[list(group.members)])
                waiting[group.number, m] = _NonLinear(group, vector, projected, residual, seconds)
    at_base, at_own = _residual_products(pool, waiting, progress)
    for key, item in waiting.items():
        members = item.group.members
        point = MergePoint(
            item.alpha,
            tuple(at_base[key, j] for j in members),
            tuple(at_own[key, j] for j in members),
            dispersion(pool, item.vector, members),
        )
        formed[key] = Merge(item.vector, point, item.seconds)
    return formed


Products = dict[tuple[Key, int], np.ndarray]


def _residual_products(
    pool: PoolStatistics, waiting: Mapping[Key, _NonLinear], progress: Callable[[str, int, int], None]
) -> tuple[Products, Products]:
    """J_j(x_0) r and J_j(x_j) r in logits, by (merge, expert j)."""
    by_task: dict[str, dict[Key, None]] = {}
    by_expert: dict[int, dict[Key, None]] = {}
    for key, item in waiting.items():
        for j in item.group.members:
            by_task.setdefault(pool.tasks[j], {})[key] = None
            by_expert.setdefault(j, {})[key] = None
    at_base: Products = {}
    at_own: Products = {}
    total = len(by_task) + len(by_expert)
    for count, (task, keys) in enumerate(by_task.items()):
        directions = torch.stack([waiting[key].residual for key in keys])
        products = pool.backbone.products(pool.base, directions, pool.calibration[task].images)
        for key, product in zip(keys, products, strict=True):
            for j in waiting[key].group.members:
                if pool.tasks[j] == task:
                    at_base[key, j] = pool.readouts[j].products(product).double().numpy()
        progress("non-linear merges", count + 1, total)
    for count, (j, keys) in enumerate(by_expert.items()):
        directions = torch.stack([waiting[key].residual for key in keys])
        products = pool.backbone.products(pool.vectors[j], directions, pool.calibration[pool.tasks[j]].images)
        for key, product in zip(keys, products, strict=True):
            at_own[key, j] = pool.readouts[j].products(product).double().numpy()
        progress("non-linear merges", len(by_task) + count + 1, total)
    return at_base, at_own


def collect_midpoints(pool: PoolStatistics, vectors: Sequence[Tensor], members: Sequence[int]) -> list[Midpoint]:
    """Logits and products half-way between each expert and each merge of the group, on each expert's task."""
    rows, heads = list(members), [pool.readouts[j] for j in members]
    images = torch.stack([pool.calibration[pool.tasks[j]].images for j in rows])
    anchors = pool.vectors[rows]
    features, products = pool.backbone.products_at(
        torch.cat([(anchors + vector) / 2 for vector in vectors]),
        torch.cat([vector - anchors for vector in vectors]),
        images.repeat(len(vectors), *[1] * (images.ndim - 1)),
    )
    midpoints = []
    for f, d in zip(torch.split(features, len(rows)), torch.split(products, len(rows)), strict=True):
        logits = tuple(h.logits(part).double().numpy() for h, part in zip(heads, f, strict=True))
        changes = tuple(h.products(part).double().numpy() for h, part in zip(heads, d, strict=True))
        midpoints.append(Midpoint(logits, changes))
    return midpoints


def merge_rows(bench: Bench, group: PlannedGroup, merges: Mapping[Key, Merge]) -> list[Row]:
    """One row per method: predictions (calibration images), measurements (test images), bounds, costs."""
    pool, members, size = bench.pool, list(group.members), len(group.members)
    stats = pool.group(members)
    own = bench.table.iloc[members]
    base = measure(pool, pool.base, members, pool.test)
    formed = [merges[group.number, m] for m in range(len(bench.spec.methods))]
    midpoints = collect_midpoints(pool, [merge.vector for merge in formed], members)
    rows = []
    for method, merge, midpoint in zip(bench.spec.methods, formed, midpoints, strict=True):
        started = time.perf_counter()
        prices = price(stats, merge.point, midpoint)
        marginal = time.perf_counter() - started
        measured, on_calibration = measure_on(pool, merge.vector, members, (pool.test, pool.calibration))
        rows.append(
            {
                "group": group.number,
                "half": group.half,
                "experts": ";".join(bench.names(members)),
                "tasks": ";".join(pool.tasks[i] for i in members),
                "N": size,
                "method": method.name,
                "measured_loss": measured.loss,
                "measured_loss_calibration": on_calibration.loss,
                "measured_accuracy": measured.accuracy,
                "measured_se": measured.standard_error,
                "expert_loss": float(own["test_loss"].mean()),
                "expert_accuracy": float(own["test_accuracy"].mean()),
                "base_loss": base.loss,
                "base_accuracy": base.accuracy,
                "merging_cost": measured.loss - float(own["test_loss"].mean()),
                "expert_loss_calibration": float(stats.own_risks().mean()),
                **prices,
                **trivial(stats, merge.point),
                **bound_columns(
                    method,
                    members,
                    bench.experts,
                    pool,
                    bench.table,
                    merge.point.dispersion,
                    shares_images=bench.spec.family.share_images or bench.spec.heads == "shared",
                    trained_heads=bench.spec.heads == "trained",
                ),
                **reestimated_columns(bench, merge.vector, members),
                **_seconds(pool, size, merge.point.base_residual is None, merge.seconds, marginal),
            }
        )
    return rows


def reestimated_columns(bench: Bench, vector: Tensor, members: Sequence[int]) -> Row:
    """The merge with BatchNorm statistics re-estimated on the group's calibration images: measured only, not covered
    by any prediction or bound.  Empty for networks without BatchNorm."""
    pool = bench.pool
    if not pool.backbone.partition.buffers:
        return {}
    state = {**bench.base, **pool.backbone.space.unflatten(vector)}
    tasks = dict.fromkeys(pool.tasks[j] for j in members)
    new = reestimate_batchnorm(bench.model, state, [pool.calibration[task].images for task in tasks])
    measured = measure(pool, pool.backbone.vector(new), members, pool.test)
    return {"reestimated_loss": measured.loss, "reestimated_accuracy": measured.accuracy}


def _seconds(pool: PoolStatistics, size: int, linear: bool, merging: float, marginal: float) -> Row:
    """Seconds to price one merge alone with nothing cached, from measured unit costs, against evaluating the merge.

    Vector arithmetic on the checkpoints counts as nothing; the master bound costs its measured smoothness.
    """
    c = pool.costs
    directions = size if linear else size + 1
    forward, product = size * (size + 1) * c.forward, size * directions * c.product
    chord = forward
    base, own = size * c.forward + product, size * c.forward + product
    return {
        "seconds_secant": chord,
        "seconds_tangent_base": base,
        "seconds_tangent_expert": own,
        "seconds_tangent_both": base + own,
        "seconds_secant_tangent": chord + base,
        "seconds_second_order": chord + base,
        "seconds_curvature_endpoint": own,
        "seconds_curvature_segment": own + size * c.product_at,
        "seconds_curvature_gradient": own + size * c.product_at,
        "seconds_bracket": chord + base,
        "seconds_output": own,
        "seconds_remainder": own + size * c.product_at,
        "seconds_master_checkpoints": size * c.smoothness,
        "seconds_master_logs": size * c.smoothness,
        "seconds_expert_risk": size * c.forward,
        "seconds_base_risk": size * c.forward,
        "seconds_logit_mean": size * size * c.forward,
        **dict.fromkeys(("seconds_task_vector_norm", "seconds_V", "seconds_cosine", "seconds_N"), 0.0),
        "seconds_midpoint": size * (c.forward + c.product_at),
        "seconds_marginal": marginal,
        "seconds_measure": merging + size * c.forward,
    }
