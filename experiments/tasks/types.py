"""What a task is: named, disjoint splits of images and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    ``images``: float32, (n, channels, height, width); ``labels``: int64, (n,); ``source``: (n,) row numbers of the
    underlying data set, which say whether two splits (or two tasks) share an image.
    """

    images: Tensor
    labels: Tensor
    source: np.ndarray

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def batch(self, rows: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Images and labels of some rows; there is no augmentation, so ``epoch`` changes nothing."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return self.images[index], self.labels[index]

    def take(self, rows: np.ndarray) -> Split:
        """The sub-split with the given row numbers."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return Split(self.images[index], self.labels[index], self.source[np.asarray(rows, dtype=np.int64)])


@dataclass(frozen=True)
class Task:
    """One task i: training sample S_i, calibration (validation) images and test images, all disjoint."""

    name: str
    train: Split
    calibration: Split
    test: Split
    classes: int


@dataclass(frozen=True)
class Family:
    """A base's pretraining images and the tasks fine-tuned from it.

    ``shares_images`` says whether training samples of different tasks contain the same images (assumption A1 of the
    stability theorems then fails).
    """

    name: str
    pretraining: Split
    tasks: Mapping[str, Task]
    shares_images: bool
    seed: int
