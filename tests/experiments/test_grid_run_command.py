"""``mergebound grid run`` and ``grid resume`` as commands: options and the page, a stop, another folder, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli import main
from experiments.engines.cohort_job import run_cohort
from experiments.engines.progress import Outcome
from experiments.grid.yaml_source import read_grid
from experiments.store import Store
from tests.experiments.engine_grids import planner_of

GRID = """\
name: mine
tasks: [sets/mine.npz, digits8:flip]
base: {kind: random, architecture: mlp_4, classes: 10, options: {img_size: 8}}
learning_rate: [0.01, 0.1]
batch_size: 8
steps: 6
store: out
"""


class InProcess:
    """Stands in for the workers: cohorts one after the other in this process; ``most`` of them, then Ctrl-C.

    Cohort number ``given_up`` is left undone, with an error.
    """

    def __init__(self, most: int | None = None, given_up: int | None = None) -> None:
        self.most, self.given_up = most, given_up
        self.called: dict[str, Any] = {}

    def __call__(self, folder: Path, root: Any, **options: Any) -> Outcome:
        self.called = {"root": root} | options
        with Store.open(folder) as store:
            plan = store.plan()
            assert plan is not None
            new, failed = 0, {}
            for number, cohort in enumerate(plan.cohorts):
                if number == self.most:
                    raise KeyboardInterrupt
                if number == self.given_up:
                    failed[cohort.name] = "no reason"
                    continue
                new += run_cohort(store, cohort, root, resamples=options["resamples"])
            total, missing = len(store.runs()), len(store.missing())
        return Outcome(total, total - missing, new, 0, failed, 1.0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a grid on a data set that is named by a relative path."""
    rng = np.random.default_rng([0, 0x9C])
    parts = {}
    for part, n in (("train", 60), ("test", 20)):
        parts[f"x_{part}"] = rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
        parts[f"y_{part}"] = np.arange(n) % 3
    (tmp_path / "sets").mkdir()
    np.savez(tmp_path / "sets" / "mine.npz", **parts)
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.finetune.cohort.planner.make_plan", planner_of(size=1))
    return tmp_path


def _call(monkeypatch: pytest.MonkeyPatch, engine: InProcess, *words: object) -> int:
    monkeypatch.setattr("experiments.engines.local.run_local", engine)
    with pytest.raises(SystemExit) as stop:
        main(["grid", *map(str, words)])
    return int(stop.value.code or 0)


def test_a_grid_that_is_stopped_is_resumed_from_another_folder_to_the_same_bits(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = InProcess()
    assert _call(monkeypatch, whole, "run", "grid.yaml", "--store", "whole", "--workers", 3, "--resamples", 7) == 0
    assert (whole.called["device"], whole.called["workers"], whole.called["resamples"]) == ("cpu", 3, 7)
    said = capsys.readouterr().err
    assert "4 runs in 4 cohorts; the plan is in whole" in said
    assert "4 runs done in 1 s; 4 of 4 are stored" in said
    assert _call(monkeypatch, InProcess(most=1), "run", "grid.yaml", "--resamples", 7) == 130  # the page says where
    with Store.open(place / "out", "r") as store:
        assert len(store.missing()) == 3
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert _call(monkeypatch, InProcess(given_up=3), "resume", "../out", "--resamples", 7) == 1
    said = capsys.readouterr().err
    assert "given up: cohort c3: no reason" in said
    assert "2 runs done in 1 s; 3 of 4 are stored" in said
    assert "go on with `mergebound grid resume ../out`" in said
    assert _call(monkeypatch, InProcess(), "resume", "../out", "--resamples", 7) == 0
    with Store.open(place / "out", "r") as store, Store.open(place / "whole", "r") as other:
        assert {store.spec(digest).task for digest in store.runs()} == {f"{place}/sets/mine.npz", "digits8:flip"}
        assert not store.missing()
        for digest in other.runs():
            ours, theirs = store.result(digest), other.result(digest)
            assert [dict(row) for row in ours.metrics] == [dict(row) for row in theirs.metrics]
            for step, state in theirs.states.items():
                for name, tensor in state.items():
                    np.testing.assert_array_equal(ours.states[step][name].numpy(), tensor.numpy())


def test_a_grid_grows_without_doing_anything_twice(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run becomes four: the store then holds what a grid of four holds; a page without a stored run is refused."""
    small = GRID.replace("[0.01, 0.1]", "[0.1]").replace(
        "tasks: [sets/mine.npz, digits8:flip]", "tasks: [digits8:flip]"
    )
    (place / "grid.yaml").write_text(small)
    assert _call(monkeypatch, InProcess(), "run", "grid.yaml", "--resamples", 0) == 0
    with Store.open(place / "out", "r") as store:
        [first] = store.runs()
        before = store.result(first)
        old = store.meta["digest"]
    (place / "more.yaml").write_text(GRID)
    assert _call(monkeypatch, InProcess(), "run", "more.yaml", "--resamples", 0) == 2
    assert "--extend" in " ".join(capsys.readouterr().err.split())
    refused = ("run", "more.yaml", "--extend", "--limit-runs", 2)
    assert _call(monkeypatch, InProcess(), *refused) == 2
    engine = InProcess(most=2)  # of the old cohort and three new ones
    assert _call(monkeypatch, engine, "run", "more.yaml", "--resamples", 0, "--extend") == 130
    assert "the grid has grown: 3 runs are new" in capsys.readouterr().err
    assert _call(monkeypatch, InProcess(), "resume", "out", "--resamples", 0) == 0
    assert "2 runs done in 1 s; 4 of 4 are stored" in capsys.readouterr().err
    assert _call(monkeypatch, InProcess(), "run", "more.yaml", "--store", "whole", "--resamples", 0) == 0
    with Store.open(place / "out", "r") as store, Store.open(place / "whole", "r") as whole:
        assert set(store.runs()) == set(whole.runs())
        assert store.meta["digest"] == whole.meta["digest"]
        assert store.meta["extended"] == [old]
        assert store.runs()[0] == first
        assert store.result(first).seconds == before.seconds  # not done again
        for digest in whole.runs():
            for name, tensor in whole.state(digest).items():
                np.testing.assert_array_equal(store.state(digest)[name].numpy(), tensor.numpy())
    (place / "less.yaml").write_text(GRID.replace("[0.01, 0.1]", "[0.01, 0.2]"))
    capsys.readouterr()
    assert _call(monkeypatch, InProcess(), "run", "less.yaml", "--extend") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of its 4 runs are not in the new specification" in said
    assert "learning_rate 0.1" in said
    with Store.open(place / "out", "r") as store:
        assert len(store.runs()) == 4


def test_a_grid_that_was_stopped_before_its_first_run_finds_its_files_from_another_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("experiments.engines.prepare._add_runs", stop)
        assert _call(patch, InProcess(), "run", "grid.yaml") == 130
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert _call(monkeypatch, InProcess(), "resume", "../out", "--resamples", 0) == 0
    with Store.open(place / "out", "r") as store:
        assert len(store.runs()) == 4


def test_what_is_refused_before_anything_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: object) -> str:
        assert _call(monkeypatch, InProcess(), *words) == 2
        return " ".join(capsys.readouterr().err.split())

    (place / "grid.yaml").write_text(GRID.replace("store: out\n", ""))
    assert "grid.yaml: says no store; give --store FOLDER" in refused("run", "grid.yaml")
    assert "--engine cloud: is unknown" in refused("run", "grid.yaml", "--store", "out", "--engine", "cloud")
    assert "--address: is of a Ray cluster" in refused("run", "grid.yaml", "--store", "out", "--address", "auto")
    (place / "grid.yaml").write_text(GRID + "device: gpu0\n")
    assert "grid.yaml, line 8: device: gpu0: there is no such kind of device" in refused("run", "grid.yaml")
    assert not (place / "out").exists()
    (place / "empty").mkdir()
    assert refused("resume", "empty")


def test_the_page_and_the_digest_do_not_depend_on_where_it_runs(place: Path) -> None:
    spec = read_grid("grid.yaml").spec
    (place / "other.yaml").write_text(GRID.replace("store: out", "store: elsewhere"))
    assert read_grid("other.yaml").spec.digest() == spec.digest()
    assert json.loads(json.dumps(spec.content()))["store"] == "out"
