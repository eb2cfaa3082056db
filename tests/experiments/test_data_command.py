"""``mergebound data``: listing, getting and checking tiny data sets in their real formats, from local files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import tasks
from experiments.cli import main
from experiments.tasks import catalogue
from experiments.tasks.getting import find_root, get, standing
from experiments.tasks.hub_names import HUB
from experiments.tasks.unpack import kind
from experiments.tasks.vision_data import Archive, VisionData
from tests.experiments import vision_trees
from tests.experiments.file_servers import Answer, serving
from theory.errors import MergeboundError

Capture = pytest.CaptureFixture[str]
Shop = Callable[[str], VisionData]


@pytest.fixture(autouse=True)
def _no_folder_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MERGEBOUND_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def run(*arguments: str) -> int:
    try:
        main(["data", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def archive(path: Path, into: str = "", **other: Any) -> Archive:
    """The catalogue's entry of a file on this machine."""
    content = path.read_bytes()
    return Archive(path.as_uri(), into, md5=hashlib.md5(content).hexdigest(), size=len(content), **other)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VisionData, VisionData]:
    """A catalogue of two tiny data sets, MNIST as four .gz files and EuroSAT as a .zip, which lie in ``shop``."""
    made = tmp_path / "made"
    rng = np.random.default_rng([0, 0x5409])
    vision_trees.mnist(made, rng)
    vision_trees.eurosat(made, rng)
    goods = tmp_path / "shop"
    goods.mkdir()
    packed = []
    for path in sorted((made / "MNIST" / "raw").iterdir()):
        content = path.read_bytes() if path.suffix == ".gz" else gzip.compress(path.read_bytes())
        place = goods / f"{path.name.removesuffix('.gz')}.gz"
        place.write_bytes(content)
        packed.append(archive(place, "MNIST/raw"))
    mnist = replace(catalogue.find("mnist"), archives=tuple(packed))
    real = catalogue.find("eurosat")
    shutil.make_archive(str(goods / "EuroSAT"), "zip", made / "eurosat", "2750")
    eurosat = replace(real, archives=(replace(archive(goods / "EuroSAT.zip"), into=real.archives[0].into),))
    entries = tuple({"mnist": mnist, "eurosat": eurosat}.get(each.name, each) for each in catalogue.vision())
    monkeypatch.setattr(catalogue, "vision", lambda count=20: entries[:count])
    return mnist, eurosat


def test_the_list_has_all_sizes_and_licences_and_touches_nothing(tmp_path: Path, capsys: Capture) -> None:
    assert run("list", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == [entry.name for entry in catalogue.vision()]
    for record, entry in zip(records, catalogue.vision(), strict=True):
        assert record["licence"] == entry.licence
        assert record["bytes"] == entry.size
        assert "on_disk" not in record
    assert run("list", "--benchmark", "8") == 0
    table = capsys.readouterr().out
    assert all(entry.name in table for entry in catalogue.vision(8))
    assert "flowers102" not in table
    assert "39.1 GB" in table
    assert "by hand" in table
    assert list(tmp_path.iterdir()) == []


def test_names_are_shown_with_all_that_is_known(capsys: Capture) -> None:
    assert run("list", "Cars", "fashion-MNIST") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "stanford_cars" in shown
    assert "cars_test_annos_withlabels.mat" in shown
    assert "Ankle boot" in shown
    assert "sun397" not in shown


def test_the_list_says_what_lies_on_disk(shop: Any, tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "root"
    vision_trees.mnist(root, np.random.default_rng(0))
    assert run("list", "mnist", "svhn", "--root", str(root), "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["on_disk"]["complete"] for record in records] == [True, False]
    next((root / "MNIST" / "raw").glob("t10k*")).unlink()
    assert run("list", "mnist", "svhn", "--root", str(root)) == 0
    shown = capsys.readouterr().out
    assert "partly" in shown


def test_getting_lists_first_and_asks(shop: Any, tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "root"
    assert run("get", "mnist", "eurosat", "--root", str(root)) == 2
    shown = capsys.readouterr()
    assert "EuroSAT" not in shown.err
    assert "eurosat" in shown.out
    assert "MIT" in shown.out
    assert "--yes" in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not root.exists()


@pytest.mark.parametrize(("answer", "code"), [(True, 0), (False, 1)])
def test_the_answer_counts(shop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bool, code: int) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("typer.confirm", lambda question: answer)
    assert run("get", "mnist", "--root", str(tmp_path / "root")) == code
    assert (tmp_path / "root").exists() == answer


def test_what_is_got_loads_and_checks(
    shop: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("MERGEBOUND_DATA", str(root))
    assert run("get", "mnist", "eurosat", "--yes") == 0
    made = tasks.load("mnist", tmp_path / "made")
    got = tasks.load("mnist", root)
    for part in ("train", "test"):
        assert [got.parts[part].read(row).tolist() for row in range(3)] == [
            made.parts[part].read(row).tolist() for row in range(3)
        ]
    import torchvision

    theirs = torchvision.datasets.MNIST(str(root), train=False, download=False)
    assert np.array_equal(np.asarray(theirs[0][0])[..., None], got.parts["test"].read(0))
    folder = torchvision.datasets.EuroSAT(str(root), download=False)
    labels = sorted(label for path, label in folder.samples if not Path(path).name.startswith("._"))
    assert labels == tasks.load("eurosat", root).parts["train"].labels.tolist()
    assert not list(root.rglob("*.zip"))
    assert not [path for path in (root / ".mergebound").rglob("*.gz")]
    capsys.readouterr()
    assert run("check", "mnist", "eurosat", "--json", "--seed", "3") == 0
    records = json.loads(capsys.readouterr().out)
    assert records[0]["digest"] == tasks.task("mnist", root, seed=3).digest
    assert records[0]["parts"]["test"] == {"images": 3, "read": 3, "sizes": "28x28x1"}
    assert records[0]["class_counts"]["3"] == 3
    assert any("60000" in message for _, message in records[0]["findings"])
    assert records[1]["classes"] == 10
    assert run("get", "mnist", "--yes") == 0
    assert "is in" in capsys.readouterr().out


def test_archives_are_kept_if_asked(shop: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert run("get", "eurosat", "--root", str(root), "--yes", "--keep-archives") == 0
    assert (root / ".mergebound" / "eurosat" / "EuroSAT.zip").is_file()


def test_a_failure_in_between_keeps_what_came(shop: Any, tmp_path: Path, capsys: Capture) -> None:
    mnist, _ = shop
    root = tmp_path / "root"
    lost = Path(mnist.archives[2].url.removeprefix("file://"))
    content = lost.read_bytes()
    lost.unlink()
    assert run("get", "mnist", "eurosat", "--root", str(root), "--yes") == 2
    shown = capsys.readouterr()
    assert lost.name in shown.err
    assert len(shown.err.splitlines()) == 1
    assert "eurosat: is in" in shown.out  # the next one is got all the same
    found = standing(mnist, root)
    assert found.begun
    assert [each.filename for each in found.wanted] == [each.filename for each in mnist.archives[2:]]
    for each in mnist.archives[:2]:  # what has come is not wanted again
        Path(each.url.removeprefix("file://")).unlink()
    lost.write_bytes(content)
    assert run("get", "mnist", "--root", str(root), "--yes") == 0
    assert len(tasks.load("mnist", root).parts["test"]) == 3


def test_a_wrong_checksum_places_nothing(shop: Any, tmp_path: Path, capsys: Capture) -> None:
    _, eurosat = shop
    path = Path(eurosat.archives[0].url.removeprefix("file://"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert run("get", "eurosat", "--root", str(tmp_path / "root"), "--yes") == 2
    assert eurosat.archives[0].md5 in capsys.readouterr().err
    assert not [each for each in (tmp_path / "root").rglob("*") if each.is_file() and each.suffix != ".lock"]


def test_an_interrupted_unpacking_is_done_again(shop: Any, tmp_path: Path) -> None:
    _, eurosat = shop
    root = tmp_path / "root"
    get(eurosat, root)
    folder = next(path for path in root.rglob("2750"))
    gone = sorted(folder.iterdir())[0]
    shutil.rmtree(gone)
    note = root / ".mergebound" / "eurosat" / "EuroSAT.zip.done.json"
    note.write_text('{"state": "unpacking"}')
    found = standing(eurosat, root)
    assert not found.complete
    assert found.halves == ("EuroSAT.zip",)
    get(eurosat, root)
    assert gone.is_dir()
    assert standing(eurosat, root).complete


def test_an_archive_that_lies_where_torchvision_puts_it_is_used(shop: Any, tmp_path: Path) -> None:
    _, eurosat = shop
    root = tmp_path / "root"
    source = Path(eurosat.archives[0].url.removeprefix("file://"))
    place = root / eurosat.archives[0].into / "EuroSAT.zip"
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, place)
    get(eurosat, root)
    assert place.is_file()
    assert standing(eurosat, root).complete


def test_an_interrupted_download_counts_as_there(shop: Any, tmp_path: Path) -> None:
    _, eurosat = shop
    content = Path(eurosat.archives[0].url.removeprefix("file://")).read_bytes()
    with serving(Answer(content, cut=100, etag='"a"'), Answer(status=404)) as server:
        entry = replace(eurosat, archives=(replace(eurosat.archives[0], url=server.url, name="EuroSAT.zip"),))
        with pytest.raises(MergeboundError, match="kept"):
            get(entry, tmp_path / "root")
    assert standing(entry, tmp_path / "root").to_download == len(content) - 100


def test_what_must_be_placed_by_hand_is_explained(shop: Any, tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "root"
    assert run("get", "stanford_cars", "mnist", "--root", str(root), "--yes") == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "place it by hand" in shown
    assert "cars_train" in shown
    assert standing(shop[0], root).complete


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("get", "mnist"), ["--root", "MERGEBOUND_DATA"]),
        (("get",), ["--benchmark"]),
        (("get", "mnits", "--root", "."), ["mnits", "mnist"]),
        (("get", "mnist", "--benchmark", "8"), ["not both"]),
        (("list", "--benchmark", "9"), ["9", "8, 14, 20, npz8"]),
        (("get", "--benchmark", "npz8", "--root", "."), ["npz8"]),
        (("check", "mnist", "--root", "nowhere"), ["nowhere"]),
        (("check", "mine.npz"), ["mine.npz"]),
        (("split", "mnist", "--root", "."), ["MNIST", "mergebound data get mnist"]),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], words: list[str], capsys: Capture, tmp_path: Path) -> None:
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("error: ")
    assert all(word in shown.err for word in words), shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_data_set_does_not_hide_the_others(tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    vision_trees.mnist(tmp_path, rng)
    vision_trees.svhn(tmp_path, rng)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:200])
    assert run("check", "svhn", "mnist", "--root", str(tmp_path)) == 2
    shown = capsys.readouterr()
    assert "train_32x32.mat" in shown.err
    assert tasks.task("mnist", tmp_path).digest[:16] in shown.out


def test_own_files_are_checked_by_path_and_split_by_seed(tmp_path: Path, capsys: Capture) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (40, 6, 5), dtype=np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, class_names=np.array(list("abcd")))
    assert run("check", "own.npz", "--json") == 0
    record = json.loads(capsys.readouterr().out)[0]
    assert record["parts"]["train"]["sizes"] == "6x5x1"
    digests = []
    for seed in ("0", "1"):
        assert run("split", "own.npz", "--seed", seed, "--validation", "8", "--json") == 0
        split = json.loads(capsys.readouterr().out)[0]
        assert (split["train"], split["validation"], split["test"]) == (24, 8, 8)
        digests.append(split["digest"])
    assert digests[0] != digests[1]
    assert run("split", "own.npz", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["digest"] == record["digest"]


def test_one_of_npz8_is_checked_by_the_name_that_finetune_takes(tmp_path: Path, capsys: Capture) -> None:
    assert run("check", "npz8:mnis", "--root", str(tmp_path)) == 2
    assert "did you mean 'mnist'" in capsys.readouterr().err
    assert run("check", "npz8:mnist", "--root", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "mnist.npz") in said
    assert run("check", "digits8:rotate90") == 2
    assert "made in memory" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(shop: Any, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.tasks.getting.download", stopped)
    assert run("get", "mnist", "--root", str(tmp_path / "root"), "--yes") == 130
    assert "run the same command again" in capsys.readouterr().err


def test_the_root_is_the_option_then_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MERGEBOUND_DATA", "/there")
    assert find_root(None) == Path("/there")
    assert find_root(tmp_path) == tmp_path


def test_the_catalogue_can_be_got() -> None:
    assert list(HUB) == [entry.name for entry in catalogue.vision()]
    for entry in catalogue.vision():
        names = [each.filename for each in entry.archives]
        assert len(set(names)) == len(names), entry.name
        for each in entry.archives:
            assert each.filename == Path(each.filename).name, entry.name
            assert not Path(each.into).is_absolute(), entry.name
            assert ".." not in Path(each.into).parts, entry.name
            assert kind(each.filename) is not None or Path(each.filename).suffix not in (".rar", ".7z"), entry.name
            for url in (each.url, *each.mirrors):
                assert url.startswith(("https://", "http://")), url
                assert url.startswith("https://") or each.md5 or each.sha256, url
