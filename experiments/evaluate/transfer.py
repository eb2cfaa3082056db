"""Held-out transfer: how good a frozen backbone's features are for a task that it was not trained on.

=================  ==================================================================================================
``ncm_cosine``     nearest class mean of features of length one, by cosine
``ncm_euclidean``  nearest class mean, by Euclidean distance
``knn_majority``   k nearest neighbours by cosine, one vote each
``knn_euclidean``  k nearest neighbours by Euclidean distance, one vote each
``knn_softmax``    k nearest neighbours by cosine, votes exp(cosine / 0.07), as DINO does
``linear_probe``   multinomial logistic regression on standardised features, l2 chosen on validation images
=================  ==================================================================================================

Where several k are given, the validation images choose (the smaller k of equally good ones).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.evaluate.bootstrap import RESAMPLES, bootstrap_means, percentile
from experiments.evaluate.neighbours import Distance, Vote, nearest_class_mean, votes
from experiments.evaluate.predictions import BATCH, Function, extract
from experiments.evaluate.probe import GRID, linear_probe
from experiments.inputs.training_data import TrainingData
from experiments.statistics import Estimate
from theory.errors import MergeboundError, nearest

METHODS = ("ncm_cosine", "ncm_euclidean", "knn_majority", "knn_euclidean", "knn_softmax", "linear_probe")
TEMPERATURE = 0.07
NEIGHBOURS = (20,)

_NEIGHBOUR_KINDS: Mapping[str, tuple[Distance, Vote]] = {
    "knn_majority": ("cosine", "majority"),
    "knn_euclidean": ("euclidean", "majority"),
    "knn_softmax": ("cosine", "softmax"),
}


@dataclass(frozen=True)
class TransferFeatures:
    """Features of one task.

    Attributes:
        name: of the task.
        classes: C.
        train, validation, test: (n, d) features and (n,) labels.
        digest, split_seed: of the split.
    """

    name: str
    classes: int
    train: tuple[Tensor, Tensor] = field(repr=False)
    validation: tuple[Tensor, Tensor] = field(repr=False)
    test: tuple[Tensor, Tensor] = field(repr=False)
    digest: str = ""
    split_seed: int | None = None


@dataclass(frozen=True)
class Transfer:
    """Measured accuracy of one method on one task.

    Attributes:
        task, method: names.
        accuracy: with its interval over test images.
        n: test images.
        settings: what was chosen on validation images (k, l2) and how the fit went.
        correct: (n,) bool, for paired comparisons.
        digest, split_seed: of the split.
        seed: of the bootstrap.
    """

    task: str
    method: str
    accuracy: Estimate
    n: int
    settings: Mapping[str, Any]
    correct: NDArray[np.bool_] = field(repr=False)
    digest: str = ""
    split_seed: int | None = None
    seed: int = 0
    tier: Literal["measured"] = "measured"

    def to_row(self) -> dict[str, Any]:
        """One row of a data frame."""
        row: dict[str, Any] = {"task": self.task, "method": self.method, "tier": self.tier, "n": self.n}
        row |= {"accuracy": self.accuracy.value, "accuracy_low": self.accuracy.low, "accuracy_high": self.accuracy.high}
        row |= self.settings
        return row | {"split_digest": self.digest, "split_seed": self.split_seed, "bootstrap_seed": self.seed}


def transfer_features(
    backbone: Function,
    train: TrainingData,
    validation: TrainingData,
    test: TrainingData,
    classes: int,
    *,
    name: str = "",
    digest: str = "",
    split_seed: int | None = None,
    batch_size: int = BATCH,
) -> TransferFeatures:
    """Features of a frozen backbone (a timm network without its head, or any function of images) on three splits.

    Give data without augmentation.
    """
    parts = [extract(backbone, data, batch_size=batch_size) for data in (train, validation, test)]
    return TransferFeatures(name, classes, parts[0], parts[1], parts[2], digest, split_seed)


def transfer(
    features: TransferFeatures,
    methods: Sequence[str] = METHODS,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    grid: Sequence[float] = GRID,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Transfer]:
    """Accuracy on the test images by each method.

    Args:
        methods: of :data:`METHODS`.
        neighbours: values of k; those beyond the number of training images are lowered to it.
        temperature: of ``knn_softmax``.
        grid: values of l2 for the linear probe.
        resamples, level, seed: of the bootstrap over test images, shared by the methods (so they can be compared).

    Raises:
        MergeboundError: an unknown method, or features that do not fit.
    """
    for method in methods:
        if method not in METHODS:
            raise MergeboundError(f"transfer method {method!r}: {nearest(method, METHODS)}")
    if not neighbours:
        raise MergeboundError("neighbours: give at least one k")
    labels = features.test[1].numpy()
    found: dict[str, tuple[NDArray[np.bool_], dict[str, Any]]] = {}
    for method in dict.fromkeys(methods):
        if method.startswith("ncm_"):
            distance: Distance = "cosine" if method == "ncm_cosine" else "euclidean"
            scores = nearest_class_mean(*features.train, features.test[0], features.classes, distance=distance)
            settings: dict[str, Any] = {}
        elif method == "linear_probe":
            probe = linear_probe(*features.train, *features.validation, features.classes, grid=grid)
            scores = probe.logits(features.test[0])
            settings = {"l2": probe.l2, "gradient": probe.gradient, "converged": probe.converged}
        else:
            scores, settings = _neighbours(features, method, neighbours, temperature)
        found[method] = (scores.numpy().argmax(axis=1) == labels, settings)
    if not found:
        return {}
    columns = np.column_stack([correct for correct, _ in found.values()]).astype(float)
    draws = bootstrap_means([columns], resamples=resamples, seed=seed)[0]
    return {
        method: Transfer(
            features.name,
            method,
            percentile(float(correct.mean()), draws[:, column], level),
            len(labels),
            settings,
            correct,
            features.digest,
            features.split_seed,
            seed,
        )
        for column, (method, (correct, settings)) in enumerate(found.items())
    }


def _neighbours(
    features: TransferFeatures, method: str, neighbours: Sequence[int], temperature: float
) -> tuple[Tensor, dict[str, Any]]:
    distance, vote = _NEIGHBOUR_KINDS[method]
    if vote == "softmax" and not temperature > 0:
        raise MergeboundError(f"temperature = {temperature}: give a positive number")
    ks = tuple(sorted({min(k, len(features.train[0])) for k in neighbours}))
    settings: dict[str, Any] = {"temperature": temperature} if vote == "softmax" else {}
    if len(ks) == 1:
        chosen = ks[0]
    else:
        inputs, wanted = features.validation
        tried = votes(*features.train, inputs, features.classes, ks, distance, vote, temperature)
        right = {k: int((ballot.numpy().argmax(axis=1) == wanted.numpy()).sum()) for k, ballot in tried.items()}
        chosen = max(ks, key=lambda k: (right[k], -k))
    ballot = votes(*features.train, features.test[0], features.classes, (chosen,), distance, vote, temperature)
    return torch.as_tensor(ballot[chosen]), settings | {"k": chosen}
