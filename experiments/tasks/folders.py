"""Folders of images: one sub-folder per class, found without opening an image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from theory.errors import MergeboundError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of image files, in lower case (capitals are read too)."""

DEEPEST = 32
"""Folders may be nested so deep below a class."""


@dataclass(frozen=True)
class Found:
    """Files below a folder, as names relative to it with ``/``, folder by folder in the order of their names.

    Attributes:
        images: files that end as images do.
        others: all other files.
    """

    images: tuple[str, ...]
    others: tuple[str, ...]


def visible_folders(path: Path) -> list[Path]:
    """Sub-folders that are not hidden, in the order of their names; none where ``path`` is no folder.

    Raises:
        MergeboundError: it may not be read.
    """
    if not path.is_dir():
        return []
    return sorted(entry for entry in _entries(path) if entry.is_dir() and not entry.name.startswith("."))


def image_files(path: Path) -> list[str]:
    """Names of the images that lie directly in a folder, hidden ones left out, in order."""
    return [entry.name for entry in sorted(_entries(path)) if not entry.is_dir() and is_image(entry.name)]


def is_image(name: str) -> bool:
    """Whether a name is that of an image that is not hidden."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


def find_files(path: Path) -> Found:
    """All files below a folder, hidden files and folders left out, links followed.

    Raises:
        MergeboundError: a link that leads nowhere or back to a folder above it, a folder that may not be read, or one
            nested deeper than :data:`DEEPEST`; names it.
    """
    images: list[str] = []
    others: list[str] = []
    _walk(path, "", (), images, others)
    return Found(tuple(sorted(images, key=_by_folder)), tuple(sorted(others, key=_by_folder)))


def _by_folder(name: str) -> list[str]:
    return name.split("/")


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...], images: list[str], others: list[str]) -> None:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise MergeboundError(f"{folder}: a link back to a folder above it, a loop without end; remove the link")
    if len(above) >= DEEPEST:
        raise MergeboundError(f"{folder}: nested more than {DEEPEST} folders deep; put the images higher up")
    for entry in sorted(_entries(folder)):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            _walk(entry, f"{prefix}{entry.name}/", (*above, here), images, others)
        elif entry.is_symlink() and not entry.exists():
            raise MergeboundError(
                f"{entry}: a link to {os.readlink(entry)}, which is not there (or a loop); remove or repair the link"
            )
        elif is_image(entry.name):
            images.append(f"{prefix}{entry.name}")
        else:
            others.append(f"{prefix}{entry.name}")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise MergeboundError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
