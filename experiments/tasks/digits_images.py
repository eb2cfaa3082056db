"""The embedded digits as image tasks of 8-bit grey images: no files are needed.

``digits8:NAME`` is the digits under one fixed transformation (:func:`experiments.tasks.digits8.transformations`), with
training images of its own for the eight default transformations; ``digits8:pretraining`` is what bases are made of.
The other four transformations are for judging frozen features: their training and validation images are the 256
validation images of the eight, split in two, so that no base and no expert of the eight was trained on them.
The 17 grey levels v of the source become ``round(255 v / 16)``.
"""

from __future__ import annotations

import numpy as np

from experiments.tasks.dataset import DataSet, ImageTask, split
from experiments.tasks.digits8 import EIGHT, MORE, TWELVE, transformations
from experiments.tasks.images import ArrayImages
from theory.errors import MergeboundError, nearest

PRETRAINING, CALIBRATION, TEST, OWN = 500, 256, 400, 80
"""Images for pretraining, validation and test, which all tasks share, and of each task's own for training."""
JUDGED = 160
"""Of the validation images, those on which features for the four further tasks are fitted; the rest validates."""


def digits_task(name: str, *, seed: int = 0) -> ImageTask:
    """One task of the embedded digits.

    Args:
        name: a transformation of :data:`~experiments.tasks.digits8.TWELVE`, or ``pretraining``.
        seed: names the permutation that makes all parts; tasks of one seed do not share training images.

    Raises:
        MergeboundError: an unknown name.
    """
    from sklearn.datasets import load_digits

    if name != "pretraining" and name not in TWELVE:
        raise MergeboundError(f"digits8 has no task {name!r}; {nearest(name, (*TWELVE, 'pretraining'))}")
    raw = load_digits()
    order = np.random.default_rng([seed, 0xD161]).permutation(len(raw.target))
    pre, calibration, test, rest = np.split(order, np.cumsum([PRETRAINING, CALIBRATION, TEST]))
    number = EIGHT.index(name) if name in EIGHT else 0
    own = pre if name == "pretraining" else rest[number * OWN : (number + 1) * OWN]
    if name in MORE:
        own, calibration = calibration[:JUDGED], calibration[JUDGED:]
    turn = transformations()["identity" if name == "pretraining" else name]

    def part(rows: np.ndarray) -> ArrayImages:
        seen = turn(raw.images[rows].astype(np.float64) / 16.0)
        pixels = np.ascontiguousarray(np.rint(255.0 * seen).astype(np.uint8)[..., None])
        return ArrayImages(pixels, raw.target[rows].astype(np.int64), f"digits8 ({name})", rows.astype(np.int64))

    parts = {"train": part(own), "validation": part(calibration), "test": part(test)}
    data = DataSet(f"digits8:{name}", tuple(str(k) for k in range(10)), parts)
    return split(data, seed=seed)
