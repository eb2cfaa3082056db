"""Forming merges of a pool's experts and measuring them, image by image."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.measured import Measured
from experiments.prediction.material import Material, features
from experiments.spec import MethodSpec
from experiments.tasks.types import Split
from merging.batchnorm import reestimate_batchnorm
from merging.merge import merge_flat
from merging.registry import get
from theory.function_space import Array, Labels, joint_standard_error


@dataclass(frozen=True)
class Formed:
    """A merge: its coordinates M (P,), its coefficients where it is linear, and what forming it cost.

    Attributes:
        vector: M.
        alpha: (N,); ``None`` for methods that are not linear.
        seconds: processor seconds.
    """

    vector: Tensor
    alpha: Array | None
    seconds: float


def form(material: Material, members: Sequence[int], method: MethodSpec, seed: int, **extras: Any) -> Formed:
    """Merge some of the pool's experts; ``extras`` are a method's data (Fisher diagonals, coefficients)."""
    rows = list(members)
    settings: dict[str, Any] = dict(method.settings) | extras
    started = time.process_time()
    vector = merge_flat(
        method.name,
        material.origin,
        material.deltas[rows],
        material.backbone.space,
        material.backbone.partition,
        names=[material.names[i] for i in rows],
        seed=seed,
        **settings,
    )
    seconds = time.process_time() - started
    return Formed(vector, linear_coefficients(method, len(rows)), seconds)


def linear_coefficients(method: MethodSpec, size: int) -> Array | None:
    """alpha of a method that is linear with coefficients known beforehand, else ``None``."""
    if method.name == "average":
        return np.full(size, 1.0 / size)
    if method.name == "task_arithmetic":
        defaults = get(method.name).settings(method.settings)
        return np.full(size, float(defaults["coefficient"]))
    return None


Images = list[tuple[Array, Array, Labels]]
"""Per task: losses in nats, whether the class was right, and names of the images, (n,) each."""


def per_image(
    material: Material, vector: Tensor, members: Sequence[int], sets: Sequence[Mapping[str, Split]]
) -> list[Images]:
    """Losses and hits of merged coordinates on every member's own task through its own head, on several sets of images
    that pass together."""
    found: list[Images] = [[] for _ in sets]
    for j in members:
        splits = [one[material.tasks[j]] for one in sets]
        joined = features(material, vector, torch.cat([split.images for split in splits]))
        logits = torch.split(material.readouts[j].logits(joined), [len(split) for split in splits])
        for one, part, split in zip(found, logits, splits, strict=True):
            losses = torch.nn.functional.cross_entropy(part.double(), split.labels, reduction="none").numpy()
            hits = (part.argmax(dim=1) == split.labels).double().numpy()
            one.append((losses, hits, np.asarray(split.source)))
    return found


def summary(images: Images, part: slice = slice(None)) -> Measured:
    """Losses and accuracies by task, and the standard error of the mean loss (by images)."""
    some: Images = [(losses[part], hits[part], source[part]) for losses, hits, source in images]
    error = joint_standard_error([losses for losses, _, _ in some], [source for _, _, source in some])
    return Measured(
        np.array([losses.mean() for losses, _, _ in some]), np.array([hits.mean() for _, hits, _ in some]), error
    )


def measure_sets(
    material: Material, vector: Tensor, members: Sequence[int], sets: Sequence[Mapping[str, Split]]
) -> list[Measured]:
    """Loss and accuracy of merged coordinates on several sets of images."""
    return [summary(images) for images in per_image(material, vector, members, sets)]


def reestimated(material: Material, vector: Tensor, members: Sequence[int]) -> Tensor | None:
    """The merge with BatchNorm statistics of the group's calibration images (every task counts the same); ``None``
    where the network has no such statistics.  No prediction covers what it does."""
    if not material.backbone.partition.buffers:
        return None
    state = {**material.base_state, **material.backbone.space.unflatten(vector)}
    tasks = dict.fromkeys(material.tasks[j] for j in members)
    new = reestimate_batchnorm(material.model, state, [material.calibration[task].images for task in tasks])
    return material.backbone.vector(new)


def own_measured(material: Material, members: Sequence[int], known: dict[int, Measured]) -> Measured:
    """Each member's expert on its own test images, as one measurement; ``known`` keeps them by expert."""
    for j in members:
        if j not in known:
            known[j] = measure_sets(material, material.vectors[j], [j], [material.test])[0]
    return Measured(
        np.array([known[j].loss for j in members]), np.array([known[j].accuracy for j in members]), float("nan")
    )
