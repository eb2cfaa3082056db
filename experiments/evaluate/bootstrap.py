"""Bootstrap over test images: several statistics and several models share the draws, so comparisons are paired.

Every task draws its n images with replacement (n draws of n), independently of the other tasks.  Tasks that contain the
same images, as ``source`` says, draw images jointly: an image that is in two tasks then counts equally in both.
Intervals are percentile intervals; they cover sampling of test images only, not of training runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from experiments.statistics import Estimate
from theory.errors import MergeboundError

RESAMPLES = 1000
_SEED = 0xB007
_CELLS = 1 << 21

Floats = NDArray[np.float64]


def bootstrap_means(
    values: Sequence[Floats],
    *,
    sources: Sequence[NDArray[np.int64] | None] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Floats]:
    """Means of resampled images.

    Args:
        values: for each task j an array (n_j, k_j): k_j quantities of each image.
        sources: for each task the images' numbers in a common source, (n_j,), or ``None`` for images that no other
            task has.
        resamples: R.
        seed: names the draws.

    Returns:
        For each task, (R, k_j) means.  A task whose images were all missed (possible only where tasks overlap in part)
        has NaN.
    """
    origins = [None] * len(values) if sources is None else list(sources)
    if len(origins) != len(values):
        raise MergeboundError(f"{len(origins)} sources for {len(values)} tasks; give one per task")
    out = [np.full((resamples, np.shape(block)[1]), np.nan) for block in values]
    for members in _components(origins):
        first = members[0]
        if len(members) == 1:
            positions, distinct = [np.arange(len(values[first]))], len(values[first])
        else:
            found, inverse = np.unique(np.concatenate([_of(origins[j]) for j in members]), return_inverse=True)
            positions = list(np.split(inverse, np.cumsum([len(values[j]) for j in members])[:-1]))
            distinct = len(found)
        rng = np.random.default_rng([seed, _SEED, first])
        rows = max(1, _CELLS // max(distinct, 1))
        for start in range(0, resamples, rows):
            count = min(rows, resamples - start)
            drawn = rng.integers(0, distinct, size=(count, distinct))
            drawn += np.arange(count)[:, None] * distinct
            counts = np.bincount(drawn.ravel(), minlength=count * distinct).reshape(count, distinct).astype(float)
            for j, position in zip(members, positions, strict=True):
                weights = counts[:, position]
                total = weights.sum(axis=1, keepdims=True)
                with np.errstate(invalid="ignore", divide="ignore"):
                    out[j][start : start + count] = weighted_sums(weights, values[j]) / total
    return out


def weighted_sums(weights: Floats, values: Floats) -> Floats:
    """weights (R, n) times values (n, k); an infinite value counts only where its weight is positive."""
    bad = ~np.isfinite(values)
    if not bad.any():
        product: Floats = weights @ values
        return product
    sums = weights @ np.where(bad, 0.0, values)
    for column in np.flatnonzero(bad.any(axis=0)):
        rows = bad[:, column]
        hit = (weights[:, rows] > 0).any(axis=1)
        worst = np.nan if np.isnan(values[rows, column]).any() else values[rows, column].sum()
        sums[hit, column] = worst
    return sums


def _of(source: NDArray[np.int64] | None) -> NDArray[np.int64]:
    assert source is not None
    return source


def _components(sources: Sequence[NDArray[np.int64] | None]) -> list[list[int]]:
    """Groups of tasks that share images, directly or through others, in the order of their first task."""
    groups: list[tuple[list[int], set[int]]] = []
    for j, source in enumerate(sources):
        rows = set() if source is None else set(np.asarray(source).tolist())
        members = [j]
        rest = []
        for group in groups:
            if group[1] & rows:
                members = group[0] + members
                rows |= group[1]
            else:
                rest.append(group)
        groups = [*rest, (sorted(members), rows)]
    return sorted(members for members, _ in groups)


def percentile(value: float, draws: Floats, level: float = 0.95) -> Estimate:
    """The value with the percentile interval of its draws; NaN bounds where fewer than two draws are numbers."""
    kept = draws[~np.isnan(draws)]
    if len(kept) < 2 or np.isnan(value):
        return Estimate(float(value), float("nan"), float("nan"))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(kept, [tail, 1.0 - tail], method="inverted_cdf" if np.isinf(kept).any() else "linear")
    return Estimate(float(value), float(low), float(high))
