"""FER2013 as torchvision keeps it: text tables in ``fer2013``, one row per image of 48 x 48 grey pixels.

``fer2013.csv`` or, where it is not there, ``icml_face_data.csv``: columns emotion, Usage, pixels (``Training`` rows
train, ``PublicTest`` and ``PrivateTest`` rows test, as torchvision takes them).  Else ``train.csv``, whose companion
``test.csv`` has no labels and is not used: the test images are then drawn from the training part.
"""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import ArrayImages, Images
from experiments.tasks.sources.common import damaged, need
from experiments.tasks.vision_data import VisionData

SIDE = 48
USAGE = {"Training": "train", "PublicTest": "test", "PrivateTest": "test"}


def load(root: Path) -> DataSet:
    """Train and, where the table has labels for it, test, (n, 48, 48, 1), read whole.

    Raises:
        MergeboundError: names the file, and the line where one is damaged.
    """
    entry = find("fer2013")
    names = ("fer2013/fer2013.csv", "fer2013/icml_face_data.csv", "fer2013/train.csv")
    path = need(entry, root, *names)
    return DataSet(entry.name, entry.class_names, _read(path, entry, parts=path.name != "train.csv"))


def _read(path: Path, entry: VisionData, *, parts: bool) -> dict[str, Images]:
    pixels: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file, warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            table = csv.reader(file)
            header = [name.strip() for name in next(table, [])]
            columns = [header.index(name) for name in ("emotion", "pixels", *(["Usage"] if parts else []))]
            for row in table:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(f"line {table.line_num} has {len(row)} fields, its header {len(header)}")
                cells = [row[column].strip() for column in columns]
                part = USAGE.get(cells[2]) if parts else "train"
                if part is None:
                    raise ValueError(f"line {table.line_num}: Usage {cells[2]!r} is none of {', '.join(USAGE)}")
                if not cells[0].isdecimal() or int(cells[0]) >= entry.classes:
                    raise ValueError(f"line {table.line_num}: emotion {cells[0]!r} is not 0 .. {entry.classes - 1}")
                pixels[part].append(_pixels(cells[1], table.line_num))
                labels[part].append(int(cells[0]))
    except (OSError, ValueError, UnicodeDecodeError, csv.Error) as error:
        raise damaged(path, error, entry) from error
    if not labels["train"]:
        raise damaged(path, "it has no training image", entry)
    return {
        part: ArrayImages(
            np.stack(pixels[part]).reshape(-1, SIDE, SIDE, 1),
            np.asarray(labels[part], dtype=np.int64),
            f"{path} ({part})",
        )
        for part in pixels
        if labels[part]
    }


def _pixels(text: str, line: int) -> np.ndarray:
    """The numbers 0 .. 255 of one image, (2304,) uint8."""
    try:
        found = np.fromstring(text, dtype=np.int64, sep=" ")
    except (ValueError, DeprecationWarning) as error:  # numpy warns of text that it has not read to its end
        raise ValueError(f"line {line}: its pixels are not whole numbers") from error
    if found.size != SIDE * SIDE or found.min() < 0 or found.max() > 255:
        raise ValueError(f"line {line}: {found.size} pixels, not {SIDE * SIDE} numbers from 0 to 255")
    return found.astype(np.uint8)
