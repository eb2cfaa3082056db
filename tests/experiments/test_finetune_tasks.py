"""Experts of tasks: what is measured is recomputed by hand, finished experts are kept, bad input stops before work."""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from experiments.bases.base import Base, random_base, save_base
from experiments.cli import build_app
from experiments.finetune import many_tasks
from experiments.finetune.loop import finetune
from experiments.finetune.many_tasks import finetune_tasks
from experiments.finetune.schedules import schedule
from experiments.finetune.task_expert import FinetuneSpec, finetune_task, identity, records, save_expert, start_from
from experiments.tasks.digits8 import digits8
from experiments.tasks.named import expand, open_task
from experiments.tasks.types import Split
from merging.checkpoint import load_state_dict
from theory.errors import MergeboundError

SPEC = FinetuneSpec(steps=12, batch_size=16, augment="none", data_share=0.5, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small grey tasks: digits, and digits turned."""
    from sklearn.datasets import load_digits

    place = tmp_path_factory.mktemp("tasks")
    raw = load_digits()
    images, labels = (raw.images[:300] * 15).astype(np.uint8), raw.target[:300]
    for name, x in (("upright", images), ("turned", np.rot90(images, 1, (1, 2)))):
        np.savez(
            place / f"{name}.npz",
            x_train=x[:200],
            y_train=labels[:200],
            x_test=x[200:],
            y_test=labels[200:],
            class_names=np.array([str(k) for k in range(10)]),
        )
    return place


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base("resnet_bn", classes=10, seed=1)


def test_what_is_measured_is_what_the_expert_does(folder: Path, base: Base) -> None:
    task = open_task(str(folder / "upright.npz"))
    expert = finetune_task(base, task, SPEC, resamples=50)
    network = base.model()
    network.load_state_dict(dict(expert.state))
    with np.load(folder / "upright.npz") as file:
        x = (torch.from_numpy(file["x_test"].astype(np.float32))[:, None] / 255 - 0.5) / 0.5
        y = torch.from_numpy(file["y_test"])
    row = expert.row
    with torch.no_grad():
        logits = network.eval()(x)
    assert row["accuracy"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert row["loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-4)
    assert row["n"] == 100
    assert row["split_digest"] == task.digest


def test_an_expert_is_what_the_loop_makes_of_the_same_images(folder: Path, base: Base) -> None:
    task = open_task(str(folder / "turned.npz"))
    expert = finetune_task(base, task, SPEC, resamples=0)
    network, start = start_from(base, 10, SPEC.seed)
    x = np.stack([task.train.read(row) for row in range(len(task.train))]).transpose(0, 3, 1, 2)
    images = (torch.from_numpy(x.astype(np.float32)) / 255 - 0.5) / 0.5
    split = Split(images, torch.from_numpy(np.asarray(task.train.labels)), np.arange(len(images)))
    hyper = SPEC.hyperparameters(len(split))
    state, _ = finetune(network, start, split, hyper, SPEC.seed, schedule=schedule("cosine", 12))
    for name, tensor in state.items():  # batches differ in their last bits: (x / 255 - mean) / std is one product there
        torch.testing.assert_close(expert.state[name], tensor, rtol=0.01, atol=1e-3)
    moved = max(float((state[name] - start[name]).abs().max()) for name in state if "weight" in name)
    assert moved > 0.02


def test_epochs_become_steps() -> None:
    assert FinetuneSpec(epochs=3, batch_size=16).hyperparameters(50).steps == 3 * 4
    assert FinetuneSpec(epochs=3, batch_size=16, data_share=0.5).hyperparameters(50).steps == 3 * 2
    assert FinetuneSpec(epochs=3, steps=7).hyperparameters(50).steps == 7


def test_a_new_head_is_seeded_and_the_backbone_is_the_base(base: Base) -> None:
    _, first = start_from(base, 7, 0)
    _, again = start_from(base, 7, 0)
    _, other = start_from(base, 7, 1)
    head = {name for name in first if first[name].shape != base.state[name].shape}
    assert head
    assert all(torch.equal(first[name], base.state[name]) for name in first if name not in head)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in head)


OPTIONS = ["--steps", "12", "--batch-size", "16", "--augment", "none", "--data-share", "0.5", "--seed", "3"]


def by_command(out: Path, files: list[str], workers: int) -> pd.DataFrame:
    """The table of the experts that ``mergebound finetune`` makes; they have the bits of those made in this process."""
    command = ["finetune", *files, "--model", "resnet_bn", *OPTIONS, "--workers", str(workers), "--out", str(out)]
    result = CliRunner().invoke(build_app(), command)
    assert result.exit_code == 0, result.output
    assert "kept from before" not in result.output
    table = pd.read_csv(out / "experts.csv")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, accuracy in zip(files, table["accuracy"], strict=True):
            expert = finetune_task(random_base("resnet_bn", classes=10, seed=3), open_task(name), SPEC, resamples=0)
            stored = load_state_dict(out / f"{Path(name).stem}.safetensors")
            assert all(torch.equal(stored[key], tensor) for key, tensor in expert.state.items())
            assert expert.row["accuracy"] == pytest.approx(accuracy)
    finally:
        torch.set_num_threads(threads)
    return table


def test_command_line_makes_experts_in_a_fresh_process(folder: Path, tmp_path: Path) -> None:
    assert list(by_command(tmp_path, [str(folder / "upright.npz")], 1)["task"]) == ["upright"]


def test_command_line_makes_experts_in_workers_and_keeps_finished_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = random_base("resnet_bn", classes=10, seed=3), tmp_path / "experts"
    files = [str(folder / "upright.npz"), str(folder / "turned.npz")]
    started: list[int] = []

    def pool(count: int, mp_context: object) -> ProcessPoolExecutor:
        started.append(count)  # forked here: the test above has a worker that imports everything anew
        return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork"))

    with monkeypatch.context() as patch:
        patch.setattr(many_tasks, "ProcessPoolExecutor", pool)
        table = by_command(out, files, 2)
    assert started == [2]
    assert list(table["task"]) == ["upright", "turned"]
    assert set(table["tier"]) == {"measured"}
    assert set(table["steps"]) == {12}
    assert [len(digest) for digest in table["split_digest"]] == [64, 64]

    bits = {name: (out / f"{name}.safetensors").read_bytes() for name in ("upright", "turned")}
    made: list[str] = []

    def here(jobs: list[tuple[str, str]], *rest: Any) -> None:
        for name, stem in jobs:
            made.append(stem)
            rest[-1][name] = {"task": stem}

    monkeypatch.setattr(many_tasks, "_run", here)
    told: list[tuple[str, bool]] = []

    def again(spec: FinetuneSpec = SPEC) -> None:
        told.clear()
        made.clear()
        finetune_tasks(base, files, spec, out, watch=lambda row, kept: told.append((row["task"], kept)))

    again()
    assert (told, made) == ([("upright", True), ("turned", True)], [])
    with pytest.raises(MergeboundError, match="another expert"):
        again(replace(SPEC, steps=13))
    assert (told, made) == ([], [])
    (out / "turned.json").unlink()  # killed between the weights and their record: not complete
    again()
    assert (told, made) == ([("upright", True)], ["turned"])
    (out / "upright.json").write_text("{")  # records are written whole: this is no record of ours
    with pytest.raises(MergeboundError, match=r"upright\.json: not the record of an expert"):
        again()
    assert bits == {name: (out / f"{name}.safetensors").read_bytes() for name in bits}


@pytest.mark.parametrize(
    "names",
    [
        ("r/x-2.npz", "p/x.npz", "q/x.npz"),
        ("p/x.npz", "q/x.npz", "r/X.npz", "r/x-1.npz"),
        ("base.npz", "npz8:mnist", "mnist"),
    ],
)
def test_every_expert_has_a_file_of_its_own(names: tuple[str, ...]) -> None:
    stems = many_tasks._stems(names)
    assert len({stem.lower() for stem in stems.values()} | {"base"}) == len(names) + 1


def test_other_experts_in_the_folder_are_not_overwritten(folder: Path, base: Base, tmp_path: Path) -> None:
    name = str(folder / "upright.npz")
    save_expert(tmp_path, "upright", finetune_task(base, open_task(name), SPEC, resamples=0))
    bits = (tmp_path / "upright.safetensors").read_bytes()
    other = FinetuneSpec(steps=13, batch_size=16, augment="none", data_share=0.5, seed=3)
    with pytest.raises(MergeboundError, match="another expert"):
        finetune_tasks(base, [name], other, tmp_path)
    save_base(tmp_path / "base.safetensors", random_base("resnet_bn", classes=10, seed=2))
    with pytest.raises(MergeboundError, match="another base"):
        finetune_tasks(base, [name], SPEC, tmp_path)
    assert (tmp_path / "upright.safetensors").read_bytes() == bits
    (tmp_path / "notes.json").write_text("[]")
    assert [record["task"]["name"] for record in records(tmp_path)] == ["upright"]


def test_identity_changes_with_everything_that_changes_bits(folder: Path, base: Base) -> None:
    task, other = open_task(str(folder / "upright.npz")), open_task(str(folder / "upright.npz"), seed=1)
    ids = {
        identity(base, task, SPEC),
        identity(base, other, SPEC),
        identity(random_base("resnet_bn", classes=10, seed=2), task, SPEC),
        identity(base, task, FinetuneSpec(steps=13, batch_size=16, augment="none", data_share=0.5, seed=3)),
    }
    assert len(ids) == 4


def test_a_saved_expert_is_read_by_the_merging_library(folder: Path, base: Base, tmp_path: Path) -> None:
    expert = finetune_task(base, open_task(str(folder / "upright.npz")), SPEC, resamples=0)
    path = save_expert(tmp_path, "upright", expert)
    stored = load_state_dict(path)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expert.state.items())
    record = json.loads((tmp_path / "upright.json").read_text())
    assert record["spec"]["steps"] == 12
    assert len(record["log"]["batch_loss"]) == 12


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 999}, "batch_size = 999 is larger than the 90 training images"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"epochs": 0.0, "steps": None}, "epochs"),
        ({"augment": "heavy"}, "heavy"),
        ({"precision": "float8"}, "precision"),
        ({"schedule": "steps"}, "schedule"),
    ],
)
def test_bad_input_stops_before_work(
    folder: Path, base: Base, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    content = {"steps": 12, "batch_size": 16, "data_share": 0.5, **change}
    with pytest.raises(MergeboundError, match=said):
        finetune_tasks(base, [str(folder / "upright.npz")], FinetuneSpec(**content), tmp_path / "out")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_embedded_digits_are_the_images_of_digits8() -> None:
    family = digits8(seed=2)
    for name in ("rotate90", "checkerboard"):
        task, known = open_task(f"digits8:{name}", seed=2), family.tasks[name]
        for part, split in ((task.train, known.train), (task.test, known.test)):
            pixels = np.stack([part.read(row)[..., 0] for row in range(len(part))])
            levels = (split.images[:, 0].double() * 0.5 + 0.5).numpy()  # v / 16
            np.testing.assert_array_equal(pixels, np.rint(255 * levels).astype(np.uint8))
            np.testing.assert_array_equal(part.labels, split.labels.numpy())
    with pytest.raises(MergeboundError, match="rotate90"):
        open_task("digits8:rotate9")


def test_names_of_tasks() -> None:
    assert expand(["npz8"])[0] == "npz8:mnist"
    assert len(expand(["npz8"])) == 8
    with pytest.raises(MergeboundError, match="twice"):
        expand(["npz8", "npz8:mnist"])
    with pytest.raises(MergeboundError, match="no task"):
        expand([])


def test_a_path_that_is_not_there_is_called_so() -> None:
    with pytest.raises(MergeboundError, match="photos/mine: there is no such folder"):
        open_task("photos/mine")
