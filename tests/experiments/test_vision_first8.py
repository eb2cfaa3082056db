"""The first eight vision data sets against torchvision's own classes on the same trees, and their damaged trees.

What every data set must do is in ``tests/conformance/test_vision.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat
from torchvision import datasets

from experiments import tasks
from experiments.tasks.images import Images
from experiments.tasks.sources.idx import read_idx
from tests.experiments.vision_trees import BUILDERS, plain, write_idx, write_image
from theory.errors import MergeboundError


def build(name: str, root: Path) -> Any:
    root.mkdir(parents=True, exist_ok=True)
    return BUILDERS[name](root, np.random.default_rng([8, len(name)]))


def pairs(images: Any) -> list[tuple[np.ndarray, int]]:
    """Images and labels of a torchvision data set or of ours, images as (height, width, channels)."""
    if isinstance(images, datasets.VisionDataset):
        arrays = [(np.asarray(image), label) for image, label in (images[row] for row in range(len(images)))]
        return [(array if array.ndim == 3 else array[..., None], int(label)) for array, label in arrays]
    return [(images.read(row), int(images.labels[row])) for row in range(len(images))]


def same(here: list[tuple[np.ndarray, int]], there: list[tuple[np.ndarray, int]]) -> None:
    assert [label for _, label in here] == [label for _, label in there]
    for (mine, _), (other, _) in zip(here, there, strict=True):
        np.testing.assert_array_equal(mine, other)


TORCHVISION: dict[str, dict[str, Callable[[Path], datasets.VisionDataset]]] = {
    "stanford_cars": {part: lambda root, part=part: datasets.StanfordCars(root, part) for part in ("train", "test")},
    "eurosat": {"train": datasets.EuroSAT},
    "svhn": {part: lambda root, part=part: datasets.SVHN(str(root), part) for part in ("train", "test")},
    "gtsrb": {part: lambda root, part=part: datasets.GTSRB(root, part) for part in ("train", "test")},
    "dtd": {
        part: lambda root, word=word: datasets.DTD(root, word)
        for part, word in (("train", "train"), ("validation", "val"), ("test", "test"))
    },
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_images_labels_and_order_are_those_of_torchvision(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)  # it wants the md5 of the full files
    build(name, tmp_path)
    data = tasks.load(name, tmp_path)
    for hidden in tmp_path.rglob("._*"):  # torchvision takes macOS's notes for images
        hidden.unlink()
    assert set(data.parts) == set(TORCHVISION[name])
    for part, make in TORCHVISION[name].items():
        theirs = make(tmp_path)
        same(pairs(data.parts[part]), pairs(theirs))
        if hasattr(theirs, "classes") and name != "gtsrb":
            assert list(data.class_names) == list(theirs.classes)


def test_mnist_is_that_of_torchvision_plain_and_compressed(tmp_path: Path) -> None:
    build("mnist", tmp_path / "mixed")
    data = tasks.load("mnist", tmp_path / "mixed")
    for part, word in (("train", "train"), ("test", "t10k")):  # all plain, as torchvision keeps them
        images = data.parts[part]
        pixels = np.stack([images.read(row)[..., 0] for row in range(len(images))])
        write_idx(tmp_path / "plain" / "MNIST" / "raw" / f"{word}-images-idx3-ubyte", pixels)
        write_idx(tmp_path / "plain" / "MNIST" / "raw" / f"{word}-labels-idx1-ubyte", images.labels.astype(np.uint8))
    again = tasks.load("mnist", tmp_path / "plain")
    for part in ("train", "test"):
        same(pairs(again.parts[part]), pairs(datasets.MNIST(tmp_path / "plain", train=part == "train")))
        same(pairs(again.parts[part]), pairs(data.parts[part]))
        assert again.parts[part].fingerprint == data.parts[part].fingerprint


def test_sun397_holds_what_torchvision_finds(tmp_path: Path) -> None:
    build("sun397", tmp_path)
    theirs = datasets.SUN397(tmp_path)
    expected = dict(zip(map(str, theirs._image_files), theirs._labels, strict=True))
    parted = tasks.load("sun397", tmp_path)
    found = {images.place(row): int(images.labels[row]) for images in parted.parts.values() for row in range(397)}
    assert found == expected
    assert list(parted.class_names) == theirs.classes
    for name in ("Training_01.txt", "Testing_01.txt"):
        (tmp_path / "SUN397" / name).unlink()
    whole = tasks.load("sun397", tmp_path)
    assert set(whole.parts) == {"train"}
    images = whole.parts["train"]
    assert {images.place(row): int(images.labels[row]) for row in range(len(images))} == expected
    row = 17
    np.testing.assert_array_equal(
        images.read(row), np.asarray(theirs[[str(f) for f in theirs._image_files].index(images.place(row))][0])
    )
    task = tasks.task("sun397", tmp_path, seed=1)
    assert len(task.test) == round(0.2 * 794)
    assert task.digest != tasks.task("sun397", tmp_path, seed=2).digest


def test_resisc45_is_an_image_folder_and_its_lists_choose_among_it(tmp_path: Path) -> None:
    build("resisc45", tmp_path)
    base = tmp_path / "resisc45" / "NWPU-RESISC45"
    folder = datasets.ImageFolder(base)
    data = tasks.load("resisc45", tmp_path)
    assert list(data.class_names) == folder.classes
    expected = dict(folder.samples)
    listed = {
        images.place(row): int(images.labels[row]) for images in data.parts.values() for row in range(len(images))
    }
    assert listed == expected
    (tmp_path / "resisc45" / "resisc45-val.txt").unlink()  # two lists are enough
    assert set(tasks.load("resisc45", tmp_path).parts) == {"train", "test"}
    for word in ("train", "test"):
        (tmp_path / "resisc45" / f"resisc45-{word}.txt").unlink()
    same(pairs(tasks.load("resisc45", tmp_path).parts["train"]), pairs(folder))
    base.rename(tmp_path / "NWPU-RESISC45")  # directly in the root
    assert len(tasks.load("resisc45", tmp_path).parts["train"]) == 135
    (tmp_path / "resisc45").rmdir()
    (tmp_path / "NWPU-RESISC45").rename(tmp_path / "resisc45")  # class folders directly in resisc45/
    assert len(tasks.load("resisc45", tmp_path).parts["train"]) == 135


def test_svhn_below_a_folder_of_its_own(tmp_path: Path) -> None:
    build("svhn", tmp_path)
    here = tasks.load("svhn", tmp_path)
    (tmp_path / "moved" / "svhn").mkdir(parents=True)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / name).rename(tmp_path / "moved" / "svhn" / name)
    there = tasks.load("svhn", tmp_path / "moved")
    assert here.parts["train"].fingerprint == there.parts["train"].fingerprint
    assert not tasks.find("svhn").missing(tmp_path / "moved")


def test_gtsrb_final_training_set_is_read_where_it_lies(tmp_path: Path) -> None:
    build("gtsrb", tmp_path)
    before = tasks.load("gtsrb", tmp_path).parts["train"].fingerprint
    base = tmp_path / "gtsrb" / "GTSRB"
    (base / "Final_Training").mkdir()
    (base / "Training").rename(base / "Final_Training" / "Images")
    assert tasks.load("gtsrb", tmp_path).parts["train"].fingerprint == before


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trees that are built once, for tests that put back what they change."""
    roots: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp(name)
            build(name, roots[name])
        return roots[name]

    return of


# --- damaged and partial trees ---------------------------------------------------------------------------------------


def refused(name: str, root: Path, *told: str) -> str:
    with pytest.raises(MergeboundError) as caught:
        tasks.load(name, root)
    message = str(caught.value)
    for part in told:
        assert part in message
    assert "\n" not in message
    return message


@settings(max_examples=40)
@given(cut=st.integers(min_value=0, max_value=10_000))
def test_an_idx_file_of_another_length_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "cut-images-idx3-ubyte"
    write_idx(path, np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28))
    whole = path.read_bytes()
    entry = tasks.find("mnist")
    np.testing.assert_array_equal(read_idx(path, 3, entry).reshape(-1), np.arange(2 * 28 * 28, dtype=np.uint8))
    kept = cut % len(whole)
    for raw in (whole[:kept], whole + whole[: kept + 1]):
        path.unlink()  # the mapped file above stays as it was
        path.write_bytes(raw)
        with pytest.raises(MergeboundError, match="cut-images-idx3-ubyte: damaged"):
            read_idx(path, 3, entry)


def test_an_idx_header_whose_product_exceeds_64_bits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3]) + np.array([2**32 - 1, 2**31, 2**31], dtype=">u4").tobytes())
    said = refused_idx(path, 3)
    assert f"says {16 + (2**32 - 1) * 2**62}" in said
    path.write_bytes(bytes([0, 0, 8, 3]) + np.array([2**31, 2**31, 4], dtype=">u4").tobytes())  # 2^64: 0 in 64 bits
    assert f"says {16 + 2**64}" in refused_idx(path, 3)


def refused_idx(path: Path, dimensions: int) -> str:
    with pytest.raises(MergeboundError) as caught:
        read_idx(path, dimensions, tasks.find("mnist"))
    assert str(path) in str(caught.value)
    return str(caught.value)


@settings(max_examples=40)
@given(shape=st.tuples(*[st.integers(1, 6)] * 3), seed=st.integers(0, 2**32))
def test_idx_files_are_read_as_they_were_written(
    shape: tuple[int, int, int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    for name in ("any-idx3-ubyte", "any-idx3-ubyte.gz"):
        path = tmp_path_factory.getbasetemp() / name
        path.unlink(missing_ok=True)
        write_idx(path, pixels)
        np.testing.assert_array_equal(read_idx(path, 3, tasks.find("mnist")), pixels)


@pytest.mark.parametrize("name", ["train_32x32.mat", "test_32x32.mat"])
def test_a_matlab_file_cut_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    build("svhn", tmp_path)
    whole = (tmp_path / name).read_bytes()
    padding = 8  # what lies behind the last label of a file that is not compressed says nothing
    for kept in (0, 1, 64, 127, 128, 132, 140, 500, len(whole) // 3, len(whole) - 200, len(whole) - padding):
        (tmp_path / name).write_bytes(whole[:kept])
        refused("svhn", tmp_path, str(tmp_path / name))


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    build("mnist", tmp_path)
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    labels.unlink()
    write_idx(labels, np.asarray([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0], dtype=np.uint8))
    refused("mnist", tmp_path, "train-images-idx3-ubyte", "image 10", "label 10")
    write_idx(labels, np.asarray([0, 1, 2], dtype=np.uint8))
    refused("mnist", tmp_path, "train-images-idx3-ubyte", "12 images for 3 labels")

    build("svhn", tmp_path)
    pixels = np.zeros((32, 32, 3, 2), dtype=np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": pixels, "y": np.asarray([[11], [1]], dtype=np.uint8)})
    refused("svhn", tmp_path, str(tmp_path / "test_32x32.mat"), "y holds 11")
    savemat(tmp_path / "test_32x32.mat", {"X": pixels[..., :1], "y": np.asarray([[2], [1]], dtype=np.uint8)})
    refused("svhn", tmp_path, str(tmp_path / "test_32x32.mat"), "1 images for 2 labels")
    savemat(tmp_path / "test_32x32.mat", {"X": pixels.astype(float), "y": np.asarray([[2], [1]], dtype=np.uint8)})
    refused("svhn", tmp_path, str(tmp_path / "test_32x32.mat"), "float64")
    savemat(tmp_path / "test_32x32.mat", {"X": pixels})
    refused("svhn", tmp_path, str(tmp_path / "test_32x32.mat"), "no variable 'y'")

    build("gtsrb", tmp_path)
    table = tmp_path / "gtsrb/GT-final_test.csv"
    table.write_text(table.read_text().replace(";38", ";43"))
    refused("gtsrb", tmp_path, str(table), "'43'", "0 to 42")

    build("stanford_cars", tmp_path)
    rows = np.zeros((1, 1), dtype=[("class", object), ("fname", object)])
    rows[0, 0] = (197, "00001.jpg")
    place = tmp_path / "stanford_cars/cars_test_annos_withlabels.mat"
    savemat(place, {"annotations": rows})
    refused("stanford_cars", tmp_path, str(place), "197", "1 to 196")


@pytest.mark.parametrize(
    ("name", "file", "line", "told"),
    [
        ("dtd", "dtd/dtd/labels/val1.txt", "velvety/velvety_0001.jpg", "velvety"),
        ("dtd", "dtd/dtd/labels/val1.txt", "banded/../../../secret.jpg", "secret"),
        ("resisc45", "resisc45/resisc45-test.txt", "casino_001.jpg", "casino_001.jpg"),
        ("sun397", "SUN397/Testing_01.txt", "/c/casino/sun_a.jpg", "casino"),
        ("sun397", "SUN397/ClassName.txt", "/casino", "casino"),
        ("sun397", "SUN397/ClassName.txt", "/a/abbey", "397 classes on 398 lines"),
        ("gtsrb", "gtsrb/GT-final_test.csv", "00007.ppm;3", "row 5"),
        ("gtsrb", "gtsrb/GT-final_test.csv", "../../secret.ppm;4;6;0;0;3;5;1", "row 5"),
    ],
)
def test_a_damaged_line_is_named(name: str, file: str, line: str, told: str, kept: Callable[[str], Path]) -> None:
    root = kept(name)
    before = (root / file).read_bytes()
    (root / file).write_bytes(before + line.encode() + b"\n")
    try:
        refused(name, root, str(root / file), told)
    finally:
        (root / file).write_bytes(before)


def test_lists_that_are_not_text_and_folders_that_are_no_class_are_named(tmp_path: Path) -> None:
    build("dtd", tmp_path)
    (tmp_path / "dtd/dtd/labels/train1.txt").write_bytes(b"\xff\xfe\x00banded")
    refused("dtd", tmp_path, str(tmp_path / "dtd/dtd/labels/train1.txt"))
    build("eurosat", tmp_path)
    (tmp_path / "eurosat/2750/Desert").mkdir()
    refused("eurosat", tmp_path, str(tmp_path / "eurosat/2750/Desert"), "none of the 10 class folders")
    (tmp_path / "eurosat/2750/Desert").rmdir()
    for image in (tmp_path / "eurosat/2750/River").iterdir():
        image.unlink()
    refused("eurosat", tmp_path, str(tmp_path / "eurosat/2750/River"))
    build("resisc45", tmp_path)
    (tmp_path / "resisc45/resisc45-train.txt").unlink()
    refused("resisc45", tmp_path, str(tmp_path / "resisc45/resisc45-train.txt"), "place both lists")


def test_cars_annotations_without_labels_are_explained(tmp_path: Path) -> None:
    build("stanford_cars", tmp_path)
    rows = np.zeros((1, 1), dtype=[("bbox_x1", object), ("fname", object)])
    rows[0, 0] = (1, "00001.jpg")
    place = tmp_path / "stanford_cars/cars_test_annos_withlabels.mat"
    savemat(place, {"annotations": rows})
    refused("stanford_cars", tmp_path, str(place), "no field 'class'", "without labels")
    place.unlink()
    refused("stanford_cars", tmp_path, str(place), "by hand", "cars_train/")


def test_grey_and_palette_photographs_come_as_colour(tmp_path: Path) -> None:
    build("stanford_cars", tmp_path)
    grey = plain(np.random.default_rng(5))[..., :1]
    write_image(tmp_path / "stanford_cars/cars_train/00003.jpg", grey)
    images: Images = tasks.load("stanford_cars", tmp_path).parts["train"]
    found = images.read(2)
    assert found.shape == (8, 9, 3)
    assert np.abs(found.astype(int) - grey).max() <= 3
