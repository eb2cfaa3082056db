"""Food-101 as torchvision keeps it: ``food-101/meta/train.json`` and ``test.json`` list ``images/<class>/<id>.jpg``."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.sources.common import damaged, listed_images, need
from experiments.tasks.vision_data import VisionData

FOLDER = "food-101"


def load(root: Path) -> DataSet:
    """Train and test images, found but not opened; classes in the order of their names, as torchvision numbers them.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    entry = find("food101")
    lists = {part: need(entry, root, f"{FOLDER}/meta/{part}.json") for part in ("train", "test")}
    need(entry, root, f"{FOLDER}/images/")
    found = {part: _read(path, entry) for part, path in lists.items()}
    classes = tuple(sorted(found["train"]))
    label = {name: number for number, name in enumerate(classes)}
    parts = {}
    for part, listed in found.items():
        unknown = [name for name in listed if name not in label]
        if unknown:
            raise damaged(lists[part], f"class {unknown[0]!r} is not in train.json", entry)
        files = [f"images/{name}.jpg" for names in listed.values() for name in names]
        numbers = [label[name] for name, names in listed.items() for _ in names]
        parts[part] = listed_images(root / FOLDER, files, numbers, entry, listed_in=lists[part])
    return DataSet(entry.name, classes, parts)


def _read(path: Path, entry: VisionData) -> dict[str, list[str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error, entry) from error
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values()
    ):
        raise damaged(path, "it is not a list of images per class", entry)
    for name, names in found.items():
        outside = [each for each in names if not each.startswith(f"{name}/") or ".." in each.split("/")]
        if outside:
            raise damaged(path, f"image {outside[0]!r} is listed under class {name!r}", entry)
    return found
