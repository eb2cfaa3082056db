"""The cache of resized images, and the choice between memory, cache and disk."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.inputs.cache import cache_file, cached, open_cache
from experiments.inputs.opening import memory_room, open_inputs
from experiments.inputs.resident import Resident, load_resident
from experiments.inputs.streamed import Streamed
from experiments.tasks.fit import fit
from experiments.tasks.form import InputFormat
from experiments.tasks.images import ArrayImages, FileImages
from theory.errors import MergeboundError

FORM = InputFormat(3, 16, 16, crop=0.9)


@dataclass
class Watched:
    """Images that count what is read."""

    whole: ArrayImages
    reads: int = 0
    missing: set[int] = field(default_factory=set)

    @property
    def labels(self) -> np.ndarray:
        return self.whole.labels

    @property
    def fingerprint(self) -> str:
        return self.whole.fingerprint

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, row: int) -> np.ndarray:
        self.reads += 1
        if row in self.missing:
            raise MergeboundError(f"{self.place(row)}: gone")
        return self.whole.read(row)

    def place(self, row: int) -> str:
        return self.whole.place(row)


def watched(channels: int = 3, count: int = 70, seed: int = 0) -> Watched:
    rng = np.random.default_rng([seed, 0xCAC4E])
    pixels = rng.integers(0, 256, (count, 20, 30, channels), dtype=np.uint8)
    return Watched(ArrayImages(pixels, rng.integers(0, 3, count), "box"))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_second_opening_reads_no_image(tmp_path: Path, channels: int) -> None:
    images = watched(channels)
    assert open_cache(images, FORM, tmp_path) is None
    first = cached(images, FORM, tmp_path / "new", workers=3)
    assert images.reads == 71  # the first one tells how many channels there are
    expected = np.stack([fit(images.whole.read(row), FORM).transpose(2, 0, 1) for row in range(70)])
    assert np.array_equal(first, expected)
    second = cached(images, FORM, tmp_path / "new")
    assert images.reads == 71
    assert np.array_equal(second, expected)
    second[0] = 0  # changes the mapping of this process alone
    assert np.array_equal(cached(images, FORM, tmp_path / "new"), expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [cache_file(images, FORM, tmp_path).name]


def test_other_images_sizes_or_crops_have_other_files(tmp_path: Path) -> None:
    images = watched()
    forms = [FORM, InputFormat(3, 16, 20), InputFormat(3, 16, 16), InputFormat(3, 16, 16, interpolation="bilinear")]
    names = {cache_file(images, form, tmp_path).name for form in forms}
    names.add(cache_file(images, FORM, tmp_path, decode="draft").name)
    names.add(cache_file(watched(seed=1), FORM, tmp_path).name)
    assert len(names) == 6
    same = InputFormat(3, 16, 16, (0.1,), (0.2,), crop=0.9)  # normalisation comes after
    assert cache_file(images, same, tmp_path) == cache_file(images, FORM, tmp_path)


def test_an_unreadable_image_leaves_no_cache(tmp_path: Path) -> None:
    images = watched()
    images.missing = {40}
    with pytest.raises(MergeboundError, match="box, image 40: gone"):
        cached(images, FORM, tmp_path)
    assert list(tmp_path.iterdir()) == []


CRASH = """
import os, sys
from pathlib import Path
import numpy as np
from experiments.inputs import cache
from experiments.tasks.form import InputFormat
from experiments.tasks.images import ArrayImages

cache.os.replace = lambda old, new: os._exit(9)  # the machine stops between writing and renaming
images = ArrayImages(np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5, np.int64))
cache.cached(images, InputFormat(1, 8, 8), Path(sys.argv[1]))
"""


def test_a_crash_before_the_renaming_leaves_no_cache(tmp_path: Path) -> None:
    images = ArrayImages(np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5, np.int64))
    form = InputFormat(1, 8, 8)
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", CRASH, str(tmp_path)], cwd=root, timeout=60)
    assert found.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".part")
    assert open_cache(images, form, tmp_path) is None
    assert cached(images, form, tmp_path).shape == (5, 1, 8, 8)
    assert left.exists()  # it may belong to a run that is still writing
    os.utime(left, (0, 0))
    cached(watched(1), form, tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["cut", "text", "shape", "objects"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    images = watched()
    expected = np.array(cached(images, FORM, tmp_path))
    path = cache_file(images, FORM, tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("nothing")
    elif damage == "shape":
        np.save(path, np.zeros((3, 3, 16, 16), dtype=np.uint8))
    else:
        np.save(path, np.asarray([{}], dtype=object), allow_pickle=True)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(cached(images, FORM, tmp_path), expected)
    assert f"{path}: damaged cache" in caplog.text


def test_no_room_and_no_permission_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MergeboundError, match=r"file.*cannot be cached"):
        cached(watched(), FORM, tmp_path / "file")
    monkeypatch.setattr("experiments.inputs.cache._SPARE", 1 << 60)
    with pytest.raises(MergeboundError, match="are free; choose another folder"):
        cached(watched(), FORM, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_choice_is_by_bytes_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = watched()
    needed = 70 * 3 * 16 * 16
    options = dict(augment="flip_shift", seed=2, name="box", first_row=3)
    rows = np.asarray([5, 69, 5, 0])
    with caplog.at_level(logging.INFO):
        memory = open_inputs(images, FORM, memory_limit=needed, **options)  # type: ignore[arg-type]
        mapped = open_inputs(images, FORM, memory_limit=needed - 1, cache=tmp_path, **options)  # type: ignore[arg-type]
        disk = open_inputs(images, FORM, memory_limit=needed - 1, **options)  # type: ignore[arg-type]
        views = open_inputs(images, FORM, views="crop_flip", cache=tmp_path)
    assert [type(data) for data in (memory, mapped, disk, views)] == [Resident, Resident, Streamed, Streamed]
    told = caplog.messages
    assert "in memory" in told[0]
    assert "more than the limit of 0.1 MB, so mapped from a cache" in told[1]
    assert any("more than the limit of 0.1 MB, so read from disk by 2 threads" in line for line in told)
    assert "random views need the full-size images" in told[-1]
    expected = load_resident(images, FORM, **options).batch(rows, 4)  # type: ignore[arg-type]
    for data in (memory, mapped, disk):
        x, labels = data.batch(rows, 4)
        assert torch.equal(x, expected[0])
        assert torch.equal(labels, expected[1])
    before = images.reads
    again = open_inputs(images, FORM, memory_limit=1, cache=tmp_path, **options)  # type: ignore[arg-type]
    assert torch.equal(again.batch(rows, 4)[0], expected[0])
    assert images.reads == before
    assert isinstance(open_inputs(images, FORM), Resident)
    assert memory_room() is None or memory_room()


def test_a_file_that_changed_has_another_cache(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "a.png")
    images = FileImages(tmp_path, ("a.png",), np.zeros(1, dtype=np.int64))
    red = np.array(cached(images, FORM, tmp_path / "cache"))
    rng = np.random.default_rng([0, 1])
    Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    assert not np.array_equal(cached(images, FORM, tmp_path / "cache"), red)


def test_photographs_read_as_grey_ones_are_other_images(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    files = tuple(f"{number}.png" for number in range(3))
    colour, grey = (FileImages(tmp_path, files, np.arange(3), grey=grey) for grey in (False, True))
    assert colour.fingerprint != grey.fingerprint
    assert cached(grey, FORM, tmp_path / "cache").shape[1] == 1
    assert np.array_equal(cached(colour, FORM, tmp_path / "cache"), load_resident(colour, FORM).images.numpy())
