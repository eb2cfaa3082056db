"""The user's own data: both layouts on tiny files, odd and damaged ones with an error that names the file."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.tasks.dataset import split
from experiments.tasks.local import load_local
from theory.errors import MergeboundError


def arrays(n: int = 6, *, grey: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (n, 8, 10) if grey else (n, 8, 10, 3)
    return {
        "x_train": rng.integers(0, 256, shape, dtype=np.uint8),
        "y_train": np.arange(n) % 3,
        "x_test": rng.integers(0, 256, shape, dtype=np.uint8),
        "y_test": np.arange(n, dtype=np.uint8) % 3,
        "class_names": np.array(["ant", "bee", "cat"]),
    }


def save(path: Path, values: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(path, **values)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("grey", [False, True])
def test_npz(tmp_path: Path, grey: bool) -> None:
    made = arrays(grey=grey)
    data = load_local(save(tmp_path / "insects.npz", made))
    assert (data.name, data.class_names, set(data.parts)) == ("insects", ("ant", "bee", "cat"), {"train", "test"})
    for part in ("train", "test"):
        images = data.parts[part]
        assert images.labels.tolist() == made[f"y_{part}"].tolist()
        assert images.labels.dtype == np.int64
        for row in range(6):
            np.testing.assert_array_equal(images.read(row).squeeze(), made[f"x_{part}"][row].squeeze())
    assert data.parts["test"].place(2) == f"{tmp_path / 'insects.npz'} (x_test), image 2"
    assert load_local(tmp_path / "insects.npz", "other").name == "other"


def test_npz_parts_by_other_names_and_without_class_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = arrays()
    path = save(
        tmp_path / "d.npz",
        {"x": made["x_train"], "y": np.array([0, 1, 2, 3, 0, 1]), "x_val": made["x_test"], "y_val": made["y_test"],
         "x_extra": made["x_test"]},
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        data = load_local(path)
    assert "x_extra is left out" in caplog.text
    assert (data.class_names, set(data.parts)) == (("0", "1", "2", "3"), {"train", "validation"})


def test_npz_becomes_a_task_with_a_stable_digest(tmp_path: Path) -> None:
    made = arrays(60)
    one = split(load_local(save(tmp_path / "d.npz", made)), seed=4)
    np.savez(tmp_path / "d2.npz", **made)  # type: ignore[arg-type]  # the same pixels, not compressed
    assert split(load_local(tmp_path / "d2.npz", "d"), seed=4).digest == one.digest
    assert split(load_local(tmp_path / "d.npz"), seed=5).digest != one.digest
    made["x_train"][0, 0, 0, 0] ^= 1
    assert split(load_local(save(tmp_path / "d.npz", made)), seed=4).digest != one.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((6, 8, 10, 3), np.float32)}, r"x_train is float32; store the images as uint8 .*by 255"),
        ({"x_train": np.zeros((6, 8, 10, 3), np.int64)}, "x_train has type int64"),
        ({"x_train": np.zeros((6, 3, 8, 10), np.uint8)}, r"channels first; store x_train\.transpose\(0, 2, 3, 1\)"),
        ({"x_train": np.zeros((6, 8, 10, 4), np.uint8)}, r"uint8 of shape \(6, 8, 10, 4\)"),
        ({"x_train": np.zeros((6, 80), np.uint8)}, r"uint8 of shape \(6, 80\)"),
        ({"x_train": np.zeros((6, 0, 10), np.uint8)}, "without pixels"),
        ({"x_train": np.zeros((5, 8, 10), np.uint8)}, "x_train has 5 images but y_train has 6 labels"),
        ({"y_train": np.zeros(6)}, "y_train is float64 of shape"),
        ({"y_train": np.zeros((6, 1), int)}, r"y_train is int64 of shape \(6, 1\)"),
        ({"y_train": np.array([0, 1, 2, 3, 0, 1])}, r"y_train\[3\] is 3, but there are 3 classes"),
        ({"y_test": np.array([0, 1, -1, 0, 0, 1])}, r"y_test\[2\] is -1"),
        ({"y_test": np.full(6, 2**64 - 1, np.uint64)}, "number the classes from 0"),
        ({"x_test": np.zeros((0, 8, 10), np.uint8), "y_test": np.zeros(0, int)}, "x_test holds no images"),
        ({"class_names": np.array(["a", "b", "a"])}, "class_names has 'a' twice"),
        ({"class_names": np.arange(3)}, r"class_names is int64 of shape \(3,\); store names"),
        ({"x_training": np.zeros((6, 8, 10), np.uint8)}, "x_train and x_training are the same part"),
        ({"x_train": np.array([{"a": 1}] * 6, dtype=object)}, r"x_train\.npy holds Python objects"),
        ({"y_train": np.array([0, None] * 3, dtype=object)}, r"y_train\.npy holds Python objects"),
    ],
)  # fmt: skip
def test_npz_that_cannot_be_used(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    path = save(tmp_path / "d.npz", arrays() | change)
    with pytest.raises(MergeboundError, match=rf"d\.npz: .*{message}") as caught:
        load_local(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["x_train", "y_train", "y_test"])
def test_npz_with_an_array_missing(tmp_path: Path, lost: str) -> None:
    made = arrays()
    del made[lost]
    message = {"x_train": "no x_train", "y_train": "x_train has no labels", "y_test": "x_test has no labels"}[lost]
    with pytest.raises(MergeboundError, match=rf"d\.npz: {message}"):
        load_local(save(tmp_path / "d.npz", made))


def test_damaged_npz_at_every_place(tmp_path: Path) -> None:
    """Cut short anywhere, or with bytes changed: an error that names the file, or the same data."""
    path = save(tmp_path / "d.npz", arrays())
    whole = path.read_bytes()
    fingerprint = load_local(path).parts["train"].fingerprint
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(MergeboundError, match=r"d\.npz: cannot be read as \.npz"):
            load_local(path)
    rng = np.random.default_rng(0)
    for place in rng.choice(len(whole), 150, replace=False):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        path.write_bytes(bytes(changed))
        found = _fingerprint_or_message(path)
        assert found == fingerprint or "d.npz" in found


def _fingerprint_or_message(path: Path) -> str:
    try:
        return load_local(path).parts["train"].fingerprint
    except MergeboundError as error:
        return str(error)


def test_npz_whose_header_claims_more_than_there_is(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", arrays())
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    assert b"(6, 8, 10, 3)" in parts["x_train.npy"]
    parts["x_train.npy"] = parts["x_train.npy"].replace(b"(6, 8, 10, 3)", b"(9, 8, 10, 3)")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in parts.items():
            archive.writestr(entry, data)
    with pytest.raises(MergeboundError, match=r"d\.npz: .*x_train\.npy is cut short: 720 bytes"):
        load_local(path)


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(MergeboundError, match="none: there is no such file or folder"):
        load_local(tmp_path / "none")
    (tmp_path / "d.csv").write_text("1")
    with pytest.raises(MergeboundError, match=r"d\.csv: not an \.npz file"):
        load_local(tmp_path / "d.csv")


# --- folders ---------------------------------------------------------------------------------------------------------


def classes(root: Path, names: tuple[str, ...] = ("ant", "bee"), images: int = 3) -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (6, 5), (label, number, 9)).save(root / name / f"{number}.png")
    return root


def test_folder_of_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = classes(tmp_path / "insects", ("bee", "ant"))
    (root / "ant" / "more" / "deep").mkdir(parents=True)
    Image.new("L", (6, 5), 77).save(root / "ant" / "more" / "deep" / "Z.JPEG", quality=95)
    (root / ".hidden").mkdir()
    Image.new("L", (6, 5)).save(root / ".hidden" / "x.png")
    (root / "bee" / "._0.png").write_bytes(b"resource fork")
    (root / "bee" / "notes.txt").write_text("no image")
    (root / "README.md").write_text("about")
    with caplog.at_level(logging.WARNING):
        data = load_local(root)
    assert "1 files are not images and are left out, the first is bee/notes.txt" in caplog.text
    images = data.parts["train"]
    assert (data.name, data.class_names, len(images)) == ("insects", ("ant", "bee"), 7)
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert images.read(1)[0, 0].tolist() == [1, 1, 9]
    assert images.read(3).shape == (5, 6, 3)
    assert images.place(3) == str(root / "ant" / "more" / "deep" / "Z.JPEG")
    assert load_local(root, grey=True).parts["train"].read(3).shape == (5, 6, 1)


def test_folder_agrees_with_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = classes(tmp_path / "d", ("10", "9", "b", "A"), 11)
    (root / "9" / "sub").mkdir()
    (root / "9" / "0.png").rename(root / "9" / "sub" / "0.png")
    theirs = ImageFolder(str(root))
    ours = load_local(root)
    assert list(ours.class_names) == theirs.classes
    images = ours.parts["train"]
    assert sorted((images.place(row), int(images.labels[row])) for row in range(len(images))) == sorted(theirs.samples)


def test_folder_with_parts(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        classes(tmp_path / "d" / part, images=4 if part == "train" else 2)
    data = load_local(tmp_path / "d")
    assert {part: len(images) for part, images in data.parts.items()} == {"train": 8, "validation": 4, "test": 4}
    task = split(data)
    assert (len(task.train), len(task.validation), len(task.test)) == (8, 4, 4)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = classes(tmp_path / "d", ("train", "bus"))
    assert load_local(root).class_names == ("bus", "train")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    store = classes(tmp_path / "store", ("x",))
    root = classes(tmp_path / "d")
    (root / "bee" / "linked").symlink_to(store / "x", target_is_directory=True)
    assert len(load_local(root).parts["train"]) == 9
    (root / "ant" / "again").symlink_to(root, target_is_directory=True)
    with pytest.raises(MergeboundError, match=r"again.*a loop without end"):
        load_local(root)
    (root / "ant" / "again").unlink()
    (root / "ant" / "self.png").symlink_to(root / "ant" / "self.png")
    with pytest.raises(MergeboundError, match=r"self\.png: a link to .* which is not there \(or a loop\)"):
        load_local(root)
    (root / "ant" / "self.png").unlink()
    (root / "ant" / "gone.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(MergeboundError, match=r"gone\.png: a link to .*nothing\.png, which is not there"):
        load_local(root)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    root = classes(tmp_path / "a")
    (root / "empty").mkdir()
    with pytest.raises(MergeboundError, match=r"a/empty: a class folder without images"):
        load_local(root)
    (root / "empty" / "data.npy").write_bytes(b"")
    with pytest.raises(MergeboundError, match=r"a/empty: a class folder without images .*only data\.npy"):
        load_local(root)
    root = classes(tmp_path / "b")
    Image.new("L", (4, 4)).save(root / "stray.png")
    with pytest.raises(MergeboundError, match=r"b/stray\.png: an image outside of a class folder; .*b/<class>/stray"):
        load_local(root)
    (tmp_path / "c").mkdir()
    with pytest.raises(MergeboundError, match=r"c: no images in class-named sub-folders"):
        load_local(tmp_path / "c")
    for name in ("train", "test"):
        (tmp_path / "flat" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "flat" / name / "0.png")
    with pytest.raises(MergeboundError, match=r"flat/test: holds no class folders, so its images have no labels"):
        load_local(tmp_path / "flat")


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    root = tmp_path / "d"
    classes(root / "train", ("ant", "bee"))
    classes(root / "test", ("ant",))
    with pytest.raises(MergeboundError, match=r"test/bee: there is no such class folder, but .*train has one"):
        load_local(root)
    classes(root / "test" / "x", ("y",))
    (root / "test" / "x").rename(root / "test" / "bee")
    (root / "test" / "cow").symlink_to(root / "train" / "ant", target_is_directory=True)
    with pytest.raises(MergeboundError, match=r"train/cow: there is no such class folder, but .*test has one"):
        load_local(root)
    (root / "test" / "cow").unlink()
    classes(root / "docs", ("z",))
    with pytest.raises(MergeboundError, match=r"docs: beside .*, but it is no part"):
        load_local(root)
    (root / "docs").rename(root / "Training")
    with pytest.raises(MergeboundError, match=r"train: the same part as Training"):
        load_local(root)
    only = classes(tmp_path / "only" / "test")
    with pytest.raises(MergeboundError, match="only: no folder train, only test"):
        load_local(only.parent)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    root = classes(tmp_path / "d")
    (root / "ant").chmod(0)
    with pytest.raises(MergeboundError, match=r"ant: cannot be listed"):
        load_local(root)
    (root / "ant").chmod(0o700)
