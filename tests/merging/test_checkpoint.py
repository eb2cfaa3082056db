"""Reading and writing: formats, hostile and damaged files, atomic writes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merging.checkpoint import file_hash, load_state_dict, read_metadata, save_state_dict
from merging.errors import CheckpointError

State = dict[str, Tensor]


def same(one: State, other: State) -> bool:
    return list(sorted(one)) == sorted(other) and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one
    )


@pytest.fixture
def state(random_state: Callable[..., State]) -> State:
    return random_state(0)


def write_shards(folder: Path, state: State) -> Path:
    names = sorted(state)
    shards = {"part-1.safetensors": names[:3], "part-2.safetensors": names[3:]}
    for file, members in shards.items():
        save_file({n: state[n] for n in members}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {n: f for f, m in shards.items() for n in m}}))
    return index


class TestFormats:
    def test_safetensors(self, tmp_path: Path, state: State) -> None:
        save_file(state, tmp_path / "m.safetensors")
        assert same(load_state_dict(tmp_path / "m.safetensors"), state)
        assert list(load_state_dict(tmp_path / "m.safetensors", ["scale"])) == ["scale"]
        with pytest.raises(CheckpointError, match="tensor 'absent' is missing"):
            load_state_dict(tmp_path / "m.safetensors", ["absent"])

    def test_shards(self, tmp_path: Path, state: State) -> None:
        index = write_shards(tmp_path, state)
        assert same(load_state_dict(index), state)
        assert list(load_state_dict(index, ["stem.weight", "block.bias"])) == ["stem.weight", "block.bias"]
        before = file_hash(index)
        save_file({n: state[n] + 1 for n in sorted(state)[:3]}, tmp_path / "part-1.safetensors")
        assert file_hash(index) != before

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
    @pytest.mark.parametrize("nest", [None, "state_dict", "model"])
    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_legacy(self, tmp_path: Path, state: State, suffix: str, nest: str | None, prefix: str) -> None:
        content: Any = {prefix + name: tensor for name, tensor in state.items()}
        if nest:
            content = {nest: content, "epoch": 3}
        torch.save(content, tmp_path / f"m{suffix}")
        assert same(load_state_dict(tmp_path / f"m{suffix}"), state)

    def test_legacy_parameters_and_old_container(self, tmp_path: Path) -> None:
        layer = torch.nn.Linear(2, 2)
        torch.save(dict(layer.named_parameters()), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
        loaded = load_state_dict(tmp_path / "m.pt")
        assert not loaded["weight"].requires_grad
        assert torch.equal(loaded["weight"], layer.weight)

    @pytest.mark.parametrize(
        "dtype",
        [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint16, torch.bool],
    )
    def test_what_we_write_others_read(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensor = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0]]).to(dtype)
        content = {"t": tensor, "view": tensor.t(), "scalar": torch.tensor(1).to(dtype), "empty": tensor[:0]}
        save_state_dict(tmp_path / "m.safetensors", content | {"f": torch.ones(3)})
        loaded = load_file(tmp_path / "m.safetensors")
        for name, expected in content.items():
            assert loaded[name].shape == expected.shape
            assert loaded[name].dtype == dtype
            assert torch.equal(loaded[name].float(), expected.float())

    def test_metadata(self, tmp_path: Path, state: State) -> None:
        save_state_dict(tmp_path / "m.safetensors", state, {"method": "ties", "parameters": {"density": 0.2}})
        assert read_metadata(tmp_path / "m.safetensors") == {"method": "ties", "parameters": {"density": 0.2}}
        save_file(state, tmp_path / "other.safetensors")
        assert read_metadata(tmp_path / "other.safetensors") == {}

    def test_same_content_same_bytes(self, tmp_path: Path, state: State) -> None:
        save_state_dict(tmp_path / "a.safetensors", state, {"x": 1})
        save_state_dict(tmp_path / "b.safetensors", dict(reversed(state.items())), {"x": 1})
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
        assert file_hash(tmp_path / "a.safetensors") == file_hash(tmp_path / "b.safetensors")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class TestHostileAndDamaged:
    @pytest.mark.parametrize("wrap", ["bare", "entry", "nested", "plain pickle", "old container"])
    def test_code_is_never_run(self, tmp_path: Path, state: State, wrap: str) -> None:
        marker, file = tmp_path / "ran", tmp_path / "m.pt"
        bomb = Bomb(marker)
        if wrap == "plain pickle":
            file.write_bytes(pickle.dumps({"w": bomb}))
        else:
            content: Any = {"bare": bomb, "entry": state | {"x": bomb}, "nested": {"state_dict": state, "o": bomb}}
            torch.save(content.get(wrap, bomb), file, _use_new_zipfile_serialization=wrap != "old container")
        with pytest.raises(CheckpointError, match=r"m\.pt: refused, because it is not plain tensors"):
            load_state_dict(file)
        assert not marker.exists()

    def test_whole_models_are_refused(self, tmp_path: Path) -> None:
        torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
        with pytest.raises(CheckpointError, match=r"refused.*save model.state_dict\(\)"):
            load_state_dict(tmp_path / "m.pt")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
    def test_truncated(self, tmp_path: Path, state: State, suffix: str, share: float) -> None:
        file = tmp_path / f"m{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(state, file)
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match=rf"m\{suffix}: .*(truncated|damaged)"):
            load_state_dict(file)

    def test_corrupted_header(self, tmp_path: Path, state: State) -> None:
        file = tmp_path / "m.safetensors"
        save_file(state, file)
        content = bytearray(file.read_bytes())
        content[0:8] = (2**60).to_bytes(8, "little")
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_state_dict(file)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.zeros(2), "holds a Tensor, not a state dict"),
            ({"epoch": 3, "w": torch.zeros(2)}, "entry 'epoch' is a int"),
            ({"w": torch.zeros(2).to_sparse()}, "entry 'w' is a torch.sparse_coo tensor"),
            ({}, "holds no tensors"),
            ({3: torch.zeros(2)}, "entry '3' is a"),
        ],
    )
    def test_not_a_state_dict(self, tmp_path: Path, content: Any, message: str) -> None:
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(CheckpointError, match=message):
            load_state_dict(tmp_path / "m.pt")

    def test_paths(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"absent\.safetensors: there is no such file"):
            load_state_dict(tmp_path / "absent.safetensors")
        with pytest.raises(CheckpointError, match="this is a folder"):
            load_state_dict(tmp_path)
        (tmp_path / "m.h5").touch()
        with pytest.raises(CheckpointError, match=r"the suffix '\.h5' is not a known checkpoint format"):
            load_state_dict(tmp_path / "m.h5")

    def test_shards(self, tmp_path: Path, state: State) -> None:
        index = write_shards(tmp_path, state)
        (tmp_path / "part-2.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"the shard 'part-2\.safetensors' is missing"):
            load_state_dict(index)
        save_file({"other": torch.zeros(1)}, tmp_path / "part-2.safetensors")
        with pytest.raises(CheckpointError, match="the index places in this shard, is missing"):
            load_state_dict(index)
        for text, message in [
            ("{", "not a readable JSON index"),
            ("[]", "no 'weight_map'"),
            ('{"weight_map": {"w": "../../etc/passwd"}}', "points outside its folder"),
            ('{"weight_map": {}}', "holds no tensors"),
        ]:
            index.write_text(text)
            with pytest.raises(CheckpointError, match=message):
                load_state_dict(index)


class TestAtomicWriting:
    def test_a_full_disk_leaves_the_old_file(
        self, tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "m.safetensors"
        save_state_dict(file, state)
        before = file.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_state_dict(file, {n: t + 1 for n, t in state.items()})
        assert file.read_bytes() == before
        assert os.listdir(tmp_path) == ["m.safetensors"]

    def test_a_tensor_that_cannot_be_stored(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="safetensors cannot store"):
            save_state_dict(tmp_path / "m.safetensors", {"w": torch.zeros(1), "c": torch.zeros(1, dtype=torch.cfloat)})
        assert os.listdir(tmp_path) == []

    def test_targets(self, tmp_path: Path, state: State) -> None:
        with pytest.raises(CheckpointError, match=r"written as \.safetensors only"):
            save_state_dict(tmp_path / "m.pt", state)
        with pytest.raises(CheckpointError, match="does not exist: create it first"):
            save_state_dict(tmp_path / "no" / "m.safetensors", state)
        (tmp_path / "d.safetensors").mkdir()
        with pytest.raises(CheckpointError, match="this is a folder"):
            save_state_dict(tmp_path / "d.safetensors", state)

    def test_killed_in_the_middle(self, tmp_path: Path) -> None:
        program = (
            "import os, signal, sys, torch\n"
            "from pathlib import Path\n"
            "from merging import writer\n"
            "with writer.atomic_file(Path(sys.argv[1])) as handle:\n"
            "    handle.write(b'half'); handle.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        file = tmp_path / "m.safetensors"
        result = subprocess.run([sys.executable, "-c", program, str(file)], check=False)
        assert result.returncode == -signal.SIGKILL
        assert not file.exists()
