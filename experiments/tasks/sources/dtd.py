"""DTD, in the layout of ``torchvision.datasets.DTD``: ``dtd/dtd/images`` and the lists in ``dtd/dtd/labels``."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import FileImages
from experiments.tasks.sources.common import damaged, listed_images, located, text_lines
from experiments.tasks.vision_data import VisionData


def load(root: Path) -> DataSet:
    """Training, validation and test images of the source's first split, in the order of its lists.

    Raises:
        MergeboundError: a list or an image is missing, or a line is damaged; names the file.
    """
    entry = find("dtd")
    images, train, validation, test = located(entry, root)
    parts = {
        part: _listed(images, path, entry)
        for part, path in (("train", train), ("validation", validation), ("test", test))
    }
    return DataSet(entry.name, entry.class_names, parts)


def _listed(images: Path, path: Path, entry: VisionData) -> FileImages:
    """Images of one list, whose lines are ``<class>/<file>``."""
    number = {name: label for label, name in enumerate(entry.class_names)}
    files = text_lines(path, entry)
    labels = []
    for line in files:
        folder, _, name = line.partition("/")
        if folder not in number or not name or "/" in name:
            raise damaged(path, f"{line!r} is not one of the {entry.classes} classes, a slash and a file name", entry)
        labels.append(number[folder])
    return listed_images(images, files, labels, entry, listed_in=path)
