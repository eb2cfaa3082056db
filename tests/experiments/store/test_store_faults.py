"""Whatever moment a process dies at, or the disk fills, a run is absent or complete."""

import errno
import multiprocessing
import os
import sqlite3
from pathlib import Path

import pytest

from experiments.bases.base import tensors_digest
from experiments.grid.result import Cohort, Plan
from experiments.store import Store, StoreConflict, StoreError, database
from experiments.store.blobs import blob_path
from experiments.store.schema import MIGRATIONS, VERSION
from tests.experiments.store.samples import BASE, result, spec, specs

FORK = multiprocessing.get_context("fork")


def new_store(folder: Path, count: int = 3, **options: object) -> Store:
    store = Store.create(folder, **options)  # type: ignore[arg-type]
    store.add_base(BASE)
    runs = specs(count)
    store.add_runs(runs, BASE.digest, "s")
    if runs:
        store.freeze(Plan((Cohort("c", tuple(runs)),)))
    return store


def _die_at(folder: Path, digest: str, moment: int) -> None:
    """Commit a run in this process, which ends without any clean-up at the given call that touches the disk."""
    seen = 0

    def count() -> None:
        nonlocal seen
        if seen == moment:
            os._exit(9)
        seen += 1

    def fatal(function):  # type: ignore[no-untyped-def]
        def called(*args, **kwargs):  # type: ignore[no-untyped-def]
            count()
            return function(*args, **kwargs)

        return called

    os.fsync, os.replace = fatal(os.fsync), fatal(os.replace)
    with Store.open(folder) as store:
        store._database.connection.set_trace_callback(lambda sql: count())
        store.commit(digest, result(0))
    os._exit(0)


def test_dying_at_any_write_leaves_the_run_absent_or_complete(tmp_path: Path) -> None:
    names = list(specs(40))
    with new_store(tmp_path, 0) as store:
        store.add_runs(specs(40), BASE.digest, "s")
        store.freeze(Plan(tuple(Cohort(f"c{k}", (name,)) for k, name in enumerate(names))))
    outcomes: list[bool] = []
    for moment, name in enumerate(names):
        child = FORK.Process(target=_die_at, args=(tmp_path, name, moment), daemon=True)
        child.start()
        child.join(60)
        with Store.open(tmp_path) as store:
            there = store.outcome(name) == "finished"
            left = len(names) - moment - there
            assert store.status().missing == len(store.missing()) == left
            if not there:
                assert store.query(digest=name).empty
                store.gc(older_than=0)
                assert sum(1 for _ in (tmp_path / "blobs").glob("*/*")) == 1 + moment  # the base and earlier runs
                cohort = store.lease("next", 10)
                assert cohort is not None
                assert cohort.name == f"c{moment}"
                assert store.commit(name, result(0))
            assert tensors_digest(store.state(name, 2)) == tensors_digest(result(0).states[2])
        outcomes.append(there)
        if child.exitcode == 0:
            break
    assert child.exitcode == 0
    assert outcomes.count(False) >= 5
    assert outcomes == sorted(outcomes)  # once complete, always complete
    with Store.open(tmp_path) as store:
        assert store.verify(deep=True).good


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    with new_store(tmp_path / "s") as store:
        first = next(iter(specs(1)))
        before = sorted((tmp_path / "s" / "blobs").glob("*/*"))

        def refuse(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            if call == "open":
                patch.setattr("experiments.store.blobs.open", refuse, raising=False)
            else:
                patch.setattr(os, call, refuse)
            with pytest.raises(StoreError, match=r"disk is full|may not be written|refuses") as caught:
                store.commit(first, result(0))
        assert "\n" not in str(caught.value)
        assert sorted((tmp_path / "s" / "blobs").glob("*/*")) == before
        assert store.outcome(first) is None
        assert store.commit(first, result(0))


def test_a_full_database_is_one_error_and_goes_on_after_space_is_freed(tmp_path: Path) -> None:
    with new_store(tmp_path / "s", 40) as store:
        connection = store._database.connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        names = list(specs(40))
        failed = None
        for seed, name in enumerate(names):
            try:
                store.commit(name, result(seed))
            except StoreError as error:
                failed = (name, seed, str(error))
                break
        assert failed is not None
        assert "disk is full" in failed[2]
        assert store.outcome(failed[0]) is None
        connection.execute("PRAGMA max_page_count = 1000000")
        assert store.commit(failed[0], result(failed[1]))
        assert store.verify(deep=True).good


def test_a_damaged_file_is_named_and_its_run_can_be_done_again(tmp_path: Path) -> None:
    with new_store(tmp_path / "s") as store:
        names = list(specs(3))
        for seed, name in enumerate(names):
            store.commit(name, result(seed))
        blob = store._database.read("SELECT blob FROM results ORDER BY run")[1]["blob"]
        path = blob_path(tmp_path / "s", blob)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        found = store.verify()
        assert found.damaged == (names[1],)
        assert str(path) in found.problems[0]
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(StoreError, match=path.name):
            store.state(names[1])
        assert store.forget(found.damaged) == 1
        assert store.missing() == (names[1],)
        assert store.lease("x", 5) is not None
        path.unlink()
        store.commit(names[1], result(1))
        assert store.verify(lambda d, run: result(run.seed), sample=3, deep=True).good
        assert store.verify(lambda d, run: result(run.seed, bits=1), sample=2).unequal[0][1] == "the weights at step 2"


def test_a_run_that_is_done_again_replaces_the_damaged_file_of_its_name(tmp_path: Path) -> None:
    """The same bits have the same name, and the damaged file may have the right size."""
    with new_store(tmp_path / "s") as store:
        name = next(iter(specs(1)))
        store.commit(name, result(0))
        path = blob_path(tmp_path / "s", store._database.read("SELECT blob FROM results")[0]["blob"])
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        assert store.forget(store.verify().damaged) == 1
        assert store.commit(name, result(0))
        assert store.verify(deep=True).good


def test_other_bits_for_the_same_run_are_refused_and_recorded(tmp_path: Path) -> None:
    with new_store(tmp_path / "s") as store:
        first, second, _ = specs(3)
        assert store.commit(first, result(0), owner="a")
        assert not store.commit(first, result(0), owner="b")
        with pytest.raises(StoreConflict, match="other bits than b"):
            store.commit_many({first: result(0, bits=1), second: result(1)}, owner="b")
        assert store.outcome(second) == "finished"
        assert store.status().conflicts == 1
        assert tensors_digest(store.state(first, 2)) == tensors_digest(result(0).states[2])


def test_divergence_is_an_outcome_with_the_last_finite_state(tmp_path: Path) -> None:
    with new_store(tmp_path / "s") as store:
        first = next(iter(specs(1)))
        store.commit(first, result(0, outcome="diverged", value=float("nan")))
        assert store.outcome(first) == "diverged"
        assert store.status().diverged == 1
        row = store.query("outcome == 'diverged' and isnan(test_accuracy)").iloc[0]
        assert (row["step"], row["final"]) == (2, True)
        assert tensors_digest(store.state(first)) == tensors_digest(result(0, outcome="diverged").states[2])


def test_an_old_file_is_migrated_and_a_newer_one_refused(tmp_path: Path) -> None:
    with new_store(tmp_path / "s") as store:
        first = next(iter(specs(1)))
        store.commit(first, result(0))
    file = tmp_path / "s" / database.DATABASE
    raw = sqlite3.connect(file)
    for thing in ("TABLE conflicts", "TABLE merges", "TABLE measures", "TABLE tallies", "INDEX metrics_nan"):
        raw.execute(f"DROP {thing}")
    raw.execute("ALTER TABLE results DROP COLUMN seals")
    raw.execute("PRAGMA user_version = 1")
    raw.commit()
    schema = {row[0] for row in raw.execute("SELECT name FROM sqlite_schema WHERE name NOT LIKE 'sqlite%'")}
    raw.close()
    fresh = sqlite3.connect(":memory:")
    fresh.executescript(MIGRATIONS[0])
    assert schema == {row[0] for row in fresh.execute("SELECT name FROM sqlite_schema WHERE name NOT LIKE 'sqlite%'")}
    with pytest.raises(StoreError, match="older version"):
        Store.open(tmp_path / "s", "r")
    with Store.open(tmp_path / "s") as store:
        assert store._database.read("PRAGMA user_version")[0][0] == VERSION
        assert len(store.query("test_accuracy == 0.5")) == 2
        assert store.add_merges([{"x": 1}]) == 1
    raw = sqlite3.connect(file)
    raw.execute(f"PRAGMA user_version = {VERSION + 1}")
    raw.commit()
    raw.close()
    with pytest.raises(StoreError, match="newer version of mergebound"):
        Store.open(tmp_path / "s")


def test_a_lock_that_stays_is_a_clear_error(tmp_path: Path) -> None:
    new_store(tmp_path / "s").close()
    other = sqlite3.connect(tmp_path / "s" / database.DATABASE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Store.open(tmp_path / "s", patience=0.3) as store:
        with pytest.raises(StoreError, match="other processes held the store"):
            store.add_runs({}, "", "")
        other.execute("ROLLBACK")
        assert store.lease("me", 5) is not None
    other.close()


def _hammer(folder: Path, owner: str) -> None:
    with Store.open(folder) as store:
        while (cohort := store.lease(owner, 30)) is not None:
            for name in store.missing(cohort):
                store.commit(name, result(store.spec(name).seed), owner=owner)
            store.release(owner, cohort)


def test_two_processes_share_one_store(tmp_path: Path) -> None:
    count = 40
    with Store.create(tmp_path / "s", durable=False) as store:
        store.add_base(BASE)
        runs = specs(count)
        store.add_runs(runs, BASE.digest, "s")
        names = list(runs)
        store.freeze(Plan(tuple(Cohort(f"c{k}", tuple(names[k : k + 2])) for k in range(0, count, 2))))
    children = [FORK.Process(target=_hammer, args=(tmp_path / "s", owner), daemon=True) for owner in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    with Store.open(tmp_path / "s", "r") as store:
        assert store.status().finished == count
        assert store.verify(deep=True).good
        assert store.gc(dry_run=True, older_than=0).files == ()


def test_what_is_no_store_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        Store.open(tmp_path)
    (tmp_path / database.DATABASE).write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"store\.sqlite: is not a store's database"):
        Store.open(tmp_path)
    with new_store(tmp_path / "s") as store, pytest.raises(StoreError, match="add it with add_runs"):
        store.commit("0" * 64, result(0))
    with pytest.raises(StoreError, match="holds a store already"):
        Store.create(tmp_path / "s")
    with Store.open(tmp_path / "s", "r") as store, pytest.raises(StoreError, match="opened for reading"):
        store.add_runs({}, "", "")


def test_runs_and_plans_are_checked(tmp_path: Path) -> None:
    with new_store(tmp_path / "s") as store:
        run = spec(99)
        with pytest.raises(StoreError, match="not that of its specification"):
            store.add_runs({"0" * 64: run}, BASE.digest, "s")
        names = tuple(specs(3))
        assert store.freeze(Plan((Cohort("c", names),))) == 0
        with pytest.raises(StoreError, match="keeps its plan"):
            store.freeze(Plan((Cohort("c", names[:2]),)))
        with pytest.raises(StoreError, match="in another cohort"):
            store.freeze(Plan((Cohort("d", names[:1]),)))
        plan = store.plan()
        assert plan is not None
        assert plan.cohorts == (Cohort("c", names),)
