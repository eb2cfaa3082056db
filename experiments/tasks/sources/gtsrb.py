"""GTSRB, in the layout of ``torchvision.datasets.GTSRB``: ``gtsrb/GTSRB`` and ``gtsrb/GT-final_test.csv``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import FileImages
from experiments.tasks.sources.common import class_folders, damaged, listed_images, located, only_classes, text_lines
from experiments.tasks.vision_data import VisionData


def load(root: Path) -> DataSet:
    """Training images by class folder (``00000`` to ``00042``), test images in the order of their list.

    Training images lie in ``GTSRB/Training`` or, for the larger final set, in ``GTSRB/Final_Training/Images``; where a
    class folder has its annotations (``GT-00007.csv``), every image listed there must be in it.

    Raises:
        MergeboundError: a class folder, list or image is missing, or a list is damaged; names the file.
    """
    entry = find("gtsrb")
    train, test, table = located(entry, root)
    folders = [f"{label:05d}" for label in range(entry.classes)]
    only_classes(train, folders, entry)
    parts = {"train": class_folders(train, folders, entry, suffixes=(".ppm",)), "test": _test(test, table, entry)}
    for folder in folders:
        annotations = train / folder / f"GT-{folder}.csv"
        if annotations.is_file():
            listed = [f"{folder}/{name}" for (name,) in _columns(annotations, ("Filename",), entry)]
            listed_images(train, listed, [0] * len(listed), entry, listed_in=annotations)
    return DataSet(entry.name, entry.class_names, parts)


def _test(images: Path, table: Path, entry: VisionData) -> FileImages:
    """Test images and the classes that ``GT-final_test.csv`` gives them."""
    files: list[str] = []
    labels: list[int] = []
    for name, label in _columns(table, ("Filename", "ClassId"), entry):
        if not label.isdecimal() or int(label) >= entry.classes:
            raise damaged(table, f"ClassId of {name} is {label!r}, not in 0 to {entry.classes - 1}", entry)
        files.append(name)
        labels.append(int(label))
    return listed_images(images, files, labels, entry, listed_in=table)


def _columns(path: Path, wanted: Sequence[str], entry: VisionData) -> list[tuple[str, ...]]:
    """Some columns of a table with semicolons and a header."""
    rows = csv.reader(text_lines(path, entry), delimiter=";", skipinitialspace=True)
    header = next(rows)
    for name in wanted:
        if name not in header:
            raise damaged(path, f"its header has no {name}: {';'.join(header)[:80]}", entry)
    places = [header.index(name) for name in wanted]
    found: list[tuple[str, ...]] = []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header) or not row[places[0]] or "/" in row[places[0]]:
            raise damaged(path, f"row {number} is {';'.join(row)[:80]!r}", entry)
        found.append(tuple(row[place] for place in places))
    return found
