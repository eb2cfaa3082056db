"""``mergebound merge`` in chunks: plans, limits, speed, hashes, memory and interruptions as a user meets them."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import merge_job
from experiments.cli import main
from experiments.merge_job import Resources, describe, execute, outline, prepare, route
from merging.checkpoint import file_hash, read_metadata, save_checkpoint
from merging.config import ExpertEntry, MergeFile, build
from merging.errors import MethodError
from merging.fingerprint import quick_hash
from merging.streaming import plan
from tests.merging import processes

EXPERTS = ("e1", "e2", "e3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "CHUNK", 1 << 10)
    draw = torch.Generator().manual_seed(0)
    for name in ("base", *EXPERTS):
        state = {f"blocks.{i}.weight": torch.randn(60, 90, generator=draw) for i in range(4)}
        save_file(state | {"head.weight": torch.randn(2, 9, generator=draw)}, f"{name}.safetensors")
    return tmp_path


def run(*arguments: str) -> int:
    experts = [f"{name}.safetensors" for name in EXPERTS]
    try:
        main(["merge", "--base", "base.safetensors", *experts, "--method", "ties", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_in_chunks_or_not_the_bits_are_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", "plain.safetensors") == 0
    for out, options in (("one", ["--threads", "1"]), ("two", ["--threads", "2", "--no-map", "--no-resume"])):
        assert run("--out", f"{out}.safetensors", "--max-memory", "40MB", *options) == 0
        assert (folder / f"{out}.safetensors").read_bytes() == (folder / "plain.safetensors").read_bytes()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("written: ")]
    assert len(lines) == 3
    for line, out in zip(lines, ("plain", "one", "two"), strict=True):
        assert re.fullmatch(rf"written: {out}\.safetensors \(\d+\.\d\d s, \d+\.\d\d GB/s\)", line), line


def test_the_plan_of_a_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(folder))
    options = ["--out", "o.safetensors", "--max-memory", "40MB", "--threads", "2", "--dry-run"]
    assert run(*options) == 0
    text = capsys.readouterr().out
    assert "merged in chunks of 1,024 entries, 2 threads:" in text
    assert "trim, elect, aggregate: 4 tensors, 21,600 entries, 2 passes" in text
    assert "copy: 1 tensor, 18 entries, 1 pass" in text
    assert "s if reading keeps up" in text
    assert run(*options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    entries = 4 * 60 * 90
    assert report["plan"]["read"] == 4 * (2 * 4 * entries + 18)  # two passes over four checkpoints, the head once
    assert report["plan"]["written"] == 4 * (entries + 18)
    assert report["plan"]["passes"] == 2
    assert 0 < report["plan"]["memory"] <= 40_000_000
    assert report["plan"]["seconds"] > 0
    assert (report["written"], report["interrupted"]) == (False, [])
    assert run("--out", "o.safetensors", "--dry-run", "--json") == 0
    plain = json.loads(capsys.readouterr().out)["plan"]
    assert (plain["how"], plain["seconds"]) == ("all tensors at once", None)
    assert plain["read"] == 4 * 4 * entries
    assert run("--out", "o.safetensors", "--set", "scope=tensor", "--dry-run") == 0
    assert "merged tensor by tensor:" in capsys.readouterr().out
    assert sorted(os.listdir(folder)) == before


def test_speed_in_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", "o.safetensors", "--max-memory", "40MB", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    moved = report["plan"]["read"] + report["plan"]["written"]
    assert report["gigabytes_per_second"] == pytest.approx(moved / 1e9 / report["seconds"])
    assert report["resumed_at"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-memory", "0.1MB"], "method 'ties' needs 21."),
        (["--max-memory", "lots"], "--max-memory 'lots' is not a positive size: write bytes, or as in 500MB or 5GB"),
        (["--max-memory", "9GB", "--method", "knots"], "--max-memory: method 'knots' needs all tensors at once"),
        (["--max-memory", "9GB", "--method", "emr", "--for-expert", "e1"], "--max-memory: method 'emr' needs all"),
        (["--hash", "slow"], "--hash slow: choose between full and quick"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_refused_before_anything_is_read(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
    dry: bool,
) -> None:
    monkeypatch.setattr("experiments.commands.merge.record_of", lambda *_: pytest.fail("hashed"))
    before = sorted(os.listdir(folder))
    assert run("--out", "o.safetensors", *options, *(["--dry-run"] if dry else [])) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert sorted(os.listdir(folder)) == before


class TestHashes:
    def test_what_is_recorded(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = [sha256(Path(f"{name}.safetensors").read_bytes()).hexdigest() for name in EXPERTS]
        quick = [quick_hash(f"{name}.safetensors") for name in EXPERTS]

        def recorded(*options: str) -> list[dict[str, str]]:
            assert run("--out", "o.safetensors", "--overwrite", *options) == 0
            entries: list[dict[str, str]] = read_metadata("o.safetensors")["experts"]
            return [{k: v for k, v in entry.items() if k.endswith("sha256")} for entry in entries]

        assert recorded() == recorded("--hash", "full") == [{"sha256": digest} for digest in full]
        assert recorded("--hash", "quick") == [{"quick_sha256": digest} for digest in quick]
        monkeypatch.setattr("experiments.merge_job.records.HASHED_UP_TO", 1000)
        assert recorded() == [{"quick_sha256": digest} for digest in quick]
        assert recorded("--hash", "full") == [{"sha256": digest} for digest in full]

    def test_what_is_verified_is_named(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for options, verdict in ((["--hash", "full"], "same"), (["--hash", "quick"], "alike")):
            assert run("--out", "o.safetensors", "--overwrite", *options) == 0
            capsys.readouterr()
            with pytest.raises(SystemExit):
                main(["inspect", "o.safetensors", "--verify", ".", "--json"])
            found = json.loads(capsys.readouterr().out)["sources"]
            assert [source["verdict"] for source in found] == [verdict] * 4
        with pytest.raises(SystemExit):
            main(["inspect", "o.safetensors"])
        assert "expert e1.safetensors, quick_sha256 " in capsys.readouterr().out
        state = load_file("e2.safetensors")
        save_file({name: tensor + 1e-6 for name, tensor in state.items()}, "e2.safetensors")
        with pytest.raises(SystemExit) as stop:
            main(["inspect", "o.safetensors", "--verify", ".", "--json"])
        assert stop.value.code == 1
        assert [s["verdict"] for s in json.loads(capsys.readouterr().out)["sources"]] == ["alike"] * 2 + [
            "different",
            "alike",
        ]

    def test_quick_hashes_see_headers_samples_and_sizes(self, folder: Path) -> None:
        state = {"a": torch.arange(5000.0), "b": torch.zeros(0), "c": torch.ones(3)}
        save_checkpoint("x.safetensors", state)
        known = quick_hash("x.safetensors")
        others = [
            state | {"a": state["a"].index_fill(0, torch.tensor([2500]), -1.0)},  # in the middle
            state | {"c": torch.tensor([1.0, 1.0, 2.0])},
            {"d" if name == "c" else name: tensor for name, tensor in state.items()},
            state | {"a": state["a"].view(50, 100)},
            state | {"b": torch.zeros(0, 2)},
        ]
        found = {known}
        for other in others:
            save_checkpoint("y.safetensors", other, overwrite=True)
            found.add(quick_hash("y.safetensors"))
        save_checkpoint("y.safetensors", state, {"a": "record"}, overwrite=True)
        found.add(quick_hash("y.safetensors"))
        torch.save(state, "y.pt")
        found.add(quick_hash("y.pt"))
        assert len(found) == len(others) + 3
        save_checkpoint("z.safetensors", state)
        assert quick_hash("z.safetensors") == known != file_hash("z.safetensors")
        moved = state | {"a": state["a"].index_fill(0, torch.tensor([0]), -1.0)}  # what a sample cannot see
        save_checkpoint("z.safetensors", moved, overwrite=True)
        assert quick_hash("z.safetensors") == known


class TestInterrupted:
    def test_a_line_says_so_and_the_same_command_goes_on(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--out", "plain.safetensors") == 0
        options = ["--out", "o.safetensors", "--max-memory", "40MB", "--threads", "1"]
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):

            def work(number: signal.Signals = number) -> None:
                import merging.streaming.output as module

                real, count = module._write_at, iter(range(10**9))

                def slow(*arguments: Any) -> None:
                    real(*arguments)
                    if next(count) == 10:
                        os.kill(os.getpid(), number)
                        time.sleep(0.3)

                torch.set_num_threads(1)
                logging.getLogger().handlers.clear()  # those of the tests
                signal.signal(signal.SIGINT, signal.default_int_handler)
                module._write_at = slow
                with open("told", "w") as told:
                    os.dup2(told.fileno(), 2)
                    sys.stderr = told
                    code = run(*options)
                    told.flush()
                os._exit(code)

            assert processes.run(work) == status
            assert Path("told").read_text().startswith("warning: o.safetensors: interrupted; the same command goes on")
            assert not Path("o.safetensors").exists()
            capsys.readouterr()
            assert run(*options, "--dry-run") == 0
            assert (
                "left by interrupted merges, to go on from, or removed when a merge is complete: .o.safetensors."
                in (capsys.readouterr().out)
            )
            assert run(*options) == 0
            assert re.search(r" GB/s, gone on from \d+%\)$", capsys.readouterr().out.strip())
            assert Path("o.safetensors").read_bytes() == Path("plain.safetensors").read_bytes()
            Path("o.safetensors").unlink()
            assert not [name for name in os.listdir(folder) if name.startswith(".")]


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("average", {}),
        ("ties", {}),
        ("ties", {"scope": "tensor"}),
        ("dare_ties", {}),
        ("karcher", {}),
        ("breadcrumbs", {}),  # by its definition, tensor by tensor
    ],
)
def test_memory_is_as_planned(tmp_path_factory: pytest.TempPathFactory, method: str, settings: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "large"
    if not folder.exists():
        folder.mkdir()
        draw = torch.Generator().manual_seed(1)
        for size, prefix in ((1 << 21, "l"), (1 << 10, "s")):
            for name in ("base", *EXPERTS):
                state = {f"{i}.w": torch.empty(size // 512, 512).uniform_(-1, 1, generator=draw) for i in range(3)}
                save_checkpoint(folder / f"{prefix}.{name}.safetensors", state)

    def job(prefix: str) -> merge_job.Job:
        experts = [ExpertEntry(file=folder / f"{prefix}.{name}.safetensors") for name in EXPERTS]
        given = MergeFile(
            method=method,
            base=folder / f"{prefix}.base.safetensors",
            experts=experts,
            settings=settings,
            out=folder / "o.safetensors",
            overwrite=True,
        )
        return prepare(build(given, source=""))

    for threads in (1, 2):
        resources = Resources(threads=threads, streamed=True)
        small, large = job("s"), job("l")
        execute(small, describe(small), resources)  # loads the compiled loops
        planned = route(large, resources)
        predicted = outline(large, planned)["memory"]
        begin, peak, stop = anonymous(), 0, threading.Event()

        def watch(stop: threading.Event = stop) -> None:
            nonlocal peak
            while not stop.wait(1e-3):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            execute(large, describe(large), resources, chosen=planned)
        finally:
            stop.set()
            watcher.join()
        measured = peak - begin
        assert measured <= predicted + 30_000_000, (method, threads, predicted, measured)
        assert predicted <= 3 * max(0, measured) + 60_000_000


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (folder / "base.safetensors").write_bytes(b"not a checkpoint")
    for name, words in (("cuda", "there is no such device"), ("gpu", "no name of a device")):
        assert run("--out", "out.safetensors", "--device", name) != 0
        error = capsys.readouterr().err
        assert error.startswith(f"error: --device {name}: ")
        assert words in error
        assert error.count("\n") == 1
        with pytest.raises(MethodError, match=words):
            Resources(device=name)
    assert not list(folder.glob("*out*"))


def test_a_device_that_would_idle_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    files = [ExpertEntry(file=folder / f"{name}.safetensors") for name in EXPERTS]

    def chosen(method: str, **resources: Any) -> merge_job.Route:
        given = MergeFile(method=method, base=folder / "base.safetensors", experts=files)
        return route(prepare(build(given, source="")), Resources(device="cuda", **resources))

    with pytest.raises(MethodError, match=r"--device cuda: method 'ties' merges these checkpoints in chunks, on the"):
        chosen("ties", streamed=True)
    with pytest.raises(MethodError, match=r"with all tensors in memory, on the processor: leave --device out"):
        chosen("ties")
    for streamed in (True, False):
        found = chosen("tsv_m", streamed=streamed)
        assert found.device == "cuda"
        assert found.streamed is None or found.streamed.stream.device == "cuda"


def test_the_processor_by_name_is_the_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, options in (("one", []), ("two", ["--device", "cpu"])):
        assert run("--out", f"{out}.safetensors", "--max-memory", "1GB", *options) == 0
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
    capsys.readouterr()
    assert run("--dry-run", "--json", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["device"] == "cpu"


@pytest.mark.parametrize("method", ["ties", "average", "tsv_m"])
def test_the_memory_that_is_asked_for_is_enough(folder: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    arguments = ("--dry-run", "--method", method, "--threads", "2", "--max-memory")
    assert run(*arguments, "1") != 0
    said = re.search(r"needs ([\d.]+ .B) with .* and 1 B are allowed", capsys.readouterr().err)
    assert said is not None
    assert run(*arguments, said[1].replace(" ", "")) == 0
