"""Worker processes: killed, stopped, stuck; and grids that go on to the same bits."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.engines import local, worker
from experiments.engines.dispatch import Dispatcher
from experiments.engines.prepare import tidy
from experiments.store import Store
from experiments.store.errors import StoreError
from tests.experiments.engine_grids import contents, run_in_group, tiny_runs, tiny_store, warm

__all__ = ["warm"]
Runner = Callable[..., tuple[Any, Any]]
LIMIT = 120.0
KILLS = 5


@pytest.fixture
def runner(warm: Any) -> Iterator[Runner]:
    """Starts runners, and leaves none behind."""
    started = []

    def start(folder: Path, trap: str = "", **options: Any) -> tuple[Any, Any]:
        ours, theirs = warm.Pipe()
        options = {"workers": 2, "resamples": 20} | options
        process = warm.Process(target=run_in_group, args=(folder, options, theirs, trap))
        process.start()
        started.append(process)
        theirs.close()
        return process, ours

    yield start
    for process in started:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join(LIMIT)


def _ended(process: Any, channel: Any) -> Any:
    assert channel.poll(LIMIT), "the runner did not end"
    found = channel.recv()
    process.join(LIMIT)
    return found


def _group_is_gone(group: int) -> bool:
    """Whether no process of a group is left."""
    until = time.monotonic() + 20.0
    while time.monotonic() < until:
        members = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] not in "ZX":
                members.append(path)
        if not members:
            return True
        time.sleep(0.05)
    return False


def _stored(folder: Path) -> int:
    """Runs that are stored; asked often, so the database alone is read."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'store.sqlite'}?mode=ro", uri=True, timeout=30)) as base:
        return int(base.execute("SELECT count(*) FROM results").fetchone()[0])


def test_five_kills_leave_every_run_once_with_the_bits_of_a_grid_that_was_not_killed(
    runner: Runner, tmp_path: Path
) -> None:
    runs = tiny_runs(seeds=12, steps=30, checkpoints=(15, 30))
    for name in ("whole", "killed"):
        tiny_store(tmp_path / name, runs, way="vmap", chunk=2, size=3)  # a cohort is stored at once
    kind, outcome = _ended(*runner(tmp_path / "whole"))
    assert (kind, outcome.complete, outcome.new, outcome.failed) == ("outcome", True, len(runs), {})
    rng = np.random.default_rng([0, 0x50AC])
    seen = 0
    for _ in range(KILLS):
        process, channel = runner(tmp_path / "killed")
        wanted = seen + int(rng.integers(1, 4))
        until = time.monotonic() + LIMIT
        while (seen := _stored(tmp_path / "killed")) < wanted and time.monotonic() < until:
            time.sleep(0.005 + 0.02 * rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.join(LIMIT)
        assert _group_is_gone(process.pid)
        channel.close()
    assert 0 < _stored(tmp_path / "killed") < len(runs)
    kind, outcome = _ended(*runner(tmp_path / "killed"))
    assert (kind, outcome.complete, outcome.done) == ("outcome", True, len(runs))
    assert outcome.new < len(runs)
    tidy(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    with Store.open(tmp_path / "killed") as store:
        assert len(store.runs()) == len(set(store.runs())) == len(runs)
        assert store.gc(dry_run=True, older_than=0.0).files == ()
        assert store.verify().good
        assert store.status().conflicts == 0


def test_two_runners_share_one_store(runner: Runner, tmp_path: Path) -> None:
    runs = tiny_runs(seeds=5)
    for name in ("one", "two"):
        tiny_store(tmp_path / name, runs, size=2)
    _ended(*runner(tmp_path / "one", workers=1))
    first, second = (runner(tmp_path / "two", workers=1) for _ in range(2))
    ends = [_ended(*first)[1], _ended(*second)[1]]
    assert all(each.complete for each in ends)
    assert sum(each.new for each in ends) == len(runs)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(
    ("trap", "error"),
    [("killed", "its worker was killed"), ("refused", "this cannot be trained"), ("stuck", "its worker was killed")],
)
def test_a_cohort_that_cannot_be_done_is_given_up_and_the_others_go_on(
    runner: Runner, tmp_path: Path, trap: str, error: str
) -> None:
    tiny_store(tmp_path, tiny_runs(seeds=3))
    options = {"attempts": 1, "silence": 3.0} if trap == "stuck" else {"attempts": 2}
    kind, outcome = _ended(*runner(tmp_path, trap, **options))
    assert kind == "outcome"
    assert list(outcome.failed) == ["c1"]
    assert error in outcome.failed["c1"]
    assert not outcome.complete
    assert outcome.done == 12 - 4
    with Store.open(tmp_path) as store:
        assert not store.status().leases
        plan = store.plan()
        assert plan is not None
        assert set(store.missing()) == set(plan.cohorts[1].runs)


def test_a_passing_trouble_is_tried_again(runner: Runner, tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(seeds=2))
    outcome = _ended(*runner(tmp_path, "once"))[1]
    assert outcome.complete
    assert outcome.failed == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything_and_gives_leases_back(runner: Runner, tmp_path: Path, number: int) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), seeds=2, steps=100_000, checkpoints=(100_000,)))
    process, channel = runner(tmp_path)
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        with Store.open(tmp_path, "r") as store:
            if store.status().leases:
                break
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert _ended(process, channel)[0] == "stopped"
    assert _group_is_gone(process.pid)
    with Store.open(tmp_path) as store, Dispatcher(store) as leases:
        assert not store.status().leases
        assert leases.next() is not None


def test_workers_end_when_only_their_parent_is_killed(runner: Runner, tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), seeds=2, steps=100_000, checkpoints=(100_000,)))
    process, channel = runner(tmp_path)
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        with Store.open(tmp_path, "r") as store:
            if store.status().leases:
                break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join(LIMIT)
    assert _group_is_gone(process.pid)
    channel.close()


def _stopped_while_it_ends(said: Path) -> None:
    """A worker whose store refuses and whose end is slow; it is asked to stop meanwhile, and what it says is kept."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:

        def serve(*_: object) -> None:
            raise StoreError("the disk is full")

        worker._serve = serve  # type: ignore[assignment]
        atexit._clear()
        atexit.register(time.sleep, 2.0)  # as a slow end of the interpreter
        worker.work(worker.WorkerSpec("store", None, "cpu", "me", parent=os.getppid()), theirs)
        atexit._run_exitfuncs()
        os._exit(0)
    while ours.recv()[0] != "disk":
        pass
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)


def test_a_worker_that_is_stopped_while_it_ends_says_nothing(warm: Any, tmp_path: Path) -> None:
    process = warm.Process(target=_stopped_while_it_ends, args=(tmp_path / "said",))
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    assert (tmp_path / "said").read_text() == ""


def _deaf_at_first(channel: Any) -> None:
    """Loses the first request to stop, as a process may that was just forked."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    channel.send("ready")
    time.sleep(LIMIT)


def test_a_worker_that_lost_the_request_to_stop_is_asked_again(warm: Any) -> None:
    ours, theirs = warm.Pipe()
    process = warm.Process(target=_deaf_at_first, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(LIMIT)
    crew = object.__new__(local._Crew)
    crew._workers = [local._Worker(process, ours)]
    crew.end()
    assert process.exitcode == -signal.SIGTERM  # and not of SIGKILL, after GRACE seconds


def test_a_store_that_cannot_be_written_ends_the_run_with_one_line(runner: Runner, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; the soak test fills a disk")
    tiny_store(tmp_path, tiny_runs(seeds=1))
    (tmp_path / "blobs").chmod(0o500)
    kind, error = _ended(*runner(tmp_path))
    assert kind == "error"
    assert "may not be written" in error
