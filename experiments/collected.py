"""Everything that is collected once per pool of experts, so that every merge can be priced from it.

Features are stored rather than logits: a private linear head of any expert is then one matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.experts import Expert, Progress
from experiments.measure.backbone import Backbone, Readout, smoothness_many
from experiments.measure.function_space import GroupStatistics
from experiments.tasks.types import Family, Split

SMOOTHNESS_IMAGES = 16


@dataclass(frozen=True)
class UnitCosts:
    """Measured seconds on one task's calibration images: a forward pass, a Jacobian product at a shared anchor, one at
    an anchor of its own, and the measured smoothness of one expert."""

    forward: float
    product: float
    product_at: float
    smoothness: float


@dataclass(frozen=True)
class PoolStatistics:
    """Statistics of a pool of E experts; task names index calibration images.

    Attributes:
        backbone: the network as a function of its coordinates.
        base: x_0, (P,).
        vectors: x_i, (E, P).
        deltas: Delta_i, (E, P).
        readouts: each expert's head.
        tasks: each expert's task.
        calibration, test: images by task.
        base_features: by task, (n, d).
        expert_features: by (expert, task), (n, d).
        base_products: by (expert, task), J_task(x_0) Delta_expert, (n, d).
        own_products: by (anchor expert j, expert i), J_j(x_j) Delta_i on j's task, (n, d).
        smoothness: estimated L of each expert's loss, (E,).
        costs: measured unit costs.
    """

    backbone: Backbone
    base: Tensor
    vectors: Tensor
    deltas: Tensor
    readouts: tuple[Readout, ...]
    tasks: tuple[str, ...]
    calibration: Mapping[str, Split]
    test: Mapping[str, Split]
    base_features: Mapping[str, Tensor]
    expert_features: Mapping[tuple[int, str], Tensor]
    base_products: Mapping[tuple[int, str], Tensor]
    own_products: Mapping[tuple[int, int], Tensor]
    smoothness: np.ndarray
    costs: UnitCosts

    @property
    def classes(self) -> int:
        """Number of classes C."""
        weight = self.readouts[0].weight
        return int(next(iter(self.base_features.values())).shape[1] if weight is None else weight.shape[0])

    def group(self, members: Sequence[int]) -> GroupStatistics:
        """The statistics of one group of experts, through each one's own head."""
        base_logits, expert_logits, base_products, own_products, labels = [], [], [], [], []
        for j in members:
            task, head = self.tasks[j], self.readouts[j]
            base_logits.append(_wide(head.logits(self.base_features[task])))
            features = torch.stack([self.expert_features[i, task] for i in members])
            expert_logits.append(_wide(head.logits(features)))
            base_products.append(_wide(head.products(torch.stack([self.base_products[i, task] for i in members]))))
            own_products.append(_wide(head.products(torch.stack([self.own_products[j, i] for i in members]))))
            labels.append(self.calibration[task].labels.numpy())
        rows = self.deltas[list(members)].double()
        return GroupStatistics(
            tuple(labels),
            tuple(base_logits),
            tuple(expert_logits),
            tuple(base_products),
            tuple(own_products),
            (rows @ rows.T).numpy(),
            tuple(self.calibration[self.tasks[j]].source for j in members),
        )


def _wide(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.double().numpy())


def collect_pool(
    backbone: Backbone,
    base: Mapping[str, Tensor],
    experts: Sequence[Expert],
    family: Family,
    groups: Sequence[Sequence[int]],
    progress: Progress,
) -> PoolStatistics:
    """Collect features and Jacobian products for every pair (expert, task) that occurs in a group."""
    origin = backbone.vector(base)
    vectors = torch.stack([backbone.vector(e.state) for e in experts])
    deltas = vectors - origin
    readouts = tuple(backbone.readout(e.state) for e in experts)
    tasks = tuple(e.plan.task for e in experts)
    partners: dict[int, set[int]] = {i: set() for i in range(len(experts))}
    for group in groups:
        for j in group:
            partners[j].update(group)
    by_task: dict[str, set[int]] = {name: set() for name in family.tasks}
    for j, others in partners.items():
        by_task[tasks[j]].update(others)
    total = sum(len(s) for s in by_task.values()) + sum(len(s) for s in partners.values())
    done = 0
    calibration = {name: task.calibration for name, task in family.tasks.items()}
    base_features, expert_features, base_products, own_products = {}, {}, {}, {}
    clock = {"forward": 0.0, "product": 0.0}
    counts = {"forward": 0, "product": 0}
    names = list(family.tasks)
    sizes = [len(calibration[name]) for name in names]
    every_image = torch.cat([calibration[name].images for name in names])
    for i in range(len(experts)):
        started = time.perf_counter()
        pieces = torch.split(backbone.features(vectors[i], every_image), sizes)
        clock["forward"] += time.perf_counter() - started
        counts["forward"] += len(names)
        expert_features.update({(i, name): piece for name, piece in zip(names, pieces, strict=True)})
    for name, needed in by_task.items():
        images = calibration[name].images
        started = time.perf_counter()
        base_features[name] = backbone.features(origin, images)
        clock["forward"] += time.perf_counter() - started
        counts["forward"] += 1
        started = time.perf_counter()
        if needed:
            rows = sorted(needed)
            for i, product in zip(rows, backbone.products(origin, deltas[rows], images), strict=True):
                base_products[i, name] = product
        clock["product"] += time.perf_counter() - started
        counts["product"] += len(needed)
        done += len(needed)
        progress("collect", done, total)
    for j, others in partners.items():
        rows = sorted(others)
        if rows:
            products = backbone.products(vectors[j], deltas[rows], calibration[tasks[j]].images)
            for i, product in zip(rows, products, strict=True):
                own_products[j, i] = product
        done += len(rows)
        progress("collect", done, total)
    stiffness = np.full(len(experts), np.nan)
    started = time.perf_counter()
    rows = [j for j in range(len(experts)) if partners[j]]
    if rows:
        some_images = torch.stack([calibration[tasks[j]].images[:SMOOTHNESS_IMAGES] for j in rows])
        heads = [readouts[j] for j in rows]
        anchors = (origin.expand(len(rows), -1), vectors[rows])
        found = [smoothness_many(backbone, point, heads, some_images, iterations=4) for point in anchors]
        stiffness[rows] = torch.maximum(*found).double().numpy()
    per_smoothness = (time.perf_counter() - started) / max(len(rows), 1)
    started = time.perf_counter()
    some = calibration[tasks[0]].images
    backbone.products_at(vectors[:4], deltas[:4], torch.stack([some] * len(vectors[:4])))
    at_own = (time.perf_counter() - started) / len(vectors[:4])
    return PoolStatistics(
        backbone,
        origin,
        vectors,
        deltas,
        readouts,
        tasks,
        calibration,
        {name: task.test for name, task in family.tasks.items()},
        base_features,
        expert_features,
        base_products,
        own_products,
        stiffness,
        UnitCosts(
            clock["forward"] / max(counts["forward"], 1),
            clock["product"] / max(counts["product"], 1),
            at_own,
            per_smoothness,
        ),
    )
