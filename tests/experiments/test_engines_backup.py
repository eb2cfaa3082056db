"""What lies where a store is copied to is not lost: other grids' copies, and results that the store lacks."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest

from experiments.cli import main
from experiments.engines.cohort_job import run_cohort
from experiments.engines.errors import EngineError
from experiments.engines.mirror import Mirror, check_mirror, mirror_store
from experiments.engines.prepare import prepare
from experiments.store import Store
from experiments.store.database import DATABASE
from tests.experiments.engine_grids import META, planner_of, tiny_runs, tiny_store

RUNS = tiny_runs(("identity",), 1)


def _do(folder: Path, *numbers: int) -> None:
    with Store.open(folder) as store:
        plan = store.plan()
        assert plan is not None
        for number in numbers:
            run_cohort(store, plan.cohorts[number])


def _bytes(url: str) -> bytes:
    with fsspec.open(f"{url}/{DATABASE}", "rb") as file:
        return bytes(file.read())


def test_a_new_store_does_not_replace_the_copy_of_a_lost_one(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    for name in ("old", "new"):
        tiny_store(tmp_path / name, RUNS, size=1)
    _do(tmp_path / "old", 0, 1)
    mirror_store(tmp_path / "old", url)
    kept = _bytes(url)
    lost = r"2 of its 2 results are not in .*new.*copy it back .*fs.get.*grid resume out/back.*--mirror-replace"
    with pytest.raises(EngineError, match=lost):
        check_mirror(tmp_path / "nothing/new", url, "tiny")  # before there is a store
    with pytest.raises(EngineError, match=lost), Mirror(tmp_path / "new", url):
        pytest.fail("refused before the body")
    _do(tmp_path / "new", 0)
    with pytest.raises(EngineError, match="1 of its 2 results"):
        mirror_store(tmp_path / "new", url)
    assert _bytes(url) == kept
    _do(tmp_path / "new", 1)  # the same bits: nothing is lost
    with Store.open(tmp_path / "old") as store:
        store.add_merges([{"key": "m", "accuracy": 0.5}])
    mirror_store(tmp_path / "old", url)
    with pytest.raises(EngineError, match=r"1 of its 1 merges are not in .*such as merge m"):
        mirror_store(tmp_path / "new", url)
    mirror_store(tmp_path / "new", url, replace=True)
    assert len(_bytes(url)) > 0
    check_mirror(tmp_path / "old", url)


def test_another_grids_copy_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    tiny_store(tmp_path / "one", RUNS, size=1)
    other = META | {"digest": "other", "grid": {"name": "second"}}
    prepare(tmp_path / "two", tiny_runs(("flip",), 1), other, planner=planner_of(), durable=False)
    there = tmp_path / "mir"
    mirror_store(tmp_path / "one", str(there))
    with pytest.raises(
        EngineError, match=r"^\S*mir: holds a copy of another grid, 'tiny' .0 runs.; .*--mirror-replace"
    ):
        check_mirror(tmp_path / "two", str(there), "other")
    with Mirror(tmp_path / "two", str(there), every=0, replace=True) as mirror:
        pass
    assert mirror.copies == 2
    with Store.open(there, "r") as store:
        assert store.meta["digest"] == "other"
    with Store.open(tmp_path / "one") as store:  # one that has grown from that grid takes the copy along
        store.set_meta(store.meta | {"digest": "larger", "extended": ["other"]})
    assert mirror_store(tmp_path / "one", str(there))


def test_the_command_refuses_before_it_makes_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_store(tmp_path / "mir", RUNS, size=1)
    (tmp_path / "g.yaml").write_text(
        "name: g\ntasks: [digits8:flip]\nbase: {kind: random, architecture: mlp_4, classes: 10}\n"
        "learning_rate: 0.1\nbatch_size: 8\nsteps: 6\n"
    )
    words = ["grid", "run", str(tmp_path / "g.yaml"), "--store", str(tmp_path / "new")]
    for more, said in (
        (["--mirror", str(tmp_path / "mir")], "holds a copy of another grid, 'tiny'"),
        (["--mirror-replace"], "--mirror-replace: is about a copy; give --mirror PLACE too"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, *more])
        assert stop.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_a_copy_that_another_runner_changed_is_read_again(tmp_path: Path) -> None:
    for name in ("here", "other"):
        tiny_store(tmp_path / name, RUNS, size=1)
    there = tmp_path / "mir"
    _do(tmp_path / "other", 0)
    with pytest.raises(EngineError, match="1 of its 1 results"), Mirror(tmp_path / "here", str(there), every=0):
        mirror_store(tmp_path / "other", str(there))


def test_the_store_itself_and_what_is_no_store_are_refused(tmp_path: Path) -> None:
    tiny_store(tmp_path / "s", RUNS, size=1)
    with pytest.raises(EngineError, match="is the folder of the store itself"):
        mirror_store(tmp_path / "s", str(tmp_path / "x" / ".." / "s"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / DATABASE).write_text("my notes")
    with pytest.raises(EngineError, match="is not a store's database, or is damaged"):
        mirror_store(tmp_path / "s", str(tmp_path / "notes"))
    assert (tmp_path / "notes" / DATABASE).read_text() == "my notes"


def test_what_a_killed_process_left_beside_the_database_counts_and_does_not_stay(tmp_path: Path) -> None:
    for name in ("here", "mir"):
        tiny_store(tmp_path / name, RUNS, size=1)
    held = Store.open(tmp_path / "mir")  # its result is in the write-ahead log alone while it is open
    run_cohort(held, held.plan().cohorts[0])  # type: ignore[union-attr]
    assert (tmp_path / "mir" / f"{DATABASE}-wal").stat().st_size > 0
    with pytest.raises(EngineError, match="1 of its 1 results"):
        mirror_store(tmp_path / "here", str(tmp_path / "mir"))
    held.close()
    (tmp_path / "mir" / f"{DATABASE}-wal").write_bytes(b"of another database")
    mirror_store(tmp_path / "here", str(tmp_path / "mir"), replace=True)
    assert not (tmp_path / "mir" / f"{DATABASE}-wal").exists()
    with Store.open(tmp_path / "mir", "r") as store:
        assert len(store.missing()) == 2
