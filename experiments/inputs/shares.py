"""Shares of the data: seeded subsets, each within the next larger one (0.5 within 0.8 within 1.0)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from theory.errors import MergeboundError

_PLAIN, _STRATIFIED = 0x5EED, 0x57A7


def subset_size(n: int, share: float) -> int:
    """How many of ``n`` samples a share is: the nearest whole number, at least one.

    Raises:
        MergeboundError: no samples, or a share outside (0, 1].
    """
    if n < 1:
        raise MergeboundError(f"data_share = {share}: there are no samples to take a share of; check the training data")
    if not 0 < share <= 1:
        raise MergeboundError(f"data_share = {share!r}: must be in (0, 1]; 0.5 takes half of the samples, 1.0 all")
    return max(1, round(share * n))


def nested_subset(n: int, share: float, seed: int) -> np.ndarray:
    """Rows of a seeded subset of the share; subsets of one seed are nested (0.5 within 0.8 within 1.0).

    The rows are the first ones of one random permutation, so a smaller subset is the beginning of a larger one.

    Returns:
        (m,) int64, in the order of the permutation.

    Raises:
        MergeboundError: no samples, or a share outside (0, 1].
    """
    return np.random.default_rng([seed, _PLAIN]).permutation(n)[: subset_size(n, share)]


def stratified_subset(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """As :func:`nested_subset`, with the classes in the proportions of the whole.

    Sample number j (in a random order, from 0) of a class of n_c is placed at (j + 1/2) / n_c, and samples are taken
    by place, ties at random.  Of a class of n_c among C classes and n samples, a subset of m therefore holds
    m n_c / n samples up to an error of 1/2 + C n_c / (2 n).

    Args:
        labels: (n,) integers.
        share: in (0, 1].
        seed: names the order.

    Returns:
        (m,) int64, m as :func:`subset_size` says; a smaller subset is the beginning of a larger one.

    Raises:
        MergeboundError: no samples, labels that are not (n,) integers, or a share outside (0, 1].
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise MergeboundError(f"labels: {labels.dtype} of shape {labels.shape}; give integers of shape (n,)")
    size = subset_size(len(labels), share)
    rng = np.random.default_rng([seed, _STRATIFIED])
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, counts = np.unique(labels, return_counts=True)
    within = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (within + 0.5) / np.repeat(counts, counts)
    taken = np.lexsort((rng.random(len(labels)), place))[:size]
    rows: np.ndarray = by_class[taken]
    return rows


def nested_subsets(n: int, shares: Sequence[float], seed: int) -> dict[float, np.ndarray]:
    """The subset of each share, by share; all are beginnings of the largest one.

    Raises:
        MergeboundError: as :func:`nested_subset`.
    """
    return {share: nested_subset(n, share, seed) for share in shares}
