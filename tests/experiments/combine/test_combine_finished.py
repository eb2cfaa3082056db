"""``grid merge`` says what a grid lacks, and refuses an unfinished one; tied fields are named where cells are empty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bases.base import random_base
from experiments.bases.spec import BaseSpec
from experiments.cli import main
from experiments.combine.designs import by_factor
from experiments.combine.finished import how_finished
from experiments.grid.result import RunResult
from experiments.grid.run_spec import RunSpec
from experiments.store import Store
from experiments.tasks.named import open_task
from tests.experiments.combine.grids import expert_state, finished_grid
from tests.experiments.combine.stores import NAMES, finished_store, log_of
from theory.errors import MergeboundError


def _lacking(folder: Path) -> None:
    """A store with one run that diverged, at learning rate 0.1, and one that is not done."""
    options = {"img_size": 8, "in_chans": 1}
    base = random_base("mlp_8", classes=10, options=options, seed=3)
    spec = BaseSpec(kind="random", architecture="mlp_8", classes=10, options=options, seed=3)
    split = open_task(NAMES[0]).digest
    with finished_store(folder, NAMES[:2]) as store:
        runs = {
            run.digest(base=base.digest, split=split): run
            for seed in (1, 2)
            for run in [
                RunSpec(
                    task=NAMES[0], base=spec, learning_rate=0.1, steps=4, batch_size=8, checkpoints=(2, 4), seed=seed
                )
            ]
        }
        store.add_runs(runs, base.digest, split)
        store.commit(next(iter(runs)), RunResult("diverged", {2: expert_state(base, 10, 9)}, log_of(2)))


def test_an_unfinished_grid_is_refused_and_what_it_lacks_is_always_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _lacking(tmp_path / "grid")
    common = ["grid", "merge", str(tmp_path / "grid"), "--factor", "learning_rate", "--size", "2", "--groups", "1"]
    common += ["--images", "20"]
    with pytest.raises(SystemExit) as stop:
        main(common)
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 6 runs are not done yet" in said
    assert "mergebound grid resume" in said
    assert "--unfinished" in said
    with Store.open(tmp_path / "grid", "r") as store:
        assert store.status().merges == 0
    with pytest.raises(SystemExit):
        main([*common, "--unfinished"])
    line = "1 of 6 runs are missing; 1 diverged experts were left out (learning_rate: 1 at 0.1)"
    assert line in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main([*common, "--unfinished", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["runs"], shown["missing_runs"], shown["diverged_experts"]) == (6, 1, 1)
    levels = [{"level": 0.01, "diverged": 0}, {"level": 0.1, "diverged": 1}]
    assert (shown["factor"], shown["diverged_by_level"]) == ("learning_rate", levels)
    assert [one["merges"] for one in shown["clamped"]] == [0]


def test_diverged_experts_are_counted_by_interval_and_by_what_is_held() -> None:
    frame = finished_grid("mlp_8", rates=(0.01, 0.02, 0.1, 0.2), with_states=False).frame()
    lost = frame["digest"].isin(frame["digest"].unique()[[0, 9, 15]])  # rates 0.01, 0.1 and 0.2 of the first task
    frame.loc[lost, "outcome"] = "diverged"
    intervals = by_factor(frame, "learning_rate", sizes=(2,), groups=1, bins=2).levels
    found = how_finished(frame, runs=70, missing=6, factor="learning_rate", levels=intervals)
    assert [count for _, count in found.by_level] == [1, 2]
    assert found.words.startswith("6 of 70 runs are missing; 3 diverged experts")
    held = how_finished(frame, runs=64, missing=0, fixed={"batch_size": [8]})
    rows = frame[lost & (frame["batch_size"] == 8)]
    assert (held.diverged, held.by_level) == (rows["digest"].nunique(), ())
    assert held.to_row() == {"runs": 64, "missing_runs": 0, "diverged_experts": held.diverged}


def test_a_tie_is_named_where_it_leaves_cells_empty() -> None:
    frame = finished_grid("mlp_8", with_states=False).frame()
    tied = frame[(frame["learning_rate"] == 0.01) == (frame["batch_size"] == 8)]
    with pytest.raises(MergeboundError, match=r"learning_rate is tied to batch_size .*--others free"):
        by_factor(tied, "learning_rate", sizes=(2,), groups=1)
    assert len(by_factor(tied, "learning_rate", sizes=(2,), groups=1, others="free")) == 2
    hole = frame[(frame["task"] != "ants") | (frame["learning_rate"] != 0.1)]
    with pytest.raises(MergeboundError, match=r"finish the grid.*--leave-out-missing") as caught:
        by_factor(hole, "learning_rate", sizes=(2,), groups=1)
    assert "tied" not in str(caught.value)
