"""Cohort jobs, leases, preparation: everything of the engines that needs no worker process."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.bases.base import random_base
from experiments.engines.cohort_job import Done, pieces, run_cohort
from experiments.engines.dispatch import Dispatcher
from experiments.engines.errors import EngineError
from experiments.engines.mirror import Mirror, mirror_store
from experiments.engines.owner import is_gone, owner_name, short_name
from experiments.engines.prepare import prepare, spread, tidy
from experiments.engines.progress import Meter
from experiments.engines.workplace import Workplace
from experiments.evaluate.evaluate import evaluate
from experiments.evaluate.results import EvaluationSet
from experiments.finetune.reference import train_run
from experiments.finetune.task_expert import start_from
from experiments.grid.result import Cohort
from experiments.inputs.resident import residents
from experiments.models.form import input_format
from experiments.store import Store
from experiments.tasks.named import open_task
from tests.experiments.engine_grids import META, contents, planner_of, tiny_runs, tiny_store


@given(st.integers(1, 40), st.integers(0, 12))
def test_pieces_are_the_cohort_in_order(count: int, chunk: int) -> None:
    cohort = Cohort("c", tuple(f"{k}" for k in range(count)), "vmap", chunk, {"threads": 1})
    found = pieces(cohort)
    assert sum((piece.runs for piece in found), ()) == cohort.runs
    assert all(len(piece.runs) == max(chunk, 1) for piece in found[:-1])
    assert all(replace(piece, runs=()) == replace(cohort, runs=()) for piece in found)


@given(st.integers(1, 200), st.integers(1, 250))
def test_spread_takes_so_many_from_first_to_last(count: int, most: int) -> None:
    runs = tuple(range(count))
    found = spread(runs, most)  # type: ignore[arg-type]
    assert len(found) == min(count, most)
    assert list(found) == sorted(set(found))  # type: ignore[type-var]
    assert found[0] == 0
    assert most == 1 or found[-1] == count - 1


def test_a_cohort_job_gives_what_the_reference_and_an_evaluation_give(tmp_path: Path) -> None:
    run = tiny_runs(("flip",), 1, data_share=0.5, augment="light")[0]
    tiny_store(tmp_path, (run,))
    with Store.open(tmp_path) as store:
        plan = store.plan()
        assert plan is not None
        heard: list[Done] = []
        assert run_cohort(store, plan.cohorts[0], owner="me", resamples=50, watch=heard.append) == 1
        digest = store.runs()[0]
        found = store.result(digest)

    base = random_base("mlp_16", classes=10)
    task = open_task(run.task, seed=0)
    network, start = start_from(base, 10, run.seed)
    train, validation, test = residents(task, input_format(network), seed=run.seed, augment="light")
    assert digest == run.digest(base=base.digest, split=task.digest)
    expected = train_run(run, network, start, train)
    assert list(found.states) == [6, 12]
    for step, state in expected.states.items():
        assert all(torch.equal(tensor, found.states[step][name]) for name, tensor in state.items())
    np.testing.assert_array_equal(found.log.batch_loss, expected.log.batch_loss)
    assert heard[0].samples == 12 * 8
    rows = {(row["step"], row["part"], row["name"]): row for row in found.metrics}
    assert len(rows) == 2 * 2 * 4
    for step, state in expected.states.items():
        network.load_state_dict(dict(state))
        for part, data, draws in (("test", test, 50), ("validation", validation, 0)):
            measured = evaluate(network, EvaluationSet(task.name, data), resamples=draws)
            assert rows[step, part, "accuracy"]["value"] == measured.metrics.accuracy
            assert rows[step, part, "loss"]["value"] == measured.metrics.loss
            assert rows[step, part, "loss"]["low"] == (measured.intervals["loss"].low if draws else None)
            assert rows[step, part, "ece"]["n"] == len(data)


def test_an_interrupted_piece_is_trained_whole_and_only_what_is_missing_is_stored(tmp_path: Path) -> None:
    runs = tiny_runs(("identity",), 2)
    for name in ("whole", "parts"):
        tiny_store(tmp_path / name, runs, way="vmap", chunk=3)
    with Store.open(tmp_path / "whole") as store:
        plan = store.plan()
        assert plan is not None
        run_cohort(store, plan.cohorts[0])
    with Store.open(tmp_path / "parts") as store:
        stops = iter([False, True])
        assert run_cohort(store, plan.cohorts[0], stop=lambda: next(stops)) == 2
        kept = set(store.runs()) - set(store.missing())
        before = {digest: store.result(digest) for digest in kept}
        store.forget(sorted(kept)[:1])
        left = len(store.missing())
        assert run_cohort(store, plan.cohorts[0], owner="later") == left
        rows = store.frame()
        assert (rows.owner == "later").sum() == 2 * left
        assert set(before) <= set(store.runs())
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")


def test_starts_and_images_are_shared_and_are_those_of_one_run(tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs())
    with Store.open(tmp_path) as store:
        place = Workplace(store.base)
        jobs = {d: place.job(store.spec(d), *store.digests(d)) for d in store.runs()}
        for job in jobs.values():
            _, start = start_from(random_base("mlp_16", classes=10), 10, job.run.seed)
            assert list(job.start) == list(start)
            assert all(torch.equal(tensor, job.start[name]) for name, tensor in start.items())
        same = [job for job in jobs.values() if job.run.seed == 1 and job.run.task == "digits8:flip"]
        assert len(same) == 2
        assert same[0].train is same[1].train
        assert same[0].start["layers.0.weight"] is jobs[store.runs()[0]].start["layers.0.weight"]


def test_images_that_do_not_fit_are_dropped_and_read_again(tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(seeds=1))
    with Store.open(tmp_path) as store:
        one = (80 + 256 + 400) * 64
        place, roomy = Workplace(store.base, memory=one + 10), Workplace(store.base)
        for digest in (*store.runs(), *store.runs()):
            small, large = (w.job(store.spec(digest), *store.digests(digest)) for w in (place, roomy))
            rows = np.arange(20)
            assert torch.equal(small.train.batch(rows, 1)[0], large.train.batch(rows, 1)[0])
            assert len(place._images) == 1


def test_other_images_than_those_of_the_grid_are_refused(tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(seeds=1))
    with Store.open(tmp_path) as store:
        digest = store.runs()[0]
        base, _ = store.digests(digest)
        with pytest.raises(EngineError, match=r"digits8:identity.*not those that the grid began with"):
            Workplace(store.base).job(store.spec(digest), base, "0" * 64)


def _name(channel: object) -> None:
    channel.send(owner_name())  # type: ignore[attr-defined]


def test_owners_know_whether_their_process_runs() -> None:
    mine = owner_name()
    assert not is_gone(mine)
    assert mine != owner_name()
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_name, args=(theirs,), daemon=True)
    child.start()
    assert ours.poll(30)
    other = ours.recv()
    child.join(30)
    assert is_gone(other)
    host, space, process, _, part = mine.split(":")
    assert is_gone(":".join([host, space, process, "1", part]))  # the number was given to another process
    assert not is_gone(":".join(["elsewhere", space, "999999", "1", part]))
    assert not is_gone("somebody")
    assert short_name(mine) == f"{host}, process {process}"


def test_attempts_are_counted_and_what_was_given_up_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), 4), size=4)
    with Store.open(tmp_path) as store, Store.open(tmp_path) as other:
        with Dispatcher(store, attempts=2) as leases, Dispatcher(other) as second:
            first = leases.next()
            assert first is not None
            assert first.name == "c0"
            rest = second.next()
            assert rest is not None
            assert rest.name == "c1"
            assert leases.next() is None
            assert leases.went_wrong("c0", "trouble")
            again = leases.next()
            assert again is not None
            assert again.name == "c0"
            assert not leases.went_wrong("c0", "trouble again")
            assert leases.failed == {"c0": "trouble again"}
            assert leases.next() is None
            assert not leases.over()
            second.finished("c1")
            one = leases.next()
            assert one is not None
            run_cohort(store, one)
            leases.finished("c1")
            assert leases.over()
            assert not second.over()
            assert second.next() is not None  # another runner may try what this one gave up
        assert not store.status().leases


def test_what_a_dead_process_held_is_taken_over_at_once(tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), 2))
    host, space, process, _, part = owner_name().split(":")
    dead, far = ":".join([host, space, process, "1", part]), "elsewhere:x:1:1:abc"
    with Store.open(tmp_path) as store:
        assert store.lease(dead, 3600) is not None
        with Dispatcher(store) as leases:
            assert leases.next() is not None
    with Store.open(tmp_path) as store:
        assert store.lease(far, 3600) is not None
        with Dispatcher(store) as leases:
            assert leases.next() is None  # a machine that cannot be looked at keeps its lease until it ends


def test_time_left_counts_samples_not_runs() -> None:
    meter = Meter({"short": 10, "long": 990, "other": 1000}, total=5, kept=2, started=0.0)
    meter.add(Done("long", "diverged", 700, 1.0))
    now = meter.now()
    assert (now.done, now.total, now.diverged) == (3, 5, 1)
    assert now.left is not None
    assert meter.started == 0.0
    seconds = 60.0 / now.per_minute
    assert now.left == pytest.approx(seconds * 1010 / 990, rel=1e-6)
    meter.others(1)
    assert meter.now().done == 4


def test_a_grid_grows_and_keeps_its_first_cohorts(tmp_path: Path) -> None:
    runs = tiny_runs()
    first = prepare(tmp_path, spread(runs, 3), META, planner=planner_of(size=2))
    again = prepare(tmp_path, spread(runs, 3), META, planner=planner_of(size=1))
    assert again.plan == first.plan
    assert again.added == 0
    more = prepare(tmp_path, runs, META, planner=planner_of(size=5))
    assert more.plan.cohorts[: len(first.plan.cohorts)] == first.plan.cohorts
    assert more.added == len(runs) - 3
    with Store.open(tmp_path) as store:
        assert sorted(run for each in more.plan.cohorts for run in each.runs) == sorted(store.runs())


def test_a_store_of_another_grid_device_or_version_is_refused(tmp_path: Path) -> None:
    runs = tiny_runs(seeds=1)
    tiny_store(tmp_path, runs)
    with pytest.raises(EngineError, match=r"holds the grid 'tiny'.*another specification"):
        prepare(tmp_path, runs, {**META, "digest": "other"}, planner=planner_of())
    with pytest.raises(EngineError, match="its plan was made for cpu, not for cuda"):
        prepare(tmp_path, (), META, device="cuda", planner=planner_of())
    base = sqlite3.connect(tmp_path / "store.sqlite")
    with base:
        base.execute("UPDATE meta SET value = replace(value, '\"numerics\": ', '\"numerics\": 9') WHERE key = 'meta'")
    base.close()
    with pytest.raises(EngineError, match="numerics version 9"):
        tiny_store(tmp_path, runs)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(EngineError, match=r"file.*cannot be written"):
        tiny_store(file, runs)


def test_what_killed_runners_left_is_removed_when_the_grid_is_complete(tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), 1), size=9)
    orphan = tmp_path / "blobs" / "ab" / f"{'c' * 62}.safetensors"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"left behind")
    assert tidy(tmp_path) == 0
    with Store.open(tmp_path) as store:
        cohort = store.lease("me")
        assert cohort is not None
        run_cohort(store, cohort)
        store.release("me", cohort)
    assert tidy(tmp_path) == 1
    assert not orphan.exists()


def test_a_mirror_opens_as_a_store_and_copies_only_what_is_new(tmp_path: Path) -> None:
    tiny_store(tmp_path / "here", tiny_runs(("identity",), 1), size=1)
    there = tmp_path / "there"
    with Store.open(tmp_path / "here") as store:
        plan = store.plan()
        assert plan is not None
        run_cohort(store, plan.cohorts[0])
        assert mirror_store(tmp_path / "here", there.as_uri()) == 3  # base, one run, database
        run_cohort(store, plan.cohorts[1])
        assert mirror_store(tmp_path / "here", str(there)) == 2
    assert contents(there) == contents(tmp_path / "here")
    with pytest.raises(EngineError, match="no-such-protocol://x"):
        mirror_store(tmp_path / "here", "no-such-protocol://x")


@contextmanager
def _stopped() -> Iterator[None]:
    """The body must end by Ctrl-C."""
    with pytest.raises(KeyboardInterrupt):
        yield


def test_a_mirror_is_kept_while_a_grid_runs_and_when_it_is_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copied back, it is resumed to the bits of a grid that was never stopped."""
    runs = tiny_runs(("identity",), 1)
    for name in ("here", "whole"):
        tiny_store(tmp_path / name, runs, size=1)
    with Store.open(tmp_path / "whole") as store:
        for cohort in store.plan().cohorts:  # type: ignore[union-attr]
            run_cohort(store, cohort)
    there = tmp_path / "there"
    with Store.open(tmp_path / "here") as store:
        first, second = store.plan().cohorts  # type: ignore[union-attr]
        with _stopped(), Mirror(tmp_path / "here", str(there), every=0.05) as mirror:
            assert mirror.copies == 1
            with Store.open(there, "r") as copied:
                assert len(copied.missing()) == 2
            run_cohort(store, first)
            before, until = mirror.copies, time.monotonic() + 30
            while mirror.copies < before + 2 and time.monotonic() < until:  # one that began after the run
                time.sleep(0.02)
            with Store.open(there, "r") as copied:
                assert len(copied.missing()) == 1
            mirror._every = 60.0
            run_cohort(store, second)
            raise KeyboardInterrupt
    assert contents(there) == contents(tmp_path / "here")
    with Store.open(tmp_path / "here") as store, Mirror(tmp_path / "here", str(there), every=0):
        store.forget(store.runs()[1:])
    system, path = fsspec.core.url_to_fs(str(there))
    system.get(f"{path}/", str(tmp_path / "back"), recursive=True)
    with Store.open(tmp_path / "back") as store:
        assert len(store.missing()) == 1
        for cohort in store.plan().cohorts:  # type: ignore[union-attr]
            run_cohort(store, cohort)
        assert store.verify(deep=True).good
    assert contents(tmp_path / "back") == contents(tmp_path / "whole")


def test_a_mirror_that_refuses_is_an_error_unless_something_else_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_store(tmp_path / "s", tiny_runs(("identity",), 1), size=1)
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="cannot be written"), Mirror(tmp_path / "s", str(tmp_path / "file")):
        pytest.fail("a target that refuses is an error before anything runs")

    def refuses(*_: object, **__: object) -> int:
        raise EngineError("no space there")

    with _stopped(), Mirror(tmp_path / "s", str(tmp_path / "there"), every=0):
        monkeypatch.setattr("experiments.engines.mirror.mirror_store", refuses)
        raise KeyboardInterrupt
    assert "no space there; the copy there is older" in caplog.text
    monkeypatch.undo()
    with pytest.raises(EngineError, match="no space"), Mirror(tmp_path / "s", str(tmp_path / "there"), every=0):
        monkeypatch.setattr("experiments.engines.mirror.mirror_store", refuses)
