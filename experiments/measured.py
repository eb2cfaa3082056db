"""Measuring merges on test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.collected import PoolStatistics
from experiments.tasks.types import Split
from merging.partition import is_variance
from theory.function_space import joint_standard_error


@dataclass(frozen=True)
class Measured:
    """Measured joint risk of a merge on the test sets: per-task loss and accuracy, and the standard error of the mean
    loss (images shared by tasks are counted once)."""

    losses: np.ndarray
    accuracies: np.ndarray
    standard_error: float

    @property
    def loss(self) -> float:
        """Mean over tasks."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Mean over tasks."""
        return float(self.accuracies.mean())


def measure(pool: PoolStatistics, vector: Tensor, members: Sequence[int], splits: Mapping[str, Split]) -> Measured:
    """Loss and accuracy of the merged coordinates on every member's own task, through its own head."""
    return measure_on(pool, vector, members, (splits,))[0]


def measure_on(
    pool: PoolStatistics, vector: Tensor, members: Sequence[int], sets: Sequence[Mapping[str, Split]]
) -> list[Measured]:
    """:func:`measure` on several sets of images (each by task) in one pass."""
    names = [pool.tasks[j] for j in members]
    parts = [(k, name) for k in range(len(sets)) for name in dict.fromkeys(names)]
    features = pool.backbone.features(vector, torch.cat([sets[k][name].images for k, name in parts]))
    pieces = dict(zip(parts, torch.split(features, [len(sets[k][name]) for k, name in parts]), strict=True))
    found = []
    for k, splits in enumerate(sets):
        losses, accuracies = [], []
        for j, name in zip(members, names, strict=True):
            logits, labels = pool.readouts[j].logits(pieces[k, name]), splits[name].labels
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().numpy())
            accuracies.append(float((logits.argmax(dim=1) == labels).double().mean()))
        error = joint_standard_error(losses, [splits[name].source for name in names])
        found.append(Measured(np.array([loss.mean() for loss in losses]), np.array(accuracies), error))
    return found


def dispersion(pool: PoolStatistics, vector: Tensor, members: Sequence[int]) -> float:
    """V(M) = mean over experts of |M - x_j|^2."""
    return float((vector - pool.vectors[list(members)]).double().square().sum(dim=1).mean())


def clamp_variances(pool: PoolStatistics, vector: Tensor) -> Tensor:
    """Clamp merged running variances at zero, as merging does."""
    out = vector
    for name, piece in pool.backbone.space.segments():
        if is_variance(name):
            out = out.clone() if out is vector else out
            out[piece] = out[piece].clamp(min=0.0)
    return out
