"""Rendered SST2 as torchvision keeps it: ``rendered-sst2/{train,valid,test}/{negative,positive}/*.png``."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.common import class_folders, need

PARTS = {"train": "train", "validation": "valid", "test": "test"}


def load(root: Path) -> DataSet:
    """Train, validation and test images, found but not opened.

    Raises:
        MergeboundError: names the folder that is missing or empty.
    """
    entry = find("rendered_sst2")
    for folder in entry.files:
        need(entry, root, folder)
    parts = {
        part: class_folders(root / "rendered-sst2" / folder, entry.class_names, entry, suffixes=(".png",))
        for part, folder in PARTS.items()
    }
    return DataSet(entry.name, entry.class_names, parts)
