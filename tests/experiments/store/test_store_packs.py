"""Files that hold several runs: those of earlier versions are read, layouts are written once, a commit waits once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.bases.base import tensors_digest
from experiments.engines import cohort_job
from experiments.engines.cohort_job import Together, run_cohort
from experiments.engines.dispatch import Dispatcher
from experiments.grid.result import Cohort, Plan
from experiments.store import Store, StoreError
from experiments.store.blobs import blob_hash, blob_path
from experiments.store.content import bundle, pack, unpack_log, unpack_state
from experiments.store.garbage import collect
from tests.experiments.engine_grids import tiny_runs, tiny_store
from tests.experiments.store.samples import BASE, result, specs

GOLDEN = Path(__file__).parents[2] / "golden" / "store-format-1.safetensors"
"""Two runs as the first version wrote them: :func:`samples.result` 0 and 1."""


def _placed(folder: Path, data: bytes) -> str:
    name = blob_hash(data)
    path = blob_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


def test_files_of_the_first_format_are_read_to_the_same_bits(tmp_path: Path) -> None:
    name = _placed(tmp_path, GOLDEN.read_bytes())
    for seed, run in enumerate(specs(2)):
        expected = result(seed)
        for step, state in expected.states.items():
            assert tensors_digest(unpack_state(tmp_path, name, run, step, BASE.state)) == tensors_digest(state)
        scalars = {"seconds": 0.1, "finite": True}
        np.testing.assert_array_equal(unpack_log(tmp_path, name, run, scalars).batch_loss, expected.log.batch_loss)


def test_layouts_are_written_once_and_a_damaged_record_is_named(tmp_path: Path) -> None:
    runs = {run: pack(result(seed), BASE.state) for seed, run in enumerate(specs(8))}
    data = bundle(runs)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    record = json.loads(header["__metadata__"]["mergebound"])
    assert record["format"] == 2
    assert len(record["layouts"]) == 2  # of sixteen states, and of eight logs
    name = _placed(tmp_path, data)
    for run in runs:
        assert tensors_digest(unpack_state(tmp_path, name, run, 4, BASE.state)) == runs[run].digests[4]
    for wrong in ({**record, "layouts": []}, {**record, "format": 3}):
        header["__metadata__"]["mergebound"] = json.dumps(wrong)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        name = _placed(tmp_path, len(text).to_bytes(8, "little") + text + data[8 + size :])
        with pytest.raises(StoreError, match=r"its record is damaged|is not of a format") as caught:
            unpack_state(tmp_path, name, next(iter(runs)), 4, BASE.state)
        assert name[2:] in str(caught.value)


def test_counters_and_weights_in_any_order_of_memory_come_back() -> None:
    """BatchNorm's counters are packed as integers; views, transposes and negative steps give the same bits."""
    from experiments.store.codec import decode, encode

    base = {"n": torch.tensor(7), "w": torch.arange(12.0).reshape(3, 4), "low": torch.tensor([-(2**63), 5])}
    state = {"n": torch.tensor(-3), "w": torch.arange(24.0).reshape(4, 6).T[::2], "low": torch.tensor([2**63 - 1, 5])}
    stored, header = encode(state, base, "k")
    assert tensors_digest(decode(stored, header, base, "k")) == tensors_digest(state)
    assert header["exact"] == []


def _waits(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> int:
    """How often the disk is waited for while so many runs are committed together."""
    runs = specs(count)
    seen = 0
    true = os.fsync

    def counted(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        true(descriptor)

    with Store.create(folder) as store:
        store.add_base(BASE)
        store.add_runs(runs, BASE.digest, "s")
        store.freeze(Plan((Cohort("c", tuple(runs)),)))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted)
            assert store.commit_many({run: result(seed) for seed, run in enumerate(runs)}) == count
        assert store.status().cohorts_done == 1
        assert collect(store._database, folder, dry_run=True, older_than=0).files == ()
        assert store.verify(deep=True).good
    return seen


def test_many_runs_wait_for_the_disk_as_often_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _waits(tmp_path / "many", monkeypatch, 30) == _waits(tmp_path / "one", monkeypatch, 1) == 2


def test_short_pieces_share_a_commit_and_long_ones_do_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = Store.commit_many

    def noted(self: Store, results: Any, **rest: Any) -> int:
        sizes.append(len(results))
        return plain(self, results, **rest)

    monkeypatch.setattr(Store, "commit_many", noted)
    monkeypatch.setattr(cohort_job, "results_of", lambda piece, *_, **__: ((run, made[run]) for run in piece.runs))
    tiny_store(tmp_path / "a", tiny_runs(("identity",), 2), chunk=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with Store.open(tmp_path / "a", "r") as store:
        (cohort,) = store.plan().cohorts  # type: ignore[union-attr]
    for folder, wait in (("a", 60.0), ("b", 0.0)):
        monkeypatch.setattr(cohort_job, "TOGETHER", wait)
        monkeypatch.setattr(
            cohort_job.committed, "__kwdefaults__", cohort_job.committed.__kwdefaults__ | {"wait": wait}
        )
        with Store.open(tmp_path / folder) as store:
            made = {run: result(seed) for seed, run in enumerate(store.runs())}
            assert run_cohort(store, cohort) == 4
            assert not store.missing()
    assert sizes == [4, 1, 1, 1, 1]
    monkeypatch.setattr(cohort_job, "TOGETHER", 60.0)
    with Store.open(tmp_path / "a") as store:  # what came out before an error is kept
        last = cohort.runs[-1]
        store.forget(made)
        del made[last]
        with pytest.raises(KeyError):
            run_cohort(store, cohort)
        assert store.missing() == (last,)


def test_what_waits_is_committed_once_and_when_it_is_due(tmp_path: Path) -> None:
    with Store.create(tmp_path / "s") as store:
        store.add_base(BASE)
        store.add_runs(specs(3), BASE.digest, "s")
        names = list(specs(3))
        waiting = Together(store, "me", wait=3600.0)
        assert (waiting.due(), waiting.commit()) == (False, [])
        for seed, name in enumerate(names):
            waiting.add(name, result(seed))
        assert not waiting.due()
        assert store.missing() == tuple(names)
        assert [done.digest for done in waiting.commit()] == names
        assert waiting.commit() == []
        assert store.missing() == ()
        soon = Together(store, "me", wait=0.0)
        soon.add(names[0], result(0))
        assert soon.due()


def test_cohorts_that_were_given_up_are_seen_until_somebody_takes_them_again(tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), 2), size=2)
    with Store.open(tmp_path) as store:
        with Dispatcher(store, attempts=2) as leases:
            for retried in (True, False):
                cohort = leases.next()
                assert cohort is not None
                taken = cohort
                assert leases.went_wrong(cohort.name, "no memory\nat all") is retried
            (found,) = store.status().given_up
            assert (found.cohort, found.attempts, found.error, found.missing) == ("c0", 2, "no memory at all", 2)
            assert found.owner == leases.owner
        with Store.open(tmp_path, "r") as other:
            assert other.status().given_up == (found,)
        with Dispatcher(store) as leases:
            assert leases.next() == taken
            assert store.status().given_up == ()
            assert not leases.went_wrong("c0", "refused", again=False)
        assert store.status().given_up[0].attempts == 1
        store.commit_many({run: result(seed, outcome="diverged") for seed, run in enumerate(taken.runs)})
        assert store.status().given_up == ()


def test_known_runs_are_those_of_single_questions(tmp_path: Path) -> None:
    tiny_store(tmp_path, tiny_runs(("identity",), 2))
    with Store.open(tmp_path) as store:
        names = store.runs()[::-1]
        assert store.known(names) == {name: (store.spec(name), *store.digests(name)) for name in names}
        assert store.work() == {name: store.spec(name).steps * store.spec(name).batch_size for name in store.runs()}
        with pytest.raises(StoreError, match="knows no run 000000000000"):
            store.known([*names, "0" * 64])
