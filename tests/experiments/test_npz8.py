"""The family ``npz8``: the catalogue's facts, what is refused, and (with the files) counts and splits."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.inputs.resident import residents
from experiments.tasks.dataset import split
from experiments.tasks.form import InputFormat
from experiments.tasks.npz8 import FILES, NAMES, VARIABLE, NpzFile, load_one, npz8, npz8_root
from theory.errors import MergeboundError

needs_data = pytest.mark.skipif(
    not os.environ.get(VARIABLE), reason=f"{VARIABLE} is not set to the folder of npz8's files"
)

DIGESTS = {
    "mnist": "10ecd54f72e803fed2fb82eb3e3132066817f8cf2ac72e6efb2d1abab91031bf",
    "fashion_mnist": "5f60bfac56019be3978e804dd906b29905c151e59e4e9e032d51bfae2c5be178",
    "notmnist": "ba2b846ae3cae59126bea1d0977c04b734ae2963f8f1931ee6fce99c804cab72",
    "arabic_letters": "a36f484b7a437942336fcbd3ff74da4ab2681773f03e11c08768b636aaf72fb0",
    "cifar10": "cd9a7c02698c71a45c896c374c4f75f7966d74975b323d25ab880a29feb6b5e2",
    "gtsrb": "5aac025058edcbb54f8c7bcf4c1f1dea8ccaeeddab80c528080e038dcaa05281",
    "ucmerced": "c7084c6119d246bf4e8b2eaf491ce6e04a8216681546c1ad3b7527fc4c5b4999",
    "chars74k": "f4b607da8cc99c7a385c8b466aebbc6b8498d1f41e4b69e63cbda8cc4caa5e7a",
}
"""Of the splits with seed 0: results that carry them were measured on the same images."""


def test_the_catalogue() -> None:
    assert NAMES == (
        "mnist", "fashion_mnist", "notmnist", "arabic_letters", "cifar10", "gtsrb", "ucmerced", "chars74k",
    )  # fmt: skip
    assert len({file.sha256 for file in FILES}) == 8
    assert all(len(file.sha256) == 64 and file.licence and file.source and file.title for file in FILES)
    assert [file.name for file in FILES if file.channels == 1] == list(NAMES[:4])


def test_the_folder_comes_from_the_argument_then_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert npz8_root() == tmp_path
    (tmp_path / "other").mkdir()
    assert npz8_root(tmp_path / "other") == tmp_path / "other"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(MergeboundError, match=r"gone: there is no such folder; set MERGEBOUND_DATA"):
        npz8()
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(MergeboundError, match="give root or set MERGEBOUND_DATA"):
        npz8()


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeboundError, match=r"mnist\.npz: there is no such file; point root or MERGEBOUND_DATA"):
        npz8(tmp_path)
    with pytest.raises(MergeboundError, match=r"no data set 'minst'; did you mean 'mnist'"):
        npz8(tmp_path, ["minst"])
    with pytest.raises(MergeboundError, match="no data set of npz8 is named"):
        npz8(tmp_path, [])


def test_another_file_under_the_name_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    x, y = np.zeros((20, 32, 32), np.uint8), np.arange(20) % 2
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y, class_names=np.array(["a", "b"]))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(MergeboundError, match=rf"mnist\.npz: its SHA-256 is {found}.*check_hash=False"):
        npz8(tmp_path, ["mnist"])
    task = npz8(tmp_path, ["mnist"], check_hash=False)["mnist"]
    assert (len(task.train), len(task.validation), len(task.test), task.classes) == (18, 2, 20, 2)


@needs_data
def test_hashes_are_those_of_the_list_beside_the_files() -> None:
    listed = dict(
        reversed(line.split()) for line in (npz8_root() / "SHA256SUMS").read_text().splitlines() if line.strip()
    )
    ours = {f"{file.name}.npz": file.sha256 for file in FILES}
    assert {name.lstrip("*"): value for name, value in listed.items() if name.endswith(".npz")} == ours


@needs_data
@pytest.mark.parametrize("entry", FILES, ids=NAMES)
def test_counts_classes_channels_and_split(entry: NpzFile) -> None:
    data = load_one(None, entry.name)
    assert {part: len(images) for part, images in data.parts.items()} == {"train": entry.train, "test": entry.test}
    assert len(data.class_names) == entry.classes
    for images in data.parts.values():
        assert images.read(0).shape == (32, 32, entry.channels)
        assert set(images.labels.tolist()) == set(range(entry.classes))
    task = split(data, seed=0)
    assert task.class_names == data.class_names
    assert len(task.validation) == round(0.1 * entry.train)
    assert len(task.train) + len(task.validation) == entry.train
    assert task.digest == DIGESTS[entry.name]


@needs_data
def test_class_names() -> None:
    assert load_one(None, "mnist").class_names == tuple("0123456789")
    assert load_one(None, "notmnist").class_names == tuple("ABCDEFGHIJ")
    assert load_one(None, "cifar10").class_names == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip


@needs_data
def test_grey_and_colour_files_become_batches_for_a_colour_network() -> None:
    form = InputFormat(3, 32, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name in ("mnist", "ucmerced"):
        task = npz8(names=[name])[name]
        train, _, test = residents(task, form, augment="light")
        assert train.images.shape[1] == task.train.read(0).shape[2]
        assert train.batch(np.arange(5), 0)[0].shape == (5, 3, 32, 32)
        expected = (np.broadcast_to(task.test.read(7), (32, 32, 3)) / 255 - np.array(form.mean)) / np.array(form.std)
        got = test.batch(np.array([7]), 0)[0][0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(got, expected.astype(np.float32))
