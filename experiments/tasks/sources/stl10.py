"""STL-10 as torchvision keeps it: ``stl10_binary/train_X.bin`` and so on.

Images are bytes, (n, 3, 96, 96) with columns before rows; labels are bytes from 1.  The 100,000 images without labels
are not used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import ArrayImages
from experiments.tasks.sources.common import checked_arrays, damaged, need, text_lines
from experiments.tasks.vision_data import VisionData

FOLDER = "stl10_binary"
SIDE = 96


def load(root: Path) -> DataSet:
    """Train and test, (n, 96, 96, 3), mapped from the files and not copied.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    entry = find("stl10")
    listed = need(entry, root, f"{FOLDER}/class_names.txt")
    names = tuple(text_lines(listed, entry))
    if len(names) != entry.classes:
        raise damaged(listed, f"{len(names)} names for {entry.classes} classes", entry)
    return DataSet(entry.name, names, {part: _part(entry, root, part, len(names)) for part in ("train", "test")})


def _part(entry: VisionData, root: Path, part: str, classes: int) -> ArrayImages:
    images, labels = (need(entry, root, f"{FOLDER}/{part}_{kind}.bin") for kind in "Xy")
    one = 3 * SIDE * SIDE
    size = images.stat().st_size
    if not size or size % one:
        raise damaged(images, f"{size} bytes are not a whole number of images of {one} bytes", entry)
    try:
        pixels = np.memmap(images, dtype=np.uint8, mode="r").reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)
        numbers = np.fromfile(labels, dtype=np.uint8).astype(np.int64) - 1
    except (OSError, ValueError) as error:
        raise damaged(images, error, entry) from error
    wrong = np.flatnonzero((numbers < 0) | (numbers >= classes))
    if len(wrong):
        raise damaged(labels, f"image {wrong[0]} has label {numbers[wrong[0]] + 1} of 1 .. {classes}", entry)
    if len(pixels) != len(numbers):
        raise damaged(labels, f"{len(numbers)} labels for the {len(pixels)} images of {images.name}", entry)
    return checked_arrays(pixels, numbers, images, entry)
