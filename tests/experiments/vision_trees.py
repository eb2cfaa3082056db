"""Tiny copies of vision data sets in their real on-disk formats, written here by hand: the first eight.

A builder writes a tree below a folder and says what it wrote.  ``vision_trees_b`` has the other twelve.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

Written = list[tuple[np.ndarray, int]]
"""Images, uint8 (height, width, channels), and labels from 0, in the order of the loader."""


@dataclass(frozen=True)
class Tree:
    """What a builder wrote.

    Attributes:
        parts: images and labels of each part.
        class_names: as the loader should give them.
        exact: whether pixels are stored without loss; JPEG is compared within ``LOSS``.
        gone: files below the root that the data set cannot do without.
        cut: files below the root that are damaged when half of them is missing.
    """

    parts: Mapping[str, Written]
    class_names: tuple[str, ...]
    exact: bool
    gone: tuple[str, ...] = ()
    cut: tuple[str, ...] = field(default=())


LOSS = 6
"""Largest difference of a pixel of a plain-coloured image after JPEG."""

Builder = Callable[[Path, np.random.Generator], Tree]


def plain(rng: np.random.Generator, size: tuple[int, int] = (8, 9)) -> np.ndarray:
    """An image of one random colour, which JPEG hardly changes, (height, width, 3)."""
    return np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (*size, 3)).copy()


def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """An image of random pixels."""
    return rng.integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write one image; the ending says how."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(path, **options)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes in the idx format; a name that ends in ``.gz`` is compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def idx_part(images: Path, labels: Path, numbers: Sequence[int], rng: np.random.Generator) -> Written:
    """Write random grey images of 28 x 28 and their labels, in that order."""
    pixels = noise(rng, (len(numbers), 28, 28))
    write_idx(images, pixels)
    write_idx(labels, np.asarray(numbers, dtype=np.uint8))
    return [(image[..., None], label) for image, label in zip(pixels, numbers, strict=True)]


def mnist(root: Path, rng: np.random.Generator) -> Tree:
    """Plain idx files for training, compressed ones for test."""
    raw = root / "MNIST" / "raw"
    names = [f"MNIST/raw/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    test_names = [f"{name}.gz" for name in names[2:]]
    train = idx_part(root / names[0], root / names[1], [*rng.permutation(10).tolist(), 3, 3], rng)
    test = idx_part(root / test_names[0], root / test_names[1], [7, 0, 9], rng)
    files = (*names[:2], *test_names)
    assert all((raw / Path(name).name).is_file() for name in files)
    return Tree({"train": train, "test": test}, tuple("0123456789"), True, files, files)


def svhn(root: Path, rng: np.random.Generator) -> Tree:
    """MATLAB 5 files with images last and label 10 for the digit 0, compressed as the source has them."""
    from scipy.io import savemat

    parts = {}
    for part, digits in (("train", [*rng.permutation(10).tolist(), 0]), ("test", [4, 0, 1])):
        pixels = noise(rng, (len(digits), 32, 32, 3))
        labels = np.asarray([[digit or 10] for digit in digits], dtype=np.uint8)
        savemat(
            root / f"{part}_32x32.mat", {"X": np.moveaxis(pixels, 0, -1), "y": labels}, do_compression=part == "test"
        )
        parts[part] = list(zip(pixels, digits, strict=True))
    files = ("train_32x32.mat", "test_32x32.mat")
    return Tree(parts, tuple("0123456789"), True, files, files)


def eurosat(root: Path, rng: np.random.Generator) -> Tree:
    """One folder per class, two images in the first ones."""
    names = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
    names += ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]
    train: Written = []
    for label, name in enumerate(names):
        for number in range(1, 3 if label < 6 else 2):
            image = plain(rng, (16, 16))
            write_image(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", image)
            train.append((image, label))
    (root / "eurosat" / "2750" / "Forest" / "._Forest_1.jpg").write_bytes(b"not an image: macOS")
    gone = ("eurosat/2750/River/River_1.jpg",)
    return Tree({"train": train}, tuple(names), False, gone, ("eurosat/2750/Forest/Forest_2.jpg",))


def resisc45(root: Path, rng: np.random.Generator) -> Tree:
    """One folder per class, three images each, and the three lists of file names, in the order of the lists."""
    from experiments.tasks import find

    names = find("resisc45").class_names
    images = {}
    for label, name in enumerate(names):
        for number in (1, 2, 3):
            image = plain(rng)
            write_image(root / "resisc45" / "NWPU-RESISC45" / name / f"{name}_{number:03d}.jpg", image)
            images[label, number] = image
    parts: dict[str, Written] = {}
    for number, (part, word) in enumerate((("train", "train"), ("validation", "val"), ("test", "test")), start=1):
        order = rng.permutation(len(names)).tolist()
        (root / "resisc45" / f"resisc45-{word}.txt").write_text(
            "".join(f"{names[label]}_{number:03d}.jpg\n" for label in order)
        )
        parts[part] = [(images[label, number], label) for label in order]
    image = "resisc45/NWPU-RESISC45/railway_station/railway_station_002.jpg"
    return Tree(parts, names, False, ("resisc45/resisc45-test.txt", image), ("resisc45/resisc45-train.txt", image))


def sun397(root: Path, rng: np.random.Generator) -> Tree:
    """ClassName.txt, folders by first letter, some two deep, and the first partition's lists."""
    scenes = ["abbey", "airplane_cabin", "apartment_building/outdoor", "bistro/indoor", "bistro/outdoor"]
    scenes += [f"scene_{number:03d}" for number in range(397 - len(scenes))]
    base = root / "SUN397"
    parts: dict[str, Written] = {"train": [], "test": []}
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for label, scene in enumerate(scenes):
        for part in parts:
            image = plain(rng, (4, 5))
            name = f"/{scene[0]}/{scene}/sun_{part}{label:03d}.jpg"
            write_image(base / name[1:], image)
            lists[part].append(name)
            parts[part].append((image, label))
    (base / "ClassName.txt").write_text("".join(f"/{scene[0]}/{scene}\n" for scene in scenes))
    for part, word in (("train", "Training"), ("test", "Testing")):
        (base / f"{word}_01.txt").write_text("\r\n".join(lists[part]) + "\r\n")
    image = "SUN397/b/bistro/indoor/sun_train003.jpg"
    gone = ("SUN397/ClassName.txt", "SUN397/Testing_01.txt", image)
    return Tree(parts, tuple(scenes), False, gone, ("SUN397/ClassName.txt", "SUN397/Training_01.txt", image))


def stanford_cars(root: Path, rng: np.random.Generator) -> Tree:
    """The devkit's MATLAB structs and two folders of photographs; class numbers from 1."""
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = [f"Maker Model {number} Sedan {1990 + number % 30}" for number in range(196)]
    cells = np.empty((1, 196), dtype=object)
    cells[0, :] = names
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": cells})
    parts: dict[str, Written] = {}
    for part, count in (("train", 196), ("test", 5)):
        labels = rng.permutation(196)[:count].tolist()
        rows = np.zeros((1, count), dtype=[(f, object) for f in ("bbox_x1", "bbox_y1", "class", "fname")])
        parts[part] = []
        for number, label in enumerate(labels):
            image = plain(rng)
            write_image(base / f"cars_{part}" / f"{number + 1:05d}.jpg", image)
            rows[0, number] = (1, 2, label + 1, f"{number + 1:05d}.jpg")
            parts[part].append((image, label))
        place = "devkit/cars_train_annos.mat" if part == "train" else "cars_test_annos_withlabels.mat"
        savemat(base / place, {"annotations": rows})
    mats = ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    files = (*(f"stanford_cars/{name}" for name in mats), "stanford_cars/cars_test/00004.jpg")
    return Tree(parts, tuple(names), False, files, files)


def gtsrb(root: Path, rng: np.random.Generator) -> Tree:
    """PPM files of many sizes, a table per class folder, and the table of the final test."""
    from experiments.tasks import find

    base = root / "gtsrb"
    train: Written = []
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    for label in range(43):
        folder = base / "GTSRB" / "Training" / f"{label:05d}"
        lines = header
        for number in range(1 + label % 2):
            image = noise(rng, (3 + label % 4, 5, 3))
            write_image(folder / f"00000_{number:05d}.ppm", image)
            lines += f"00000_{number:05d}.ppm;5;{len(image)};0;0;4;2;{label}\n"
            train.append((image, label))
        (folder / f"GT-{label:05d}.csv").write_text(lines)
    test: Written = []
    table = header
    for number, label in enumerate([16, 1, 38]):
        image = noise(rng, (6, 4, 3))
        write_image(base / "GTSRB" / "Final_Test" / "Images" / f"{number:05d}.ppm", image)
        table += f"{number:05d}.ppm;4;6;0;0;3;5;{label}\n"
        test.append((image, label))
    (base / "GT-final_test.csv").write_text(table)
    images = ("gtsrb/GTSRB/Training/00007/00000_00001.ppm", "gtsrb/GTSRB/Final_Test/Images/00002.ppm")
    tables = ("gtsrb/GT-final_test.csv",)
    return Tree({"train": train, "test": test}, find("gtsrb").class_names, True, (*tables, *images), images)


def dtd(root: Path, rng: np.random.Generator) -> Tree:
    """Photographs by class and the lists of the first split, in random order."""
    from experiments.tasks import find

    base = root / "dtd" / "dtd"
    names = find("dtd").class_names
    (base / "labels").mkdir(parents=True)
    parts: dict[str, Written] = {}
    for number, (part, word) in enumerate((("train", "train"), ("validation", "val"), ("test", "test"))):
        parts[part] = []
        lines = []
        for label in rng.permutation(len(names)).tolist():
            image = plain(rng)
            name = f"{names[label]}/{names[label]}_{number:04d}.jpg"
            write_image(base / "images" / name, image)
            lines.append(f"{name}\n")
            parts[part].append((image, label))
        (base / "labels" / f"{word}1.txt").write_text("".join(lines))
    lists = tuple(f"dtd/dtd/labels/{word}1.txt" for word in ("train", "val", "test"))
    image = "dtd/dtd/images/polka-dotted/polka-dotted_0002.jpg"
    return Tree(parts, names, False, (*lists, image), (*lists, image))


BUILDERS: dict[str, Builder] = {
    builder.__name__: builder for builder in (sun397, stanford_cars, resisc45, eurosat, svhn, gtsrb, mnist, dtd)
}
