"""Archives, good and hostile: what is unpacked is what was packed, and nothing lies elsewhere or halfway."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.tasks import unpack as module
from experiments.tasks.unpack import unpack
from theory.errors import MergeboundError

RNG = np.random.default_rng([0, 0x2B])
FILES = {"set/a/1.png": RNG.bytes(3_000), "set/a/2.png": b"", "set/b/3.png": RNG.bytes(700), "list.txt": b"1\n2\n"}
TARS = ("tar", "tar.gz", "tgz", "tar.bz2", "tar.xz")


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An archive in the format that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            for name, content in files.items():
                made.writestr(name, content)
        return path
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}.get(path.suffix, "w")
    with tarfile.open(path, mode) as made:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def refused(archive: Path, folder: Path, **named: int) -> str:
    """The one line of the error; nothing may be left of the archive."""
    before = tree(folder)
    with pytest.raises(MergeboundError) as caught:
        unpack(archive, folder, **named)
    assert str(archive) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(folder) == before
    assert not [path for path in folder.rglob("*.unpacking")]
    return str(caught.value)


@pytest.mark.parametrize("ending", [*TARS, "zip"])
def test_what_is_unpacked_is_what_was_packed(tmp_path: Path, ending: str) -> None:
    out = tmp_path / "out"
    names = unpack(pack(tmp_path / f"data.{ending}", FILES), out)
    assert tree(out) == FILES
    assert names == ("list.txt", "set")


def test_archives_of_the_usual_tools(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    subprocess.run(["tar", "-czf", tmp_path / "gnu.tar.gz", "-C", source, "."], check=True)
    unpack(tmp_path / "gnu.tar.gz", tmp_path / "out")
    assert tree(tmp_path / "out") == FILES


def test_a_gz_of_one_file_loses_its_ending(tmp_path: Path) -> None:
    archive = tmp_path / "labels-idx1-ubyte.gz"
    archive.write_bytes(gzip.compress(FILES["set/a/1.png"]))
    assert unpack(archive, tmp_path / "raw") == ("labels-idx1-ubyte",)
    assert tree(tmp_path / "raw") == {"labels-idx1-ubyte": FILES["set/a/1.png"]}


def test_archives_of_one_tree_are_joined(tmp_path: Path) -> None:
    out = tmp_path / "out"
    unpack(pack(tmp_path / "one.zip", {"GTSRB/Training/0/a.ppm": b"a", "GTSRB/note": b"old"}), out)
    unpack(pack(tmp_path / "two.zip", {"GTSRB/Final_Test/b.ppm": b"b", "GTSRB/note": b"new"}), out)
    assert tree(out) == {"GTSRB/Training/0/a.ppm": b"a", "GTSRB/Final_Test/b.ppm": b"b", "GTSRB/note": b"new"}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_nothing_leaves_the_folder(tmp_path: Path, name: str, ending: str) -> None:
    line = refused(pack(tmp_path / f"bad.{ending}", {"good": b"1", name: b"evil"}), tmp_path / "out")
    assert "outside" in line
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    archive = tmp_path / "links.tar"
    with tarfile.open(archive, "w") as made:
        member = tarfile.TarInfo("passwd")
        member.type, member.linkname = kind, "/etc/passwd"
        made.addfile(member)
    assert "do not use this archive" in refused(archive, tmp_path / "out")


def test_hard_links_to_members_are_copies_of_them(tmp_path: Path) -> None:
    for name, target, good in (
        ("a.tar", "set/one", True),
        ("b.tar", "set/later", False),
        ("c.tar", "set/../../x", False),
    ):
        archive = tmp_path / name
        with tarfile.open(archive, "w") as made:
            first = tarfile.TarInfo("set/one")
            first.size = 3
            made.addfile(first, io.BytesIO(b"abc"))
            link = tarfile.TarInfo("set/two")
            link.type, link.linkname = tarfile.LNKTYPE, target
            made.addfile(link)
        if good:
            unpack(archive, tmp_path / "out")
            assert tree(tmp_path / "out") == {"set/one": b"abc", "set/two": b"abc"}
        else:
            refused(archive, tmp_path / "bad")


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "links.zip"
    with zipfile.ZipFile(archive, "w") as made:
        member = zipfile.ZipInfo("passwd")
        member.external_attr = 0o120777 << 16
        made.writestr(member, "/etc/passwd")
    assert "link" in refused(archive, tmp_path / "out")


@pytest.mark.parametrize("ending", [*TARS, "zip", "gz"])
@given(share=st.floats(0.0, 1.0, exclude_max=True))
@settings(max_examples=15)
def test_a_cut_archive_leaves_nothing(ending: str, share: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = folder / f"data.{ending}"
        whole = gzip.compress(FILES["set/a/1.png"]) if ending == "gz" else pack(archive, FILES).read_bytes()
        kept = whole.rstrip(b"\0") if ending == "tar" else whole  # a tar is padded with blocks of zeros
        archive.write_bytes(kept[: int(share * len(kept))])
        refused(archive, folder / "out")


def test_a_tar_cut_between_two_members_is_noticed(tmp_path: Path) -> None:
    archive = pack(tmp_path / "data.tar", FILES)
    archive.write_bytes(archive.read_bytes()[: 512 + 3_072])  # the first member, to its last block
    assert "mark of its end" in refused(archive, tmp_path / "out")


@pytest.mark.parametrize("ending", ["tar.gz", "zip", "gz"])
def test_a_changed_byte_is_noticed(tmp_path: Path, ending: str) -> None:
    archive = tmp_path / f"data.{ending}"
    whole = gzip.compress(FILES["set/a/1.png"]) if ending == "gz" else pack(archive, FILES).read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 3] ^= 0x10
    archive.write_bytes(bytes(broken))
    assert "damaged" in refused(archive, tmp_path / "out")


@pytest.mark.parametrize("ending", ["tar.gz", "zip", "gz"])
def test_bombs_are_not_unpacked(tmp_path: Path, ending: str) -> None:
    archive, zeros = tmp_path / f"bomb.{ending}", bytes(5_000_000)
    if ending == "gz":
        archive.write_bytes(gzip.compress(zeros))
    else:
        pack(archive, {"zeros": zeros})
    assert "attack" in refused(archive, tmp_path / "out", most=4_000_000)
    unpack(archive, tmp_path / "out")  # a gigabyte is always allowed
    assert sum(map(len, tree(tmp_path / "out").values())) == len(zeros)


def test_too_little_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE", 1 << 60)
    assert "make room" in refused(pack(tmp_path / "data.zip", FILES), tmp_path / "out")


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    for name in ("data.rar", "data.mat"):
        (tmp_path / name).write_bytes(b"Rar!")
        assert "not an archive" in refused(tmp_path / name, tmp_path)
    (tmp_path / "page.zip").write_bytes(b"<html>not found</html>")
    assert "damaged" in refused(tmp_path / "page.zip", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert "no files" in refused(tmp_path / "empty.zip", tmp_path / "out")


def test_a_killed_unpacking_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    archive = pack(tmp_path / "data.tar.gz", {f"set/{n}.bin": RNG.bytes(2_000) for n in range(1_000)})
    out = tmp_path / "out"
    child = os.fork()
    if not child:
        taken = module._Budget.take

        def take(self: object, size: int, members: int = 0) -> None:
            taken(self, size, members)  # type: ignore[arg-type]
            if self._members > 300:  # type: ignore[attr-defined]
                time.sleep(60)

        module._Budget.take = take  # type: ignore[assignment,method-assign]
        try:
            unpack(archive, out)
        finally:
            os._exit(0)
    hidden, limit = out / ".data.tar.gz.unpacking" / "set", time.monotonic() + 20
    while not (hidden / "299.bin").exists() and time.monotonic() < limit:
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert not (out / "set").exists()
    assert len(list(hidden.iterdir())) == 300
    unpack(archive, out)
    assert len(list((out / "set").iterdir())) == 1_000
    assert not hidden.exists()
