"""Data sets in the hub's formats, written by the library ``datasets`` itself and compared with what it reads."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.tasks import hub as module
from experiments.tasks.dataset import DataSet, split
from experiments.tasks.hub import find_parts, load_hub, patterns
from theory.errors import MergeboundError

datasets = pytest.importorskip("datasets", reason="the extra hub is not installed: pip install 'mergebound[hub]'")
CLASSES = ["cat", "dog", "ant"]


def pictures(count: int, seed: int, mode: str = "RGB") -> list[Image.Image]:
    rng = np.random.default_rng([seed, 0x4B])
    shape = (7, 5, 3) if mode == "RGB" else (7, 5)
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


def made(mode: str = "RGB", image: str = "image", label: Any = None) -> Any:
    """A tiny data set: 7 images to train with, 4 to test."""
    features = datasets.Features({image: datasets.Image(), "label": label or datasets.ClassLabel(names=CLASSES)})
    parts = {
        part: datasets.Dataset.from_dict(
            {image: pictures(count, count, mode), "label": [n % 3 for n in range(count)]}, features=features
        )
        for part, count in (("train", 7), ("test", 4))
    }
    return datasets.DatasetDict(parts)


def clone(folder: Path, data: Any, shards: int = 2) -> Path:
    """What a clone of the repository would be: data/<part>-0000i-of-0000n.parquet."""
    (folder / "data").mkdir(parents=True)
    for part, rows in data.items():
        for number in range(shards):
            shard = rows.shard(shards, number, contiguous=True)
            shard.to_parquet(str(folder / "data" / f"{part}-{number:05d}-of-{shards:05d}.parquet"))
    return folder


def same(found: DataSet, truth: Any, image: str = "image") -> None:
    """Images and labels as ``datasets`` decodes them."""
    for part, rows in truth.items():
        images = found.parts[part]
        assert len(images) == len(rows)
        assert images.labels.tolist() == [int(label) for label in rows["label"]]
        for row in range(len(rows)):
            expected = np.asarray(rows[row][image])
            assert np.array_equal(np.squeeze(images.read(row)), expected)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(MergeboundError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "saved"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_and_labels_are_those_of_the_library(tmp_path: Path, form: str, mode: str) -> None:
    truth = made(mode)
    if form == "parquet":
        clone(tmp_path / "tiny", truth)
    else:
        truth.save_to_disk(str(tmp_path / "tiny"))
    found = load_hub(tmp_path / "tiny")
    assert found.name == "tiny"
    assert found.class_names == tuple(CLASSES)
    assert found.parts["train"].read(0).shape == (7, 5, 3 if mode == "RGB" else 1)
    same(found, truth)


def test_the_same_images_have_the_same_fingerprint_in_every_format(tmp_path: Path) -> None:
    truth = made()
    clone(tmp_path / "a" / "tiny", truth, shards=1)
    clone(tmp_path / "b" / "tiny", truth, shards=3)
    truth.save_to_disk(str(tmp_path / "c" / "tiny"))
    digests = {split(load_hub(tmp_path / each / "tiny"), validation=3).digest for each in "abc"}
    assert len(digests) == 1
    other = datasets.DatasetDict(train=truth["train"].select([1, 0, 2, 3, 4, 5, 6]), test=truth["test"])
    clone(tmp_path / "d" / "tiny", other)
    assert split(load_hub(tmp_path / "d" / "tiny"), validation=3).digest not in digests


def test_readers_go_to_other_processes_without_the_images(tmp_path: Path) -> None:
    found = load_hub(clone(tmp_path / "tiny", made()))
    images = found.parts["train"]
    packed = pickle.dumps(images)
    assert len(packed) < 3_000
    assert np.array_equal(pickle.loads(packed).read(5), images.read(5))


def test_large_files_are_mapped_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = made()
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = load_hub(clone(tmp_path / "tiny", truth))
    same(found, truth)
    assert found.class_names == tuple(CLASSES)


def test_labels_without_names_booleans_and_strings(tmp_path: Path) -> None:
    numbers = load_hub(clone(tmp_path / "a", made(label=datasets.Value("int64"))))
    assert numbers.class_names == ("0", "1", "2")
    data = made()
    yes = data.map(lambda row: {"label": row["label"] > 0}, features=_with(data, datasets.Value("bool")))
    found = load_hub(clone(tmp_path / "b", yes))
    assert found.class_names == ("false", "true")
    assert found.parts["train"].labels.tolist() == [0, 1, 1, 0, 1, 1, 0]
    words = data.map(lambda row: {"label": CLASSES[row["label"]]}, features=_with(data, datasets.Value("string")))
    found = load_hub(clone(tmp_path / "c", words))
    assert found.class_names == ("ant", "cat", "dog")
    assert [found.class_names[label] for label in found.parts["test"].labels] == ["cat", "dog", "ant", "cat"]


def _with(data: Any, kind: Any) -> Any:
    features = data["train"].features.copy()
    features["label"] = kind
    return features


def test_parts_are_found_in_the_hubs_usual_layouts(tmp_path: Path) -> None:
    truth = made()
    for layout in (
        "{part}.parquet",
        "default/{part}/0000.parquet",
        "{part}/0000.parquet",
        "data/{part}-00000-of-00001-ab12.parquet",
    ):
        folder = tmp_path / layout.partition(".")[0].replace("/", "_").replace("{part}", "x")
        for part, rows in truth.items():
            path = folder / layout.format(part=part)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(str(path))
        assert set(find_parts(folder).parts) == {"train", "test"}, layout
        same(load_hub(folder), truth)


def test_a_part_called_validation_is_one_unless_it_is_the_test(tmp_path: Path) -> None:
    data = made()
    data["valid"] = data["test"]
    found = load_hub(clone(tmp_path / "a", data))
    assert set(found.parts) == {"train", "validation", "test"}
    two = datasets.DatasetDict(train=data["train"], validation=data["test"])
    found = load_hub(clone(tmp_path / "b", two), test="validation")
    assert set(found.parts) == {"train", "test"}
    found = load_hub(tmp_path / "b", test=None)
    assert set(found.parts) == {"train", "validation"}
    assert "did you mean" in refused(lambda: load_hub(tmp_path / "b", train="trian", test=None))
    assert "test=None" in refused(lambda: load_hub(tmp_path / "b"))


def test_configurations_are_chosen(tmp_path: Path) -> None:
    truth = made()
    for config in ("small", "large"):
        clone(tmp_path / "set" / config, truth)
        for path in (tmp_path / "set" / config / "data").iterdir():
            path.rename(tmp_path / "set" / config / path.name)
        (tmp_path / "set" / config / "data").rmdir()
    assert "large, small" in refused(lambda: load_hub(tmp_path / "set"))
    same(load_hub(tmp_path / "set", config="small"), truth)


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    truth = made(image="img")
    same(load_hub(clone(tmp_path / "a", truth)), truth, "img")
    fine = truth.map(lambda row: {"coarse": row["label"] // 2})
    fine = fine.cast_column("coarse", datasets.ClassLabel(names=["x", "y"]))
    folder = clone(tmp_path / "b", fine)
    assert load_hub(folder).class_names == tuple(CLASSES)  # the one that is called label
    assert load_hub(folder, label="coarse").class_names == ("x", "y")
    both = clone(tmp_path / "c", fine.rename_column("label", "fine"))
    assert "label=" in refused(lambda: load_hub(both))
    assert "imgs" in refused(lambda: load_hub(folder, image="imgs"))
    assert "did you mean 'coarse'" in refused(lambda: load_hub(folder, label="coarze"))


def test_damaged_and_partial_folders_are_named(tmp_path: Path) -> None:
    folder = clone(tmp_path / "tiny", made())
    path = folder / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in refused(lambda: load_hub(folder))
    made().save_to_disk(str(tmp_path / "saved"))
    arrow = next((tmp_path / "saved" / "test").glob("*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    assert str(arrow) in refused(lambda: load_hub(tmp_path / "saved"))
    arrow.unlink()
    assert str(arrow) in refused(lambda: load_hub(tmp_path / "saved"))
    (tmp_path / "saved" / "dataset_dict.json").write_text("{")
    assert "dataset_dict.json" in refused(lambda: load_hub(tmp_path / "saved"))
    (tmp_path / "empty").mkdir()
    assert "no .parquet" in refused(lambda: load_hub(tmp_path / "empty"))
    assert "no such folder" in refused(lambda: load_hub(tmp_path / "none"))


def test_bad_images_and_labels_are_named(tmp_path: Path) -> None:
    def write(folder: Path, images: list[Any], labels: list[Any]) -> Path:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        return clone(folder, {"train": rows, "test": rows}, shards=1)

    buffer = io.BytesIO()
    pictures(1, 0)[0].save(buffer, "PNG")
    good = {"bytes": buffer.getvalue(), "path": None}
    cut = {"bytes": buffer.getvalue()[:60], "path": None}
    found = load_hub(write(tmp_path / "a", [good, cut], [0, 1]))
    line = refused(lambda: found.parts["train"].read(1))
    assert "train-00000-of-00001.parquet, image 1" in line
    line = refused(lambda: load_hub(write(tmp_path / "b", [{"bytes": b"<html>", "path": None}], [0])))
    assert "image 0" in line
    assert "label -1" in refused(lambda: load_hub(write(tmp_path / "c", [good, good], [0, -1])))
    assert "image 1 has no label" in refused(lambda: load_hub(write(tmp_path / "d", [good, good], [0, None])))


def test_stored_paths_stay_in_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    pictures(1, 0)[0].save(outside)
    import pyarrow as pa
    import pyarrow.parquet

    for name, path in (("a", str(outside)), ("b", "../outside.png"), ("c", "inside.png")):
        folder = tmp_path / name
        folder.mkdir()
        pictures(1, 5)[0].save(folder / "inside.png")
        rows = pa.table({"image": [{"bytes": None, "path": path}], "label": [0]})
        for part in ("train", "test"):
            pyarrow.parquet.write_table(
                rows.cast(
                    pa.schema(
                        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
                    )
                ),
                folder / f"{part}.parquet",
            )
        if name == "c":
            assert np.array_equal(load_hub(folder).parts["train"].read(0), np.asarray(pictures(1, 5)[0]))
        else:
            assert "outside" in refused(lambda folder=folder: load_hub(folder))  # type: ignore[misc]


def test_loading_scripts_are_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "never run" in refused(lambda: load_hub(folder))
    assert not (tmp_path / "ran").exists()


def test_names_are_looked_up_in_the_cache_only_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[dict[str, Any]] = []
    truth = made()
    stored = clone(tmp_path / "snapshot", truth)

    def snapshot(repository: str, **named: Any) -> str:
        calls.append({"repository": repository} | named)
        if named["local_files_only"] and len(calls) == 1:
            raise FileNotFoundError("not here")
        return str(stored)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    line = refused(lambda: load_hub("tanganke/dtd"))
    assert "download=True" in line
    found = load_hub("tanganke/dtd", download=True, revision="abc", token="t")
    same(found, truth)
    assert found.name == "dtd"
    assert [call["local_files_only"] for call in calls] == [True, False]
    assert (calls[1]["revision"], calls[1]["token"], calls[1]["repo_type"]) == ("abc", "t", "dataset")
    assert all(shape.endswith(".parquet") for shape in calls[1]["allow_patterns"])


def test_the_command_states_sizes_and_licences_asks_and_fetches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    from experiments.cli import main

    stored = clone(tmp_path / "snapshot", made(label=datasets.ClassLabel(names=[f"c{n}" for n in range(47)])))
    fetched: list[bool] = []

    def snapshot(repository: str, **named: Any) -> str:
        fetched.append(not named["local_files_only"])
        return str(stored)

    def info(self: object, repository: str, **named: Any) -> Any:
        assert (repository, named["files_metadata"]) == ("tanganke/dtd", True)
        files = {"data/train-00000-of-00001.parquet": 3_000_000, "data/contrast-00000-of-00001.parquet": 9_000_000}
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
        return SimpleNamespace(siblings=siblings, card_data=SimpleNamespace(license=["cc0-1.0"]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for arguments, code in ((["get", "dtd", "--hub"], 2), (["get", "dtd", "--hub", "--yes"], 0)):
        fetched.clear()
        with pytest.raises(SystemExit) as stop:
            main(["data", *arguments])
        assert (stop.value.code or 0) == code
        shown = capsys.readouterr().out
        assert "3 MB" in shown
        assert "cc0-1.0" in shown
        assert fetched == ([True] if code == 0 else [])
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "dtd", "--hub", "--json"])
    assert stop.value.code == 2  # most of its 47 classes have no image here
    assert fetched == [True, False]
    assert "no training image" in capsys.readouterr().err


def test_a_set_of_the_catalogue_comes_from_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = made(image="jpg")
    stored = clone(tmp_path / "snapshot", truth.rename_column("label", "cls"))
    asked: list[Any] = []

    def fetch(*arguments: Any) -> Path:
        asked.extend(arguments)
        return stored

    monkeypatch.setattr(module, "fetch", fetch)
    found = module.load_published("FER-2013")
    same(found, truth, "jpg")
    assert found.name == "fer2013"
    assert asked[0] == "clip-benchmark/wds_fer2013"
    assert asked[3:] == ["refs/convert/parquet", None, False]


def test_an_empty_cache_is_refused_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    import huggingface_hub.constants

    def no(*arguments: object, **named: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "mergebound data get --hub" in refused(lambda: load_hub("owner/some-set"))


def test_only_the_wanted_parts_are_fetched() -> None:
    from fnmatch import fnmatch

    wanted = patterns(["train", "test"], "cropped_digits")
    files = {
        "cropped_digits/train-00000-of-00001.parquet": True,
        "cropped_digits/extra-00000-of-00002.parquet": False,
        "full_numbers/train-00000-of-00002.parquet": False,
        "README.md": False,
        "svhn.py": False,
    }
    assert {name: any(fnmatch(name, shape) for shape in wanted) for name in files} == files


def test_without_the_libraries_the_line_that_installs_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = refused(lambda: load_hub("owner/name"))
    assert "pip install 'mergebound[hub]'" in line


def test_a_state_that_names_other_folders_is_kept_inside(tmp_path: Path) -> None:
    made().save_to_disk(str(tmp_path / "saved"))
    state = tmp_path / "saved" / "train" / "state.json"
    record = json.loads(state.read_text())
    record["_data_files"][0]["filename"] = "/etc/passwd"
    state.write_text(json.dumps(record))
    assert str(tmp_path / "saved" / "train" / "passwd") in refused(lambda: load_hub(tmp_path / "saved"))
    shutil.rmtree(tmp_path / "saved")
