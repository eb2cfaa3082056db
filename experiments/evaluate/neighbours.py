"""Classifiers without training on frozen features: nearest class mean and k nearest neighbours.

All give scores (m, C), the larger the better, and the predicted class is the first with the largest score.  Rows are
taken in chunks, so that at most about :data:`CELLS` similarities are in memory.  Computed in the features' own floating
type; Euclidean distances are taken after subtracting the training mean, which keeps digits in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from theory.errors import MergeboundError

Distance = Literal["cosine", "euclidean"]
Vote = Literal["majority", "softmax"]
CELLS = 1 << 24
"""Similarities that are held at once."""


def nearest_class_mean(
    features: Tensor, labels: Tensor, queries: Tensor, classes: int, *, distance: Distance = "cosine"
) -> Tensor:
    """Scores of the class means (Mensink et al. 2013; the prototypes of Snell et al. 2017).

    ``euclidean``: minus the squared distance to the mean of a class's features.  ``cosine``: features are scaled to
    length one, averaged over a class, and the cosine with that mean is the score.

    Args:
        features, labels: training set, (n, d) and (n,).
        queries: (m, d).
        classes: C; a class without training images has the score -inf.

    Returns:
        (m, C).

    Raises:
        MergeboundError: shapes that do not fit, or features that are not finite.
    """
    check(features, labels, classes, "training")
    check(queries, None, classes, "query")
    features, queries = _prepared(features, queries, distance)
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, features.double())
    counts = torch.bincount(labels, minlength=classes)
    means = (sums / counts.clamp(min=1)[:, None]).to(features.dtype)
    if distance == "cosine":
        means = F.normalize(means, dim=1)
    parts = [_similarity(part, means, distance) for part in _chunks(queries, classes)]
    return torch.cat(parts).masked_fill(counts == 0, -torch.inf)


def k_nearest(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    *,
    k: int = 20,
    distance: Distance = "cosine",
    vote: Vote = "majority",
    temperature: float = 0.07,
) -> Tensor:
    """Votes of the k nearest training images.

    ``majority``: every neighbour has one vote.  ``softmax``: a neighbour's vote is exp(cosine / temperature) (Wu et al.
    2018; the classifier of DINO, Caron et al. 2021, with k = 20 and temperature 0.07).  Of equally near images the
    first in the order of the training set are taken; a tie of votes goes to the class with the smallest number.

    Returns:
        Shares of the votes, (m, C), each row adding up to one.

    Raises:
        MergeboundError: k beyond the training set, shapes that do not fit, or an impossible combination.
    """
    if vote == "softmax" and (distance != "cosine" or not temperature > 0):
        raise MergeboundError("k-NN: softmax votes need the cosine distance and a positive temperature")
    return votes(features, labels, queries, classes, (k,), distance, vote, temperature)[k]


def votes(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    ks: tuple[int, ...],
    distance: Distance,
    vote: Vote,
    temperature: float,
) -> dict[int, Tensor]:
    """:func:`k_nearest` for several k with one search."""
    check(features, labels, classes, "training")
    check(queries, None, classes, "query")
    for k in ks:
        if not 1 <= k <= len(features):
            raise MergeboundError(f"k-NN: k = {k} with {len(features)} training images; give k between 1 and that")
    features, queries = _prepared(features, queries, distance)
    largest = max(ks)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in _chunks(queries, len(features)):
        near, index = top_k(_similarity(part, features, distance), largest)
        own = labels[index]
        weights = torch.ones_like(near) if vote == "majority" else torch.exp((near - near[:, :1]) / temperature)
        for k in ks:
            ballot = torch.zeros(len(part), classes, dtype=near.dtype).scatter_add_(1, own[:, :k], weights[:, :k])
            found[k].append(ballot / ballot.sum(dim=1, keepdim=True))
    return {k: torch.cat(parts) for k, parts in found.items()}


def top_k(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in descending order, equal ones in the order of the columns: values and columns."""
    if k < similarity.shape[1]:
        values, index = torch.topk(similarity, k + 1, dim=1)
    else:
        values, index = torch.sort(similarity, dim=1, descending=True, stable=True)
    # torch.topk keeps any of equal values: rows with equal values among the first k + 1 are sorted again, stably
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero()[:, 0]
    if len(tied):
        again, order = torch.sort(similarity[tied], dim=1, descending=True, stable=True)
        values[tied], index[tied] = again[:, : values.shape[1]], order[:, : values.shape[1]]
    return values[:, :k], index[:, :k]


def check(features: Tensor, labels: Tensor | None, classes: int, what: str) -> None:
    """Check shapes, finiteness and labels.

    Raises:
        MergeboundError: names what does not fit.
    """
    if features.ndim != 2 or not len(features) or not features.is_floating_point():
        raise MergeboundError(
            f"{what} features are {features.dtype} of shape {tuple(features.shape)}; give floating (n, d) with n > 0"
        )
    if not torch.isfinite(features).all():
        raise MergeboundError(f"{what} features hold NaN or infinite values; the backbone has diverged")
    if labels is not None and (labels.shape != features.shape[:1] or not 0 <= int(labels.min()) <= int(labels.max())):
        raise MergeboundError(f"{what} labels of shape {tuple(labels.shape)} do not fit {len(features)} features")
    if labels is not None and int(labels.max()) >= classes:
        raise MergeboundError(f"{what} label {int(labels.max())} is out of range for {classes} classes")


def _prepared(features: Tensor, queries: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    if distance == "cosine":
        return F.normalize(features, dim=1), F.normalize(queries, dim=1)
    if distance != "euclidean":
        raise MergeboundError(f"distance {distance!r}: choose cosine or euclidean")
    middle = features.double().mean(dim=0).to(features.dtype)
    return features - middle, queries - middle


def _similarity(queries: Tensor, others: Tensor, distance: Distance) -> Tensor:
    product = queries @ others.T
    if distance == "cosine":
        return product
    square = (2.0 * product).sub_(others.square().sum(dim=1)[None, :])
    return square.sub_(queries.square().sum(dim=1)[:, None])


def _chunks(queries: Tensor, columns: int) -> Iterator[Tensor]:
    return iter(torch.split(queries, max(1, CELLS // max(columns, 1))))
