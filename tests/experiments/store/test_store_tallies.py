"""``verify`` sees rows that are lost, and makes them be done again."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.grid.result import Cohort, Plan
from experiments.store import Store, StoreConflict
from experiments.store.database import DATABASE
from tests.experiments.store.samples import BASE, result, specs

NAMES = list(specs(4))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs in two cohorts, one of them done twice with other bits, and three merges."""
    folder = tmp_path_factory.mktemp("tallies") / "s"
    with Store.create(folder, durable=False) as store:
        store.add_base(BASE)
        store.add_runs(specs(4), BASE.digest, "s")
        store.freeze(Plan((Cohort("c0", tuple(NAMES[:2])), Cohort("c1", tuple(NAMES[2:])))))
        for seed, name in enumerate(NAMES):
            store.commit(name, result(seed), owner="a")
        with pytest.raises(StoreConflict):
            store.commit(NAMES[0], result(0, bits=1), owner="b")
        store.add_merges({"key": f"m{k}", "accuracy": 0.5} for k in range(3))
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Iterator[Store]:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "s")
    with Store.open(tmp_path / "s") as opened:
        yield opened


def _by_hand(store: Store, *statements: str) -> None:
    """As somebody with the command line of SQLite would: no foreign keys."""
    raw = sqlite3.connect(store.folder / DATABASE)
    for sql in statements:
        assert raw.execute(sql).rowcount >= 1
    raw.commit()
    raw.close()


def _exit_code(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["grid", *map(str, words)])
    return int(caught.value.code or 0)


RESULT = (
    "DELETE FROM metrics WHERE checkpoint IN (SELECT id FROM checkpoints WHERE run = 2)",
    "DELETE FROM checkpoints WHERE run = 2",
    "DELETE FROM results WHERE run = 2",
)


@pytest.mark.parametrize(
    ("statements", "table", "words"),
    [
        (("DELETE FROM merges WHERE key = 'm1'",), "merges", "1 of 3 rows of its merges are lost"),
        (("DELETE FROM merges",), "merges", "3 of 3 rows of its merges are lost"),
        (("UPDATE merges SET key = 'm9', seal = NULL WHERE key = 'm1'",), "merges", "altered or exchanged"),
        (("INSERT INTO merges VALUES ('m9', 0, '{}', NULL)",), "merges", "were put in by something else"),
        (RESULT, "results", f"1 of 4 rows of its results are lost (run {NAMES[1][:12]})"),
        (("DELETE FROM conflicts",), "conflicts", "1 of 1 rows of its conflicts are lost"),
        (("DELETE FROM bases",), "bases", "1 of 1 rows of its bases are lost"),
        ((*RESULT, "DELETE FROM runs WHERE id = 2"), "runs", "1 of 4 rows of its runs are lost"),
        (("UPDATE runs SET cohort = NULL WHERE id = 2",), "cohorts", "rows of its cohorts were altered"),
        (("UPDATE cohorts SET chunk = 7 WHERE id = 1",), "cohorts", "rows of its cohorts were altered"),
        (("DELETE FROM cohorts WHERE id = 2",), "cohorts", "1 of 2 rows of its cohorts are lost"),
        (
            ("UPDATE cohorts SET missing = 1 WHERE id = 2",),
            "cohorts",
            "c1 says that 1 of its runs are to be done, and 0",
        ),
        (("DELETE FROM meta WHERE key = 'plan'",), "cohorts", "device and seed of its plan are lost"),
        (("DELETE FROM measures",), "measures", "the list of metrics lacks test accuracy"),
        (("DELETE FROM tallies WHERE name = 'merges'",), "merges", "tally of its merges is lost"),
        (("UPDATE tallies SET digest = 'x' WHERE name = 'merges'",), "merges", "tally of its merges is lost"),
        (("UPDATE tallies SET count = 4 WHERE name = 'merges'",), "merges", "1 of 4 rows of its merges are lost"),
    ],
)
def test_rows_that_are_lost_are_seen(store: Store, statements: tuple[str, ...], table: str, words: str) -> None:
    assert store.verify().good
    _by_hand(store, *statements)
    found = store.verify()
    assert table in found.lost
    assert any(words in problem for problem in found.problems), found.problems
    assert not found.good
    store.accept_losses()
    kept = store.verify()
    assert kept.lost == (("cohorts",) if "meta" in statements[0] else ())  # what has a remedy has it


def test_what_is_lost_can_be_done_again(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    _by_hand(store, *RESULT, "DELETE FROM merges WHERE key = 'm1'")
    assert store.lease("me") is None  # nobody would do it
    assert _exit_code("verify", store.folder) == 1
    assert "cohort c0 says that 0 of its runs are to be done, and 1 are" in capsys.readouterr().out
    assert _exit_code("verify", store.folder, "--forget-damaged") == 1
    assert "the rows of results, merges, cohorts were counted anew" in capsys.readouterr().out
    leased = store.lease("me")
    assert leased is not None
    assert store.missing(leased) == (NAMES[1],)
    assert store.commit(NAMES[1], result(1))
    assert store.add_merges([{"key": f"m{k}", "accuracy": 0.5} for k in (2, 1, 1)]) == 1
    assert store.lease("you") is None
    assert store.verify(deep=True).good


def test_the_tally_is_a_sum_over_the_rows_in_any_order(store: Store) -> None:
    """Against its definition; what is forgotten and done again leaves it as it was."""

    def tally(name: str) -> tuple[int, str]:
        return store._database.read_tuples("SELECT count, digest FROM tallies WHERE name = ?", (name,))[0]

    def defined(names: list[str]) -> tuple[int, str]:
        hashes = [int(hashlib.sha256(json.dumps([name]).encode()).hexdigest(), 16) for name in names]
        return len(names), f"{sum(hashes) % 2**256:064x}"

    assert tally("results") == tally("runs") == defined(NAMES)
    assert store.forget([*NAMES[1:3], NAMES[1], "0" * 64]) == 2
    assert tally("results") == defined([NAMES[0], NAMES[3]])
    store.commit_many({name: result(k) for k, name in reversed(list(enumerate(NAMES)))})
    assert tally("results") == defined(NAMES)
    assert store.forget_merges(["m1", "m7"]) == 1
    assert tally("merges") == defined(["m2", "m0"])
    store.forget(NAMES[:1])
    assert tally("conflicts") == defined([])


def test_a_store_of_an_older_version_is_counted_when_it_is_opened(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    file = store.folder / DATABASE
    store.close()
    raw = sqlite3.connect(file)
    raw.execute("DROP TABLE tallies")
    raw.execute("PRAGMA user_version = 3")
    raw.commit()
    raw.close()
    with Store.open(file.parent, "r") as old:
        found = old.verify()
        assert (found.good, found.counted) == (True, False)
    assert _exit_code("verify", file.parent) == 0
    assert "rows were not counted by the older version" in capsys.readouterr().out
    with Store.open(file.parent) as newer:
        found = newer.verify()
        assert (found.good, found.counted) == (True, True)
        assert found.counted_since is not None
        _by_hand(newer, "DELETE FROM merges WHERE key = 'm1'")
        assert newer.verify().lost == ("merges",)


def _adding(folder: Path, first: int) -> None:
    with Store.open(folder) as store:
        for k in range(first, first + 20):
            store.add_merges([{"key": f"n{k}"}, {"key": "shared"}])


def test_several_processes_count_together(store: Store) -> None:
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_adding, args=(store.folder, first), daemon=True) for first in (0, 10)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(store.merge_keys()) == 3 + 30 + 1
    assert store.verify().good
