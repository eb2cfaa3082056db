"""A data set as its source publishes it, and the task that a stored seed makes of it: train, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from experiments.tasks.images import Images, Subset, check_labels_of
from theory.errors import MergeboundError

VALIDATION_SHARE = 0.1
"""Share of the training part that becomes validation images."""
TEST_SHARE = 0.2
"""Share of the training part that becomes test images where the source has no test part."""
MOST_VALIDATION = 5000
"""At most this many validation images."""


@dataclass(frozen=True)
class DataSet:
    """What lies on disk.

    Attributes:
        name: as :func:`experiments.tasks.vision` lists it, or the file's or folder's name.
        class_names: in the order of the labels.
        parts: the source's own parts: ``train`` always, ``test`` and ``validation`` where it has them.
    """

    name: str
    class_names: tuple[str, ...]
    parts: Mapping[str, Images]

    def __post_init__(self) -> None:
        if "train" not in self.parts:
            raise MergeboundError(f"{self.name}: there is no training part, only {', '.join(self.parts) or 'nothing'}")
        for part, images in self.parts.items():
            if not len(images):
                raise MergeboundError(f"{self.name}: its {part} part holds no images; get or convert it again")
            check_labels_of(images, len(self.class_names), f"{self.name} ({part})")


@dataclass(frozen=True)
class ImageTask:
    """One task: disjoint training, validation and test images, and what identifies the split.

    Attributes:
        name: of the data set.
        class_names: in the order of the labels.
        train, validation, test: the images.
        seed: names the random split.
        digest: SHA-256 of the images' fingerprints and of the rows of each part (64 hexadecimal digits): stored with
            every result.
    """

    name: str
    class_names: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    seed: int
    digest: str

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


def split(
    data: DataSet, *, seed: int = 0, validation: float | int = VALIDATION_SHARE, test: float = TEST_SHARE
) -> ImageTask:
    """Make a task of a data set, by a stored seed.

    The source's own test part is the test part.  Where it has none, ``test`` of the training part is taken, class by
    class.  The source's validation part is the validation part; where it has none, ``validation`` of the remaining
    training images is taken (at most :data:`MOST_VALIDATION`), class by class, so that a class of two images or more
    keeps one for training.  The order of rows is the source's.

    Args:
        seed: names the random draw.
        validation: share in (0, 1), or a number of images.
        test: share in (0, 1), used only where the source has no test part.

    Raises:
        MergeboundError: a share out of range, or too few images.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not (0 < share < 1 or (name == "validation" and isinstance(share, int) and share >= 1)):
            raise MergeboundError(
                f"{name} = {share!r}: give a share between 0 and 1" + (" or a count" * (name[0] == "v"))
            )
    source = data.parts["train"]
    rng = np.random.default_rng([seed, 0x5B117])
    left = np.arange(len(source))
    pieces: dict[str, tuple[str, np.ndarray]] = {}
    if "test" in data.parts:
        pieces["test"] = ("test", np.arange(len(data.parts["test"])))
    else:
        taken = by_class(source.labels[left], round(test * len(left)), rng)
        pieces["test"] = ("train", left[taken])
        left = np.delete(left, taken)
    if "validation" in data.parts:
        pieces["validation"] = ("validation", np.arange(len(data.parts["validation"])))
    else:
        wanted = validation if isinstance(validation, int) else min(MOST_VALIDATION, round(validation * len(left)))
        taken = by_class(source.labels[left], wanted, rng)
        pieces["validation"] = ("train", left[taken])
        left = np.delete(left, taken)
    pieces["train"] = ("train", left)
    for name, (_, rows) in pieces.items():
        if not len(rows):
            raise MergeboundError(
                f"{data.name}: {len(source)} training images are too few for a {name} part; give more images or shares"
            )
    fingerprints = {part: images.fingerprint for part, images in sorted(data.parts.items())}
    digest = hashlib.sha256(repr((data.name, data.class_names, fingerprints)).encode())
    for name in ("train", "validation", "test"):
        part, rows = pieces[name]
        digest.update(f"{name}:{part}".encode())
        digest.update(np.ascontiguousarray(rows, dtype=np.int64).tobytes())
    views: dict[str, Images] = {
        name: data.parts[part] if len(rows) == len(data.parts[part]) else Subset(data.parts[part], rows)
        for name, (part, rows) in pieces.items()
    }
    return ImageTask(
        data.name, data.class_names, views["train"], views["validation"], views["test"], seed, digest.hexdigest()
    )


def by_class(labels: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Row numbers, ascending, of ``wanted`` images in the proportions of the classes (largest remainders first).

    A class with two images or more keeps at least one; a class with a single image gives none.
    """
    classes, counts = np.unique(labels, return_counts=True)
    room = np.maximum(counts - 1, 0)
    wanted = int(min(wanted, room.sum()))
    exact = wanted * counts / max(counts.sum(), 1)
    quota = np.minimum(np.floor(exact).astype(np.int64), room)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    while quota.sum() < wanted:
        for index in order:
            if quota.sum() < wanted and quota[index] < room[index]:
                quota[index] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == value))[:count] for value, count in zip(classes, quota, strict=True)
    ]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))
