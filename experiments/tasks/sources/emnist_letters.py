"""EMNIST, its ``letters`` split, as torchvision keeps it: ``EMNIST/raw/emnist-letters-{train,test}-*-ubyte``.

The files hold every image with rows and columns exchanged; here letters stand upright (torchvision hands them out as
they lie on disk, and users transpose them).  The file's labels 1 .. 26 become 0 .. 25; upper and lower case of a letter
are one class.  The archive's own folder ``gzip`` with ``.gz`` files is read as well.
"""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.idx import idx_images

FOLDER = "EMNIST/raw"


def load(root: Path) -> DataSet:
    """Train and test, (n, 28, 28, 1), upright; plain files are mapped, ``.gz`` ones read whole.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    entry = find("emnist_letters")
    parts = {}
    for part in ("train", "test"):
        stem = f"emnist-letters-{part}"
        packed = not any((root / FOLDER).glob(f"{stem}-images-idx3-ubyte*")) and (root / FOLDER / "gzip").is_dir()
        place = f"{FOLDER}/gzip/{stem}" if packed else f"{FOLDER}/{stem}"
        parts[part] = idx_images(
            entry, root, f"{place}-images-idx3-ubyte", f"{place}-labels-idx1-ubyte", transpose=True, first_label=1
        )
    return DataSet(entry.name, entry.class_names, parts)
