"""Oxford Flowers 102 as torchvision keeps it: ``flowers-102/jpg``, ``imagelabels.mat``, ``setid.mat``.

The parts are those of ``setid.mat``: ``trnid`` (1,020 images) trains, ``valid`` (1,020) validates, ``tstid`` (6,149)
tests.  Some codes take ``tstid`` for the larger training part; numbers of such codes do not compare.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.common import damaged, listed_images, load_mat, need

FOLDER = "flowers-102"
PARTS = {"train": "trnid", "validation": "valid", "test": "tstid"}


def load(root: Path) -> DataSet:
    """Train, validation and test images, found but not opened.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    entry = find("flowers102")
    label_file, set_file = (need(entry, root, f"{FOLDER}/{name}.mat") for name in ("imagelabels", "setid"))
    need(entry, root, f"{FOLDER}/jpg/")
    labels = np.ravel(load_mat(label_file, ["labels"], entry)["labels"])
    if labels.dtype.kind not in "iuf" or (labels < 1).any() or (labels > entry.classes).any():
        raise damaged(label_file, f"its labels are not 1 .. {entry.classes}", entry)
    sets = load_mat(set_file, list(PARTS.values()), entry)
    parts, seen = {}, np.zeros(len(labels) + 1, dtype=bool)
    for part, key in PARTS.items():
        numbers = np.ravel(sets[key])
        if numbers.dtype.kind not in "iuf" or (numbers < 1).any() or (numbers > len(labels)).any():
            raise damaged(set_file, f"its {key} are not numbers of the {len(labels)} labelled images", entry)
        numbers = numbers.astype(np.int64)
        if seen[numbers].any() or len(np.unique(numbers)) != len(numbers):
            raise damaged(set_file, f"its {key} name an image that it has already named", entry)
        seen[numbers] = True
        files = [f"jpg/image_{number:05d}.jpg" for number in numbers.tolist()]
        parts[part] = listed_images(
            root / FOLDER, files, labels[numbers - 1].astype(np.int64) - 1, entry, listed_in=set_file
        )
    return DataSet(entry.name, entry.class_names, parts)
