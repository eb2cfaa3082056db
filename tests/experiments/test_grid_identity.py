"""A store answers for what its runs are named by: networks, data, version and device are those that it began with."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.bases.base import random_base
from experiments.commands import grid_run, grid_store, grid_work
from experiments.engines.errors import EngineError
from experiments.engines.prepare import prepare
from experiments.engines.worker import is_of_disk, worth_another
from experiments.engines.workplace import Workplace
from experiments.finetune.cohort.planner import machine
from experiments.finetune.reference import train_run
from experiments.finetune.task_expert import start_from
from experiments.grid.errors import GridError
from experiments.grid.expand import expand
from experiments.grid.preflight import check_grid
from experiments.grid.yaml_source import parse_grid
from experiments.inputs.resident import residents
from experiments.models.form import input_format
from experiments.store import Store, StoreBusy
from experiments.store.errors import StoreError
from experiments.tasks.named import open_task
from tests.experiments.engine_grids import META, planner_of, tiny_runs, tiny_store

GRID = """\
name: g
tasks: [digits8:flip]
base: {kind: random, architecture: mlp_16, classes: 10}
learning_rate: 0.1
batch_size: 8
steps: 10
"""


def test_networks_that_begin_with_the_same_tensors_are_told_apart(tmp_path: Path) -> None:
    names = ("mlp_16", "mlp_16_tanh")
    one, other = (random_base(name, classes=10) for name in names)
    assert one.digest == other.digest  # only the activation differs
    bases = [{"kind": "random", "architecture": name, "classes": 10} for name in names]
    runs = tuple(run for base in bases for run in tiny_runs(("flip",), 1, base=base))
    for _ in range(2):  # a second preparation finds the same names
        tiny_store(tmp_path, runs)
    with Store.open(tmp_path) as store:
        assert len(store.runs()) == len(runs)
        place = Workplace(store.base)
        assert len({store.digests(digest)[0] for digest in store.runs()}) == 2
        for digest in store.runs():
            run = store.spec(digest)
            assert digest == run.digest(base=one.digest, split=store.digests(digest)[1])
            job = place.job(run, *store.digests(digest))
            network, start = start_from(random_base(run.architecture, classes=10), 10, run.seed)
            task = open_task(run.task, seed=0)
            train = residents(task, input_format(network), seed=run.seed)[0]
            expected, found = train_run(run, network, start, train), train_run(run, job.network, job.start, job.train)
            np.testing.assert_array_equal(found.log.batch_loss, expected.log.batch_loss)
            assert store.base(store.digests(digest)[0]).architecture == run.architecture
        assert store.verify().good


def _npz(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = {}
    for part, n in (("train", 60), ("test", 20)):
        parts[f"x_{part}"] = rng.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
        parts[f"y_{part}"] = np.arange(n) % 3
    np.savez(path, **parts)


def test_data_that_changed_since_the_grid_began_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    _npz(file, 0)
    runs = tuple(run.model_copy(update={"task": str(file)}) for run in tiny_runs(("flip",), 1))
    tiny_store(tmp_path / "store", runs)
    tiny_store(tmp_path / "store", runs)
    _npz(file, 1)
    with pytest.raises(EngineError, match=r"mine\.npz.*not those that the grid began with"):
        tiny_store(tmp_path / "store", runs)
    with Store.open(tmp_path / "store") as store:
        assert len(store.runs()) == len(runs)


def test_a_base_that_changed_since_the_grid_began_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = tmp_path / "base.safetensors"
    base = {"kind": "checkpoint", "architecture": "mlp_16", "classes": 10, "weights": str(weights)}
    runs = tiny_runs(("flip",), 1, base=base)
    for seed in (0, 1):
        save_file(dict(random_base("mlp_16", classes=10, seed=seed).state), weights)
        if seed == 0:
            tiny_store(tmp_path / "store", runs)
        else:
            with pytest.raises(EngineError, match=r"mlp_16.*is not the one that the grid began with"):
                tiny_store(tmp_path / "store", runs)


def _resumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a resume hands to the engine."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(grid_run, "work", lambda store, root, device, *rest: seen.update(root=root, device=device))
    grid_run.resume(folder)
    return seen


def test_a_grid_of_another_numerics_version_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_store(tmp_path, tiny_runs(seeds=1))
    assert _resumed(tmp_path, monkeypatch)["device"] == "cpu"
    base = sqlite3.connect(tmp_path / "store.sqlite")
    with base:
        base.execute("UPDATE meta SET value = replace(value, '\"numerics\": ', '\"numerics\": 9') WHERE key = 'meta'")
    base.close()
    with pytest.raises(EngineError, match="numerics version 9"):
        _resumed(tmp_path, monkeypatch)


def test_a_resume_goes_on_where_the_plan_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command may have been stopped before its plan, and the second one given another device."""
    tiny_store(tmp_path, tiny_runs(seeds=1))
    base = sqlite3.connect(tmp_path / "store.sqlite")
    with base:
        base.execute("UPDATE meta SET value = replace(value, '\"cpu\"', '\"cuda\"') WHERE key = 'plan'")
    base.close()
    assert _resumed(tmp_path, monkeypatch)["device"] == "cuda"


def test_a_resume_elsewhere_says_so_and_needs_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_store(tmp_path, tiny_runs(seeds=1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GridError, match="PyTorch finds no GPU here"):
        grid_work.check_machine(tmp_path, "cuda")
    grid_work.check_machine(tmp_path, "cpu")
    assert not caplog.records
    base = sqlite3.connect(tmp_path / "store.sqlite")
    with base:
        base.execute('UPDATE meta SET value = replace(value, \'"machine": ""\', \'"machine": "an abacus"\')')
    base.close()
    here = machine("cpu")
    for _ in range(2):
        grid_work.check_machine(tmp_path, "cpu")
        with Store.open(tmp_path, "r") as store:
            assert (store.status().machine, store.status().other_machines) == ("an abacus", (here,))
    assert [record.getMessage() for record in caplog.records if here in record.getMessage()]
    assert "the plan was made on an abacus, runs are trained on " in caplog.text


def test_a_sample_is_run_again_on_the_data_that_the_grid_was_given(tmp_path: Path) -> None:
    runs = tiny_runs(seeds=1)
    prepare(tmp_path / "store", runs, META, planner=planner_of(), durable=False, root=tmp_path)
    with Store.open(tmp_path / "store", "r") as store:
        assert grid_store.data_root(store, None) == str(tmp_path)
        assert grid_store.data_root(store, Path("elsewhere")) == Path("elsewhere")


def test_a_busy_store_is_tried_again_and_a_full_disk_is_not() -> None:
    def caused(error: Exception, by: Exception) -> Exception:
        try:
            raise error from by
        except type(error) as found:
            return found

    busy = caused(StoreBusy("busy"), sqlite3.OperationalError("database is locked"))
    full = caused(StoreError("full"), OSError(28, "No space left"))
    assert not is_of_disk(busy)
    assert worth_another(busy)
    assert is_of_disk(full)


def test_more_checkpoints_than_anybody_wants_are_refused_at_once() -> None:
    text = GRID.replace("steps: 10", "steps: 1000000000") + "checkpoints: {every: 1}\n"
    with pytest.raises(GridError, match=r"1,000,000,000 checkpoints.*every") as found:
        expand(parse_grid(text).spec)
    assert found.value.place == ("checkpoints",)


@pytest.mark.parametrize("line", ["seed: 99999999999999999999", "split_seed: 99999999999999999999"])
def test_numbers_that_a_store_cannot_hold_are_refused(line: str) -> None:
    with pytest.raises(GridError, match="less than or equal") as found:
        parse_grid(GRID + line + "\n", "mine.yaml")
    assert found.value.line == 7


def test_a_base_is_not_pretrained_on_images_that_another_split_tests_on() -> None:
    text = GRID.replace("{kind: random, architecture: mlp_16, classes: 10}",
                        "{kind: pretrain, architecture: mlp_16, data: digits8:pretraining, quality: weak}")  # fmt: skip
    assert check_grid(parse_grid(text)) == []
    (found,) = check_grid(parse_grid(text + "split_seed: [0, 1]\n"))
    assert (found.place, found.line) == (("base", "data"), 3)
    assert "split_seed" in str(found)
    first, second = (open_task(name, seed=seed) for name, seed in (("digits8:pretraining", 0), ("digits8:flip", 1)))
    seen = set(first.train.shared) & set(second.test.shared)  # type: ignore[attr-defined]
    assert len(seen) > 50, "what the refusal is about"
