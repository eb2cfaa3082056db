"""Merging from a real store: by the command, in worker processes, and after SIGKILL."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.cli import main
from experiments.combine.api import combine
from experiments.combine.designs import all_groups, by_factor
from experiments.combine.recipe import Evaluate, MergeMethod
from experiments.combine.rows import results
from experiments.store import Store
from tests.experiments.combine.stores import NAMES, finished_store

TIMES = ["seconds", "seconds_merge"]
LIMIT = 120.0


def merging(folder: Path, channel: Any) -> None:
    """What a process does that is killed: merges in two workers, and tells how far it is."""

    def say(progress: Any) -> None:
        channel.send((progress.phase, progress.done))

    with Store.open(folder) as store:
        combine(
            store, all_groups(store.frame()), ["average", "ties"], evaluate=Evaluate(images=60), workers=2, job=2,
            watch=say,
        )  # fmt: skip


def measured(store: Store) -> pd.DataFrame:
    rows = store.merges()
    return rows[rows["kind"] != "drawn"].sort_values("key").drop(columns=TIMES).reset_index(drop=True)


def test_killed_workers_leave_whole_jobs_and_a_second_call_ends_with_the_same_bits(tmp_path: Path) -> None:
    killed = finished_store(tmp_path / "killed", NAMES)
    killed.close()
    context = multiprocessing.get_context("fork")  # all that it needs is imported here
    ours, theirs = context.Pipe()
    process = context.Process(target=merging, args=(tmp_path / "killed", theirs))
    process.start()
    theirs.close()
    try:
        while True:
            assert ours.poll(LIMIT), "the merging does not go on"
            phase, done = ours.recv()
            if phase == "merges" and done >= 4:
                break
        children = _children(process.pid or 0)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    finally:
        process.kill()
        ours.close()
    ends = time.monotonic() + 60
    while any(_alive(child) for child in children) and time.monotonic() < ends:
        time.sleep(0.1)
    assert children
    assert not any(_alive(child) for child in children)
    with Store.open(tmp_path / "killed") as store:
        before = (store.merges()["kind"] == "merge").sum()
        design = all_groups(store.frame())
        assert 4 <= before < 2 * len(design)
        seen = []
        table = combine(store, design, ["average", "ties"], evaluate=Evaluate(images=60), watch=seen.append)
        assert (seen[-1].kept, seen[-1].done) == (before, 2 * len(design) - before)
        assert table["key"].nunique() == len(table) == 2 * len(design)
        resumed = measured(store)
    with finished_store(tmp_path / "whole", NAMES) as store:
        combine(store, design, ["average", "ties"], evaluate=Evaluate(images=60), job=5)
        pd.testing.assert_frame_equal(resumed, measured(store))


def test_the_command_measures_writes_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_store(tmp_path / "grid", NAMES).close()
    out = tmp_path / "merges.csv"
    common = ["grid", "merge", str(tmp_path / "grid"), "--factor", "learning_rate", "--size", "2,3", "--images", "50"]
    common += ["--groups", "random:2", "--method", "ties", "--method", "average", "--set", "density=0.5"]
    with pytest.raises(SystemExit):
        main([*common, "--count"])
    assert "8 groups x 2 methods = 16 merges" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*common, "--out", str(out), "--json", "--metric", "loss"])
    assert stop.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    table = pd.read_csv(out)
    assert len(table) == shown["merges"] == 16
    with Store.open(tmp_path / "grid", "r") as store:
        groups = by_factor(store.frame(), "learning_rate", sizes=(2, 3), groups=2)
        again = combine(
            tmp_path / "grid", groups, [MergeMethod("ties", {"density": 0.5}), "average"], evaluate=Evaluate(images=50)
        )
        assert list(again["key"]) == list(table["key"])
        assert len(results(store.merges())) == 16
    rows = table[(table["label"] == "average") & (table["size"] == 2) & (table["level"] == 0.1)]
    [mean] = [r for r in shown["means"] if (r["label"], r["size"], r["level"]) == ("average", 2, 0.1)]
    assert mean["mean"] == pytest.approx(rows["loss"].mean(), rel=1e-12)
    with pytest.raises(SystemExit):
        main([*common])
    assert "paired differences of accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "two"], "--size two: give whole numbers"),
        (["--groups", "some:3"], "give random:N, or all"),
        (["--set", "density=0.2"], "no method has a parameter 'density'"),
        (["--method", "ties", "--set", "density=2"], "outside its domain"),
        (["--factor", "learning_rat"], "did you mean 'learning_rate'"),
        (["--fix", "batch_size"], "give NAME=VALUE"),
        (["--fix", "learning_rate=fast"], "give a number"),
        (["--size", "4"], "different tasks were asked for"),
        (["--out", "table.txt"], "ends in .csv"),
        (["--method", "fisher", "--size", "2", "--groups", "1"], "needs data"),
    ],
)
def test_the_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    finished_store(tmp_path / "grid", NAMES[:2], rates=(0.01,) if "4" in options else (0.01, 0.1)).close()
    with pytest.raises(SystemExit) as stop:
        main(["grid", "merge", str(tmp_path / "grid"), *options])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == pid and "resource_tracker" not in line:
            found.append(int(folder.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
