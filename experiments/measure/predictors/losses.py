"""Risks of predicted logits: with labels, without them, tempered or clipped; and the accuracy that goes with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from experiments.measure.predictors.statistics import FieldStatistics
from theory.errors import MergeboundError
from theory.function_space import Array, cross_entropy, joint_standard_error, log_softmax, uniform_weights

Target = Literal["labels", "pseudo", "soft", "entropy"]
TARGETS: tuple[Target, ...] = ("labels", "pseudo", "soft", "entropy")


@dataclass(frozen=True)
class Loss:
    """How logits are judged.

    Attributes:
        target: ``labels``; or without labels: ``pseudo`` (the class that the task's own expert prefers), ``soft`` (the
            expert's probabilities as the target), ``entropy`` (of the logits themselves, as AdaMerging minimises).
        temperature: logits are divided by it.
        clip: losses are cut there, in nats; ``None`` for not at all.  A measurement must be cut alike.

    Bias, as the mean of predicted minus labelled risk at the same logits: ``pseudo`` differs only on images where the
    expert is wrong; where the merge follows the expert there, it is too low by up to the merge's loss on these images.
    ``soft`` is the labelled risk plus ``E (e_y - p) . log q``: zero where the expert is calibrated given the merge.
    ``entropy`` knows nothing about the labels: a confident merge that is wrong has none.  :func:`label_bias` measures
    all three.
    """

    target: Target = "labels"
    temperature: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise MergeboundError(f"target = {self.target!r}: choose from {', '.join(TARGETS)}")
        if not (np.isfinite(self.temperature) and self.temperature > 0.0):
            raise MergeboundError(f"temperature = {self.temperature}: give a positive number")
        if self.clip is not None and not self.clip > 0.0:
            raise MergeboundError(f"clip = {self.clip}: give a positive number of nats, or nothing")

    def per_image(self, statistics: FieldStatistics, j: int, logits: Array) -> Array:
        """Losses of task j, (..., n), for logits (..., n, C)."""
        tempered = logits / self.temperature
        if self.target == "labels":
            found = cross_entropy(tempered, statistics.labels[j])
        elif self.target == "pseudo":
            found = cross_entropy(tempered, statistics.own_logits(j).argmax(axis=-1))
        else:
            log_q = log_softmax(tempered)
            p = np.exp(log_q if self.target == "entropy" else log_softmax(statistics.own_logits(j) / self.temperature))
            found = -(p * log_q).sum(axis=-1)
        return found if self.clip is None else np.minimum(found, self.clip)


LABELS = Loss()
"""The cross-entropy with the true labels."""


@dataclass(frozen=True)
class Estimates:
    """Joint risk and accuracy of many merges, (A,) each.

    Attributes:
        risk: in nats.
        standard_error: of the risk, from the calibration images alone (not how far the prediction is off); an image
            that several tasks share counts as one.
        accuracy: mean over tasks of the share of images whose largest logit is the label's.
        per_task: risks, (A, tasks).
    """

    risk: Array
    standard_error: Array
    accuracy: Array
    per_task: Array


def estimate(
    statistics: FieldStatistics,
    logits: Sequence[Array],
    loss: Loss = LABELS,
    weights: npt.ArrayLike | None = None,
) -> Estimates:
    """Joint risk sum_j p_j E loss of given logits.

    Args:
        statistics: for labels, the experts' own logits, and the images' names.
        logits: of each task, (A, n_j, C_j).
        loss: how they are judged.
        weights: p_j, (tasks,); default 1/N.
    """
    p = uniform_weights(len(logits)) if weights is None else np.asarray(weights, dtype=np.float64)
    if len(logits) != statistics.size or p.shape != (statistics.size,):
        raise MergeboundError(f"logits of {len(logits)} tasks and {p.size} weights: give {statistics.size} of each")
    losses = [loss.per_image(statistics, j, h) for j, h in enumerate(logits)]
    per_task = np.stack([values.mean(axis=-1) for values in losses], axis=-1)
    names = statistics.image_names()
    errors = [joint_standard_error([v[a] for v in losses], names, p) for a in range(len(per_task))]
    right = [(h.argmax(axis=-1) == y).mean(axis=-1) for h, y in zip(logits, statistics.labels, strict=True)]
    return Estimates(per_task @ p, np.array(errors), np.stack(right, axis=-1) @ p, per_task)


def label_bias(statistics: FieldStatistics, logits: Sequence[Array]) -> dict[str, Array]:
    """By how much each unlabelled risk misses the labelled one at the same logits, in nats, (A,) each."""
    labelled = estimate(statistics, logits).risk
    return {t: estimate(statistics, logits, Loss(t)).risk - labelled for t in TARGETS if t != "labels"}
