"""Interrupted merges in chunks: killed anywhere, they go on to the same bytes; errors leave nothing behind."""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.merge_job import Job, Resources, describe, execute, interrupted, prepare
from merging.checkpoint import open_checkpoint, save_checkpoint
from merging.config import ExpertEntry, MergeFile, build
from merging.errors import CheckpointError
from merging.file_locks import hold as hold_file
from merging.folder import SAFETENSORS_INDEX
from merging.lazy import Spec
from merging.streaming import output, plan, run, source
from merging.streaming.output import Output, OutputFile
from merging.types import StateDict
from merging.unfinished import discard, leftovers
from merging.writer import outline_of
from tests.merging import processes

NAMES = ("a", "b", "c")
TARGETS = [("m.safetensors", None), ("m.safetensors", "100KB"), ("out", "100KB")]
OLD: StateDict = {"old": torch.arange(7.0)}
_CHUNK = 1 << 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts of 65,000 entries, the second in shards, tied weights and a private head included."""
    folder = tmp_path_factory.mktemp("inputs")
    draw = torch.Generator().manual_seed(3)
    base = {f"blocks.{i}.weight": torch.randn(90, 120, generator=draw) for i in range(6)}
    base |= {"blocks.0.bias": torch.randn(7, generator=draw), "head.weight": torch.randn(3, 120, generator=draw)}
    base |= {"steps": torch.tensor(3)}
    save_checkpoint(folder / "base", base)
    for name in NAMES:
        moved = {
            n: t + 0.1 * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t for n, t in base.items()
        }
        save_checkpoint(folder / name, moved, max_shard_size="90KB" if name == "b" else None)
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK", _CHUNK)


def job_of(inputs: Path, out: Path, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "method": "ties",
        "base": inputs / "base",
        "experts": [ExpertEntry(file=inputs / name) for name in NAMES],
        "out": out,
        "copy_files_from": None,
    }
    return prepare(build(MergeFile(**(given | changes)), source=""))


def resources(**changes: Any) -> Resources:
    return Resources(**({"streamed": True, "journal_every": 3 * 4 * _CHUNK} | changes))  # type: ignore[arg-type]


def merge(job: Job, progress: Callable[[int, int], None] | None = None, **changes: Any) -> Path:
    return execute(job, describe(job), resources(**changes), progress=progress)


def begun(job: Job, **changes: Any) -> float:
    """The share that an interrupted merge had done, after this one is complete."""
    shares: list[float] = []
    merge(job, lambda done, total: shares.append(done / total), **changes)
    assert shares[-1] == 1.0
    return shares[0]


def visible(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def reference(inputs: Path, folder: Path, target: str, limit: str | None, **changes: Any) -> dict[str, bytes]:
    folder.mkdir()
    merge(job_of(inputs, folder / target, max_shard_size=limit, **changes))
    assert hidden(folder) == []
    return visible(folder)


def stop_after(number: int, act: Callable[[], None]) -> Callable[[int, int], None]:
    """A progress that acts when it is called for the ``number``-th time."""
    calls = iter(range(10**9))
    return lambda done, total: act() if next(calls) == number else None


def killed(work: Callable[[Callable[[], None]], Any]) -> None:
    """Do ``work`` in a process that kills itself when work calls what it is given."""

    def child() -> None:
        torch.set_num_threads(1)
        work(lambda: os.kill(os.getpid(), signal.SIGKILL))

    assert processes.run(child) == -signal.SIGKILL


class TestKilled:
    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    @pytest.mark.parametrize("threads", [1, 2])
    def test_at_random_moments(
        self, inputs: Path, tmp_path: Path, target: str, limit: str | None, threads: int
    ) -> None:
        expected = reference(inputs, tmp_path / "expected", target, limit, overwrite=True)
        rng = random.Random(f"{target}{limit}{threads}")
        folder = tmp_path / "o"
        folder.mkdir()
        if threads == 1:
            save_checkpoint(folder / target, OLD)
        before = visible(folder)
        job = job_of(inputs, folder / target, max_shard_size=limit, overwrite=True)
        shares = []
        for _ in range(4):  # the same merge, killed four times
            reader, ready = os.pipe()

            def work(ready: int = ready) -> None:
                torch.set_num_threads(1)

                def progress(done: int, total: int) -> None:
                    os.write(ready, done.to_bytes(8, "little"))
                    time.sleep(2e-4)

                merge(job, progress, threads=threads)

            child = processes.start(work)
            os.close(ready)
            shares.append(int.from_bytes(os.read(reader, 8), "little"))
            for _ in range(rng.randrange(16)):
                os.read(reader, 8)
            time.sleep(rng.random() * 1e-3)
            os.kill(child, signal.SIGKILL)
            assert processes.wait(child) == -signal.SIGKILL
            os.close(reader)
            assert visible(folder) == before
        assert shares == sorted(shares)  # what was done stays done
        assert begun(job, threads=threads) > 0.02
        assert visible(folder) == expected
        assert hidden(folder) == []

    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    @pytest.mark.parametrize("overwrite", [True, False])
    def test_before_any_change_of_a_file(
        self, inputs: Path, tmp_path: Path, target: str, limit: str | None, overwrite: bool
    ) -> None:
        """Killed before and within system calls: in the beginning, in between, and many of the last ones."""
        expected = reference(inputs, tmp_path / "expected", target, limit, overwrite=True)

        def calls(folder: Path, last: int | None, kill: Callable[[], None]) -> int:
            """Merge; at the last-th call, do half of it where that can be, and kill."""
            count = 0
            patch = pytest.MonkeyPatch()

            def wrap(name: str) -> None:
                real = getattr(os, name)

                def call(*arguments: Any, **keywords: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == last:
                        if name in ("pwrite", "write"):
                            real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
                        kill()
                    return real(*arguments, **keywords)

                patch.setattr(os, name, call)

            for name in ("pwrite", "write", "fdatasync", "fsync", "ftruncate", "posix_fallocate"):
                wrap(name)
            for name in ("link", "rename", "replace", "unlink", "mkdir", "rmdir"):
                wrap(name)
            try:
                merge(job_of(inputs, folder / target, max_shard_size=limit, overwrite=overwrite), journal_every=1 << 16)
            finally:
                patch.undo()
            return count

        def fresh(name: str) -> Path:
            folder = tmp_path / name
            folder.mkdir()
            if overwrite:
                save_checkpoint(folder / target, OLD)
            return folder

        total = calls(fresh("counted"), None, lambda: None)
        rng = random.Random(total)
        ending = 32 if limit else 12
        moments = sorted({rng.randrange(1, 6), *rng.sample(range(6, total - ending), 3)})
        moments += sorted(rng.sample(range(total - ending, total + 1), 8))
        resumed = 0
        for moment in moments:
            folder = fresh(str(moment))
            before = visible(folder)
            killed(lambda kill, folder=folder, moment=moment: calls(folder, moment, kill))  # type: ignore[misc]
            left = visible(folder)
            name = "m" + SAFETENSORS_INDEX if limit and target != "out" else target
            if left != before and (folder / name).exists():
                assert {n: c for n, c in left.items() if n in expected} == expected  # whole, if it can be opened
            if left != expected and not overwrite and (folder / name).exists():
                raise AssertionError("not all of it is there")
            if (folder / name).exists() and not overwrite:
                continue
            resumed += begun(job_of(inputs, folder / target, max_shard_size=limit, overwrite=overwrite)) > 0.0
            assert visible(folder) == expected
            assert hidden(folder) == []
        assert resumed >= 2


class TestBegunAnew:
    def test_after_changes(self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = tmp_path / "inputs"
        mine.mkdir()
        for name in ("base", *NAMES):
            save_checkpoint(mine / name, dict(open_checkpoint(inputs / name)))

        def other_bytes() -> None:
            path = mine / "b" / "model.safetensors"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

        changes: dict[str, tuple[dict[str, Any], Callable[[], None]]] = {
            "nothing": ({}, lambda: None),
            "settings": ({"settings": {"density": 0.3}}, lambda: None),
            "type": ({"dtype": "bfloat16"}, lambda: None),
            "shards": ({"max_shard_size": "100KB"}, lambda: None),
            "time": ({}, lambda: os.utime(mine / "a" / "model.safetensors")),
            "bytes": ({}, other_bytes),
            "chunk": ({}, lambda: monkeypatch.setattr(plan, "CHUNK", 2 * _CHUNK)),
        }
        for what, (changed, act) in changes.items():
            folder = tmp_path / what
            folder.mkdir()
            killed(lambda kill, folder=folder: merge(job_of(mine, folder / "m.safetensors"), stop_after(40, kill)))  # type: ignore[misc]
            assert len(leftovers(folder / "m.safetensors")) == 2
            act()
            job = job_of(mine, folder / "m.safetensors", **changed)
            assert len(interrupted(job)) == 2
            assert (begun(job) > 0.0) == (what == "nothing"), what
            again = folder / "again"
            limit = changed.pop("max_shard_size", None)
            assert visible(folder) == reference(mine, again, "m.safetensors", limit, **changed), what
            assert hidden(folder) == [], what  # what was left under another key is gone

    def test_asked_for(self, inputs: Path, tmp_path: Path) -> None:
        job = job_of(inputs, tmp_path / "m.safetensors")
        killed(lambda kill: merge(job, stop_after(40, kill)))
        left = hidden(tmp_path)
        assert begun(job, resume=False) == 0.0
        assert hidden(tmp_path) == left  # another merge may be using these

    def test_damaged_journals_are_not_believed(self, inputs: Path, tmp_path: Path) -> None:
        job = job_of(inputs, tmp_path / "m.safetensors")
        killed(lambda kill: merge(job, stop_after(40, kill)))
        journal, partial = leftovers(tmp_path / "m.safetensors")
        good, data = journal.read_bytes(), partial.read_bytes()
        expected = reference(inputs, tmp_path / "expected", "m.safetensors", None)["m.safetensors"]
        for content, part in [
            (b"", data),
            (b"\xff\xfe{", data),
            (b"[]\n" + good, data),
            (good.replace(b'"key": "', b'"key": "0'), data),
            (good, data[:-1]),
            (good, b"\0" * len(data)),
        ]:
            journal.write_bytes(content)
            partial.write_bytes(part)
            assert begun(job) == 0.0
            assert (tmp_path / "m.safetensors").read_bytes() == expected
            (tmp_path / "m.safetensors").unlink()
        for content in (good[:-1], good + b'{"done": 4', good + b"null\n[]\n"):  # the last entry was cut short
            journal.write_bytes(content)
            partial.write_bytes(data)
            assert begun(job) > 0.0
            assert (tmp_path / "m.safetensors").read_bytes() == expected
            (tmp_path / "m.safetensors").unlink()

    def test_files_in_their_place_are_never_written_to(self, tmp_path: Path) -> None:
        """A merge that was killed between its publication and its cleaning up has links to what is in its place."""
        outline = outline_of({"x": Spec((4,), torch.float32)}, {})
        final, partial = tmp_path / "m.safetensors", tmp_path / ".m.safetensors.0.partial"
        final.write_bytes(b"in its place")
        os.link(final, partial)
        with Output([OutputFile(partial, outline)], tmp_path / "journal", "key") as out:
            assert out.resumed == 0
            out.write("x", 0, memoryview(b"0123456789abcdef"), 0)
        assert final.read_bytes() == b"in its place"
        assert partial.read_bytes() == outline.header + b"0123456789abcdef"


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("target", ["m.safetensors", "out"])
    def test_what_is_done_is_kept_and_told(
        self, inputs: Path, tmp_path: Path, number: signal.Signals, target: str
    ) -> None:
        job = job_of(inputs, tmp_path / target)
        told = tmp_path / "told"

        def work() -> None:
            torch.set_num_threads(1)
            logging.basicConfig(filename=told, force=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            merge(job, stop_after(30, lambda: os.kill(os.getpid(), number)), journal_every=1 << 30)

        assert processes.run(work) == (1 if number == signal.SIGINT else -number)
        assert "interrupted; the same command goes on from the hidden files beside it" in told.read_text()
        told.unlink()
        assert len(hidden(tmp_path)) == 2
        assert visible(tmp_path) == {}
        assert begun(job) > 0.1  # noted when it was interrupted, long before the journal's next entry
        assert hidden(tmp_path) == []

    def test_the_selection_of_the_first_pass_ends_soon(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Threads that are ranking entries when the merge is interrupted do not go through the whole model first."""
        calls = itertools.count(1)  # several threads ask at once
        pair = source.Inputs.pair

        def slow(self: source.Inputs, *arguments: Any, **keywords: Any) -> tuple[int, int]:
            if next(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            return pair(self, *arguments, **keywords)

        monkeypatch.setattr(source.Inputs, "pair", slow)
        with pytest.raises(KeyboardInterrupt):
            merge(job_of(inputs, tmp_path / "m.safetensors"))
        assert next(calls) <= 30


class TestErrors:
    @pytest.mark.parametrize("mapped", [True, False])
    @pytest.mark.parametrize("target", ["m.safetensors", "out"])
    def test_inputs_that_change_meanwhile(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, mapped: bool
    ) -> None:
        mine = tmp_path / "inputs"
        mine.mkdir()
        (tmp_path / "o").mkdir()
        for act, message in (
            ("cut", "cut short"),
            ("touch", "changed while it was in use"),
            ("gone", "cannot be read"),
        ):
            for name in ("base", *NAMES):
                save_checkpoint(mine / name, dict(open_checkpoint(inputs / name)), overwrite=True)
            file = mine / "b" / "model.safetensors"
            job = job_of(mine, tmp_path / "o" / target, method="task_arithmetic")
            count = 0
            address: Any = source.Inputs.address

            def changing(
                self: source.Inputs,
                *arguments: Any,
                act: str = act,
                file: Path = file,
                address: Any = address,
                **keywords: Any,
            ) -> int:
                nonlocal count
                count += 1
                if count == 61 and act != "gone":  # before anything of this chunk is mapped
                    os.truncate(file, 5000) if act == "cut" else os.utime(file)
                return address(self, *arguments, **keywords)

            monkeypatch.setattr(source.Inputs, "address", changing)
            if act == "gone":
                file.unlink()
            with pytest.raises(CheckpointError, match=message) as caught:
                merge(job, mapped=mapped)
            monkeypatch.setattr(source.Inputs, "address", address)
            assert "model.safetensors" in str(caught.value)
            assert "\n" not in str(caught.value)
            assert os.listdir(tmp_path / "o") == []

    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    @pytest.mark.parametrize("reserved", [True, False])
    def test_full_disks(self, inputs: Path, tmp_path: Path, target: str, limit: str | None, reserved: bool) -> None:
        save_checkpoint(tmp_path / target, OLD)
        before = visible(tmp_path)
        job = job_of(inputs, tmp_path / target, overwrite=True, max_shard_size=limit)

        def work() -> None:
            torch.set_num_threads(1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            if not reserved:  # a disk on which space cannot be set aside fills up in the middle

                def truncate(descriptor: int, size: int) -> None:
                    """Leave the file empty."""

                output._reserve = truncate  # type: ignore[assignment]
            with pytest.raises(CheckpointError, match=r"writing failed \(File too large\), and nothing was written"):
                merge(job)

        assert processes.run(work) == 0
        assert visible(tmp_path) == before
        assert hidden(tmp_path) == []

    def test_a_disk_that_fills_up(self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for call, code in (("pwrite", errno.ENOSPC), ("fdatasync", errno.EIO), ("fsync", errno.EIO)):
            count = 0
            real = getattr(os, call)

            def failing(*arguments: Any, real: Any = real, code: int = code) -> Any:
                nonlocal count
                count += 1
                if count > 2:
                    raise OSError(code, os.strerror(code))
                return real(*arguments)

            monkeypatch.setattr(os, call, failing)
            with pytest.raises(CheckpointError, match="writing failed"):
                merge(job_of(inputs, tmp_path / "m.safetensors", max_shard_size="100KB"))
            monkeypatch.setattr(os, call, real)
            assert os.listdir(tmp_path) == []

    def test_descriptors_are_closed(self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        merge(job_of(inputs, tmp_path / "m.safetensors"))
        before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CheckpointError, match="No space left"):
            merge(job_of(inputs, tmp_path / "other.safetensors"))
        assert (len(os.listdir("/proc/self/fd")) if before else 0) == before
        assert os.listdir(tmp_path) == ["m.safetensors"]


class TestTwoAtOnce:
    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    def test_the_same_merge(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, limit: str | None
    ) -> None:
        monkeypatch.setattr("merging.unfinished._BUSY", 0.1)
        expected = reference(inputs, tmp_path / "expected", target, limit)
        folder = tmp_path / "o"
        folder.mkdir()
        reader, ready = os.pipe()
        gate, release = os.pipe()

        def wait() -> None:
            os.write(ready, b"!")
            os.read(gate, 1)

        def work() -> None:
            torch.set_num_threads(1)
            merge(job_of(inputs, folder / target, max_shard_size=limit), stop_after(20, wait))

        child = processes.start(work)
        assert os.read(reader, 1) == b"!"
        with pytest.raises(CheckpointError, match="another process is writing just this: wait until it is done"):
            merge(job_of(inputs, folder / target, max_shard_size=limit))
        os.write(release, b".")
        assert processes.wait(child) == 0
        assert visible(folder) == expected
        assert hidden(folder) == []
        for descriptor in (reader, ready, gate, release):
            os.close(descriptor)

    @pytest.mark.parametrize(("target", "limit"), TARGETS)
    def test_other_settings(self, inputs: Path, tmp_path: Path, target: str, limit: str | None) -> None:
        """The second keeps its hands off what the first is writing; both are whole, one after the other."""
        reader, ready = os.pipe()
        gate, release = os.pipe()

        def wait() -> None:
            os.write(ready, b"!")
            os.read(gate, 1)

        def work() -> None:
            torch.set_num_threads(1)
            job = job_of(inputs, tmp_path / target, max_shard_size=limit, overwrite=True)
            merge(job, stop_after(20, wait))

        child = processes.start(work)
        assert os.read(reader, 1) == b"!"
        mine = {"settings": {"density": 0.4}, "max_shard_size": limit}
        merge(job_of(inputs, tmp_path / target, **mine))
        second = visible(tmp_path)
        assert hidden(tmp_path) != []
        os.write(release, b".")
        assert processes.wait(child) == 0
        assert hidden(tmp_path) == []
        first = visible(tmp_path)
        assert first == reference(inputs, tmp_path / "first", target, limit, overwrite=True)
        for path in tmp_path.glob("first/*"):
            discard([path])
        (tmp_path / "first").rmdir()
        assert second == reference(inputs, tmp_path / "second", target, limit, settings={"density": 0.4})
        for descriptor in (reader, ready, gate, release):
            os.close(descriptor)


class TestLocks:
    def test_a_journal_that_is_removed_before_it_is_locked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, real, count = tmp_path / "journal", fcntl.flock, 0

        def removing(descriptor: int, how: int) -> None:
            nonlocal count
            count += 1
            if count <= 2:
                path.unlink()
            if count == 2:
                path.write_bytes(b"of another process")
            real(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", removing)
        held = hold_file(path, 0.0)
        assert held is not None
        assert held is not False
        assert os.path.samestat(os.fstat(held), path.stat())
        assert count == 3
        assert hold_file(path, 0.05) is False  # now it is locked
        os.close(held)

    def test_a_journal_that_is_looked_at(self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever tidies up holds other journals for a moment; that is no reason to refuse a merge."""
        monkeypatch.setattr("merging.unfinished._BUSY", 5.0)
        job = job_of(inputs, tmp_path / "m.safetensors")
        killed(lambda kill: merge(job, stop_after(40, kill)))
        journal, _ = leftovers(tmp_path / "m.safetensors")

        def hold() -> None:
            with open(journal) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.write(ready, b"!")
                time.sleep(0.1)

        reader, ready = os.pipe()
        child = processes.start(hold)
        assert os.read(reader, 1) == b"!"
        assert begun(job) > 0.0
        assert processes.wait(child) == 0
        os.close(reader)
        os.close(ready)

    def test_where_files_cannot_be_locked_nothing_is_kept(
        self, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: int) -> None:
            raise OSError(errno.ENOTSUP, "Operation not supported")

        expected = reference(inputs, tmp_path / "expected", "m.safetensors", "100KB")
        folder = tmp_path / "o"
        folder.mkdir()
        monkeypatch.setattr(fcntl, "flock", refuse)
        job = job_of(inputs, folder / "m.safetensors", max_shard_size="100KB")

        def interrupt() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge(job, stop_after(40, interrupt))
        assert hidden(folder) == []
        assert begun(job) == 0.0
        assert visible(folder) == expected
        assert hidden(folder) == []

    def test_leftovers_in_use_stay(self, inputs: Path, tmp_path: Path) -> None:
        job = job_of(inputs, tmp_path / "m.safetensors")
        killed(lambda kill: merge(job, stop_after(40, kill)))
        left = leftovers(tmp_path / "m.safetensors")
        with open(left[0]) as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            merge(job_of(inputs, tmp_path / "m.safetensors", settings={"density": 0.3}))
            assert leftovers(tmp_path / "m.safetensors") == left
        again = job_of(inputs, tmp_path / "m.safetensors", settings={"density": 0.5}, overwrite=True)
        merge(again)
        assert hidden(tmp_path) == []

    def test_leftovers_of_other_targets_stay(self, inputs: Path, tmp_path: Path) -> None:
        names = [".m.safetensors.0123456789ab.partial", ".mm.safetensors.0123456789ab.partial"]
        names += [".m-00001-of-00002.safetensors.0123456789ab.partial", ".m.0123456789ab.journal", ".m.safetensors.tmp"]
        for name in names:
            (tmp_path / name).write_bytes(b"")
        found = [path.name for path in leftovers(tmp_path / "m.safetensors")]
        assert found == sorted([names[0], names[2]])
        assert [path.name for path in leftovers(tmp_path / "m")] == [names[3]]
        merge(job_of(inputs, tmp_path / "m.safetensors"))
        assert hidden(tmp_path) == sorted([names[1], *names[3:]])


def test_resumed_merges_compute_only_what_is_missing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(inputs, tmp_path / "m.safetensors")
    killed(lambda kill: merge(job, stop_after(45, kill)))
    computed: list[int] = []
    real = run._Job.merge

    def counting(self: Any, number: int, *arguments: Any) -> Any:
        computed.append(number)
        return real(self, number, *arguments)

    monkeypatch.setattr(run._Job, "merge", counting)
    share = begun(job)
    entries = sum(spec.nbytes for spec in job.specs.values())
    tasks = sum(-(-spec.numel // _CHUNK) for spec in job.specs.values())
    assert sorted(computed) == list(range(tasks - len(computed), tasks))
    assert 0.2 < 1.0 - len(computed) / tasks < 0.8
    assert abs(share - (1.0 - len(computed) / tasks)) < 4 * 4 * _CHUNK / entries + 0.1
