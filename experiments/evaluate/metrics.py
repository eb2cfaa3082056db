"""Metrics of a classifier, from logits and labels.

Everything is computed per image in float64 (:class:`Scores`) and summed afterwards in the order of the images, so the
same logits give the same numbers in any split into batches.  Where all class probabilities are needed
(:class:`ClasswiseBins`), sums are kept in fixed point, which adds without rounding, so the split into batches does not
matter there either.

Predictions with equal logits go to the class with the smallest number.  An image with a NaN or +inf logit counts as
wrong, with infinite loss; its confidence and Brier score are NaN, and so are then the metrics that use them.

Calibration error (Naeini, Cooper, Hauskrecht 2015; Guo et al. 2017): sum_b n_b / n |accuracy_b - confidence_b| over
bins of the confidence, which is the largest softmax probability.  *Equal width*: (b/B, (b+1)/B], with 0 in the first.
*Equal mass* (Nguyen, O'Connor 2015): cut at the confidences of rank ceil(k n / B), equal confidences in one bin.
*Classwise* (Kull et al. 2019): mean over classes c of the equal-width error of p_c against the event y = c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from theory.errors import MergeboundError

BINS = 15
"""Bins of the calibration error."""

Floats = NDArray[np.float64]
_CHUNK = 8192
_FIXED = 2.0**40


@dataclass(frozen=True)
class Scores:
    """What is kept of n images: 33 bytes each.

    Attributes:
        labels, predicted: (n,) int64; ``predicted`` is -1 where a logit is NaN or +inf.
        correct: (n,) bool.
        loss: cross-entropy in nats, (n,) float64.
        confidence: largest softmax probability, (n,) float64.
        brier: sum over classes of (p_c - [y = c])^2, (n,) float64, in [0, 2].
        classes: C.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    correct: NDArray[np.bool_]
    loss: Floats
    confidence: Floats
    brier: Floats
    classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def empty(self) -> Scores:
        """Scores of no image, with the same number of classes."""
        return _assembled(lambda name: getattr(self, name)[:0].copy(), self.classes)


@dataclass(frozen=True)
class Metrics:
    """Metrics of one task; shares in [0, 1], losses in nats.

    Attributes:
        n: images.
        correct: how many are right.
        accuracy, loss, brier, confidence: means over images.
        ece: calibration error with equal-width bins.
        ece_mass: with equal-mass bins.
        bins: how many bins.
        class_n: images per class, (C,).
        class_accuracy: accuracy per class, (C,), NaN where a class has no image.
        nonfinite: images with a NaN or +inf logit.
    """

    n: int
    correct: int
    accuracy: float
    loss: float
    brier: float
    confidence: float
    ece: float
    ece_mass: float
    bins: int
    class_n: tuple[int, ...] = field(repr=False)
    class_accuracy: tuple[float, ...] = field(repr=False)
    nonfinite: int = 0

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the accuracies of the classes that have images."""
        return float(np.nanmean(self.class_accuracy))


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Per-image scores of one batch.

    Args:
        logits: (n, C), floating.
        labels: (n,) integers in 0 .. C - 1.

    Raises:
        MergeboundError: shapes that do not match, or a label out of range.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise MergeboundError(
            f"logits of shape {tuple(logits.shape)} with labels of shape {tuple(labels.shape)}: give (n, C) and (n,)"
        )
    wanted = labels.detach().cpu().numpy().astype(np.int64)
    classes = int(logits.shape[1])
    outside = np.flatnonzero((wanted < 0) | (wanted >= classes))
    if len(outside):
        raise MergeboundError(
            f"label {int(wanted[outside[0]])} of image {int(outside[0])} is out of range for {classes} logits; use the "
            "head that belongs to these labels"
        )
    parts = [
        _score(logits[start : start + _CHUNK], wanted[start : start + _CHUNK])
        for start in range(0, len(wanted), _CHUNK)
    ]
    return join(parts) if parts else _score(logits, wanted)


def _score(logits: Tensor, labels: NDArray[np.int64]) -> Scores:
    values = logits.detach().to("cpu", torch.float64).numpy()
    classes = values.shape[1]
    top = values.max(axis=1, initial=-np.inf)
    good = np.isfinite(top) & ~np.isnan(values).any(axis=1)
    shifted = np.where(good[:, None], values - np.where(good, top, 0.0)[:, None], 0.0)
    total = np.exp(shifted).sum(axis=1)
    rows = np.arange(len(labels))
    loss = np.where(good, np.log(total) - shifted[rows, labels], np.inf)
    probability = np.exp(shifted) / total[:, None]
    own = probability[rows, labels]
    brier = np.where(good, np.maximum(np.square(probability).sum(axis=1) - 2.0 * own + 1.0, 0.0), np.nan)
    predicted = np.where(good, values.argmax(axis=1), -1).astype(np.int64)
    return Scores(
        labels, predicted, predicted == labels, loss, np.where(good, probability.max(axis=1), np.nan), brier, classes
    )


def join(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches, in their order.

    Raises:
        MergeboundError: nothing to join, or different numbers of classes.
    """
    classes = {part.classes for part in parts}
    if len(classes) != 1:
        raise MergeboundError(
            f"batches with {sorted(classes)} classes cannot be joined; score at least one batch, all with one head"
        )
    return _assembled(lambda name: np.concatenate([getattr(part, name) for part in parts]), classes.pop())


def _assembled(column: Callable[[str], Any], classes: int) -> Scores:
    return Scores(
        column("labels"),
        column("predicted"),
        column("correct"),
        column("loss"),
        column("confidence"),
        column("brier"),
        classes,
    )


def summarise(scores: Scores, *, bins: int = BINS) -> Metrics:
    """Metrics of n images.

    Raises:
        MergeboundError: there is no image.
    """
    n = len(scores)
    if not n:
        raise MergeboundError("no images to score; give a test set that is not empty")
    class_n = np.bincount(scores.labels, minlength=scores.classes)
    hits = np.bincount(scores.labels[scores.correct], minlength=scores.classes)
    class_accuracy = np.divide(hits, class_n, out=np.full(scores.classes, np.nan), where=class_n > 0)
    return Metrics(
        n=n,
        correct=int(scores.correct.sum()),
        accuracy=float(scores.correct.sum() / n),
        loss=float(scores.loss.mean()),
        brier=float(scores.brier.mean()),
        confidence=float(scores.confidence.mean()),
        ece=calibration_error(scores.confidence, scores.correct, equal_width(scores.confidence, bins), bins),
        ece_mass=calibration_error(scores.confidence, scores.correct, equal_mass(scores.confidence, bins), bins),
        bins=bins,
        class_n=tuple(int(value) for value in class_n),
        class_accuracy=tuple(float(value) for value in class_accuracy),
        nonfinite=int((scores.predicted < 0).sum()),
    )


def equal_width(confidence: Floats, bins: int = BINS) -> NDArray[np.int64]:
    """Number of the bin (b/B, (b+1)/B] that each confidence lies in, (n,); 0 is in the first."""
    _check_bins(bins)
    edges = np.arange(1, bins) / bins
    return np.searchsorted(edges, confidence, side="left").astype(np.int64)


def equal_mass(confidence: Floats, bins: int = BINS) -> NDArray[np.int64]:
    """Number of the equal-mass bin of each confidence, (n,): a function of the value, so ties share a bin."""
    _check_bins(bins)
    n = len(confidence)
    ranks = -(-np.arange(1, bins) * n // bins) - 1  # ceil(k n / B), from 0
    edges = np.sort(confidence)[np.maximum(ranks, 0)]
    return np.searchsorted(edges, confidence, side="left").astype(np.int64)


def calibration_error(
    confidence: Floats, event: NDArray[np.bool_], index: NDArray[np.int64], bins: int = BINS
) -> float:
    """sum_b |sum over the images of bin b of (event - confidence)| / n; NaN if a confidence is NaN."""
    if np.isnan(confidence).any():
        return float("nan")
    gaps = np.bincount(index, weights=event - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _check_bins(bins: int) -> None:
    if bins < 1:
        raise MergeboundError(f"bins = {bins}: give a positive number of calibration bins")


class ClasswiseBins:
    """Streamed sums for the classwise calibration error: counts, probabilities and events per class and bin.

    Probabilities are summed as multiples of 2^-40, exactly, so batches may be added in any split and order.
    """

    def __init__(self, classes: int, bins: int = BINS) -> None:
        _check_bins(bins)
        self.classes, self.bins, self.n = classes, bins, 0
        self.counts = np.zeros((classes, bins), dtype=np.int64)
        self.events = np.zeros((classes, bins), dtype=np.int64)
        self._fixed = np.zeros((classes, bins), dtype=np.int64)
        self._finite = True

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: logits (n, C), labels (n,)."""
        values = torch.softmax(logits.detach().to("cpu", torch.float64), dim=1).numpy()
        wanted = labels.detach().cpu().numpy()
        self.n += len(wanted)
        if not np.isfinite(values).all():
            self._finite = False
            return
        fixed = np.round(values * _FIXED).astype(np.int64)
        for c in range(self.classes):
            index = equal_width(values[:, c], self.bins)
            self.counts[c] += np.bincount(index, minlength=self.bins)
            self.events[c] += np.bincount(index[wanted == c], minlength=self.bins)
            np.add.at(self._fixed[c], index, fixed[:, c])

    @property
    def probabilities(self) -> Floats:
        """Sums of probabilities, (C, B)."""
        return self._fixed / _FIXED

    @property
    def error(self) -> float:
        """Mean over classes of sum_b |events_b - probabilities_b| / n; NaN if a probability was not finite."""
        if not self.n or not self._finite:
            return float("nan")
        return float(np.abs(self.events - self.probabilities).sum() / (self.n * self.classes))
