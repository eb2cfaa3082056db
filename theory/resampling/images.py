"""Images as what is random: which tasks share them, and how often each is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from theory.errors import MergeboundError
from theory.function_space import (
    Array,
    Field,
    Labels,
    QuadraticField,
)

_SMALL = 20


@dataclass(frozen=True)
class Images:
    """Which images each task was measured on.

    Attributes:
        clusters: per task, the number 0..M-1 of every image, (n_j,); the same number is the same image.
        strata: stratum of every image, (M,).
    """

    clusters: tuple[npt.NDArray[np.int64], ...]
    strata: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sizes: Sequence[int], sources: Sequence[npt.ArrayLike] | None = None) -> Images:
        """From the number of images of each task, and their names (integers) where tasks share images."""
        if not sizes or min(sizes) < 1:
            raise MergeboundError(f"sizes = {list(sizes)}: every task needs at least one image")
        if sources is None:
            ends = np.cumsum([0, *sizes])
            clusters = tuple(np.arange(a, b) for a, b in pairwise(ends))
        else:
            names = [np.asarray(source) for source in sources]
            if [name.shape for name in names] != [(size,) for size in sizes]:
                raise MergeboundError("sources must name every image of every task: give one integer per image")
            inverse = np.unique(np.concatenate(names), return_inverse=True)[1].astype(np.int64)
            clusters = tuple(np.split(inverse, np.cumsum(sizes)[:-1]))
        total = 1 + max(int(c.max()) for c in clusters)
        table = np.stack([np.bincount(c, minlength=total) for c in clusters], axis=1)
        strata = np.unique(table, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
        if sources is not None:
            small = np.bincount(strata)[strata] < _SMALL
            strata = np.unique(np.where(small, -1, strata), return_inverse=True)[1].astype(np.int64)
        return cls(clusters, strata)

    def draw(self, resamples: int, rng: np.random.Generator) -> list[Array]:
        """How often every image of every task is drawn: one array (resamples, n_j) per task.

        Rows sum to n_j, up to the draws of pooled strata; a draw that would leave a task empty is the sample itself.
        """
        if resamples < 2:
            raise MergeboundError(f"resamples = {resamples}: at least two, and hundreds for an interval")
        counts = np.zeros((resamples, len(self.strata)))
        for stratum in range(int(self.strata.max()) + 1):
            members = np.flatnonzero(self.strata == stratum)
            counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1.0 / len(members)), resamples)
        for c in self.clusters:
            counts[counts[:, c].sum(axis=1) == 0.0] = 1.0
        return [counts[:, c] for c in self.clusters]

    def folds(self, count: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """Fold 0..count-1 of every image of every task: strata split evenly, an image in one fold for all tasks."""
        smallest = min(len(np.unique(c)) for c in self.clusters)
        if not 2 <= count <= smallest:
            raise MergeboundError(f"folds = {count}, expected 2..{smallest}: every task needs an image in every fold")
        fold = np.zeros(len(self.strata), dtype=np.int64)
        start = 0
        for stratum in range(int(self.strata.max()) + 1):
            members = rng.permutation(np.flatnonzero(self.strata == stratum))
            fold[members] = (start + np.arange(len(members))) % count
            start += len(members)
        found = [fold[c] for c in self.clusters]
        if any(len(np.unique(f)) < count for f in found):
            raise MergeboundError(f"folds = {count} leave a task without images in a fold: use fewer folds")
        return found


def expanded(counts: Array) -> Labels:
    """Indices of images, each as often as ``counts`` says."""
    return np.repeat(np.arange(len(counts)), counts.astype(np.int64))


def take(field: Field, images: npt.NDArray[np.int64]) -> Field:
    """The field on some of its images, repeated ones repeated."""
    if isinstance(field, QuadraticField):
        return QuadraticField(
            field.constant[images], field.slopes[:, images], field.squares[:, images], field.labels[images], field.kind
        )
    return type(field)(field.constant[images], field.slopes[:, images], field.labels[images], field.kind)
