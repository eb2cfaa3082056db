"""What a training loop asks of its data."""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
from torch import Tensor


class TrainingData(Protocol):
    """n samples that can be had batch by batch, in any order, ready for the network.

    ``batch`` is a pure function of its arguments: augmentation is drawn per sample and epoch from a named seed, so a
    sample in epoch e looks the same in any batch, on any worker, and in every run that shares the seed.
    """

    @property
    def labels(self) -> Tensor:
        """Classes, (n,) int64."""

    def __len__(self) -> int: ...

    def batch(self, rows: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (m, channels, height, width), floating, normalised, and labels (m,) of the given rows.

        Args:
            rows: (m,) int64, in 0 .. n - 1, in any order, repeats allowed.
            epoch: names the augmentation draws, from 0.
        """

    def take(self, rows: np.ndarray) -> Self:
        """The data of some rows only; a sample keeps its augmentation draws."""
