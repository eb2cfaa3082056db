"""A corpus of bad files: each is refused with the file and a remedy named, and nothing in it is executed."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from merging.checkpoint import file_hash, load_state_dict, open_checkpoint, read_metadata, save_checkpoint
from merging.errors import CheckpointError
from merging.merge import merge_state_dicts
from tests.merging import processes

State = dict[str, Tensor]
REMEDIES = (
    "copy or save it again",
    "save it again",
    "save the checkpoint again",
    "save model.state_dict()",
    "convert it",
    "check the path",
    "check permissions",
    "name a checkpoint file",
    "name files beside it only",
    "put it in the same folder",
    "name the file",
    "name the one",
    "git lfs pull",
    "check where it leads",
    "open it again",
    "copy the .index.json file too",
    "use .safetensors",
)


def content() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "b.bias": torch.randn(5, generator=generator).to(torch.bfloat16),
        "c": torch.tensor(7),
        "d": torch.tensor([True, False, True]),
        "e": torch.zeros(0, 2),
    }


def refusal(path: Path) -> str:
    """The sentence with which a checkpoint is refused, by every way to read it; inputs stay as they are."""
    before = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    message = str(caught.value)
    for mapped in (False, True):
        with pytest.raises(CheckpointError):
            read_all(path, mapped=mapped)
    assert str(path.parent) in message
    assert any(remedy in message for remedy in REMEDIES), message
    assert len(message) < 700
    assert "\n" not in message
    assert before is None or path.read_bytes() == before
    return message


def read_all(path: Path, *, mapped: bool) -> State:
    checkpoint = open_checkpoint(path, mapped=mapped)
    return {name: checkpoint[name].clone() for name in checkpoint}


def attempt(path: Path) -> State | None:
    """A checkpoint, or nothing where it is refused; any other exception is a failure."""
    try:
        state = load_state_dict(path)
        for tensor in state.values():
            tensor.reshape(-1).to(torch.float64, copy=True) if not tensor.is_complex() else tensor.clone()
        read_metadata(path)
    except CheckpointError:
        return None
    return state


def header_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


EIGHT = bytes(8)
WORD = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "the file is empty"),
    "seven bytes": (b"\x01" * 7, "ends in the header's length"),
    "huge header": (header_file(entry(), EIGHT, length=2**63), "does not fit in a file"),
    "header over the limit": (header_file(entry(), EIGHT, length=100_000_001), "does not fit"),
    "header longer than the file": (header_file(entry(), b"", length=200), "does not fit in a file"),
    "zero header": (bytes(8), "the header is not JSON"),
    "not JSON": (header_file(b"{'w': 1}"), "the header is not JSON"),
    "not UTF-8": (header_file(b'{"\xff": 1}'), "the header is not JSON"),
    "not an object": (header_file([1, 2]), "the header is not JSON"),
    "deep nesting": (header_file(b'{"a":' + b"[" * 100_000), "the header is not JSON"),
    "long number": (header_file(b'{"w":' + b"9" * 10_000 + b"}"), "the header is not JSON"),
    "name twice": (header_file(b'{"w":%s,"w":%s}' % (WORD, WORD), EIGHT), "occurs twice"),
    "shape twice": (
        header_file(b'{"w":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "occurs twice",
    ),
    "metadata not text": (header_file({"__metadata__": {"a": 1}, **entry()}, EIGHT), "metadata are not text"),
    "entry not an object": (header_file({"w": 3}), "not described by type, shape and offsets"),
    "no offsets": (header_file({"w": {"dtype": "F32", "shape": [2]}}), "not described by type, shape and offsets"),
    "something more": (header_file(entry(device="cuda"), EIGHT), "not described by type, shape and offsets"),
    "unknown type": (header_file(entry("F31"), EIGHT), "type 'F31', which is unknown"),
    "type not text": (header_file({"w": {**entry()["w"], "dtype": 32}}, EIGHT), "type '32', which is unknown"),
    "negative shape": (header_file(entry(shape=(-2,)), EIGHT), "has the shape"),
    "fractional shape": (header_file(entry(shape=(2.0,)), EIGHT), "has the shape"),
    "true as a shape": (header_file(entry(shape=(True, 2)), EIGHT), "has the shape"),
    "shape not a list": (header_file({"w": {**entry()["w"], "shape": 2}}, EIGHT), "has the shape"),
    "overflowing shape": (header_file(entry(shape=(2**62, 2**62, 4), offsets=(0, 8)), EIGHT), "has the shape"),
    "empty with overflow": (header_file(entry(shape=(0, 2**62, 2**62), offsets=(0, 0))), "has the shape"),
    "many dimensions": (header_file(entry(shape=[1] * 100, offsets=(0, 4)), bytes(4)), "has the shape"),
    "shape and offsets differ": (header_file(entry(shape=(3,)), EIGHT), "takes 12 bytes"),
    "wrong type for the size": (header_file(entry("F64"), EIGHT), "takes 16 bytes"),
    "offsets backwards": (header_file(entry(offsets=(8, 0)), EIGHT), "takes 8 bytes"),
    "negative offsets": (header_file(entry(offsets=(-8, 0)), EIGHT), "has the shape"),
    "three offsets": (header_file(entry(offsets=(0, 8, 16)), EIGHT), "has the shape"),
    "offsets beyond the file": (header_file(entry(offsets=(0, 8)), EIGHT[:4]), "the file has"),
    "gap at the start": (header_file(entry(offsets=(8, 16)), EIGHT * 2), "overlap or leave gaps"),
    "bytes left over": (header_file(entry(), EIGHT * 2), "the file has"),
    "overlap": (
        header_file({"v": entry(offsets=(0, 8))["w"], **entry(offsets=(4, 12))}, EIGHT + EIGHT[:4]),
        "overlap or leave gaps",
    ),
    "the same bytes twice": (header_file({"v": entry()["w"], **entry()}, EIGHT), "overlap or leave gaps"),
    "gap": (header_file({"v": entry()["w"], **entry(offsets=(12, 20))}, bytes(20)), "overlap or leave gaps"),
    "lone surrogate": (header_file(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT), "not text"),
    "no tensors": (header_file({}), "holds no tensors"),
    "only metadata": (header_file({"__metadata__": {}}), "holds no tensors"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>404</html>" * 9, "does not fit in a file"),
    "a pickle": (pickle.dumps({"w": [1.0]}) * 9, "does not fit in a file"),
    "a zip archive": (b"PK\x03\x04" + bytes(100), "does not fit in a file"),
    "random": (bytes(range(256)) * 4, "does not fit in a file"),
}


class TestSafetensors:
    @pytest.mark.parametrize("kind", SAFETENSORS)
    def test_refused(self, tmp_path: Path, kind: str) -> None:
        data, message = SAFETENSORS[kind]
        path = tmp_path / "m.safetensors"
        path.write_bytes(data)
        assert message in refusal(path)

    def test_truncated_anywhere(self, tmp_path: Path) -> None:
        data = save_bytes(content())
        path = tmp_path / "m.safetensors"
        for length in range(len(data)):
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=r"m\.safetensors: .*truncated or damaged, so copy or save"):
                open_checkpoint(path)
        path.write_bytes(data + b"\0")
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            open_checkpoint(path)

    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
    @settings(max_examples=50, deadline=None)
    def test_flipped_bytes(self, folder: Path, flips: list[tuple[int, int]]) -> None:
        data = bytearray(save_bytes(content(), {"mergebound": '{"method": "ties"}'}))
        for place, value in flips:
            data[place % len(data)] = value
        path = folder / "m.safetensors"
        path.write_bytes(data)
        state = attempt(path)
        if state is not None:  # then the reference implementation reads the same
            reference = load_bytes(bytes(data))
            assert state.keys() == reference.keys()
            for name, tensor in state.items():
                assert tensor.dtype == reference[name].dtype
                assert tensor.shape == reference[name].shape
                assert bits(tensor) == bits(reference[name].ne(0) if tensor.dtype == torch.bool else reference[name])

    @given(st.binary(max_size=60), st.booleans())
    @settings(max_examples=50, deadline=None)
    def test_random_bytes(self, folder: Path, data: bytes, framed: bool) -> None:
        for suffix in (".safetensors", ".pt", ".safetensors.index.json"):
            (folder / f"m{suffix}").write_bytes(header_file(data) if framed else data)
            assert attempt(folder / f"m{suffix}") is None

    def test_cut_short_while_in_use(self, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        path.write_bytes(save_bytes(content()))
        for mapped in (False, True):
            checkpoint = open_checkpoint(path, mapped=mapped)
            os.truncate(path, 200)
            with pytest.raises(CheckpointError, match="the file changed while it was in use: open it again"):
                checkpoint["a.weight"]
            path.write_bytes(save_bytes(content()))
        path.unlink()
        with pytest.raises(CheckpointError, match="there is no such file"):
            checkpoint["a.weight"]


class Command:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


class Evaluation(Command):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


class Import(Command):
    def __reduce__(self) -> Any:
        return __import__, ("pathlib.touch",)


class Restored(Command):
    """Harmless to build, harmful to restore."""

    def __reduce__(self) -> Any:
        return dict, (), None, None, iter([("k", Command(self.marker))])


def zipped(bomb: Any, path: Path) -> None:
    torch.save(bomb, path)


def old_format(bomb: Any, path: Path) -> None:
    torch.save(bomb, path, _use_new_zipfile_serialization=False)


def raw(bomb: Any, path: Path, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(bomb, protocol=protocol))


CONTAINERS: dict[str, Callable[[Any, Path], None]] = {
    "zip": zipped,
    "before 1.6": old_format,
    **{f"pickle {protocol}": partial(raw, protocol=protocol) for protocol in (0, 2, 4, 5)},
}
PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda bomb: bomb,
    "beside tensors": lambda bomb: {**content(), "x": bomb},
    "in a training checkpoint": lambda bomb: {"state_dict": content(), "optimizer": {"param_groups": [{"lr": bomb}]}},
    "in the state dict": lambda bomb: {"epoch": 3, "state_dict": {**content(), "x": bomb}},
    "as a key's value in a list": lambda bomb: [[({"k": bomb},)]],
}


class TestCode:
    @pytest.mark.parametrize("suffix", [".pt", ".bin"])
    @pytest.mark.parametrize("container", CONTAINERS)
    @pytest.mark.parametrize("place", PLACES)
    def test_never_run(self, tmp_path: Path, suffix: str, container: str, place: str) -> None:
        marker = tmp_path / "ran"
        for kind in (Command, Evaluation, Import, Restored):
            path = tmp_path / f"{kind.__name__}{suffix}"
            CONTAINERS[container](PLACES[place](kind(marker)), path)
            message = refusal(path)
            assert "refused, because it is not plain tensors" in message
            assert "never executed" in message
            assert not marker.exists()

    def test_the_bombs_are_live(self, tmp_path: Path) -> None:
        for kind in (Command, Evaluation, Restored):
            marker = tmp_path / kind.__name__
            pickle.loads(pickle.dumps(PLACES["in the state dict"](kind(marker))))
            assert marker.exists()

    def test_a_shard_with_code(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
        torch.save({"b": torch.ones(2), "x": Command(marker)}, tmp_path / "pytorch_model-00002-of-00002.bin")
        index = tmp_path / "pytorch_model.bin.index.json"
        table = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        index.write_text(json.dumps({"weight_map": table}))
        for path in (index, tmp_path):
            with pytest.raises(CheckpointError, match=r"00002-of-00002\.bin: refused, because it is not plain"):
                load_state_dict(path)
        assert not marker.exists()

    def test_a_pickle_under_a_safetensors_index(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(2)}, tmp_path / "a.bin")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text('{"weight_map": {"a": "a.bin"}}')
        assert "names 'a.bin', which is not a .safetensors file" in refusal(index)

    def test_scripted_programs(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
            archive.writestr("m/data.pkl", pickle.dumps({}))
            archive.writestr("m/constants.pkl", pickle.dumps(()))
        assert "TorchScript program, which holds code" in refusal(tmp_path / "m.pt")

    def test_the_old_tar_format(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        with tarfile.open(tmp_path / "m.pt", "w") as archive:
            for name, data in {
                "sys_info": pickle.dumps({"protocol_version": 1000, "little_endian": True, "type_sizes": {}}),
                "pickle": pickle.dumps(Command(marker)),
                "storages": pickle.dumps(0),
                "tensors": pickle.dumps(0),
            }.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        assert "refused" in refusal(tmp_path / "m.pt")
        assert not marker.exists()


def rezip(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for name in source.namelist():
            archive.writestr(name, change(name, source.read(name)))
    return target.getvalue()


def saved(state: Any, **options: Any) -> bytes:
    target = io.BytesIO()
    torch.save(state, target, **options)
    return target.getvalue()


class TestLegacy:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_truncated_anywhere(self, tmp_path: Path, zipped: bool) -> None:
        data = saved(content(), _use_new_zipfile_serialization=zipped)
        path = tmp_path / "m.pt"
        for length in {*range(0, len(data), 37), *range(len(data) - 30, len(data))}:
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match=r"m\.pt: .*(truncated|damaged).*save"):
                load_state_dict(path)
            with pytest.raises(CheckpointError, match=r"m\.pt: .*(truncated|damaged).*save"):
                open_checkpoint(path)

    @given(st.booleans(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
    @settings(max_examples=50, deadline=None)
    def test_flipped_bytes(self, folder: Path, zipped: bool, flips: list[tuple[int, int]]) -> None:
        data = bytearray(saved(content(), _use_new_zipfile_serialization=zipped))
        for place, value in flips:
            data[place % len(data)] = value
        path = folder / "m.pt"
        path.write_bytes(data)
        attempt(path)
        for mapped in (False, True):
            try:
                read_all(path, mapped=mapped)
            except CheckpointError as error:
                assert str(path) in str(error)  # noqa: PT017

    def test_a_zip_bomb(self, tmp_path: Path) -> None:
        data = saved({"w": torch.zeros(2**20)})
        path = tmp_path / "m.pt"
        path.write_bytes(rezip(data, lambda name, record: record, zipfile.ZIP_DEFLATED))
        assert path.stat().st_size < 2**14
        assert "records are compressed, which torch.save never does" in refusal(path)

    def test_overlapping_records(self, tmp_path: Path) -> None:
        """A central directory that names one stored record many times."""
        data = saved({"w": torch.zeros(1000)})
        end = data.rindex(b"PK\x05\x06")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            start = archive.start_dir
        directory = data[start:end].partition(b"PK\x06\x06")[0]
        twice = data[:start] + directory * 2
        tail = b"PK\x05\x06" + bytes(4) + (2 * directory.count(b"PK\x01\x02")).to_bytes(2, "little") * 2
        tail += (2 * len(directory)).to_bytes(4, "little") + start.to_bytes(4, "little") + bytes(2)
        path = tmp_path / "m.pt"
        path.write_bytes(twice + tail)
        assert "records overlap" in refusal(path)

    @pytest.mark.parametrize("claim", [9, 200, 10**6])
    def test_a_storage_longer_than_its_record(self, tmp_path: Path, claim: int) -> None:
        """The pickle says how long a storage is; memory beyond the record must not be read."""
        data = saved({"w": torch.arange(4.0), "v": torch.arange(1000.0)})

        def lie(name: str, record: bytes) -> bytes:
            return record.replace(b"K\x04", b"J" + claim.to_bytes(4, "little")) if name.endswith("data.pkl") else record

        path = tmp_path / "m.pt"
        path.write_bytes(rezip(data, lie))
        refusal(path)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "the file is empty"),
            (b"PK\x03\x04" + bytes(64), "truncated or damaged"),
            (b"PK\x05\x06" + bytes(18), "truncated or damaged|refused"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"<!DOCTYPE html>", "refused|damaged"),
            (saved(3), "holds a int, not a state dict"),
            (saved([torch.zeros(1)]), "holds a list, not a state dict"),
            (saved({"model": 3}), "entry 'model' is a int"),
            (saved({"state_dict": {}}), "holds no tensors"),
            (saved({"s": torch.zeros(2).to_sparse()}), "sparse_coo tensor"),
            (saved({"m": torch.zeros(2, device="meta")}), "has no values"),
        ],
    )
    def test_refused(self, tmp_path: Path, data: bytes, message: str) -> None:
        path = tmp_path / "m.pt"
        path.write_bytes(data)
        found = refusal(path)
        assert any(part in found for part in message.split("|"))

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
    def test_quantized(self, tmp_path: Path) -> None:
        torch.save({"q": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)}, tmp_path / "m.pt")
        assert "entry 'q' is a quantized tensor, not a dense tensor" in refusal(tmp_path / "m.pt")


class TestPaths:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json", ""])
    def test_missing(self, tmp_path: Path, suffix: str) -> None:
        assert "there is no such file" in refusal(tmp_path / f"m{suffix}")
        (tmp_path / f"m{suffix}").symlink_to(tmp_path / "nowhere")
        assert "this link leads to a file that does not exist" in refusal(tmp_path / f"m{suffix}")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
    def test_not_a_file(self, tmp_path: Path, suffix: str) -> None:
        (tmp_path / f"d{suffix}").mkdir()
        assert "folder without a checkpoint" in refusal(tmp_path / f"d{suffix}")
        os.mkfifo(tmp_path / f"m{suffix}")
        assert "not a regular file" in refusal(tmp_path / f"m{suffix}")

    @pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
    def test_permission(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"m{suffix}"
        path.write_bytes(b"x")
        path.chmod(0)
        assert "Permission denied" in refusal(path)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".safetensors.index.json"])
    def test_a_disk_that_fails(self, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / f"m{suffix}"
        path.write_bytes(b"x")

        def fail(*arguments: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "open", fail)
        with pytest.raises(CheckpointError, match=r"cannot be read .Input/output error.: check permissions and the"):
            load_state_dict(path)

    def test_names_that_no_file_can_have(self, tmp_path: Path) -> None:
        for name in ("m\0.safetensors", "m" * 300 + ".safetensors"):
            with pytest.raises(CheckpointError, match="check the path"):
                load_state_dict(tmp_path / name)


def index_of(table: Any, **more: Any) -> str:
    return json.dumps({"metadata": {}, "weight_map": table, **more})


INDICES: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "not a readable JSON index"),
    "not text": ("\ufffd" * 3, "not a readable JSON index"),
    "empty": ("", "not a readable JSON index"),
    "nested": ("[" * 100_000, "not a readable JSON index"),
    "a list": ("[]", "has no 'weight_map'"),
    "no table": ("{}", "has no 'weight_map'"),
    "a table of numbers": (index_of({"w": 3}), "has no 'weight_map'"),
    "a table that is a list": (index_of(["w"]), "has no 'weight_map'"),
    "an empty table": (index_of({}), "holds no tensors"),
    "a name twice": ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "occurs twice"),
    "a parent": (index_of({"w": "../m.safetensors"}), "points outside its folder"),
    "the root": (index_of({"w": "/etc/passwd"}), "points outside its folder"),
    "a subfolder": (index_of({"w": "sub/m.safetensors"}), "points outside its folder"),
    "a backslash": (index_of({"w": "..\\m.safetensors"}), "points outside its folder"),
    "the parent itself": (index_of({"w": ".."}), "points outside its folder"),
    "nothing": (index_of({"w": ""}), "points outside its folder"),
    "a zero byte": (index_of({"w": "a\0.safetensors"}), "points outside its folder"),
    "itself": (index_of({"w": "m.safetensors.index.json"}), "is not a .safetensors file"),
    "a missing shard": (index_of({"w": "absent.safetensors"}), "the shard 'absent.safetensors' is missing"),
    "a folder as a shard": (index_of({"w": "d.safetensors"}), "the shard 'd.safetensors' is missing"),
    "a missing tensor": (index_of({"x": "a.safetensors"}), "tensor 'x', which the index places in this shard"),
    "one of two missing": (index_of({"w": "a.safetensors", "x": "a.safetensors"}), "tensor 'x', which the index"),
    "a damaged shard": (index_of({"w": "a.safetensors", "v": "broken.safetensors"}), "broken.safetensors: not a"),
    "an empty shard": (index_of({"w": "a.safetensors", "v": "empty.safetensors"}), "tensor 'v', which the index"),
}


class TestIndices:
    @pytest.mark.parametrize("kind", INDICES)
    def test_refused(self, tmp_path: Path, kind: str) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        (tmp_path / "m.safetensors").write_bytes(save_bytes({"w": torch.ones(2)}))
        (folder / "a.safetensors").write_bytes(save_bytes({"w": torch.ones(2)}))
        (folder / "broken.safetensors").write_bytes(save_bytes({"v": torch.ones(2)})[:-1])
        (folder / "empty.safetensors").write_bytes(header_file({}))
        (folder / "d.safetensors").mkdir()
        text, message = INDICES[kind]
        path = folder / "m.safetensors.index.json"
        path.write_text(text)
        assert message in refusal(path)
        with pytest.raises(CheckpointError):
            file_hash(path) and load_state_dict(path)

    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
    @settings(max_examples=40, deadline=None)
    def test_flipped_bytes(self, folder: Path, flips: list[tuple[int, int]]) -> None:
        path = folder / "m.safetensors.index.json"
        if not (folder / "m-00001-of-00002.safetensors").exists():
            save_checkpoint(folder / "m.safetensors", content(), max_shard_size=60, overwrite=True)
            (folder / "original").write_bytes(path.read_bytes())
        data = bytearray((folder / "original").read_bytes())
        for place, value in flips:
            data[place % len(data)] = value
        path.write_bytes(data)
        attempt(path)


class TestValues:
    """Readable files that must not be merged."""

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
    @pytest.mark.parametrize("who", ["base", "expert1"])
    def test_not_finite(self, tmp_path: Path, bad: float, dtype: torch.dtype, who: str) -> None:
        states = {
            name: {"w": torch.ones(3, 2).to(dtype), "b": torch.ones(4)} for name in ("base", "expert0", "expert1")
        }
        broken = torch.ones(3, 2)
        broken[1, 1] = bad
        states[who]["w"] = broken.to(dtype)
        read = self.through_files(tmp_path, states)
        with pytest.raises(CheckpointError, match=rf"{who}: tensor 'w' holds 1 NaN or infinite values among 6: use a"):
            merge_state_dicts("average", read.pop("base"), read)

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.ones(2, 3), r"expert0: tensor 'w' has shape \(2, 3\) where the base has \(3, 2\): use experts"),
            (torch.ones(3, 2, 1), r"has shape \(3, 2, 1\)"),
            (torch.ones(0, 2), r"has shape \(0, 2\)"),
            (torch.ones(3, 2, dtype=torch.int32), "has type torch.int32 where the base has torch.float32: convert"),
            (torch.ones(3, 2, dtype=torch.bool), "has type torch.bool where the base has torch.float32: convert"),
            (None, "tensor 'w' of the base is missing: use experts"),
        ],
    )
    def test_does_not_fit(self, tmp_path: Path, tensor: Tensor | None, message: str) -> None:
        states = {"base": {"w": torch.ones(3, 2), "b": torch.ones(4)}, "expert0": {"b": torch.ones(4)}}
        if tensor is not None:
            states["expert0"]["w"] = tensor
        read = self.through_files(tmp_path, states)
        with pytest.raises(CheckpointError, match=message):
            merge_state_dicts("average", read.pop("base"), read)

    def through_files(self, folder: Path, states: dict[str, State]) -> dict[str, State]:
        paths = {name: save_checkpoint(folder / f"{name}.safetensors", state) for name, state in states.items()}
        hashes = {name: sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
        assert {name: file_hash(path) for name, path in paths.items()} == hashes
        return {name: load_state_dict(path) for name, path in paths.items()}


class TestFullDisk:
    @pytest.mark.parametrize(("target", "limit"), [("m.safetensors", None), ("m.safetensors", 3000), ("folder", 3000)])
    def test_a_limit_of_the_system(self, tmp_path: Path, target: str, limit: int | None) -> None:
        """No file may exceed 2,000 bytes: the kernel refuses in the middle of a write."""
        state = {f"layer{index}": torch.ones(600) for index in range(4)}
        tmp_path.joinpath("input.safetensors").write_bytes(save_bytes(state))

        def work() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            with pytest.raises(CheckpointError, match=r"writing failed .File too large.*check free space"):
                save_checkpoint(
                    tmp_path / target, open_checkpoint(tmp_path / "input.safetensors"), max_shard_size=limit
                )

        assert processes.run(work) == 0
        assert os.listdir(tmp_path) == ["input.safetensors"]
        assert tmp_path.joinpath("input.safetensors").read_bytes() == save_bytes(state)

    @pytest.mark.parametrize("after", [0, 1, 2, 4])
    def test_writes_that_fail(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        original = os.fdopen

        room = [0]

        class Disk(io.BufferedWriter):
            def write(self, data: Any) -> int:
                room[0] -= 1
                if room[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        monkeypatch.setattr(os, "fdopen", lambda fd, mode: Disk(original(fd, mode, buffering=0)))
        for target, limit in (("m.safetensors", None), ("m.safetensors", 30), ("folder", 30)):
            room[0] = after
            with pytest.raises(CheckpointError, match=r"No space left on device.*check free space"):
                save_checkpoint(tmp_path / target, content(), max_shard_size=limit)
            assert os.listdir(tmp_path) == []


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("examples")
