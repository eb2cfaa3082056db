"""MNIST, in the layout of ``torchvision.datasets.MNIST``: four idx files, plain or ``.gz``, in ``MNIST/raw``."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.idx import idx_images


def load(root: Path) -> DataSet:
    """Training and test images, grey, (28, 28, 1), in the order of the files.

    Raises:
        MergeboundError: a file is missing, damaged or holds a label above 9; names it.
    """
    entry = find("mnist")
    train_images, train_labels, test_images, test_labels = entry.files
    parts = {
        "train": idx_images(entry, root, train_images, train_labels),
        "test": idx_images(entry, root, test_images, test_labels),
    }
    return DataSet(entry.name, entry.class_names, parts)
