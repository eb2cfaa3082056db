"""The user's own data sets: an ``.npz`` file, or a folder of class-named sub-folders.

``.npz``: ``x_train`` and ``y_train`` (or plain ``x`` and ``y``), where there are any ``x_test``, ``x_val`` and their
labels, and ``class_names``.  Images are uint8, grey ``(n, height, width)`` or colour ``(n, height, width, 1 | 3)``;
labels are integers from 0.  Nothing in a file is executed, and one array is read at a time.

Folders: one sub-folder per class, optionally below ``train``, ``val`` and ``test``.  Classes are numbered in the order
of their names, as torchvision's ``ImageFolder`` does; images may lie deeper in a class's folder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.tasks.dataset import DataSet
from experiments.tasks.folders import IMAGE_SUFFIXES, find_files, image_files, visible_folders
from experiments.tasks.images import ArrayImages, FileImages, Images
from experiments.tasks.npz import Header, read_array, read_headers, read_names
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

PARTS: Mapping[str, str] = {
    "": "train",
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
"""Part of a data set, by what files and folders call it; plain ``x`` and ``y`` are the training part."""


def load_local(path: str | Path, name: str | None = None, *, grey: bool = False) -> DataSet:
    """A data set of the user's own.

    Args:
        path: an ``.npz`` file, or a folder (see the module's text for both layouts).
        name: of the data set; default: the file's or folder's name without its ending.
        grey: read the images of a folder as grey, one channel; otherwise they are read as RGB.

    Raises:
        MergeboundError: missing, damaged or in another layout; names the file or folder, and what to do.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        return _load_folder(source, name or source.resolve().name, grey)
    if not source.exists():
        raise MergeboundError(f"{source}: there is no such file or folder; check the path")
    if source.suffix.lower() != ".npz":
        raise MergeboundError(
            f"{source}: not an .npz file nor a folder of class-named sub-folders; convert the images, see the layout "
            "in experiments.tasks.local"
        )
    return load_npz(source, name or source.stem)


# --- npz -------------------------------------------------------------------------------------------------------------


def load_npz(path: Path, name: str) -> DataSet:
    """A data set from an ``.npz`` file; all headers are checked before the first image is read.

    Raises:
        MergeboundError: as :func:`load_local`.
    """
    headers = read_headers(path)
    keys: dict[str, str] = {}
    for key in headers:
        if key != "x" and not key.startswith("x_"):
            continue
        ending = key[2:]
        if ending not in PARTS:
            _log.warning("%s: %s is left out: it is no part of a data set (train, val, test)", path, key)
            continue
        if PARTS[ending] in keys:
            raise MergeboundError(f"{path}: {keys[PARTS[ending]]} and {key} are the same part; keep one of them")
        keys[PARTS[ending]] = key
    if "train" not in keys:
        raise MergeboundError(
            f"{path}: no x_train (or x) among its arrays ({', '.join(headers) or 'none'}); name the arrays x_train, "
            "y_train, x_test, y_test, class_names"
        )
    for key in keys.values():
        check_headers(path, headers, key)
    labels = {part: _labels(path, _partner(key)) for part, key in keys.items()}
    names = read_names(path, headers) or tuple(
        str(number) for number in range(1 + int(max(map(np.max, labels.values()))))
    )
    twice = next((each for number, each in enumerate(names) if each in names[:number]), None)
    if twice is not None:
        raise MergeboundError(f"{path}: class_names has {twice!r} twice; give every class a name of its own")
    for part, key in keys.items():
        _check_range(path, _partner(key), labels[part], len(names))
    parts: dict[str, Images] = {}
    for part, key in keys.items():
        images = read_array(path, key)
        images = images[..., None] if images.ndim == 3 else images
        parts[part] = ArrayImages(images, labels[part], f"{path} ({key})")
    return DataSet(name, names, parts)


def check_headers(path: Path, headers: Mapping[str, Header], key: str) -> None:
    """Check that an array of images and its labels are as this module's text says.

    Raises:
        MergeboundError: names the file, the array and the remedy.
    """
    images, partner = headers[key], _partner(key)
    if partner not in headers:
        raise MergeboundError(f"{path}: {key} has no labels; store them as {partner}")
    check_pairs(path, key, images.shape, headers[partner])
    if images.dtype.kind == "f":
        raise MergeboundError(
            f"{path}: {key} is {images.dtype}; store the images as uint8 (values in [0, 1]: multiply by 255 and round; "
            "normalised values: undo the normalisation first)"
        )
    if images.dtype != np.uint8:
        raise MergeboundError(f"{path}: {key} has type {images.dtype}; store uint8 images with values from 0 to 255")
    if len(images.shape) == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise MergeboundError(
            f"{path}: {key} has shape {images.shape}, channels first; store {key}.transpose(0, 2, 3, 1)"
        )
    if len(images.shape) not in (3, 4) or (len(images.shape) == 4 and images.shape[3] not in (1, 3)):
        raise MergeboundError(
            f"{path}: {key} is uint8 of shape {images.shape}; store (n, height, width) or (n, height, width, 3)"
        )
    if 0 in images.shape[1:]:
        raise MergeboundError(f"{path}: {key} has shape {images.shape}, images without pixels; convert them again")


def check_pairs(path: Path, key: str, shape: tuple[int, ...], labels: Header) -> None:
    """Check that labels are integers, one per image, and that there are any.

    Raises:
        MergeboundError: names the file and the array.
    """
    partner = _partner(key)
    if len(labels.shape) != 1 or labels.dtype.kind not in "iu":
        raise MergeboundError(f"{path}: {partner} is {labels}; store integer labels of shape (n,)")
    count = shape[0] if shape else 0
    if count != labels.shape[0]:
        raise MergeboundError(
            f"{path}: {key} has {count} images but {partner} has {labels.shape[0]} labels; make them match"
        )
    if not count:
        raise MergeboundError(f"{path}: {key} holds no images; remove the array or choose other data")


def _partner(key: str) -> str:
    return f"y{key[1:]}"


def _labels(path: Path, key: str) -> np.ndarray:
    labels = read_array(path, key)
    if labels.dtype == np.uint64 and int(labels.max()) > np.iinfo(np.int64).max:
        raise MergeboundError(f"{path}: {key} holds {int(labels.max())}; number the classes from 0")
    return labels.astype(np.int64)


def _check_range(path: Path, key: str, labels: np.ndarray, classes: int) -> None:
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise MergeboundError(
            f"{path}: {key}[{int(bad[0])}] is {int(labels[bad[0]])}, but there are {classes} classes numbered from 0; "
            "repair the labels or class_names"
        )


# --- folders ---------------------------------------------------------------------------------------------------------


def _load_folder(root: Path, name: str, grey: bool) -> DataSet:
    folders = part_folders(root)
    if not folders:
        names, images = _load_classes(root, grey)
        return DataSet(name, names, {"train": images})
    if "train" not in folders:
        raise MergeboundError(
            f"{root}: no folder train, only {', '.join(each.name for each in folders.values())}; add training images"
        )
    parts: dict[str, Images] = {}
    names, parts["train"] = _load_classes(folders["train"], grey)
    for part, folder in folders.items():
        if part == "train":
            continue
        found, parts[part] = _load_classes(folder, grey)
        if found != names:
            lacking, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
            where, other = (folder / lacking[0], folders["train"]) if lacking else (folders["train"] / extra[0], folder)
            raise MergeboundError(
                f"{where}: there is no such class folder, but {other} has one; all parts need the same classes"
            )
    return DataSet(name, names, parts)


def part_folders(root: Path) -> dict[str, Path]:
    """Folders of the parts below a root, by part; empty where its sub-folders are classes.

    A folder called ``train`` (or ``val``, ``test``) is a part where folders lie in it, and a class where images do.

    Raises:
        MergeboundError: parts beside folders that are none, or two folders of one part; names them.
    """
    below = visible_folders(root)
    parts = [folder for folder in below if folder.name.lower() in PARTS and visible_folders(folder)]
    if not parts:
        if below and all(folder.name.lower() in PARTS for folder in below):
            raise MergeboundError(
                f"{below[0]}: holds no class folders, so its images have no labels; put them as "
                f"{below[0].name}/<class>/<image>"
            )
        return {}
    found: dict[str, Path] = {}
    for folder in below:
        if folder not in parts:
            what = "it holds no class folders" if folder.name.lower() in PARTS else "it is no part (train, val, test)"
            raise MergeboundError(
                f"{folder}: beside {parts[0].name}, which holds a part of the data, but {what}; move or rename it"
            )
        part = PARTS[folder.name.lower()]
        if part in found:
            raise MergeboundError(f"{folder}: the same part as {found[part].name}; merge the two folders")
        found[part] = folder
    return found


def _load_classes(root: Path, grey: bool) -> tuple[tuple[str, ...], FileImages]:
    folders = visible_folders(root)
    stray = image_files(root)
    if stray:
        raise MergeboundError(
            f"{root / stray[0]}: an image outside of a class folder; put it as {root.name}/<class>/{stray[0]}"
        )
    if not folders:
        raise MergeboundError(
            f"{root}: no images in class-named sub-folders; put them as {root.name}/<class>/<image> "
            f"({', '.join(IMAGE_SUFFIXES[:3])}, ...)"
        )
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for label, folder in enumerate(folders):
        found = find_files(folder)
        if not found.images:
            has = f", only {found.others[0]}" if found.others else ""
            raise MergeboundError(
                f"{folder}: a class folder without images ({', '.join(IMAGE_SUFFIXES[:3])}, ...){has}; remove the "
                "folder or add its images"
            )
        files += [f"{folder.name}/{each}" for each in found.images]
        labels += [label] * len(found.images)
        others += [f"{folder.name}/{each}" for each in found.others]
    if others:
        _log.warning("%s: %d files are not images and are left out, the first is %s", root, len(others), others[0])
    names = tuple(folder.name for folder in folders)
    return names, FileImages(root, tuple(files), np.array(labels, dtype=np.int64), grey)
