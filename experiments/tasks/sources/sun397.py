"""SUN397, in the layout of ``torchvision.datasets.SUN397``: ``ClassName.txt`` and ``a/abbey/*.jpg`` in ``SUN397``."""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import FileImages
from experiments.tasks.sources.common import class_folders, damaged, listed_images, located, text_lines
from experiments.tasks.vision_data import VisionData
from theory.errors import MergeboundError

_LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}


def load(root: Path) -> DataSet:
    """Training and test images of the source's first partition where its lists are there, else all images as one part.

    Class names are those of ``ClassName.txt`` without the first letter's folder: ``/b/bistro/indoor`` is
    ``bistro/indoor``.  The lists lie in ``SUN397`` or ``SUN397/Partitions``; images are taken by class, then by name.

    Raises:
        MergeboundError: a class folder, a listed image or one of two lists is missing, or a line is damaged; names the
            file.
    """
    entry = find("sun397")
    (names,) = located(entry, root)
    base = names.parent
    folders = text_lines(names, entry)
    for line in folders:
        if line[0] != "/" or line[2:3] != "/" or len(line) < 4:
            raise damaged(names, f"{line!r} is not like /a/abbey", entry)
    class_names = tuple(line[3:] for line in folders)
    if len(set(class_names)) != len(class_names) or len(class_names) != entry.classes:
        told = f"it names {len(set(class_names))} classes on {len(class_names)} lines, not {entry.classes}"
        raise damaged(names, told, entry)
    found = {
        part: folder / name
        for part, name in _LISTS.items()
        for folder in (base / "Partitions", base)
        if (folder / name).is_file()
    }
    if not found:
        images = class_folders(base, [line[1:] for line in folders], entry, suffixes=(".jpg",))
        return DataSet(entry.name, class_names, {"train": images})
    for part, name in _LISTS.items():
        if part not in found:
            there = next(iter(found.values()))
            raise MergeboundError(
                f"{there.parent / name}: there is no such file, but {there.name} is here; place both lists, or none "
                "for a split by seed"
            )
    number = {line: label for label, line in enumerate(folders)}
    return DataSet(entry.name, class_names, {part: _listed(base, found[part], number, entry) for part in _LISTS})


def _listed(base: Path, path: Path, number: dict[str, int], entry: VisionData) -> FileImages:
    """Images of one list, whose lines are ``/a/abbey/sun_aaaaaa.jpg``."""
    files: list[str] = []
    labels: list[int] = []
    for line in text_lines(path, entry):
        folder, _, name = line.rpartition("/")
        if folder not in number or not name:
            raise damaged(path, f"{line!r} lies in none of the {len(number)} class folders", entry)
        files.append(line[1:])
        labels.append(number[folder])
    return listed_images(base, files, labels, entry, listed_in=path)
