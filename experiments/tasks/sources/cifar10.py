"""CIFAR-10 as torchvision keeps it: ``cifar-10-batches-py/data_batch_1 .. 5``, ``test_batch``, ``batches.meta``."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.cifar import load_cifar


def load(root: Path) -> DataSet:
    """Train (the five batches in order) and test, (n, 32, 32, 3), read whole.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    train = [f"data_batch_{number}" for number in range(1, 6)]
    return load_cifar(
        find("cifar10"), root, "cifar-10-batches-py", train, "labels", meta="batches.meta", names_key="label_names"
    )
