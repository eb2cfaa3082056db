"""``verify`` names what was altered in the database: a hyperparameter, a metric, a scalar of a log, a merge."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.store import Store, StoreError
from experiments.store.database import DATABASE
from tests.experiments.store.samples import BASE, result, spec, specs

NAMES = list(specs(3))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Three runs, one of them with NaN, infinities and a negative zero, and two merges."""
    with Store.create(tmp_path / "s", durable=False) as made:
        made.add_base(BASE)
        made.add_runs(specs(3), BASE.digest, "s")
        odd = ({"value": float("nan"), "low": -0.0, "high": float("inf")}, {"value": -0.0, "low": float("nan"), "n": 3})
        for seed, name in enumerate(NAMES):
            one = result(seed)
            rows = tuple(
                {"step": step, "part": part, "name": "loss", "tier": "measured"} | content
                for step, part, content in zip((2, 4), ("test", "validation"), odd, strict=True)
            )
            made.commit(name, dataclasses.replace(one, metrics=(*one.metrics, *rows)))
        made.add_merges([{"key": "m1", "accuracy": 0.5}, {"key": "m2", "accuracy": float("nan")}])
        yield made


def _edit(store: Store, sql: str) -> None:
    with store._database.writing() as connection:
        assert connection.execute(sql).rowcount == 1


def test_a_store_as_it_was_written_is_good(store: Store) -> None:
    found = store.verify(deep=True)
    assert found.good
    assert (found.unsealed_runs, found.unsealed_merges) == (0, 0)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("UPDATE runs SET learning_rate = 0.2 WHERE id = 2", "its specification, base or split was altered"),
        ("UPDATE runs SET split_digest = 't' WHERE id = 2", "its specification, base or split was altered"),
        ("UPDATE runs SET architecture = 'mlp_64' WHERE id = 2", "its column architecture was altered"),
        ("UPDATE runs SET momentum = 2.0 WHERE id = 2", "no specification"),
    ],
)
def test_an_altered_hyperparameter_is_named_and_its_run_kept_from_being_done_again(
    store: Store, sql: str, words: str
) -> None:
    _edit(store, sql)
    found = store.verify()
    assert found.renamed == (NAMES[1],)
    assert len(found.problems) == 1
    assert NAMES[1][:12] in found.problems[0]
    assert words in found.problems[0]
    assert not found.damaged
    assert not found.good


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("UPDATE metrics SET value = 0.75 WHERE checkpoint = 4 AND name = 'accuracy'", "its metrics were altered"),
        ("UPDATE metrics SET nan = 0 WHERE checkpoint = 3 AND name = 'loss'", "its metrics were altered"),
        ("UPDATE metrics SET n = 10 WHERE checkpoint = 4 AND name = 'accuracy'", "its metrics were altered"),
        ("DELETE FROM metrics WHERE checkpoint = 4 AND name = 'accuracy'", "its metrics were altered"),
        ("UPDATE results SET log = replace(log, 'true', 'false') WHERE run = 2", "scalars of its training log"),
        ("UPDATE results SET outcome = 'diverged' WHERE run = 2", "its outcome"),
        ("UPDATE results SET seconds = 9 WHERE run = 2", "its outcome, seconds"),
        ("UPDATE runs SET task = 'digits:1' WHERE id = 2", "task"),
        ("UPDATE checkpoints SET step = 3 WHERE id = 4", "list of checkpoints"),
        ("UPDATE results SET seals = 'x' WHERE run = 2", "its seals"),
    ],
)
def test_an_altered_number_is_named_and_its_run_can_be_done_again(store: Store, sql: str, words: str) -> None:
    _edit(store, sql)
    found = store.verify()
    assert found.damaged == (NAMES[1],)
    assert any(NAMES[1][:12] in problem and words in problem for problem in found.problems)
    assert store.forget(found.damaged) == 1
    assert store.missing() == (NAMES[1],)


def test_an_altered_merge_is_named_and_can_be_measured_again(store: Store) -> None:
    _edit(store, "UPDATE merges SET record = replace(record, '0.5', '0.6') WHERE key = 'm1'")
    found = store.verify()
    assert found.merges == ("m1",)
    assert "merge m1 was altered" in found.problems[0]
    assert store.forget_merges(found.merges) == 1
    assert store.merge_keys() == {"m2"}
    assert store.add_merges([{"key": "m1", "accuracy": 0.5}]) == 1
    assert store.verify().good


def test_rows_of_older_versions_are_reported_as_not_recorded(store: Store) -> None:
    file = store.folder / DATABASE
    store.close()
    raw = sqlite3.connect(file)
    raw.execute("ALTER TABLE results DROP COLUMN seals")
    raw.execute("ALTER TABLE merges DROP COLUMN seal")
    raw.execute("DROP TABLE tallies")
    raw.execute("PRAGMA user_version = 2")
    raw.commit()
    raw.close()
    for mode in ("r", "w"):  # read as it is; opened for writing it is brought up to date
        with Store.open(file.parent, mode) as old:  # type: ignore[arg-type]
            found = old.verify()
            assert found.good
            assert (found.unsealed_runs, found.unsealed_merges) == (3, 2)
            assert len(old.query("learning_rate == 0.1", final=True)) == 3
    with Store.open(file.parent) as newer:
        newer.forget(NAMES[:1])
        newer.commit(NAMES[0], result(0))
        assert newer.verify().unsealed_runs == 2
        newer.add_runs({d: r for d, r in [(spec(9).digest(base=BASE.digest, split="s"), spec(9))]}, BASE.digest, "s")


def test_a_sample_is_measured_again_number_by_number(store: Store) -> None:
    again = {name: store.result(name) for name in NAMES}
    found = store.verify(lambda digest, run: again[digest], sample=3)
    assert (found.remeasured, found.unequal) == (3, ())
    _edit(store, "UPDATE metrics SET value = 0.75 WHERE checkpoint = 4 AND name = 'accuracy'")
    found = store.verify(lambda digest, run: again[digest], sample=3)
    assert found.unequal == (
        (NAMES[1], "the metric test accuracy at step 4: value 0.75 is stored, 0.5 is measured now"),
    )
    fewer = {name: dataclasses.replace(one, metrics=one.metrics[:1]) for name, one in again.items()}
    assert "is not measured now" in store.verify(lambda digest, run: fewer[digest], sample=1).unequal[0][1]
    without = {name: dataclasses.replace(one, metrics=()) for name, one in again.items()}
    assert store.verify(lambda digest, run: without[digest], sample=3).remeasured == 0


def test_runs_of_another_numerics_version_are_not_taken_for_altered(store: Store) -> None:
    meta = json.dumps({"numerics": -1})
    _edit(store, f"UPDATE meta SET value = '{meta}' WHERE key = 'meta'")
    with Store.open(store.folder, "r") as opened:
        found = opened.verify()
        assert found.renamed == ()
        assert "numerics version -1" in found.problems[0]
        with pytest.raises(StoreError, match="sample"):
            opened.verify(sample=1)
