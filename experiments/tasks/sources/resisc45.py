"""NWPU-RESISC45: one folder per class, and the lists of Neumann et al. (arXiv 1911.06721) where they are there."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import Images
from experiments.tasks.sources.common import class_folders, damaged, listed_images, located, only_classes, text_lines
from experiments.tasks.vision_data import VisionData
from theory.errors import MergeboundError

_LISTS = {"train": "resisc45-train.txt", "validation": "resisc45-val.txt", "test": "resisc45-test.txt"}


def load(root: Path) -> DataSet:
    """Training, validation and test images by the lists, or all images as one part where there is no list.

    A list has one file name a line (``airport_012.jpg``, with or without its folder); lists lie in the folder of the
    class folders or in the one above.  Without a validation list, validation images are drawn by seed.

    Raises:
        MergeboundError: a class folder is missing, empty or unknown; a listed image is missing; one list is there
            without the other; names it.
    """
    entry = find("resisc45")
    (base,) = located(entry, root)
    if base.name == entry.class_names[0]:
        base = base.parent
    only_classes(base, entry.class_names, entry)
    found = {
        part: folder / name
        for part, name in _LISTS.items()
        for folder in (base.parent, base)
        if (folder / name).is_file()
    }
    if not found:
        return DataSet(entry.name, entry.class_names, {"train": class_folders(base, entry.class_names, entry)})
    for part in ("train", "test"):
        if part not in found:
            there = next(iter(found.values()))
            raise MergeboundError(
                f"{there.parent / _LISTS[part]}: there is no such file, but {there.name} is here; place both lists, or "
                "none for a split by seed"
            )
    parts: dict[str, Images] = {part: _listed(base, path, entry) for part, path in found.items()}
    return DataSet(entry.name, entry.class_names, parts)


def _listed(base: Path, path: Path, entry: VisionData) -> Images:
    """Images of one list."""
    number = {name: label for label, name in enumerate(entry.class_names)}
    files: list[str] = []
    labels: list[int] = []
    for line in text_lines(path, entry):
        last = line.rpartition("/")[2]
        folder = last.rpartition("_")[0]
        if folder not in number:
            raise damaged(path, f"{line!r} names none of the {entry.classes} classes", entry)
        files.append(f"{folder}/{last}")
        labels.append(number[folder])
    return listed_images(base, files, labels, entry, listed_in=path)
