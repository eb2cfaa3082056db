"""EuroSAT (RGB), in the layout of ``torchvision.datasets.EuroSAT``: one folder per class in ``eurosat/2750``."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.common import class_folders, located, only_classes


def load(root: Path) -> DataSet:
    """All images as one part: the source has no split.

    Raises:
        MergeboundError: a class folder is missing, empty or unknown; names it.
    """
    entry = find("eurosat")
    (base,) = located(entry, root)
    only_classes(base, entry.class_names, entry)
    return DataSet(entry.name, entry.class_names, {"train": class_folders(base, entry.class_names, entry)})
