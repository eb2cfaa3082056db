"""Checkpoints behind URLs: the bits of local ones, every wait ends, nothing partial, no credentials."""

from __future__ import annotations

import ast
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from experiments.cli import build_app
from experiments.merge_job import Resources, execute, prepare, record_of
from merging import remote_file
from merging.checkpoint import file_hash, load_state_dict, open_checkpoint, read_metadata, save_state_dict
from merging.config import MergeSpec, build, read_config
from merging.errors import CheckpointError
from merging.remote import open_weights
from merging.remote_file import RangeReader, open_file
from merging.remote_path import beside, last_name, shown, url_of, within
from merging.remote_requests import Limits, Requests, persistently
from merging.remote_write import save_remote
from merging.save import save_checkpoint

State = dict[str, Tensor]
QUICK = Limits(attempt=0.3, total=0.4, pause=0.01, longest=0.05, parallel=4)
SHORT = Limits(attempt=0.05, total=0.05, pause=0.01, longest=0.05, parallel=4)


class Web(ThreadingHTTPServer):
    """Files in memory, by ranges, with faults: ``faults`` gets the path and range and says what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.versions: dict[str, int] = {}
        self.faults: Callable[[str, str | None], Any] = lambda path, part: None
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, path: str, data: bytes) -> None:
        self.files[path] = data
        self.versions[path] = self.versions.get(path, 0) + 1


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet per answer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path, part = self.path.partition("?")[0], self.headers.get("Range")
        self.server.asked.append((path, part))
        fault = self.server.faults(path, part) if body else None
        data = self.server.files.get(path)
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if isinstance(fault, float):
            time.sleep(fault)
        if data is None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status, tag = 200, f'"{self.server.versions[path]}"'
        if part is not None and self.server.ranges:
            first, last = part.removeprefix("bytes=").split("-")
            data, status = data[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("ETag", tag)
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_header("Content-Length", str(len(data) * (2 if fault == "cut" else 1)))
        self.end_headers()
        if body:
            self.wfile.write(data)
        if fault == "cut":
            self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short limits for whoever uses the defaults."""
    monkeypatch.setattr(Limits.__init__, "__defaults__", tuple(vars(QUICK).values()))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are kept before they are uploaded."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def upload(system: Any, local: Path, there: str) -> None:
    for path in local.iterdir():
        system.pipe_file(f"{there}/{path.name}", path.read_bytes())


def same(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def equal(a: Any, b: Any) -> bool:
    """The same, in any order."""
    return same(dict(sorted(a.items())), dict(sorted(b.items())))


# Names


@pytest.mark.parametrize(
    ("given_", "url"),
    [
        ("s3://bucket/a.safetensors", "s3://bucket/a.safetensors"),
        (Path("s3://bucket/a.safetensors"), "s3://bucket/a.safetensors"),
        (Path("file:///tmp/a"), "file:///tmp/a"),
        ("https://h/a?x=1//2", "https://h/a?x=1//2"),
        ("/tmp/a", None),
        ("a/b.safetensors", None),
        ("C:/models/a", None),
        ("note: this/a", None),
    ],
)
def test_what_is_a_url(given_: Any, url: str | None) -> None:
    assert url_of(given_) == url


def test_a_local_folder_that_looks_like_a_scheme_stays_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:").mkdir()
    assert url_of(Path("s3:/a")) is None


SECRET = st.text("abcdefXYZ0123456789:@", min_size=6, max_size=12).map(lambda text: "secret" + text + "terces")


@settings(max_examples=30, deadline=None)
@given(user=SECRET, query=SECRET, scheme=st.sampled_from(["http", "https", "s3", "sftp"]))
def test_credentials_are_never_shown(user: str, query: str, scheme: str) -> None:
    url = f"{scheme}://{user}:{user}@host:81/a/b.safetensors?sig={query}#{query}"
    for form in (url, Path(url)):
        assert shown(form) == f"{scheme}://host:81/a/b.safetensors"
        assert last_name(form) == "b.safetensors"


def test_neighbours_keep_the_query_of_web_addresses() -> None:
    assert beside("https://h/a/b.json?t=1", "c d") == "https://h/a/c%20d?t=1"
    assert within("s3://b/a/", "c?d") == "s3://b/a/c?d"


# Requests


def test_passing_errors_are_repeated_with_growing_pauses_until_the_limit() -> None:
    times: list[float] = []

    def fail() -> None:
        times.append(time.monotonic())
        raise ConnectionResetError(104, "to http://user:secret@host")

    with pytest.raises(CheckpointError, match=r"somewhere: no complete answer .*attempts") as error:
        persistently(fail, "somewhere", Limits(0.5, 0.6, 0.02, 0.2, 1))
    assert "secret" not in str(error.value)
    gaps = np.diff(times)
    assert len(times) >= 5
    assert times[-1] - times[0] < 0.6
    assert gaps[2] > 1.5 * gaps[0]


@pytest.mark.parametrize("error", [PermissionError(13, "no"), FileNotFoundError("s"), ValueError("x")])
def test_refusals_are_not_repeated(error: Exception) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(CheckpointError):
        persistently(fail, "somewhere", QUICK)
    assert len(calls) == 1


def test_a_call_that_never_returns_is_given_up() -> None:
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="no answer in time"):
        persistently(lambda: time.sleep(20), "somewhere", Limits(0.1, 0.3, 0.01, 0.1, 1))
    assert time.monotonic() - begin < 2.0


# Reading


@pytest.mark.parametrize("shard", [None, 300])
def test_what_is_read_is_what_is_local(
    tmp_path: Path, memory: MemoryFileSystem, random_state: Callable[..., State], shard: int | None
) -> None:
    state = random_state(3, dtype=torch.bfloat16) | {"flags": torch.tensor([True, False])}
    save_checkpoint(tmp_path / "m", state, {"a": 1}, max_shard_size=shard)
    upload(memory, tmp_path / "m", "/box/m")
    local, there = open_checkpoint(tmp_path / "m"), open_checkpoint("memory://box/m")
    assert same(local, there)
    assert there.metadata == read_metadata(Path("memory://box/m")) == {"a": 1}
    assert there.sizes == local.sizes
    assert [file.name for file in there.files] == [file.name for file in local.files]
    assert all(torch.equal(there.sample(name), local.sample(name)) for name in there)
    assert file_hash("memory://box/m") == file_hash(tmp_path / "m")
    assert same(load_state_dict(f"file://{tmp_path}/m"), local)
    assert same(load_state_dict("memory://box/m", ["stem.weight"]), {"stem.weight": local["stem.weight"]})


def test_large_tensors_come_in_several_requests(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "_PIECE", 1000)
    state = {"w": torch.randn(3001), "b": torch.randn(7)}
    save_state_dict(tmp_path / "a.safetensors", state)
    web.put("/a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    assert same(load_state_dict(web.url + "/a.safetensors"), load_state_dict(tmp_path / "a.safetensors"))
    assert len({part for _, part in web.asked if part}) >= 13


def test_web_folders_have_no_listing_and_are_found(
    web: Web, tmp_path: Path, random_state: Callable[..., State]
) -> None:
    save_checkpoint(tmp_path / "m", random_state(1), max_shard_size=300)
    for path in (tmp_path / "m").iterdir():
        web.put(f"/hub/m/{path.name}", path.read_bytes())
    assert same(open_checkpoint(f"{web.url}/hub/m?token=x"), open_checkpoint(tmp_path / "m"))


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 900),
    reads=st.lists(st.tuples(st.integers(0, 899), st.integers(1, 200)), min_size=1, max_size=12),
    block=st.integers(16, 100),
)
def test_readers_give_every_range(size: int, reads: list[tuple[int, int]], block: int) -> None:
    system = fsspec.filesystem("memory")
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    system.pipe_file("/ranges", data)
    before, remote_file.BLOCK = remote_file.BLOCK, block
    pool = Requests(QUICK)
    try:
        reader = RangeReader(open_file("memory://ranges", QUICK), pool)
        for begin, length in reads:
            begin %= size
            buffer = np.empty(min(length, size - begin), dtype=np.uint8)
            reader.announce(begin, begin + length)
            reader.read_into(buffer, begin)
            assert buffer.tobytes() == data[begin : begin + len(buffer)]
            assert len(reader._blocks) <= remote_file.KEPT
        reader.confirm()
    finally:
        remote_file.BLOCK = before
        pool.close()


def test_failing_and_truncated_answers_are_asked_for_again(web: Web, tmp_path: Path, quick: None) -> None:
    state = {"w": torch.randn(40000), "v": torch.randn(9)}
    save_state_dict(tmp_path / "a.safetensors", state)
    web.put("/a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    seen: dict[str | None, int] = {}
    order = [503, "cut", "short", 429]

    def twice(path: str, part: str | None) -> Any:
        seen[part] = seen.get(part, 0) + 1
        return order[seen[part] - 1] if seen[part] <= 4 and part else None

    web.faults = twice
    assert same(load_state_dict(web.url + "/a.safetensors"), load_state_dict(tmp_path / "a.safetensors"))
    assert max(seen.values()) >= 5


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (503, "HTTP status 503"),
        (403, "access is refused"),
        ("short", "of .* bytes"),
        ("cut", "no complete answer"),
        (3.0, "no answer in time"),
    ],
)
def test_answers_that_stay_bad_end_in_an_error(web: Web, tmp_path: Path, quick: None, fault: Any, match: str) -> None:
    save_state_dict(tmp_path / "a.safetensors", {"w": torch.randn(100)})
    web.put("/a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    web.faults = lambda path, part: fault if part else None
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=match) as error:
        open_checkpoint(web.url.replace("//", "//user:secret@") + "/a.safetensors?sig=secret")
    assert time.monotonic() - begin < 4.0
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_servers_without_ranges_are_refused_without_downloading(web: Web, tmp_path: Path, quick: None) -> None:
    save_state_dict(tmp_path / "a.safetensors", {"w": torch.randn(1 << 16)})
    web.put("/a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    web.ranges = False
    with pytest.raises(CheckpointError, match="does not serve parts of files: download it first"):
        open_checkpoint(web.url + "/a.safetensors")


def test_objects_that_change_are_noticed(web: Web, memory: MemoryFileSystem, tmp_path: Path, quick: None) -> None:
    first, second = {"w": torch.ones(50)}, {"w": torch.zeros(50)}
    save_state_dict(tmp_path / "1.safetensors", first)
    save_state_dict(tmp_path / "2.safetensors", second)
    for url, put in (
        (web.url + "/a.safetensors", lambda data: web.put("/a.safetensors", data)),
        ("memory://a.safetensors", lambda data: memory.pipe_file("/a.safetensors", data)),
    ):
        put((tmp_path / "1.safetensors").read_bytes())
        opened = open_checkpoint(url)
        put((tmp_path / "2.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match="changed while it was in use"):
            opened["w"]


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("memory://nothing/here", "there is no such file"),
        ("memory://nothing/here.safetensors", "there is no such file"),
        ("memory://a/model.pt", "no pickles"),
        ("memory://a/pytorch_model.bin.index.json", "no pickles"),
        ("memory://pickled", "no pickles"),
        ("memory://adapter", "LoRA adapters are read from local folders"),
        ("memory://bad.safetensors", "not a complete safetensors file"),
        ("memory://torn", "the shard 'b.safetensors' is missing"),
        ("memory://out", "points outside its folder"),
        ("nonsense://a/b", "not a known kind of address"),
        ("memory://a::http://h/b.safetensors", "chained URLs are not read"),
        ("http://127.0.0.1:1/a.safetensors", "Connection refused"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(memory: MemoryFileSystem, quick: None, url: str, match: str) -> None:
    memory.pipe_file("/pickled/pytorch_model.bin", b"x")
    memory.pipe_file("/adapter/adapter_model.safetensors", b"x")
    memory.pipe_file("/bad.safetensors", b"\x10" + bytes(7) + b"{}")
    memory.pipe_file("/torn/model.safetensors.index.json", b'{"weight_map": {"w": "b.safetensors"}}')
    memory.pipe_file("/out/model.safetensors.index.json", b'{"weight_map": {"w": "../b.safetensors"}}')
    with pytest.raises(CheckpointError, match=match) as error:
        open_checkpoint(url)
    assert "\n" not in str(error.value)


def test_without_fsspec_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mergebound\[remote\]'"):
        open_checkpoint("memory://a.safetensors")


# Merging


def family_at(
    memory: MemoryFileSystem, folder: Path, family: Callable[..., tuple[State, dict[str, State]]]
) -> tuple[Path, list[Path]]:
    base, experts = family()
    save_checkpoint(folder / "base", base, max_shard_size=300)
    (folder / "base" / "config.json").write_text('{"torch_dtype": "float32"}')
    upload(memory, folder / "base", "/in/base")
    for name, state in experts.items():
        save_state_dict(folder / f"{name}.safetensors", state)
        memory.pipe_file(f"/in/{name}.safetensors", (folder / f"{name}.safetensors").read_bytes())
    return folder / "base", [folder / f"{name}.safetensors" for name in experts]


@pytest.mark.parametrize(
    ("method", "values", "streamed"),
    [
        ("average", {}, True),
        ("ties", {"density": 0.4}, True),
        ("ties", {"density": 0.4}, False),
        ("dare_ties", {"drop": 0.5}, True),
        ("karcher", {}, True),
        ("tsv_m", {}, True),
    ],
)
def test_merges_have_the_bits_of_local_ones(
    tmp_path: Path,
    memory: MemoryFileSystem,
    scratch: Path,
    family: Callable[..., tuple[State, dict[str, State]]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    values: dict[str, Any],
    streamed: bool,
) -> None:
    monkeypatch.setattr(remote_file, "BLOCK", 512)
    base, experts = family_at(memory, tmp_path, family)
    names = tuple(path.stem for path in experts)
    there = tuple(Path(f"memory://in/{path.name}") for path in experts)
    local = MergeSpec(method, base, tuple(experts), names, values, out=tmp_path / "out")
    far = MergeSpec(method, Path("memory://in/base"), there, names, values, out=Path("memory://out/m"))
    resources = Resources(threads=2, streamed=streamed)
    for spec in (local, far):
        job = prepare(spec)
        execute(job, record_of(job), resources)
    assert same(open_checkpoint(tmp_path / "out"), open_checkpoint("memory://out/m"))
    assert json.loads(memory.cat_file("/out/m/config.json")) == {"torch_dtype": "float32"}
    record = open_checkpoint("memory://out/m").metadata
    assert record["base"]["url"] == "memory://in/base"
    assert record["experts"][0]["size"] == experts[0].stat().st_size
    assert not list(scratch.iterdir())


def test_an_expert_that_changes_during_a_merge_leaves_nothing(
    tmp_path: Path,
    memory: MemoryFileSystem,
    scratch: Path,
    family: Callable[..., tuple[State, dict[str, State]]],
) -> None:
    _, experts = family_at(memory, tmp_path, family)
    names = tuple(path.stem for path in experts)
    there = tuple(Path(f"memory://in/{path.name}") for path in experts)
    job = prepare(MergeSpec("average", Path("memory://in/base"), there, names, out=Path("memory://out/m")))
    record = record_of(job)

    def change(done: int, total: int) -> None:
        memory.pipe_file(f"/in/{experts[1].name}", experts[0].read_bytes())

    with pytest.raises(CheckpointError, match=r"memory://in/expert1\.safetensors: the file changed"):
        execute(job, record, Resources(streamed=True), progress=change)
    assert not memory.exists("/out/m")


def test_merge_files_name_urls(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "base: s3://b/base\nexperts: [{file: 'https://h/x/e.safetensors?sig=secret'}, {file: y/e.safetensors}]\n"
        "out: s3://b/out\n"
    )
    content = read_config(tmp_path / "m.yaml").content
    spec = build(content, source="m.yaml")
    assert spec.base is not None
    assert spec.out is not None
    assert [url_of(path) for path in (spec.base, *spec.experts, spec.out)] == [
        "s3://b/base",
        "https://h/x/e.safetensors?sig=secret",
        None,
        "s3://b/out",
    ]
    assert spec.experts[1] == tmp_path / "y/e.safetensors"
    assert spec.names == ("x/e", "y/e")


def test_an_interrupted_merge_to_a_url_goes_on_where_it_was(
    tmp_path: Path,
    memory: MemoryFileSystem,
    scratch: Path,
    family: Callable[..., tuple[State, dict[str, State]]],
) -> None:
    _, experts = family_at(memory, tmp_path, family)
    names = tuple(path.stem for path in experts)
    there = tuple(Path(f"memory://in/{path.name}") for path in experts)
    resources = Resources(streamed=True, journal_every=1)
    begun: list[int] = []
    results = []
    for target, stops in (("memory://out/a", None), ("memory://out/b", 300), ("memory://out/b", None)):
        job = prepare(MergeSpec("average", Path("memory://in/base"), there, names, out=Path(target)))
        calls: list[int] = []

        def progress(done: int, total: int, calls: list[int] = calls, stops: int | None = stops) -> None:
            calls.append(done)
            if stops is not None and done > stops:
                time.sleep(0.3)  # what is written behind gets into the journal
                raise KeyboardInterrupt

        try:
            execute(job, record_of(job), resources, progress=progress)
            results.append(memory.cat_file(f"{target}/model.safetensors"))
        except KeyboardInterrupt:
            assert not memory.exists(target)
            assert list(scratch.iterdir())
        begun.append(calls[0])
    assert results[0] == results[1]
    assert begun[:2] == [0, 0]
    assert begun[2] > 0
    assert not list(scratch.iterdir())


def test_the_command_line_takes_urls_and_hides_credentials(
    tmp_path: Path,
    memory: MemoryFileSystem,
    web: Web,
    scratch: Path,
    family: Callable[..., tuple[State, dict[str, State]]],
) -> None:
    _, experts = family_at(memory, tmp_path, family)
    web.put("/e.safetensors", experts[0].read_bytes())
    signed = web.url.replace("//", "//user:secret@") + "/e.safetensors?sig=secret"
    run = CliRunner()
    common = ["--base", "memory://in/base", "memory://in/expert1.safetensors", signed, "--method", "task_arithmetic"]
    made = run.invoke(build_app(), ["merge", *common, "--out", "memory://out/m.safetensors"])
    assert made.exit_code == 0, made.output
    assert "written: memory://out/m.safetensors" in made.output
    looked = run.invoke(build_app(), ["inspect", "memory://out/m.safetensors", "--json"])
    assert json.loads(looked.output)["metadata"]["experts"][1]["url"] == web.url + "/e.safetensors"
    printed = run.invoke(build_app(), ["inspect", "memory://out/m.safetensors"])
    differs = run.invoke(build_app(), ["diff", "memory://out/m.safetensors", signed, "--json"])
    assert differs.exit_code == 1
    assert json.loads(differs.output)["b"] == web.url + "/e.safetensors"
    checked = run.invoke(build_app(), ["inspect", "memory://out/m.safetensors", "--verify", signed])
    assert "compared with local files" in str(checked.exception)
    for text in (made.output, looked.output, printed.output, differs.output, str(checked.exception)):
        assert "secret" not in text
    assert b"secret" not in memory.cat_file("/out/m.safetensors")
    again = run.invoke(build_app(), ["merge", *common, "--out", "memory://out/m.safetensors"])
    assert "exists already" in str(again.exception)
    itself = run.invoke(build_app(), ["merge", *common, "--out", "memory://in/expert1.safetensors", "--overwrite"])
    assert "one of the inputs" in str(itself.exception)


# Writing


def contents(memory: MemoryFileSystem) -> dict[str, bytes]:
    return {path: memory.cat_file(path) for path in memory.find("/")}


class Flaky:
    """Uploads that fail: the numbered ones, some after half of the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: set[int] | Callable[[int], bool], half: bool) -> None:
        self.count, self.names = 0, []
        original = MemoryFileSystem.put_file

        def put_file(system: MemoryFileSystem, here: str, there: str, **more: Any) -> None:
            self.count += 1
            if failing(self.count) if callable(failing) else self.count in failing:
                if half:
                    system.pipe_file(there, Path(here).read_bytes()[: Path(here).stat().st_size // 2])
                raise ConnectionResetError(104, "reset")
            self.names.append(Path(here).name)
            original(system, here, there, **more)

        monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("old_shard", [None, 300])
@pytest.mark.parametrize("name", ["m", "m.safetensors"])
def test_a_reader_finds_the_old_checkpoint_or_the_new_one(
    tmp_path: Path,
    memory: MemoryFileSystem,
    scratch: Path,
    random_state: Callable[..., State],
    direct: bool,
    old_shard: int | None,
    name: str,
) -> None:
    """Whatever is looked at between two operations of the file system."""
    old, new = random_state(1), random_state(2)
    url = f"memory://out/{name}"
    main = f"memory://out/{name}" if name == "m" else None

    def write(state: State, shard: int | None) -> None:
        save_remote(
            url, lambda place: save_checkpoint(place, state, max_shard_size=shard), overwrite=True, direct=direct
        )

    write(old, old_shard)
    found: list[str] = []
    refused: list[str] = []

    def look() -> None:
        candidates = [main] if main else [p for p in (url, "memory://out/m.safetensors.index.json") if memory.exists(p)]
        for candidate in candidates:
            try:
                read = load_state_dict(candidate)
            except CheckpointError as error:  # both forms for a moment
                refused.append(str(error))
                continue
            found.append("old" if same(read, {n: old[n] for n in read}) else "new")
            assert same(read, {n: (old if found[-1] == "old" else new)[n] for n in read})

    system = memory
    for operation in ("put_file", "mv", "rm_file"):
        original = getattr(system, operation)

        def watched(*args: Any, original: Any = original, **more: Any) -> Any:
            look()
            result = original(*args, **more)
            look()
            return result

        setattr(system, operation, watched)
    try:
        write(new, 300)
    finally:
        for operation in ("put_file", "mv", "rm_file"):
            delattr(system, operation)
    assert {"old", "new"} == set(found)
    assert all("several checkpoints" in text for text in refused)
    final = main or "memory://out/m.safetensors.index.json"
    assert equal(load_state_dict(final), new)
    files = [path.rpartition("/")[2] for path in memory.find("/out")]
    assert not [file for file in files if file.startswith(".")]
    shards = [file for file in files if file.endswith(".safetensors")]
    assert sorted(file.name for file in open_checkpoint(final).files[1:]) == sorted(shards)


@pytest.mark.parametrize("half", [False, True])
def test_uploads_that_fail_for_a_while_succeed(
    memory: MemoryFileSystem,
    scratch: Path,
    random_state: Callable[..., State],
    monkeypatch: pytest.MonkeyPatch,
    quick: None,
    half: bool,
) -> None:
    Flaky(monkeypatch, {1, 2, 4, 6}, half)
    state = random_state(1)
    save_checkpoint("memory://out/m", state, max_shard_size=300)
    assert equal(load_state_dict("memory://out/m"), state)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("from_", [1, 2, 3])
def test_a_given_up_upload_goes_on_with_the_shards_that_are_missing(
    memory: MemoryFileSystem,
    scratch: Path,
    random_state: Callable[..., State],
    monkeypatch: pytest.MonkeyPatch,
    direct: bool,
    from_: int,
) -> None:
    state, saved = random_state(1), []

    def save(place: Path) -> Path:
        saved.append(place)
        return save_checkpoint(place, state, {"x": 1}, max_shard_size=300)

    with monkeypatch.context() as patch:
        first = Flaky(patch, lambda count: count >= from_, half=not direct)
        with pytest.raises(CheckpointError, match="no complete answer"):
            save_remote("memory://out/m", save, resume="key", limits=SHORT, direct=direct)
    assert not memory.exists("/out/m/model.safetensors.index.json")
    if not direct:
        assert not [path for path in memory.find("/out") if not path.rpartition("/")[2].startswith(".")]
    second = Flaky(monkeypatch, set(), half=False)
    save_remote("memory://out/m", save, resume="key", limits=SHORT, direct=direct)
    assert len(saved) == 1
    assert len(first.names) == from_ - 1
    assert sorted(first.names + second.names) == sorted(set(first.names + second.names))
    assert equal(load_state_dict("memory://out/m"), state)
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("direct", [False, True])
def test_without_a_key_nothing_stays(
    memory: MemoryFileSystem,
    scratch: Path,
    random_state: Callable[..., State],
    monkeypatch: pytest.MonkeyPatch,
    direct: bool,
) -> None:
    Flaky(monkeypatch, lambda count: count >= 3, half=False)
    with pytest.raises(CheckpointError, match="no complete answer"):
        save_remote(
            "memory://out/m",
            lambda place: save_checkpoint(place, random_state(1), max_shard_size=300),
            limits=SHORT,
            direct=direct,
        )
    assert contents(memory) == {}
    assert not list(scratch.iterdir())


def test_what_is_there_stays_unless_it_may_be_replaced(
    memory: MemoryFileSystem, scratch: Path, random_state: Callable[..., State]
) -> None:
    for url in ("memory://out/m", "memory://out/m.safetensors"):
        save_checkpoint(url, random_state(1))
        before = contents(memory)
        with pytest.raises(CheckpointError, match="exists already"):
            save_checkpoint(url, random_state(2))
        assert contents(memory) == before
    save_checkpoint("memory://out/m", random_state(2), overwrite=True)
    assert equal(load_state_dict("memory://out/m"), random_state(2))


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://user:secret@127.0.0.1/m", "web addresses are only read"),
        ("memory://out/m.pt", "change the name"),
        ("memory://", "place rather than a name"),
    ],
)
def test_where_nothing_can_be_written(scratch: Path, url: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        save_checkpoint(url, {"w": torch.ones(2)})
    assert "secret" not in str(error.value)


def test_a_second_writer_of_the_same_is_refused(memory: MemoryFileSystem, scratch: Path) -> None:
    state = {"w": torch.ones(2)}

    def save(place: Path) -> Path:
        with pytest.raises(CheckpointError, match="another process is writing just this"):
            save_remote("memory://out/m", lambda other: other, resume="key")
        return save_checkpoint(place, state)

    save_remote("memory://out/m", save, resume="key")
    assert same(load_state_dict("memory://out/m"), state)


def test_fsspec_is_imported_only_for_urls() -> None:
    for path in Path(remote_file.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("fsspec")]
            if not path.name.startswith("remote"):
                used = {f"merging.remote{part}" for part in ("", "_file", "_place", "_write")} & set(names)
                assert not used, path


def test_weights_are_described_without_credentials(web: Web, tmp_path: Path) -> None:
    save_state_dict(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    web.put("/a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    found = open_weights(web.url.replace("//", "//user:secret@") + "/a.safetensors?sig=secret")
    assert "secret" not in repr(found)
    opened = open_checkpoint(web.url.replace("//", "//user:secret@") + "/a.safetensors?sig=secret")
    assert "secret" not in repr(opened) + str(opened.path) + str(opened.files)
