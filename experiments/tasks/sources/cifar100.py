"""CIFAR-100 as torchvision keeps it: ``cifar-100-python/train``, ``test``, ``meta``; the 100 fine classes."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.cifar import load_cifar


def load(root: Path) -> DataSet:
    """Train and test, (n, 32, 32, 3), read whole.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    return load_cifar(
        find("cifar100"), root, "cifar-100-python", ["train"], "fine_labels", meta="meta", names_key="fine_label_names"
    )
