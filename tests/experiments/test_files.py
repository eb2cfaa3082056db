"""Loading the user's images: layouts, sizes, channels, normalisation, seeded subsets, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.tasks.files import check_labels, load_images, subset
from experiments.tasks.form import InputFormat
from theory.errors import MergeboundError

RGB = InputFormat(3, 8, 8, (0.1, 0.2, 0.3), (0.5, 0.4, 0.2))
GREY = InputFormat(1, 8, 8)


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.fixture
def colour() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def test_colour_is_scaled_and_normalised_by_channel(tmp_path: Path, colour: np.ndarray) -> None:
    path = save(tmp_path / "d.npz", x_test=colour, y_test=np.arange(12), class_names=np.array(["a", "b"]))
    loaded = load_images(path, RGB)
    expected = (colour / 255.0 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.4, 0.2])
    np.testing.assert_allclose(loaded.split.images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert loaded.split.labels.tolist() == list(range(12))
    assert (loaded.name, loaded.total, loaded.class_names) == ("test", 12, ("a", "b"))


def test_grey_is_repeated_for_colour_networks(tmp_path: Path, colour: np.ndarray) -> None:
    path = save(tmp_path / "d.npz", x=colour[..., 0], y=np.zeros(12, dtype=np.int64))
    images = load_images(path, RGB).split.images
    plain = images * torch.tensor(RGB.std).view(1, 3, 1, 1) + torch.tensor(RGB.mean).view(1, 3, 1, 1)
    torch.testing.assert_close(plain[:, 0], plain[:, 2])
    np.testing.assert_allclose(plain[:, 1].numpy(), colour[..., 0] / 255.0, atol=1e-6)


def test_floating_images_are_taken_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((5, 8, 8)).astype(np.float32)
    path = save(tmp_path / "d.npz", x_val=x, y_val=np.arange(5))
    np.testing.assert_array_equal(load_images(path, GREY).split.images[:, 0].numpy(), x)
    path = save(tmp_path / "c.npz", x_val=np.stack([x, x, x], axis=1), y_val=np.arange(5))
    np.testing.assert_array_equal(load_images(path, RGB).split.images[:, 2].numpy(), x)


def test_held_out_splits_come_first_and_can_be_named(tmp_path: Path, colour: np.ndarray) -> None:
    y = np.zeros(12, dtype=np.int64)
    path = save(tmp_path / "d.npz", x_train=colour, y_train=y, x_test=colour, y_test=y + 1, x_val=colour, y_val=y + 2)
    assert load_images(path, RGB).name == "val"
    assert load_images(path, RGB, split="train").split.labels.tolist() == [0] * 12
    with pytest.raises(MergeboundError, match=r"no split 'other'.*train, test, val"):
        load_images(path, RGB, split="other")


def test_subset_is_seeded_and_without_repetition(tmp_path: Path, colour: np.ndarray) -> None:
    path = save(tmp_path / "d.npz", x=colour, y=np.arange(12))
    first = load_images(path, RGB, images=6, seed=3).split
    again = load_images(path, RGB, images=6, seed=3).split
    other = load_images(path, RGB, images=6, seed=4).split
    assert first.labels.tolist() == again.labels.tolist() == first.source.tolist()
    assert len(set(first.labels.tolist())) == 6
    assert first.labels.tolist() != other.labels.tolist()
    counts = np.bincount(np.concatenate([subset(12, 6, seed) for seed in range(400)]), minlength=12)
    assert counts.min() > 140
    assert counts.max() < 260


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    flat = np.full((2, 32, 16, 3), 128, dtype=np.uint8)
    path = save(tmp_path / "d.npz", x=flat, y=np.arange(2))
    images = load_images(path, InputFormat(3, 8, 8, (0.0,), (1.0,))).split.images
    assert images.shape == (2, 3, 8, 8)
    torch.testing.assert_close(images, torch.full((2, 3, 8, 8), 128 / 255))


def folder_of_images(root: Path) -> Path:
    for label, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 10), (label * 100, number, 0)).save(root / name / f"{number}.png")
    return root


def test_folder_numbers_classes_by_name_and_crops_the_middle(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path / "photos")
    loaded = load_images(root, InputFormat(3, 8, 8, (0.0,), (1.0,)))
    assert loaded.split.images.shape == (9, 3, 8, 8)
    assert loaded.split.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert loaded.class_names == ("ant", "bee", "cat")
    torch.testing.assert_close(
        loaded.split.images[:, 0, 4, 4] * 255, torch.tensor([0, 0, 0, 100, 100, 100, 200, 200, 200.0])
    )
    halves = Image.new("L", (30, 10), 0)
    halves.paste(255, (10, 0, 20, 10))
    (tmp_path / "grey" / "a").mkdir(parents=True)
    halves.save(tmp_path / "grey" / "a" / "x.png")
    assert float(load_images(tmp_path / "grey", InputFormat(1, 10, 10, (0.0,), (1.0,))).split.images.min()) == 1.0


def test_folder_with_splits(tmp_path: Path) -> None:
    folder_of_images(tmp_path / "d" / "train")
    folder_of_images(tmp_path / "d" / "val")
    assert load_images(tmp_path / "d", RGB).name == "val"
    assert load_images(tmp_path / "d", RGB, split="train").name == "train"


def test_arrays_with_objects_are_never_unpickled(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=np.array([{"a": 1}, None], dtype=object), y=np.arange(2))
    with pytest.raises(MergeboundError, match=r"d\.npz: cannot be read as \.npz .*allow_pickle=False"):
        load_images(path, RGB)


@pytest.mark.parametrize(
    ("arrays", "form", "message"),
    [
        ({"a": np.zeros(3)}, RGB, "no images among its arrays"),
        ({"x": np.zeros((3, 8, 8), np.uint8), "y": np.zeros(2, int)}, RGB, "3 images but y has 2 labels"),
        ({"x": np.zeros((3, 8, 8), np.uint8), "y": np.zeros(3)}, RGB, "y is float64 of shape"),
        ({"x": np.zeros((3, 8), np.uint8), "y": np.zeros(3, int)}, RGB, r"uint8 of shape \(3, 8\)"),
        ({"x": np.zeros((3, 8, 8), np.int64), "y": np.zeros(3, int)}, RGB, "has type int64"),
        ({"x": np.zeros((3, 8, 8, 3), np.uint8), "y": np.zeros(3, int)}, GREY, "have 3 channels .* takes 1"),
        ({"x": np.zeros((3, 3, 8, 8)), "y": np.zeros(3, int)}, GREY, "already normalised"),
        ({"x": np.full((3, 8, 8), np.nan), "y": np.zeros(3, int)}, GREY, "NaN or infinite pixels"),
        ({"x": np.zeros((0, 8, 8), np.uint8), "y": np.zeros(0, int)}, GREY, "holds no images"),
    ],
)
def test_bad_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], form: InputFormat, message: str) -> None:
    path = save(tmp_path / "d.npz", **arrays)
    with pytest.raises(MergeboundError, match=rf"d\.npz: .*{message}"):
        load_images(path, form)


def test_bad_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(MergeboundError, match=r"none\.npz: there is no such file"):
        load_images(tmp_path / "none.npz", RGB)
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(MergeboundError, match=r"d\.csv: not an \.npz"):
        load_images(tmp_path / "d.csv", RGB)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(MergeboundError, match=r"cut\.npz: cannot be read"):
        load_images(tmp_path / "cut.npz", RGB)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(MergeboundError, match="empty: no images in class-named"):
        load_images(tmp_path / "empty", RGB)
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "x.png").write_bytes(b"not an image")
    with pytest.raises(MergeboundError, match=r"x\.png: not a readable image"):
        load_images(tmp_path / "bad", RGB)
    root = folder_of_images(tmp_path / "colour")
    with pytest.raises(MergeboundError, match="a RGB image, but the network takes one channel"):
        load_images(root, GREY)
    with pytest.raises(MergeboundError, match="images = 0"):
        load_images(root, RGB, images=0)
    with pytest.raises(MergeboundError, match="label 7 is out of range"):
        check_labels(root, torch.tensor([0, 7]), 5, "e.safetensors")


def test_bad_normalisation() -> None:
    with pytest.raises(MergeboundError, match="mean: 2 numbers"):
        InputFormat(3, 8, 8, (0.5, 0.5))
    with pytest.raises(MergeboundError, match="std:"):
        InputFormat(3, 8, 8, (0.5,), (0.0,))
