"""What a grid's reader is told although nothing is wrong, and whether what is missing fits on the disk."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.engines.cohort_job import run_cohort
from experiments.engines.errors import EngineError
from experiments.engines.prepare import prepare
from experiments.engines.room import bytes_of, check_room
from experiments.grid.estimate import estimate
from experiments.grid.expand import expansion
from experiments.grid.spec import GridSpec
from experiments.grid.yaml_source import parse_grid, read_grid, read_runs
from experiments.store import Store
from tests.experiments.engine_grids import META, planner_of, tiny_runs, tiny_store

PAGE = """\
name: g
tasks: [digits8:flip, digits8:roll]
base: {kind: random, architecture: mlp_16, classes: 10}
learning_rate: 0.1
batch_size: 8
steps: 6
checkpoints: {every: 2}
"""
Usage = namedtuple("Usage", ("total", "used", "free"))


def _notes(**changes: object) -> tuple[str, ...]:
    return expansion(GridSpec.model_validate({**parse_grid(PAGE).spec.content(), **changes})).notes


def test_adamw_without_momentum_is_noted_where_it_is() -> None:
    assert _notes(optimizer=["sgd", "adamw"], seeds=3) == (
        "adamw with beta1 = 0 in 6 runs, as its beta1 is momentum; give momentum: 0.9",
    )
    assert _notes(optimizer="adamw", momentum=0.9) == ()


def test_a_base_that_knows_a_task_is_noted() -> None:
    (own, named) = read_runs(read_grid("local-npz")).notes
    assert own.startswith("the weights resnet20-12fca82f.safetensors of cifar_resnet20 are named after a task")
    assert named.startswith("vit_s2 is pretrained on npz8:cifar10, so that experts and merges of npz8:cifar10 begin")
    assert read_runs(read_grid("one-gpu-30min")).notes == ()  # pretrained on CIFAR-100, which is no task


def test_runs_that_became_equal_are_told_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = "overrides:\n- match: {task: digits8:roll}\n  set: {learning_rate: 0.2}\n"
    (tmp_path / "g.yaml").write_text(PAGE.replace("learning_rate: 0.1", "learning_rate: [0.1, 0.3]") + page)
    with pytest.raises(SystemExit):
        main(["grid", "expand", str(tmp_path / "g.yaml")])
    said = capsys.readouterr()
    assert said.err == "note: 1 of 4 combinations became the same as others and are merged\n"
    assert len(said.out.splitlines()) == 1 + 3


def test_what_is_missing_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as the plan counts; what is stored is left out."""
    file = parse_grid(PAGE)
    runs = read_runs(file).runs
    whole = estimate(file, seconds=0, check=False).total.bytes
    assert bytes_of(runs) == whole
    free = whole
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    assert check_room(file, runs, tmp_path / "new") == []
    free = whole - 1
    (problem,) = check_room(file, runs, tmp_path / "new")
    assert "the checkpoints need" in str(problem)
    assert check_room(file, runs, tmp_path / "new", task_vectors="bfloat16") == []
    prepare(tmp_path / "s", runs, META, planner=planner_of(size=1), durable=False)
    with Store.open(tmp_path / "s") as store:
        run_cohort(store, store.plan().cohorts[0])  # type: ignore[union-attr]
    free = whole // 2
    assert check_room(file, runs, tmp_path / "s") == []
    free = whole // 2 - 1
    assert len(check_room(file, runs, tmp_path / "s")) == 1


def test_a_store_keeps_its_task_vectors_as_it_began(tmp_path: Path) -> None:
    runs = tiny_runs(("identity",), 1)
    prepare(tmp_path, runs, META, planner=planner_of(), durable=False, task_vectors="bfloat16")
    with pytest.raises(EngineError, match="in the way bfloat16, not lossless; leave --task-vectors out"):
        prepare(tmp_path, runs, META, planner=planner_of(), durable=False, task_vectors="lossless")
    tiny_store(tmp_path, runs)
    with Store.open(tmp_path, "r") as store:
        assert store.task_vectors == "bfloat16"
