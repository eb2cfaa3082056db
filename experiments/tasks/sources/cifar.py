"""CIFAR-10 and CIFAR-100 in their Python version: pickled dicts of images (n, 3072), red, green and blue planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.dataset import DataSet
from experiments.tasks.images import ArrayImages
from experiments.tasks.sources.common import damaged, need
from experiments.tasks.sources.pickles import read_pickle, text
from experiments.tasks.vision_data import VisionData


def load_cifar(
    entry: VisionData, root: Path, folder: str, train: Sequence[str], label_key: str, meta: str, names_key: str
) -> DataSet:
    """Both parts, (n, 32, 32, 3), and the class names of the meta file.

    Args:
        folder: of the data set, below ``root``.
        train: the files of the training part; the test part's file is the one in ``entry.files`` with ``test``.
        label_key: of the labels in each file.
        meta, names_key: the file with the class names, and their key in it.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    test = [name.rpartition("/")[2] for name in entry.files if "test" in name]
    paths = {name: need(entry, root, f"{folder}/{name}") for name in (*train, *test, meta)}
    classes = _names(paths[meta], names_key, entry)
    parts = {
        "train": _part([paths[name] for name in train], label_key, len(classes), root / folder, entry),
        "test": _part([paths[name] for name in test], label_key, len(classes), root / folder, entry),
    }
    return DataSet(entry.name, classes, parts)


def _names(path: Path, key: str, entry: VisionData) -> tuple[str, ...]:
    found = read_pickle(path, entry).get(key)
    try:
        if type(found) is not list or not found:
            raise ValueError(f"it has no list {key!r}")
        return tuple(text(name) for name in found)
    except ValueError as error:
        raise damaged(path, error, entry) from error


def _part(paths: Sequence[Path], label_key: str, classes: int, folder: Path, entry: VisionData) -> ArrayImages:
    pieces = [_piece(path, read_pickle(path, entry), label_key, classes, entry) for path in paths]
    images = np.empty((sum(len(rows) for rows, _ in pieces), 32, 32, 3), dtype=np.uint8)
    start = 0
    for rows, _ in pieces:
        images[start : start + len(rows)] = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        start += len(rows)
    origin = str(paths[0]) if len(paths) == 1 else f"{folder} ({paths[0].name} .. {paths[-1].name})"
    return ArrayImages(images, np.concatenate([labels for _, labels in pieces]), origin)


def _piece(
    path: Path, found: dict[str, Any], label_key: str, classes: int, entry: VisionData
) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = found.get("data"), found.get(label_key)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        raise damaged(path, "it has no 'data' of bytes, (n, 3072)", entry)
    if type(labels) is not list or not all(type(label) is int for label in labels):
        raise damaged(path, f"it has no list {label_key!r} of whole numbers", entry)
    if len(rows) != len(labels):
        raise damaged(path, f"{len(rows)} images for {len(labels)} labels", entry)
    wrong = [row for row, label in enumerate(labels) if not 0 <= label < classes]
    if wrong:
        raise damaged(path, f"image {wrong[0]} has label {labels[wrong[0]]} of {classes} classes", entry)
    return rows, np.asarray(labels, dtype=np.int64)
