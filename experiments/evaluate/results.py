"""What an evaluation leaves: frozen results with rows for data frames."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from experiments.evaluate.metrics import Metrics, Scores
from experiments.inputs.training_data import TrainingData
from experiments.statistics import Estimate
from experiments.tasks.dataset import ImageTask
from experiments.tasks.images import shared_rows
from experiments.tasks.types import Split
from theory.errors import MergeboundError

METRICS = ("accuracy", "loss", "brier", "ece")
"""Metrics that have intervals and joint values."""


@dataclass(frozen=True)
class EvaluationSet:
    """The test images of one task.

    Attributes:
        name: of the task.
        data: images in evaluation form (no augmentation) and labels.
        digest: identifies the split (``ImageTask.digest``); stored with every result.
        seed: of the split.
        source: (n,) numbers of the images in a source common to several tasks, where tasks may share images.
    """

    name: str
    data: TrainingData
    digest: str = ""
    seed: int | None = None
    source: np.ndarray | None = None

    @classmethod
    def of_task(cls, task: ImageTask, data: TrainingData) -> EvaluationSet:
        """The test images of a task, prepared as ``data`` for the network; tasks of ``digits8`` share theirs.

        Raises:
            MergeboundError: they are not as many.
        """
        if len(data) != len(task.test):
            raise MergeboundError(
                f"task {task.name!r} has {len(task.test)} test images but {len(data)} were prepared; give its test part"
            )
        return cls(task.name, data, task.digest, task.seed, shared_rows(task.test))

    @classmethod
    def of_split(cls, name: str, split: Split, seed: int | None = None) -> EvaluationSet:
        """A split in memory; the digest is of its pixels and labels, and ``source`` says what tasks share."""
        digest = hashlib.sha256(repr((name, tuple(split.images.shape))).encode())
        digest.update(split.images.contiguous().numpy().tobytes())
        digest.update(split.labels.contiguous().numpy().tobytes())
        return cls(name, split, digest.hexdigest(), seed, np.asarray(split.source))


@dataclass(frozen=True)
class Evaluation:
    """Measured performance on one task.

    Attributes:
        task: its name.
        metrics: all numbers.
        intervals: of each of :data:`METRICS`, over test images.
        digest, split_seed: of the split.
        seed: of the bootstrap.
        path: how it was computed: ``fp32``, or the fast path.
        scores: per image, for paired comparisons.
        source: as in :class:`EvaluationSet`.
    """

    task: str
    metrics: Metrics
    intervals: Mapping[str, Estimate]
    digest: str
    split_seed: int | None
    seed: int
    path: str
    scores: Scores = field(repr=False)
    source: np.ndarray | None = field(default=None, repr=False)
    tier: Literal["measured"] = "measured"

    def to_row(self) -> dict[str, Any]:
        """One row of a data frame."""
        m = self.metrics
        row: dict[str, Any] = {"task": self.task, "tier": self.tier, "n": m.n}
        for name in METRICS:
            row |= _columns(name, self.intervals[name])
        row |= {"ece_mass": m.ece_mass, "confidence": m.confidence, "balanced_accuracy": m.balanced_accuracy}
        row |= {"bins": m.bins, "nonfinite": m.nonfinite, "path": self.path, "split_digest": self.digest}
        return row | {"split_seed": self.split_seed, "bootstrap_seed": self.seed}


@dataclass(frozen=True)
class JointEvaluation:
    """Measured performance on several tasks.

    Attributes:
        tasks: in the order given.
        weights: p_i, adding up to one.
        joint: of each of :data:`METRICS`, with its interval over test images.
        seed: of the bootstrap.
    """

    tasks: tuple[Evaluation, ...]
    weights: tuple[float, ...]
    joint: Mapping[str, Estimate]
    seed: int
    tier: Literal["measured"] = "measured"

    def __getitem__(self, name: str) -> Evaluation:
        for found in self.tasks:
            if found.task == name:
                return found
        raise KeyError(name)

    @property
    def path(self) -> str:
        """How it was computed."""
        return ", ".join(dict.fromkeys(found.path for found in self.tasks))

    def to_row(self) -> dict[str, Any]:
        """One row of a data frame: joint values, and ``<metric>/<task>`` for each task."""
        row: dict[str, Any] = {"tier": self.tier, "tasks": len(self.tasks)}
        row |= {"n": sum(found.metrics.n for found in self.tasks)}
        for name in METRICS:
            row |= _columns(name, self.joint[name])
        for name in METRICS:
            row |= {f"{name}/{found.task}": found.intervals[name].value for found in self.tasks}
        row |= {f"weight/{f.task}": p for f, p in zip(self.tasks, self.weights, strict=True)}
        row |= {f"split_digest/{found.task}": found.digest for found in self.tasks}
        return row | {"path": self.path, "bootstrap_seed": self.seed}

    def to_rows(self) -> list[dict[str, Any]]:
        """One row for each task."""
        pairs = zip(self.tasks, self.weights, strict=True)
        return [found.to_row() | {"weight": weight} for found, weight in pairs]


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
