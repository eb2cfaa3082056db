"""From the catalogue's name to a data set and a task: load, check, split."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import VALIDATION_SHARE, DataSet, ImageTask, split
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """Something about a data set that is not as its source says.

    Attributes:
        level: ``error``: the classes are not those of the source, so results mean something else; ``warning``: a
            count differs, as in a subset or a mirror.
        message: what, and against which number.
    """

    level: str
    message: str


def load(name: str, root: str | Path) -> DataSet:
    """A vision data set from the folder that torchvision's class of it would be given as ``root``.

    Images in files are found, not opened; images in arrays are read whole.

    Args:
        name: any usual spelling.
        root: folder that holds the data set's own folder (``<root>/MNIST/raw``, ``<root>/dtd/dtd/images``, ...).

    Raises:
        MergeboundError: unknown name, missing or damaged file (named, with what to do), classes unlike the source's.
    """
    entry = find(name)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise MergeboundError(
            f"{folder}: there is no such folder; give the one that holds {entry.title}, or: {entry.advice(folder)}"
        )
    source = importlib.import_module(f"experiments.tasks.sources.{entry.name}")
    data: DataSet = source.load(folder)
    for finding in check(data):
        if finding.level == "error":
            raise MergeboundError(f"{folder}: {finding.message}; get the data set again or read it as a local folder")
        _log.info("%s", finding.message)
    return data


def task(
    name: str, root: str | Path, *, seed: int = 0, validation: float | int = VALIDATION_SHARE, test: float | None = None
) -> ImageTask:
    """A vision data set, split into training, validation and test images by a stored seed.

    Args:
        name, root: as for :func:`load`.
        seed, validation, test: as for :func:`experiments.tasks.dataset.split`.
    """
    data = load(name, root)
    if test is None:
        return split(data, seed=seed, validation=validation)
    return split(data, seed=seed, validation=validation, test=test)


def check(data: DataSet) -> list[Finding]:
    """Compare a loaded data set with the catalogue's entry of its name.

    Errors: another number of classes, other class names (where the source fixes them), a class without a training
    image.  Warnings: another number of images in a part than the source publishes, or an official part missing.
    """
    entry = find(data.name)
    found: list[Finding] = []
    if len(data.class_names) != entry.classes:
        found.append(
            Finding("error", f"{entry.title}: {len(data.class_names)} classes, but its source has {entry.classes}")
        )
    elif entry.class_names and data.class_names != entry.class_names:
        pairs = zip(data.class_names, entry.class_names, strict=True)
        row = next(number for number, (here, there) in enumerate(pairs) if here != there)
        found.append(
            Finding(
                "error",
                f"{entry.title}: class {row} is {data.class_names[row]!r}, but its source has "
                f"{entry.class_names[row]!r}",
            )
        )
    counts = np.bincount(data.parts["train"].labels, minlength=len(data.class_names))
    empty = [data.class_names[row] for row in np.flatnonzero(counts[: len(data.class_names)] == 0)]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        found.append(Finding("error", f"{entry.title}: no training image of class {empty[0]!r}{more}"))
    known = (entry.counts, *entry.other_counts)
    like = [counts for counts in known if set(counts) == set(data.parts)] or [entry.counts]
    here = {part: len(images) for part, images in data.parts.items()}
    for part, official in () if here in known else like[0].items():
        if part not in data.parts:
            found.append(Finding("warning", f"{entry.title}: no {part} part, which its source has ({official} images)"))
        elif len(data.parts[part]) != official:
            found.append(
                Finding(
                    "warning",
                    f"{entry.title}: {len(data.parts[part])} {part} images, but its source has {official}",
                )
            )
    return found


def check_data(name: str, root: str | Path, *, images: int = 32, seed: int = 0) -> list[Finding]:
    """Load a data set, compare it with the catalogue, and decode some of its images.

    Args:
        images: how many images of each part are decoded, drawn by the seed; 0 decodes none.
        seed: names the draw.

    Returns:
        what :func:`check` finds; empty where all is as published.

    Raises:
        MergeboundError: a file is missing or damaged (named).
    """
    data = load(name, root)
    for number, (_, part) in enumerate(sorted(data.parts.items())):
        rng = np.random.default_rng([seed, 0xC4EC, number])
        for row in np.sort(rng.choice(len(part), size=min(images, len(part)), replace=False)):
            part.read(int(row))
    return check(data)
