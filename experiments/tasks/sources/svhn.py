"""SVHN, cropped digits, in the layout of ``torchvision.datasets.SVHN``: ``train_32x32.mat`` and ``test_32x32.mat``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import ArrayImages
from experiments.tasks.sources.common import checked_arrays, damaged, load_mat, located
from experiments.tasks.vision_data import VisionData


def load(root: Path) -> DataSet:
    """Training and test images, colour, (32, 32, 3), in the order of the files; label 10 is the digit 0.

    The files lie in the root (as torchvision has it) or in ``svhn`` or ``SVHN`` below it.

    Raises:
        MergeboundError: a file is missing, damaged or holds a label outside 0 .. 10; names it.
    """
    entry = find("svhn")
    train, test = located(entry, root)
    return DataSet(entry.name, entry.class_names, {"train": _read(train, entry), "test": _read(test, entry)})


def _read(path: Path, entry: VisionData) -> ArrayImages:
    """One file: X is (32, 32, 3, n) uint8, y is (n, 1) in 1 .. 10."""
    found = load_mat(path, ("X", "y"), entry)
    pixels, labels = np.asarray(found["X"]), np.asarray(found["y"])
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[2] != 3:
        raise damaged(path, f"X is {pixels.dtype} of shape {pixels.shape}, not uint8 of shape (32, 32, 3, n)", entry)
    if labels.dtype.kind not in "iuf" or labels.size != max(labels.shape, default=0):
        raise damaged(path, f"y is {labels.dtype} of shape {labels.shape}, not one number per image", entry)
    digits = labels.reshape(-1).astype(np.int64)
    if len(digits) and (digits.min() < 0 or digits.max() > 10 or (digits != labels.reshape(-1)).any()):
        wrong = digits[(digits < 0) | (digits > 10) | (digits != labels.reshape(-1))][0]
        raise damaged(path, f"y holds {wrong}, but labels are 1 to 10", entry)
    return checked_arrays(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), digits % 10, path, entry)
