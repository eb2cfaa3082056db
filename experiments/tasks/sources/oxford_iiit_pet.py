"""Oxford-IIIT Pet as torchvision keeps it: ``oxford-iiit-pet/annotations/{trainval,test}.txt`` list ``images/*.jpg``.

A line is ``<breed>_<number> <class from 1> <species> <breed of the species>``.  The folder of images holds more than
the lists name (a few MATLAB files, some images that are damaged or not annotated); what no list names is not read.
Some images are PNG or GIF files named ``.jpg``; they are decoded by what they are.
"""

from __future__ import annotations

from pathlib import Path

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.images import Images
from experiments.tasks.sources.common import damaged, listed_images, need, text_lines
from experiments.tasks.vision_data import VisionData

FOLDER = "oxford-iiit-pet"


def load(root: Path) -> DataSet:
    """Train (``trainval.txt``) and test images, found but not opened; breeds are the names of the images.

    Raises:
        MergeboundError: names the file that is missing or damaged.
    """
    entry = find("oxford_iiit_pet")
    lists = {
        part: need(entry, root, f"{FOLDER}/annotations/{name}.txt")
        for part, name in (("train", "trainval"), ("test", "test"))
    }
    need(entry, root, f"{FOLDER}/images/")
    breeds: dict[int, str] = {}
    parts: dict[str, Images] = {}
    for part, path in lists.items():
        rows = [_row(line, path, entry) for line in text_lines(path, entry) if not line.startswith("#")]
        for image, label in rows:
            breed = image.rpartition("_")[0]
            if breeds.setdefault(label, breed) != breed:
                raise damaged(path, f"class {label} is {breeds[label]!r} and, for {image}, {breed!r}", entry)
        files = [f"images/{image}.jpg" for image, _ in rows]
        parts[part] = listed_images(root / FOLDER, files, [label - 1 for _, label in rows], entry, listed_in=path)
    trained = set(parts["train"].labels.tolist())
    absent = next((label for label in range(entry.classes) if label not in trained), None)
    if absent is not None:
        raise damaged(lists["train"], f"no image of class {absent + 1} of 1 .. {entry.classes}", entry)
    names = tuple(" ".join(word.title() for word in breeds[label].split("_")) for label in sorted(breeds))
    return DataSet(entry.name, names, parts)


def _row(line: str, path: Path, entry: VisionData) -> tuple[str, int]:
    fields = line.split()
    if len(fields) != 4 or "/" in fields[0] or "_" not in fields[0] or not fields[1].isdecimal():
        raise damaged(path, f"line {line[:60]!r} is not <breed>_<number> <class> <species> <breed>", entry)
    if not 1 <= int(fields[1]) <= entry.classes:
        raise damaged(path, f"{fields[0]} has class {fields[1]} of 1 .. {entry.classes}", entry)
    return fields[0], int(fields[1])
