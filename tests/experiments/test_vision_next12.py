"""Data sets 9 to 20 against torchvision's own classes on the same trees, their other forms, and their damaged trees.

What every data set must do is in ``tests/conformance/test_vision.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets
from torchvision.transforms.functional import hflip, rotate

from experiments import tasks
from experiments.tasks.images import ArrayImages
from tests.experiments import vision_trees_b as trees
from tests.experiments.vision_trees import Tree, write_idx
from theory.errors import MergeboundError


def build(name: str, root: Path, **options: Any) -> Tree:
    if name == "pcam":
        pytest.importorskip("h5py", reason="PCAM takes the extra 'pcam'")
    return getattr(trees, name)(root, np.random.default_rng([12, len(name)]), **options)


def refused(name: str, root: Path, *told: str) -> None:
    with pytest.raises(MergeboundError) as caught:
        tasks.load(name, root)
    message = str(caught.value)
    for part in told:
        assert part in message
    assert "\n" not in message


# --- torchvision's own classes ---------------------------------------------------------------------------------------

THREE = (("train", "train"), ("validation", "val"), ("test", "test"))
TWO = (("train", True), ("test", False))
Makers = dict[str, Callable[[Path], Any]]
TORCHVISION: dict[str, Makers] = {
    "flowers102": {part: lambda root, word=word: datasets.Flowers102(root, word) for part, word in THREE},
    "pcam": {part: lambda root, word=word: datasets.PCAM(root, word) for part, word in THREE},
    "fer2013": {part: lambda root, part=part: datasets.FER2013(root, part) for part in ("train", "test")},
    "oxford_iiit_pet": {
        part: lambda root, word=word: datasets.OxfordIIITPet(root, word)
        for part, word in (("train", "trainval"), ("test", "test"))
    },
    "stl10": {part: lambda root, part=part: datasets.STL10(root, part) for part in ("train", "test")},
    "cifar100": {part: lambda root, train=train: datasets.CIFAR100(root, train) for part, train in TWO},
    "cifar10": {part: lambda root, train=train: datasets.CIFAR10(root, train) for part, train in TWO},
    "food101": {part: lambda root, part=part: datasets.Food101(root, part) for part in ("train", "test")},
    "fashion_mnist": {part: lambda root, train=train: datasets.FashionMNIST(root, train) for part, train in TWO},
    "kmnist": {part: lambda root, train=train: datasets.KMNIST(root, train) for part, train in TWO},
    "rendered_sst2": {part: lambda root, word=word: datasets.RenderedSST2(root, word) for part, word in THREE},
}


@pytest.fixture
def no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision wants the md5 of the full files; here it only looks whether they are there."""
    for module in ("flowers102", "fer2013", "stl10", "cifar"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file()
        )


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.filterwarnings("ignore:dtype")  # torchvision unpickles CIFAR with numpy's old spelling of align
@pytest.mark.usefixtures("no_sums")
def test_images_labels_order_and_names_are_those_of_torchvision(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    data = tasks.load(name, tmp_path)
    assert set(data.parts) == set(TORCHVISION[name])
    for part, make in TORCHVISION[name].items():
        mine, theirs = data.parts[part], make(tmp_path)
        assert len(mine) == len(theirs)
        for row in range(len(theirs)):
            image, label = theirs[row]
            array = np.asarray(image)
            np.testing.assert_array_equal(mine.read(row), array if array.ndim == 3 else array[..., None])
            assert mine.labels[row] == label
        if hasattr(theirs, "classes"):
            assert list(data.class_names) == list(theirs.classes)


def test_emnist_is_that_of_torchvision_upright_and_from_label_zero(tmp_path: Path) -> None:
    build("emnist_letters", tmp_path)
    data = tasks.load("emnist_letters", tmp_path)
    for part, train in TWO:
        mine, theirs = data.parts[part], datasets.EMNIST(tmp_path, split="letters", train=train)
        assert len(mine) == len(theirs)
        for row in range(len(theirs)):
            image, label = theirs[row]
            upright = np.asarray(hflip(rotate(image, -90)))  # how studies that use torchvision turn them
            np.testing.assert_array_equal(mine.read(row)[..., 0], upright)
            assert data.class_names[mine.labels[row]] == theirs.classes[label]


def test_letters_stand_upright(tmp_path: Path) -> None:
    build("emnist_letters", tmp_path)
    stroke = np.zeros((26, 28, 28), dtype=np.uint8)
    stroke[:, 3, 5:20] = 255  # on disk: along a row, so in the picture: down a column
    path = tmp_path / "EMNIST/raw/emnist-letters-train-images-idx3-ubyte"
    path.unlink()
    write_idx(path, stroke)
    image = tasks.load("emnist_letters", tmp_path).parts["train"].read(0)[..., 0]
    assert (image[5:20, 3] == 255).all()
    assert image.sum() == 15 * 255


# --- other forms of the same data ------------------------------------------------------------------------------------


def same_data(name: str, one: Path, other: Path) -> None:
    here, there = tasks.load(name, one), tasks.load(name, other)
    assert here.class_names == there.class_names
    assert {p: i.fingerprint for p, i in here.parts.items()} == {p: i.fingerprint for p, i in there.parts.items()}


def test_idx_files_may_be_compressed_and_emnist_may_lie_as_it_is_unpacked(tmp_path: Path) -> None:
    for ending in ("", ".gz"):
        build("fashion_mnist", tmp_path / f"plain{ending}", ending=ending)
    same_data("fashion_mnist", tmp_path / "plain", tmp_path / "plain.gz")
    build("emnist_letters", tmp_path / "raw")
    build("emnist_letters", tmp_path / "unpacked", folder="EMNIST/raw/gzip", ending=".gz")
    same_data("emnist_letters", tmp_path / "raw", tmp_path / "unpacked")
    assert not tasks.find("emnist_letters").missing(tmp_path / "unpacked")


def test_places_in_fer2013_name_the_part(tmp_path: Path) -> None:
    build("fer2013", tmp_path)
    parts = tasks.load("fer2013", tmp_path).parts
    assert parts["train"].place(0) != parts["test"].place(0)
    assert str(tmp_path / "fer2013/fer2013.csv") in parts["test"].place(0)


@pytest.mark.usefixtures("no_sums")
def test_fer2013_tables_hold_the_same_and_come_in_torchvisions_precedence(tmp_path: Path) -> None:
    for form in ("fer2013.csv", "icml_face_data.csv", "train.csv"):
        build("fer2013", tmp_path / form, form=form)
    full, icml, train = (tasks.load("fer2013", tmp_path / name) for name in sorted(os.listdir(tmp_path)))
    same_data("fer2013", tmp_path / "fer2013.csv", tmp_path / "icml_face_data.csv")
    assert [len(part) for part in (full.parts["train"], full.parts["test"], icml.parts["test"])] == [8, 4, 4]
    assert set(train.parts) == {"train"}
    assert train.parts["train"].fingerprint == full.parts["train"].fingerprint
    assert any("no test part" in finding.message for finding in tasks.check(train))
    theirs = datasets.FER2013(tmp_path / "icml_face_data.csv", "test")
    for row, (image, label) in enumerate([theirs[row] for row in range(len(theirs))]):
        np.testing.assert_array_equal(icml.parts["test"].read(row)[..., 0], np.asarray(image))
        assert icml.parts["test"].labels[row] == label
    (tmp_path / "icml_face_data.csv/fer2013/fer2013.csv").write_text("emotion,pixels,Usage\n")
    refused("fer2013", tmp_path / "icml_face_data.csv", "fer2013.csv", "no training image")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar_pickled_again_by_python_3_is_the_same(protocol: int, order: str, tmp_path: Path) -> None:
    for name in ("old", "new"):
        build("cifar10", tmp_path / name)
    for path in (tmp_path / "new/cifar-10-batches-py").iterdir():
        with path.open("rb") as file, pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONWARNINGS", "ignore")
            found = pickle.load(file, encoding="latin1")
        if "data" in found:
            found["data"] = np.asarray(found["data"], order=order)
        path.write_bytes(pickle.dumps(found, protocol=protocol))
    same_data("cifar10", tmp_path / "old", tmp_path / "new")


def test_stl10_and_idx_files_are_mapped_not_copied(tmp_path: Path) -> None:
    for name in ("stl10", "kmnist", "emnist_letters"):
        build(name, tmp_path)
        array = tasks.load(name, tmp_path).parts["train"].array
        while isinstance(array.base, np.ndarray):
            array = array.base
        assert isinstance(array, np.memmap), name


@pytest.mark.parametrize("name", ["stl10", "kmnist", "emnist_letters"])
def test_mapped_images_are_pickled_as_their_place_in_the_file(name: str, tmp_path: Path) -> None:
    build(name, tmp_path)
    images = tasks.load(name, tmp_path).parts["train"]
    some = dataclasses.replace(images, array=images.array[1:], labels=images.labels[1:])
    for given in (images, some):
        packed = pickle.dumps(given)
        assert len(packed) < 1500 + given.labels.nbytes < given.array.nbytes
        again = pickle.loads(packed)
        np.testing.assert_array_equal(again.array, given.array)
        np.testing.assert_array_equal(again.labels, given.labels)
        assert again.fingerprint == given.fingerprint
        assert len(pickle.dumps(again)) == len(packed)
    file = Path(images.origin)
    file.rename(file.with_name("moved"))
    with pytest.raises(MergeboundError, match=re.escape(str(file))):
        pickle.loads(packed)
    file.write_bytes(file.with_name("moved").read_bytes()[:-1])
    with pytest.raises(MergeboundError, match="shorter"):
        pickle.loads(packed)


def test_arrays_in_memory_are_pickled_whole() -> None:
    images = ArrayImages(np.arange(48, dtype=np.uint8).reshape(4, 2, 2, 3), np.arange(4), "made")
    again = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(again.array, images.array)
    assert again.origin == "made"


@pytest.mark.parametrize("name", ["flowers102", "oxford_iiit_pet", "food101", "rendered_sst2"])
def test_no_image_is_opened_before_it_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(name, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", refuse)
    data = tasks.load(name, tmp_path)
    assert len(data.parts["train"].fingerprint) == 64
    with pytest.raises(AssertionError, match="opened"):
        data.parts["train"].read(0)


FORKING = """
import multiprocessing, os, pickle, sys
import numpy as np
from experiments import tasks

images = tasks.load("pcam", sys.argv[1]).parts["train"]
rows = {"parent": images.read(4)}  # the file is open here, so the child inherits it


def child():
    sent = pickle.loads(pickle.dumps(images))
    np.savez(sys.argv[2] + "/child.npz", own=images.read(3), again=images.read(0), sent=sent.read(1),
             pid=images.reader._opened[0] == os.getpid())


process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
alive = process.is_alive()
process.kill()
rows["after"] = images.read(2)
np.savez(sys.argv[2] + "/parent.npz", **rows)
sys.exit("the child does not end" if alive else process.exitcode)
"""
"""In a process of its own: pytest's has threads, and what is forked from those may wait for ever for a lock."""


def test_pcam_rows_are_read_in_forked_processes_which_open_the_file_anew(tmp_path: Path) -> None:
    truth = build("pcam", tmp_path / "data").parts["train"]
    words = [sys.executable, "-c", FORKING, str(tmp_path / "data"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    child, parent = np.load(tmp_path / "child.npz"), np.load(tmp_path / "parent.npz")
    for found, row in ((child, {"own": 3, "again": 0, "sent": 1}), (parent, {"parent": 4, "after": 2})):
        for name, number in row.items():
            np.testing.assert_array_equal(found[name], truth[number][0])
    assert child["pid"]


def test_pickled_pcam_images_hold_no_pixels(tmp_path: Path) -> None:
    tree = build("pcam", tmp_path)
    images = tasks.load("pcam", tmp_path).parts["train"]
    images.read(4)
    raw = pickle.dumps(images)
    assert len(raw) < 5000
    np.testing.assert_array_equal(pickle.loads(raw).read(1), tree.parts["train"][1][0])


def test_a_pcam_file_that_is_damaged_after_loading_is_named_when_it_is_read(tmp_path: Path) -> None:
    build("pcam", tmp_path)
    images = tasks.load("pcam", tmp_path).parts["test"]
    path = tmp_path / "pcam/camelyonpatch_level_2_split_test_x.h5"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(MergeboundError, match=r"split_test_x\.h5, image 1: cannot be read"):
        images.read(1)


def test_pcam_without_h5py_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("pcam", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    refused("pcam", tmp_path, "split_train_x.h5", "pip install 'mergebound[pcam]'")


def test_pcam_fingerprint_sees_labels_and_pixels(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="PCAM takes the extra 'pcam'")
    build("pcam", tmp_path)
    before = tasks.load("pcam", tmp_path).parts["test"].fingerprint
    found = {before}
    for key, place in (("y", (1, 0, 0, 0)), ("x", (3, 95, 95, 2))):
        with h5py.File(tmp_path / f"pcam/camelyonpatch_level_2_split_test_{key}.h5", "r+") as file:
            file[key][place] = 1 - file[key][place] if key == "y" else file[key][place] ^ 1
        found.add(tasks.load("pcam", tmp_path).parts["test"].fingerprint)
    assert len(found) == 3


# --- damaged and partial trees ---------------------------------------------------------------------------------------


def test_flowers_with_impossible_numbers_are_refused(tmp_path: Path) -> None:
    build("flowers102", tmp_path)
    sets, labels = tmp_path / "flowers-102/setid.mat", tmp_path / "flowers-102/imagelabels.mat"
    good = (sets.read_bytes(), labels.read_bytes())
    ids = np.arange(1, 307, dtype=np.uint16).reshape(3, 1, 102)
    for wrong, told in ((307, "valid are not numbers"), (0, "valid are not numbers"), (1, "already named")):
        other = ids.copy()
        other[1, 0, 5] = wrong
        savemat(sets, dict(zip(("trnid", "valid", "tstid"), other, strict=True)))
        refused("flowers102", tmp_path, str(sets), told)
    savemat(sets, {"trnid": ids[0], "valid": ids[1]})
    refused("flowers102", tmp_path, str(sets), "'tstid'")
    sets.write_bytes(good[0])
    for wrong in (0, 103):
        savemat(labels, {"labels": np.full((1, 306), wrong, dtype=np.uint8)})
        refused("flowers102", tmp_path, str(labels), "1 .. 102")
    labels.write_bytes(good[1])
    tasks.load("flowers102", tmp_path)


def test_pcam_files_of_other_shapes_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="PCAM takes the extra 'pcam'")
    stem = "camelyonpatch_level_2_split_valid_"
    cases: list[tuple[str, dict[str, np.ndarray], str]] = [
        ("x", {"images": np.zeros((3, 96, 96, 3), np.uint8)}, "x"),
        ("x", {"x": np.zeros((3, 96, 96, 3), np.float32)}, "float32"),
        ("x", {"x": np.zeros((3, 96, 96), np.uint8)}, "(3, 96, 96)"),
        ("x", {"x": np.zeros((2, 96, 96, 3), np.uint8)}, "2 images for the 3 labels"),
        ("y", {"y": np.array([0, 1, 2]).reshape(3, 1, 1, 1)}, "image 2 has label 2"),
        ("y", {"y": np.zeros((3, 2, 1, 1), np.uint8)}, "(3, 2, 1, 1)"),
        ("y", {"y": np.zeros((3, 1, 1, 1))}, "float64"),
    ]
    for number, (key, arrays, told) in enumerate(cases):
        build("pcam", tmp_path / str(number))
        path = tmp_path / str(number) / f"pcam/{stem}{key}.h5"
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
        refused("pcam", tmp_path / str(number), str(path), told)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"7,{' '.join(['1'] * 2304)},Training", "emotion '7' is not 0 .. 6"),
        (f"-1,{' '.join(['1'] * 2304)},Training", "emotion '-1'"),
        (f"1,{' '.join(['1'] * 2303)},Training", "2303 pixels"),
        (f"1,{' '.join(['1'] * 2303)} 256,Training", "0 to 255"),
        (f"1,{' '.join(['1'] * 2303)} -1,Training", "0 to 255"),
        (f"1,{' '.join(['1'] * 2303)} x,Training", "whole numbers"),
        (f"1,{' '.join(['1'] * 2304)},Testing", "Usage 'Testing'"),
        ("1,2", "2 fields"),
    ],
)
def test_a_damaged_row_of_fer2013_is_named(line: str, told: str, tmp_path: Path) -> None:
    build("fer2013", tmp_path)
    path = tmp_path / "fer2013/fer2013.csv"
    with path.open("a") as file:
        file.write(f"{line}\n")
    refused("fer2013", tmp_path, str(path), "line 14", told)


def test_fer2013_without_its_columns_or_in_another_encoding_is_refused(tmp_path: Path) -> None:
    build("fer2013", tmp_path)
    path = tmp_path / "fer2013/fer2013.csv"
    for raw in (b"emotion,pixels\n1,2\n", b"", b"\xff\xfe\x00", b"emotion,pixels,Usage\n"):
        path.write_bytes(raw)
        refused("fer2013", tmp_path, str(path))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("pug_7 26 2", "is not <breed>"),
        ("pug_7 26x 2 1", "is not <breed>"),
        ("../pug_7 26 2 1", "is not <breed>"),
        ("pug_7 38 2 1", "class 38 of 1 .. 37"),
        ("pug_7 0 2 1", "class 0 of 1 .. 37"),
        ("pug_201 27 2 1", "'Ragdoll'"),
    ],
)
def test_a_damaged_line_of_the_pet_lists_is_named(line: str, told: str, tmp_path: Path) -> None:
    build("oxford_iiit_pet", tmp_path)
    path = tmp_path / "oxford-iiit-pet/annotations/test.txt"
    with path.open("a") as file:
        file.write(f"{line}\n")
    refused("oxford_iiit_pet", tmp_path, str(path), told)


def test_a_breed_without_training_images_and_a_missing_photograph_name_the_list(tmp_path: Path) -> None:
    build("oxford_iiit_pet", tmp_path)
    path = tmp_path / "oxford-iiit-pet/annotations/trainval.txt"
    kept = [line for line in path.read_text().splitlines() if not line.startswith("pug_")]
    path.write_text("\n".join([*kept, "pug_77 26 2 1"]))
    refused("oxford_iiit_pet", tmp_path, "pug_77.jpg", str(path))
    path.write_text("\n".join(kept))
    refused("oxford_iiit_pet", tmp_path, str(path), "no image of class 26")


def test_stl10_labels_and_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    build("stl10", tmp_path)
    base = tmp_path / "stl10_binary"
    labels = base / "test_y.bin"
    for raw, told in (
        (b"\x0b\x01\x01", "label 11 of 1 .. 10"),
        (b"\x01\x00\x01", "label 0"),
        (b"\x01\x01", "2 labels"),
    ):
        labels.write_bytes(raw)
        refused("stl10", tmp_path, str(labels), told)
    (base / "class_names.txt").write_text("bird\ncat\n")
    refused("stl10", tmp_path, str(base / "class_names.txt"), "2 names for 10 classes")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("test_batch", {"data": np.zeros((3, 3071), np.uint8)}, "(n, 3072)"),
        ("test_batch", {"data": np.zeros((2, 3072), np.uint8)}, "2 images for 3 labels"),
        ("test_batch", {"data": [1, 2]}, "(n, 3072)"),
        ("data_batch_3", {"labels": [0, 10]}, "image 1 has label 10 of 10 classes"),
        ("data_batch_3", {"labels": [0, -1]}, "image 1 has label -1"),
        ("data_batch_3", {"labels": ["cat", "dog"]}, "whole numbers"),
        ("batches.meta", {"label_names": []}, "label_names"),
        ("batches.meta", {"label_names": [1, 2]}, "text was expected"),
    ],
)
def test_cifar_files_that_do_not_fit_are_refused(name: str, change: dict[str, Any], told: str, tmp_path: Path) -> None:
    build("cifar10", tmp_path)
    path = tmp_path / "cifar-10-batches-py" / name
    good: dict[str, Any] = {"data": np.zeros((3 if "test" in name else 2, 3072), np.uint8)}
    good["labels"] = [0] * len(good["data"])
    path.write_bytes(trees.python2({**good, **change}))
    refused("cifar10", tmp_path, str(path), told)


def test_other_class_names_than_the_sources_are_refused(tmp_path: Path) -> None:
    build("cifar10", tmp_path)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "boat", "truck"]
    (tmp_path / "cifar-10-batches-py/batches.meta").write_bytes(trees.python2({"label_names": names}))
    refused("cifar10", tmp_path, "class 8 is 'boat'", "'ship'")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"[]", "not a list of images per class"),
        (b'{"pizza": "pizza/1"}', "not a list of images per class"),
        (b'{"pizza": ["sushi/1"]}', "'sushi/1' is listed under class 'pizza'"),
        (b'{"pizza": ["pizza/../../../secret"]}', "listed under"),
        (b'{"mud_pie": ["mud_pie/1"]}', "'mud_pie' is not in train.json"),
        (b'{"pizza": [', "damaged"),
        (b"\xff", "damaged"),
        (b"[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_list_of_food101_is_named(raw: bytes, told: str, tmp_path: Path) -> None:
    build("food101", tmp_path)
    path = tmp_path / "food-101/meta/test.json"
    path.write_bytes(raw)
    refused("food101", tmp_path, str(path), told)


def test_food101_without_a_class_is_refused(tmp_path: Path) -> None:
    build("food101", tmp_path)
    for part in ("train", "test"):
        path = tmp_path / f"food-101/meta/{part}.json"
        listed = json.loads(path.read_text())
        del listed["waffles"]
        path.write_text(json.dumps(listed))
    refused("food101", tmp_path, "100 classes", "101")


def test_a_folder_of_rendered_sst2_without_images_is_named(tmp_path: Path) -> None:
    build("rendered_sst2", tmp_path)
    folder = tmp_path / "rendered-sst2/valid/positive"
    for path in folder.iterdir():
        path.rename(path.with_suffix(".txt"))
    refused("rendered_sst2", tmp_path, str(folder))


def test_emnist_labels_must_be_letters(tmp_path: Path) -> None:
    for wrong in (0, 27):
        build("emnist_letters", tmp_path / str(wrong))
        path = tmp_path / str(wrong) / "EMNIST/raw/emnist-letters-test-labels-idx1-ubyte"
        write_idx(path, np.array([1, wrong, 2], dtype=np.uint8))
        refused("emnist_letters", tmp_path / str(wrong), "emnist-letters-test", "image 1", "26 classes")
