"""Kuzushiji-MNIST as torchvision keeps it: ``KMNIST/raw`` with the four idx files, plain or ``.gz``."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.idx import idx_images


def load(root: Path) -> DataSet:
    """Train and test, (n, 28, 28, 1); plain files are mapped, ``.gz`` ones read whole.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    entry = find("kmnist")
    parts = {
        part: idx_images(entry, root, f"KMNIST/raw/{word}-images-idx3-ubyte", f"KMNIST/raw/{word}-labels-idx1-ubyte")
        for part, word in (("train", "train"), ("test", "t10k"))
    }
    return DataSet(entry.name, entry.class_names, parts)
