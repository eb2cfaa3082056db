"""Writing: files, shards and folders that others can read, that are the same for the same content, and atomic."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merging import writer
from merging.checkpoint import load_state_dict, open_checkpoint, read_metadata, save_checkpoint, save_state_dict
from merging.errors import CheckpointError
from merging.lazy import LazyState, Spec, specs
from merging.shards import parse_size, split_shards
from tests.merging import processes

State = dict[str, Tensor]
RECORD = {"method": "ties", "parameters": {"density": 0.2}, "experts": [{"file": "a", "sha256": "0" * 64}]}


def same(one: Any, other: Any) -> bool:
    return sorted(one) == sorted(other) and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stored(path: Path) -> State | None:
    """What is readable under a final name."""
    try:
        return load_state_dict(path)
    except CheckpointError:
        return None


def failure(work: Callable[[], Any]) -> str | None:
    """The message with which something is refused."""
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


@pytest.fixture
def state(random_state: Callable[..., State]) -> State:
    return random_state(0)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def other(random_state: Callable[..., State]) -> State:
    return random_state(1)


class TestShards:
    def test_one_file_where_it_fits(self, tmp_path: Path, state: State) -> None:
        path = save_checkpoint(tmp_path / "m.safetensors", state, RECORD, max_shard_size="1MB")
        assert path == tmp_path / "m.safetensors"
        assert os.listdir(tmp_path) == ["m.safetensors"]
        assert same(load_file(path), state)
        assert read_metadata(path) == RECORD
        save_state_dict(tmp_path / "plain.safetensors", state, RECORD)
        assert path.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()

    def test_shards_follow_the_convention(self, tmp_path: Path, state: State) -> None:
        path = save_checkpoint(tmp_path / "m.safetensors", state, RECORD, max_shard_size=200)
        assert path.name == "m.safetensors.index.json"
        index = json.loads(path.read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in state.values())
        shards = sorted(set(index["weight_map"].values()))
        assert shards == [f"m-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        assert len(shards) > 1
        assert sorted(os.listdir(tmp_path)) == sorted([*shards, path.name])
        union: State = {}
        for shard in shards:
            content = load_file(tmp_path / shard)
            size = sum(t.numel() * t.element_size() for t in content.values())
            assert size <= 200 or len(content) == 1
            assert {n for n, f in index["weight_map"].items() if f == shard} == set(content)
            assert read_metadata(tmp_path / shard) == RECORD
            union |= content
        assert same(union, state)
        assert same(load_state_dict(path), state)
        assert read_metadata(path) == RECORD

    def test_as_hugging_face_splits(self, tmp_path: Path, state: State) -> None:
        hub = pytest.importorskip("huggingface_hub")
        state = {name: state[name] for name in sorted(state) if state[name].numel()}
        split = hub.split_torch_state_dict_into_shards(state, max_shard_size=160)
        path = save_checkpoint(tmp_path / "model.safetensors", state, max_shard_size=160)
        index = json.loads(path.read_text())
        assert index["weight_map"] == split.tensor_to_filename
        assert index["metadata"]["total_size"] == split.metadata["total_size"]

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            (7, 7),
            ("7", 7),
            ("5GB", 5 * 10**9),
            ("5 GiB", 5 * 2**30),
            ("1.5mb", 1_500_000),
            ("2KiB", 2048),
            ("3TB", 3 * 10**12),
        ],
    )
    def test_sizes(self, text: int | str, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", [0, -1, "0GB", "GB", "5XB", "-5GB", "", "five", "1e9", True, "0.1"])
    def test_no_sizes(self, text: Any) -> None:
        with pytest.raises(CheckpointError, match="not a positive size: write bytes, or as in 500MB or 5GB"):
            parse_size(text)

    def test_a_split_covers_and_is_greedy(self) -> None:
        sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 1, "f": 0, "g": 5}
        described = {name: Spec((size,), torch.uint8) for name, size in sizes.items()}
        assert split_shards(described, 7) == [["a", "b"], ["c"], ["d", "e", "f", "g"]]
        assert split_shards(described, None) == [list(sizes)]


class TestSameBytes:
    @pytest.mark.parametrize("target", ["m.safetensors", "folder"])
    @pytest.mark.parametrize("limit", [None, 150])
    def test_whatever_the_order(self, tmp_path: Path, state: State, target: str, limit: int | None) -> None:
        shuffled = dict(sorted(state.items(), key=lambda item: hash(item[0])))
        for folder, content in (("a", state), ("b", dict(reversed(state.items()))), ("c", shuffled)):
            (tmp_path / folder).mkdir()
            save_checkpoint(tmp_path / folder / target, content, {"y": 1, "x": 2}, max_shard_size=limit)
        assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")

    def test_lazy_and_in_memory(self, tmp_path: Path, state: State) -> None:
        fetched: list[str] = []

        def read(name: str) -> Tensor:
            fetched.append(name)
            return state[name]

        save_state_dict(tmp_path / "a.safetensors", state)
        save_checkpoint(tmp_path / "b.safetensors", LazyState(specs(state), read))
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
        assert sorted(fetched) == sorted(state)

    def test_a_copy_through_a_lazy_checkpoint(self, tmp_path: Path, state: State) -> None:
        save_state_dict(tmp_path / "a.safetensors", state, RECORD)
        for name, mapped in (("b", True), ("c", False)):
            checkpoint = open_checkpoint(tmp_path / "a.safetensors", mapped=mapped)
            save_checkpoint(tmp_path / f"{name}.safetensors", checkpoint, checkpoint.metadata)
        assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1

    def test_in_place_over_its_own_source(self, tmp_path: Path, state: State) -> None:
        path = save_checkpoint(tmp_path / "m.safetensors", state, max_shard_size=150)
        before = files(tmp_path)
        save_checkpoint(tmp_path / "m.safetensors", open_checkpoint(path), max_shard_size=150, overwrite=True)
        assert files(tmp_path) == before


class TestFolders:
    def test_a_folder(self, tmp_path: Path, state: State) -> None:
        path = save_checkpoint(tmp_path / "merged", state, RECORD)
        assert path == tmp_path / "merged"
        assert os.listdir(path) == ["model.safetensors"]
        assert same(load_state_dict(path), state)
        assert read_metadata(path) == RECORD
        assert os.listdir(tmp_path) == ["merged"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~_umask()

    def test_companions_come_along(self, tmp_path: Path, state: State) -> None:
        source = tmp_path / "base"
        save_checkpoint(source, state, max_shard_size=150)
        (source / "config.json").write_text('{"architecture": "resnet18"}')
        (source / "tokenizer.model").write_bytes(b"\x0a\x0esentencepiece")
        path = save_checkpoint(tmp_path / "merged", state, source=source, max_shard_size=300)
        assert (path / "config.json").read_text() == '{"architecture": "resnet18"}'
        assert (path / "tokenizer.model").read_bytes() == b"\x0a\x0esentencepiece"
        assert same(load_state_dict(path), state)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert {p.name for p in path.glob("*.safetensors")} == set(index["weight_map"].values())

    def test_overwriting(self, tmp_path: Path, state: State, other: State) -> None:
        target = tmp_path / "merged"
        target.mkdir()
        save_checkpoint(target, state, max_shard_size=150)  # an empty folder may be used
        with pytest.raises(CheckpointError, match=r"merged: this exists already: .*overwritten"):
            save_checkpoint(target, other)
        save_checkpoint(target, other, overwrite=True)
        assert os.listdir(target) == ["model.safetensors"]
        assert same(load_state_dict(target), other)
        assert os.listdir(tmp_path) == ["merged"]

    @pytest.mark.parametrize("kind", ["notes.md", "photos/", "link", "optimizer.pt"])
    def test_a_folder_with_other_things_is_not_replaced(self, tmp_path: Path, state: State, kind: str) -> None:
        target = save_checkpoint(tmp_path / "merged", state)
        if kind.endswith("/"):
            (target / kind).mkdir()
        elif kind == "link":
            (target / "config.json").symlink_to(tmp_path)
        else:
            (target / kind).write_text("precious")
        before = files(tmp_path)
        with pytest.raises(CheckpointError, match="holds more than a checkpoint"):
            save_checkpoint(target, state, overwrite=True)
        assert files(tmp_path) == before

    def test_a_folder_without_a_checkpoint_is_not_replaced(self, tmp_path: Path, state: State) -> None:
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="holds no checkpoint, so it is not replaced"):
            save_checkpoint(tmp_path / "merged", state, overwrite=True)


class TestOverwriting:
    LIMITS = (None, 150, 200, 151)

    @pytest.mark.parametrize("old", LIMITS)
    @pytest.mark.parametrize("new", LIMITS)
    def test_only_the_new_one_remains(
        self, tmp_path: Path, state: State, other: State, old: int | None, new: int | None
    ) -> None:
        for folder in ("fresh", "used"):
            (tmp_path / folder).mkdir()
        (tmp_path / "used" / "n-00001-of-00002.safetensors").write_text("of another checkpoint")
        before = files(tmp_path)
        first = save_checkpoint(tmp_path / "used" / "m.safetensors", state, max_shard_size=old)
        with pytest.raises(CheckpointError, match="this exists already: choose another name, or allow"):
            save_checkpoint(tmp_path / "used" / "m.safetensors", other, max_shard_size=new)
        assert same(load_state_dict(first), state)
        path = save_checkpoint(tmp_path / "used" / "m.safetensors", other, max_shard_size=new, overwrite=True)
        assert same(load_state_dict(path), other)
        save_checkpoint(tmp_path / "fresh" / "m.safetensors", other, max_shard_size=new)
        (tmp_path / "used" / "n-00001-of-00002.safetensors").rename(tmp_path / "fresh" / "n-00001-of-00002.safetensors")
        (tmp_path / "fresh" / "n-00001-of-00002.safetensors").rename(tmp_path / "n-00001-of-00002.safetensors")
        assert files(tmp_path / "used") == files(tmp_path / "fresh")
        assert set(before.values()) <= set(files(tmp_path).values())

    def test_a_stray_shard_is_in_the_way(self, tmp_path: Path, state: State) -> None:
        stray = tmp_path / "m-00002-of-00002.safetensors"
        stray.write_text("?")
        limit = sum(s.nbytes for s in specs(state).values()) * 2 // 3
        with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.safetensors: this exists already"):
            save_checkpoint(tmp_path / "m.safetensors", state, max_shard_size=limit)
        assert os.listdir(tmp_path) == [stray.name]
        path = save_checkpoint(tmp_path / "m.safetensors", state, max_shard_size=limit, overwrite=True)
        assert same(load_state_dict(path), state)

    def test_a_link_is_replaced_and_not_followed(self, tmp_path: Path, state: State, other: State) -> None:
        save_state_dict(tmp_path / "input.safetensors", state)
        (tmp_path / "m.safetensors").symlink_to("input.safetensors")
        save_checkpoint(tmp_path / "m.safetensors", other, overwrite=True)
        assert same(load_state_dict(tmp_path / "input.safetensors"), state)
        assert same(load_state_dict(tmp_path / "m.safetensors"), other)


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("m.pt", "written as .safetensors, in shards if"),
            ("m.safetensors.index.json", "written as .safetensors, in shards if"),
            ("no/m.safetensors", "does not exist: create it first"),
            ("..", "a place rather than a name"),
            ("file", "a file or a link, where a folder would be written"),
            ("d.safetensors", "this is a folder"),
        ],
    )
    def test_targets(self, tmp_path: Path, state: State, name: str, message: str) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "d.safetensors").mkdir()
        before = files(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(tmp_path / name, state, overwrite=True)
        assert files(tmp_path) == before

    @pytest.mark.parametrize(
        ("tensors", "metadata", "message"),
        [
            ({}, {}, "no tensors to write"),
            ({"c": torch.zeros(1, dtype=torch.cfloat)}, {}, "tensor 'c' has type torch.complex64.*convert it"),
            ({"__metadata__": torch.zeros(1)}, {}, "reserved by safetensors: rename"),
            ({"\ud800": torch.zeros(1)}, {}, "is not text: rename it"),
            ({"w": torch.zeros(1)}, {"path": Path(".")}, "cannot be written as JSON"),
        ],
    )
    def test_content(self, tmp_path: Path, tensors: State, metadata: Any, message: str) -> None:
        for target in ("m.safetensors", "folder"):
            with pytest.raises(CheckpointError, match=message):
                save_checkpoint(tmp_path / target, tensors, metadata)
        assert os.listdir(tmp_path) == []

    def test_a_lazy_tensor_that_is_not_as_announced(self, tmp_path: Path) -> None:
        lazy = LazyState({"w": Spec((2,), torch.float32)}, lambda name: torch.zeros(3))
        with pytest.raises(CheckpointError, match=r"tensor 'w' is \(3,\) torch.float32, announced as \(2,\)"):
            save_checkpoint(tmp_path / "m.safetensors", lazy)
        assert os.listdir(tmp_path) == []


TARGETS = [("m.safetensors", None), ("m.safetensors", 150), ("folder", None), ("folder", 150)]


def opened_name(folder: Path, target: str, limit: int | None) -> Path:
    return folder / ("m.safetensors.index.json" if limit and target != "folder" else target)


class TestFaults:
    """Every system call that writing makes fails in turn, or ends the process; the final name is never wrong."""

    CALLS = ("open", "fsync", "link", "rename", "replace", "mkdir", "unlink")

    def inject(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], Any]) -> list[str]:
        """Let system call number ``at`` act instead, once."""
        seen: list[str] = []

        def patch(name: str, original: Callable[..., Any]) -> None:
            def call(*arguments: Any, **options: Any) -> Any:
                reading = name == "open" and not arguments[1] & os.O_WRONLY
                if not reading:
                    seen.append(name)
                    if len(seen) - 1 == at:
                        act()
                return original(*arguments, **options)

            monkeypatch.setattr(os, name, call)

        for name in self.CALLS:
            patch(name, getattr(os, name))
        return seen

    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    @pytest.mark.parametrize("old", [False, True])
    def test_an_error(
        self, tmp_path: Path, state: State, other: State, target: str, limit: int | None, old: bool
    ) -> None:
        failures = 0
        for at in range(100):
            folder = tmp_path / str(at)
            folder.mkdir()
            if old:
                save_checkpoint(folder / target, state, max_shard_size=limit)
            before = files(folder)

            def full() -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with pytest.MonkeyPatch.context() as patch:
                seen = self.inject(patch, at, full)
                path = folder / target
                message = failure(partial(save_checkpoint, path, other, max_shard_size=limit, overwrite=old))
            assert message is None or "No space left on device" in message
            complete = message is None or "this was written, but" in message
            readable = stored(opened_name(folder, target, limit))
            if len(seen) <= at:
                assert complete
                break
            failures += 1
            if complete:
                assert readable is not None
                assert same(readable, other)
            elif readable is not None and not same(readable, other):
                assert same(readable, state)
                assert files(folder) == before
            elif readable is None:
                assert not old
                assert files(folder) == {}
        assert failures >= 3

    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    @pytest.mark.parametrize("new", ["the same shards", "other shards"])
    def test_a_death(
        self, tmp_path: Path, state: State, other: State, target: str, limit: int | None, new: str
    ) -> None:
        size = limit if new == "the same shards" or limit is None else 400
        outcomes = set()
        for at in range(100):
            folder = tmp_path / str(at)
            folder.mkdir()
            save_checkpoint(folder / target, state, max_shard_size=limit)

            def work(at: int = at, folder: Path = folder) -> None:
                self.inject(pytest.MonkeyPatch(), at, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save_checkpoint(folder / target, other, max_shard_size=size, overwrite=True)

            status = processes.run(work)
            found = [stored(opened_name(folder, target, kind)) for kind in {limit, size}]
            for readable in found:
                if readable is None:
                    outcomes.add("none")
                else:
                    assert same(readable, state) or same(readable, other)
                    outcomes.add("old" if same(readable, state) else "new")
            visible = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
            assert all(n.startswith(("m.safetensors", "m-", "folder")) for n in visible)
            if status == 0:
                assert not any(p.name.startswith(".") for p in folder.iterdir())
                break
            assert status == -signal.SIGKILL
        assert {"old", "new"} <= outcomes


class Slow:
    """A state dict that stops at its second tensor, after saying so."""

    def __init__(self, state: State, act: Callable[[], None]) -> None:
        self.state, self.act, self.count = state, act, 0

    def lazy(self) -> LazyState:
        return LazyState(specs(self.state), self.read)

    def read(self, name: str) -> Tensor:
        self.count += 1
        if self.count == 2:
            self.act()
        return self.state[name]


class TestInterrupted:
    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_signals(
        self, tmp_path: Path, state: State, other: State, target: str, limit: int | None, number: signal.Signals
    ) -> None:
        save_checkpoint(tmp_path / target, state, max_shard_size=limit)
        before = files(tmp_path)
        reader, ready = os.pipe()

        def announce() -> None:
            os.write(ready, b"!")
            signal.pause() if number == signal.SIGKILL else threading.Event().wait(20)

        def work() -> None:
            save_checkpoint(tmp_path / target, Slow(other, announce).lazy(), max_shard_size=limit, overwrite=True)

        child = processes.start(work)
        assert os.read(reader, 1) == b"!"
        os.kill(child, number)
        assert processes.wait(child) == -number
        os.close(reader)
        os.close(ready)
        left = files(tmp_path)
        assert {n: c for n, c in left.items() if not n.startswith(".")} == before
        assert any(n.startswith(".") for n in left) == (number == signal.SIGKILL)

    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
    def test_exceptions(
        self, tmp_path: Path, state: State, target: str, limit: int | None, error: type[BaseException]
    ) -> None:
        def interrupt() -> None:
            raise error

        with pytest.raises(error):
            save_checkpoint(tmp_path / target, Slow(state, interrupt).lazy(), max_shard_size=limit)
        assert os.listdir(tmp_path) == []

    def test_a_handler_of_ones_own_is_left_alone(self, tmp_path: Path, state: State) -> None:
        calls: list[int] = []
        previous = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
        try:
            interrupt = Slow(state, lambda: os.kill(os.getpid(), signal.SIGTERM))
            save_checkpoint(tmp_path / "m.safetensors", interrupt.lazy())
            assert calls == [signal.SIGTERM]
            assert same(load_state_dict(tmp_path / "m.safetensors"), state)
        finally:
            signal.signal(signal.SIGTERM, previous)

    def test_the_default_handler_is_restored(self, tmp_path: Path, state: State) -> None:
        previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            with writer.atomic_file(tmp_path / "f") as handle:
                assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
                handle.write(b"x")
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        finally:
            signal.signal(signal.SIGTERM, previous)

    def test_in_another_thread(self, tmp_path: Path, state: State) -> None:
        thread = threading.Thread(target=save_checkpoint, args=(tmp_path / "m.safetensors", state))
        thread.start()
        thread.join()
        assert same(load_state_dict(tmp_path / "m.safetensors"), state)


class TestTwoAtOnce:
    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    def test_one_wins_whole(self, tmp_path: Path, state: State, other: State, target: str, limit: int | None) -> None:
        overwritten = tmp_path / "overwritten"
        overwritten.mkdir()
        for attempt in range(4):
            folder = tmp_path / str(attempt)
            folder.mkdir()

            def fresh(content: State, folder: Path = folder) -> None:
                save_checkpoint(folder / target, content, max_shard_size=limit)

            def over(content: State) -> None:
                save_checkpoint(overwritten / target, content, max_shard_size=limit, overwrite=True)

            children = [processes.start(lambda c=c: fresh(c)) for c in (state, other)]  # type: ignore[misc]
            assert sorted(processes.wait(child) for child in children) == [0, 1]
            found = load_state_dict(opened_name(folder, target, limit))
            assert same(found, state) or same(found, other)
            children = [processes.start(lambda c=c: over(c)) for c in (state, other)]  # type: ignore[misc]
            assert [processes.wait(child) for child in children] == [0, 0]
            found = load_state_dict(opened_name(overwritten, target, limit))
            assert same(found, state) or same(found, other)
            assert not any(p.name.startswith(".") for p in (*folder.iterdir(), *overwritten.iterdir()))

    def test_the_second_waits_while_the_first_renames(self, tmp_path: Path, state: State, other: State) -> None:
        reader, ready = os.pipe()
        gate, release = os.pipe()
        link = os.link

        def pausing(*arguments: Any) -> None:
            link(*arguments)
            os.write(ready, b"!")
            os.read(gate, 1)

        def save(content: State) -> None:
            save_checkpoint(tmp_path / "m.safetensors", content, max_shard_size=150, overwrite=True)

        def first() -> None:
            pytest.MonkeyPatch().setattr(os, "link", pausing)
            save(state)

        one = processes.start(first)
        assert os.read(reader, 1) == b"!"  # one shard is in place, the others are not
        two = processes.start(lambda: save(other))
        time.sleep(0.2)
        assert os.waitpid(two, os.WNOHANG) == (0, 0)
        os.write(release, b"." * 100)
        assert (processes.wait(one), processes.wait(two)) == (0, 0)
        assert same(load_state_dict(tmp_path / "m.safetensors.index.json"), other)
        for descriptor in (reader, ready, gate, release):
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
