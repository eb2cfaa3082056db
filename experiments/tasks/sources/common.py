"""What the readers of vision data sets share: missing, text and MATLAB files, with errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.images import ArrayImages, FileImages
from experiments.tasks.vision_data import VisionData
from theory.errors import MergeboundError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp", ".pgm")


def need(entry: VisionData, root: Path, *names: str) -> Path:
    """The first of some paths below the root that exists; a name that ends in ``/`` is a folder, others are files.

    Args:
        names: with ``/``, alternatives also as ``a|b`` (as in :attr:`VisionData.files`).

    Raises:
        MergeboundError: none does; names the first and says how to get the data set.
    """
    every = [each for name in names for each in name.split("|")]
    for name in every:
        path = root / name
        if path.is_dir() if name.endswith("/") else path.is_file():
            return path
    raise MergeboundError(f"{root / every[0]}: {missing(entry, root, every[0])}")


def located(entry: VisionData, root: Path) -> list[Path]:
    """Where each of the entry's ``files`` is, in their order.

    Raises:
        MergeboundError: names the first missing one and says how to get the data set.
    """
    return [need(entry, root, name) for name in entry.files]


def missing(entry: VisionData, root: Path | None, name: str) -> str:
    """The rest of a message about a missing file or folder: what it belongs to, and how to get it.

    Args:
        root: of the data set, None where unknown.
        name: with a ``/`` at its end if it is a folder.
    """
    kind = "folder" if name.endswith("/") else "file"
    advice = entry.advice(root or "DIR")
    how = f"by hand: {advice}" if entry.manual else f"get it with: {advice}"
    return f"there is no such {kind}, so {entry.title} is not here or incomplete; {how}"


def damaged(path: Path, reason: object, entry: VisionData) -> MergeboundError:
    """The error of a file that is there but cannot be used."""
    told = " ".join(str(reason).replace(str(path), path.name).split()).rstrip(".")
    again = "place it again" if entry.manual else f"remove it and get it again with: {entry.advice()}"
    return MergeboundError(f"{path}: damaged or not a file of {entry.title} ({told}); {again}")


def text_lines(path: Path, entry: VisionData) -> list[str]:
    """Lines of a text file without the blanks around them; empty lines are left out.

    Raises:
        MergeboundError: not readable as UTF-8 text, or without a line.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, error, entry) from error
    found = [line for line in lines if line]
    if not found:
        raise damaged(path, "it holds no line", entry)
    return found


def load_mat(path: Path, keys: Sequence[str], entry: VisionData, *, squeeze: bool = False) -> dict[str, Any]:
    """Some variables of a MATLAB file of version 5 (scipy's reader, which runs no code of the file).

    Raises:
        MergeboundError: not such a file, cut short, or without one of the variables.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        found: dict[str, Any] = loadmat(str(path), squeeze_me=squeeze, variable_names=list(keys))
    except (OSError, ValueError, TypeError, KeyError, EOFError, NotImplementedError, MatReadError) as error:
        raise damaged(path, error, entry) from error
    except Exception as error:  # scipy lets zlib.error and errors of its own C code pass
        raise damaged(path, f"{type(error).__name__}: {error}", entry) from error
    for key in keys:
        if key not in found:
            raise damaged(path, f"it has no variable {key!r}", entry)
    return found


def listed_images(
    root: Path,
    files: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    entry: VisionData,
    *,
    listed_in: Path | None = None,
    grey: bool = False,
) -> FileImages:
    """Images that an annotation file lists, all of which must be there (each folder is listed once, none is opened).

    Args:
        root: folder that ``files`` are relative to.
        files: with ``/``.
        labels: class of each file, from 0.
        listed_in: the annotation file, for messages.

    Raises:
        MergeboundError: names the first missing file.
    """
    there: dict[str, frozenset[str]] = {}
    for name in files:
        folder, _, last = name.rpartition("/")
        if folder not in there:
            there[folder] = frozenset(_names(root / folder))
        if last not in there[folder]:
            where = f"{listed_in} lists it, but " if listed_in else ""
            raise MergeboundError(f"{root / name}: {where}{missing(entry, None, name)}")
    return FileImages(root, tuple(files), np.asarray(labels, dtype=np.int64), grey)


def class_folders(
    base: Path, folders: Sequence[str], entry: VisionData, *, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> FileImages:
    """Images in one folder per class, in the order of ``folders`` and of names (torchvision's ``make_dataset`` order).

    Args:
        base: folder that holds the class folders.
        folders: the class folders, in the order of the labels.
        suffixes: lower-case endings of image files; other files are left out.

    Raises:
        MergeboundError: a class folder is missing or holds no image.
    """
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        here = base / folder
        if not here.is_dir():
            raise MergeboundError(f"{here}: {missing(entry, None, folder + '/')}")
        found = images_below(here, suffixes)
        if not found:
            raise damaged(here, f"no image of class {folder} lies here", entry)
        files += [f"{folder}/{name}" for name in found]
        labels += [label] * len(found)
    return FileImages(base, tuple(files), np.asarray(labels, dtype=np.int64))


def images_below(folder: Path, suffixes: Iterable[str] = IMAGE_SUFFIXES) -> list[str]:
    """Names of the image files below a folder, relative, with ``/``, sorted folder by folder.

    Hidden files and folders (names that start with a dot, such as ``._a.jpg`` of macOS archives) are left out, and
    links to folders are not followed.
    """
    endings = tuple(suffixes)
    found: list[str] = []
    for here, _, names in sorted(os.walk(folder)):
        relative = Path(here).relative_to(folder).as_posix()
        if relative != "." and any(part.startswith((".", "__MACOSX")) for part in relative.split("/")):
            continue
        prefix = "" if relative == "." else f"{relative}/"
        found += [prefix + name for name in sorted(names) if name.lower().endswith(endings) and name[0] != "."]
    return found


def only_classes(base: Path, folders: Sequence[str], entry: VisionData) -> None:
    """Check that a folder holds no folder but those of the classes (hidden ones apart).

    Raises:
        MergeboundError: names the first other folder.
    """
    for name in sorted(_names(base)):
        if name not in folders and name[0] not in "._" and (base / name).is_dir():
            raise damaged(base / name, f"it is none of the {len(folders)} class folders", entry)


def checked_arrays(array: np.ndarray, labels: np.ndarray, path: Path, entry: VisionData) -> ArrayImages:
    """Images in memory, (n, height, width, channels) uint8, whose number must be that of the labels.

    Raises:
        MergeboundError: names the file of the images.
    """
    if len(array) != len(labels):
        raise damaged(path, f"{len(array)} images for {len(labels)} labels", entry)
    return ArrayImages(array, np.ascontiguousarray(labels, dtype=np.int64), str(path))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
