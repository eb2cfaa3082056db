"""PatchCamelyon as torchvision keeps it: ``pcam/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5``.

``x`` is bytes, (n, 96, 96, 3), read image by image (the training file alone has 7 GB); ``y`` is (n, 1, 1, 1).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import ReadImages
from experiments.tasks.sources.common import damaged, need
from experiments.tasks.vision_data import VisionData
from theory.errors import MergeboundError

PARTS = {"train": "train", "validation": "valid", "test": "test"}
SAMPLED = 64
"""Images of a file that its fingerprint covers, besides its size, shape and labels."""


class H5Rows:
    """Rows of an HDF5 array, one at a time.  The file is opened by each process for itself and never pickled.

    Args:
        path: the file.
        key: of the array in it, (n, height, width, channels).
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._opened: tuple[int, Any] | None = None

    def __call__(self, row: int) -> np.ndarray:
        """Row ``row``; OSError, KeyError or IndexError where it cannot be read."""
        import h5py

        try:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = (os.getpid(), h5py.File(self.path, "r")[self.key])
            found: np.ndarray = self._opened[1][row]
        except RuntimeError as error:  # h5py's word for some damages
            raise OSError(str(error)) from error
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "_opened": None}


def load(root: Path) -> DataSet:
    """Train, validation and test images; labels are read, images when asked for.

    Raises:
        MergeboundError: names the file that is missing or damaged; h5py is not installed.
    """
    entry = find("pcam")
    paths = {
        part: [need(entry, root, f"pcam/camelyonpatch_level_2_split_{word}_{kind}.h5") for kind in "xy"]
        for part, word in PARTS.items()
    }
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise MergeboundError(
            f"{paths['train'][0]}: reading it takes the package h5py, which is not installed; pip install "
            "'mergebound[pcam]'"
        ) from error
    return DataSet(entry.name, entry.class_names, {part: _part(x, y, entry) for part, (x, y) in paths.items()})


def _part(x: Path, y: Path, entry: VisionData) -> ReadImages:
    import h5py

    numbers = _labels(y, entry)
    try:
        with h5py.File(x, "r") as file:
            pixels = file["x"]
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
                raise ValueError(f"its x is {pixels.dtype} of shape {pixels.shape}, not bytes (n, 96, 96, 3)")
            if len(pixels) != len(numbers):
                raise ValueError(f"{len(pixels)} images for the {len(numbers)} labels of {y.name}")
            digest = hashlib.sha256(repr((x.name, x.stat().st_size, pixels.shape)).encode())
            digest.update(numbers.tobytes())
            for row in np.unique(np.linspace(0, len(pixels) - 1, SAMPLED).round().astype(int)) if len(pixels) else ():
                digest.update(pixels[row].tobytes())
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise damaged(x, error, entry) from error
    return ReadImages(H5Rows(x, "x"), numbers, str(x), digest.hexdigest())


def _labels(path: Path, entry: VisionData) -> np.ndarray:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            found = np.asarray(file["y"][...])
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise damaged(path, error, entry) from error
    if found.dtype.kind not in "iu" or found.size != len(found):
        raise damaged(path, f"its y is {found.dtype} of shape {found.shape}, not whole numbers (n, 1, 1, 1)", entry)
    numbers = found.reshape(-1).astype(np.int64)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= entry.classes))
    if len(wrong):
        raise damaged(path, f"image {wrong[0]} has label {numbers[wrong[0]]}, not 0 or 1", entry)
    return numbers
