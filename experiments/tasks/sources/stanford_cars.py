"""Stanford Cars, in the layout of ``torchvision.datasets.StanfordCars``: ``stanford_cars/`` with its devkit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import FileImages
from experiments.tasks.sources.common import damaged, listed_images, load_mat, located
from experiments.tasks.vision_data import VisionData


def load(root: Path) -> DataSet:
    """Training and test images in the order of the annotations; class names from ``cars_meta.mat``.

    Raises:
        MergeboundError: an annotation file or an image is missing, or an annotation is damaged; names the file.
    """
    entry = find("stanford_cars")
    meta, train, test, train_images, test_images = located(entry, root)
    names = np.atleast_1d(load_mat(meta, ("class_names",), entry, squeeze=True)["class_names"])
    if not all(isinstance(name, str) for name in names.tolist()):
        raise damaged(meta, f"class_names is {names.dtype} of shape {names.shape}, not names", entry)
    class_names = tuple(str(name).strip() for name in names)
    if len(set(class_names)) != entry.classes:
        raise damaged(meta, f"it names {len(set(class_names))} classes, not {entry.classes}", entry)
    parts = {
        "train": _annotated(train, train_images, len(class_names), entry),
        "test": _annotated(test, test_images, len(class_names), entry),
    }
    return DataSet(entry.name, class_names, parts)


def _annotated(path: Path, images: Path, classes: int, entry: VisionData) -> FileImages:
    """Images of one annotation file: structs with ``fname`` and ``class`` (from 1)."""
    rows = np.atleast_1d(load_mat(path, ("annotations",), entry, squeeze=True)["annotations"])
    fields = rows.dtype.names or ()
    for field in ("fname", "class"):
        if field not in fields:
            told = ", ".join(fields) or "none"
            advice = " (the test file without labels?)" if field == "class" and fields else ""
            raise damaged(path, f"its annotations have no field {field!r}, only {told}{advice}", entry)
    files: list[str] = []
    labels: list[int] = []
    for number, (name, label) in enumerate(zip(rows["fname"].tolist(), rows["class"].tolist(), strict=True)):
        if not isinstance(name, str) or not name or "/" in name or "\\" in name:
            raise damaged(path, f"fname of annotation {number} is {name!r}, not a file name", entry)
        if not isinstance(label, int) or not 1 <= label <= classes:
            raise damaged(path, f"class of annotation {number} ({name}) is {label!r}, not in 1 to {classes}", entry)
        files.append(name)
        labels.append(label - 1)
    return listed_images(images, files, labels, entry, listed_in=path)
