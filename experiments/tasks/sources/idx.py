"""Files in the idx format of MNIST (LeCun, Cortes, Burges): plain ones are mapped, ``.gz`` ones are read whole.

Layout: two zero bytes, type 8 (uint8), number of dimensions, one big-endian 32-bit size each, then the bytes.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from experiments.tasks.images import ArrayImages
from experiments.tasks.sources.common import checked_arrays, damaged, need
from experiments.tasks.vision_data import VisionData


def idx_images(
    entry: VisionData, root: Path, images: str, labels: str, *, transpose: bool = False, first_label: int = 0
) -> ArrayImages:
    """One part of a data set: grey images, (n, height, width, 1), and their labels from 0.

    Args:
        root: folder of the data set's root.
        images, labels: names of the two files below ``root``, without ``.gz``; the plain file is preferred.
        transpose: swap rows and columns (EMNIST stores images that way).
        first_label: what the file calls class 0.

    Raises:
        MergeboundError: a file is missing, cut short, too long or of another kind; names it.
    """
    places = [need(entry, root, name, f"{name}.gz") for name in (images, labels)]
    pixels = read_idx(places[0], 3, entry)
    if transpose:
        pixels = pixels.transpose(0, 2, 1)
    numbers = read_idx(places[1], 1, entry).astype(np.int64) - first_label
    return checked_arrays(pixels[..., None], numbers, places[0], entry)


def read_idx(path: Path, dimensions: int, entry: VisionData) -> np.ndarray:
    """The bytes of an idx file as uint8, with so many dimensions.

    Raises:
        MergeboundError: not such a file, or not as long as its header says; names it.
    """
    header = 4 + 4 * dimensions
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                raw = np.frombuffer(file.read(), dtype=np.uint8)
        else:
            raw = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise damaged(path, error, entry) from error
    if len(raw) < header or bytes(raw[:4]) != bytes([0, 0, 8, dimensions]):
        raise damaged(path, f"its header is not that of bytes in {dimensions} dimension(s)", entry)
    shape = tuple(int(size) for size in np.frombuffer(bytes(raw[4:header]), dtype=">u4"))
    expected = header + prod(shape)
    if len(raw) != expected:
        raise damaged(path, f"{len(raw)} bytes, but its header says {expected}", entry)
    return np.asarray(raw)[header:].reshape(shape)
