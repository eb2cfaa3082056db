"""What ``mergebound finetune`` offers of the reference loop."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.bases.base import Base, random_base
from experiments.cli import build_app
from experiments.finetune.reference import train_run
from experiments.finetune.task_expert import FinetuneSpec, finetune_task, identity, start_from
from experiments.grid.run_spec import RunSpec
from experiments.inputs.resident import residents
from experiments.models import input_format
from experiments.spec import NUMERICS_VERSION
from experiments.tasks.dataset import ImageTask
from experiments.tasks.named import open_task
from tests.experiments.reference_nets import BASE, assert_same
from theory.errors import MergeboundError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng([0, 5])
    file = tmp_path_factory.mktemp("task") / "dots.npz"
    images, labels = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 4
    names = np.array(["a", "b", "c", "d"])
    np.savez(file, x_train=images[:40], y_train=labels[:40], x_test=images[40:], y_test=labels[40:], class_names=names)
    return file


@pytest.fixture(scope="module")
def task(file: Path) -> ImageTask:
    return open_task(str(file))


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base("resnet_bn", classes=10, seed=0)


LOW_RANK = FinetuneSpec(
    steps=4,
    batch_size=8,
    learning_rate=0.01,
    optimizer="adamw",
    beta2=0.99,
    label_smoothing=0.1,
    clip_norm=0.5,
    trained="low_rank",
    rank=2,
)


def test_the_command_line_hands_every_option_over(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[FinetuneSpec] = []

    def keep(base: Base, names: list[str], spec: FinetuneSpec, *rest: object, **others: object) -> NoReturn:
        handed.append(spec)
        raise MergeboundError("no more is needed")

    monkeypatch.setattr("experiments.finetune.many_tasks.finetune_tasks", keep)
    for spec in (LOW_RANK, FinetuneSpec(nesterov=True), FinetuneSpec(optimizer="sam", sam_radius=0.2, trained="head")):
        usual = FinetuneSpec()
        options = [
            part
            for name, value in asdict(spec).items()
            if value != getattr(usual, name)
            for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
        ]
        arguments = ["finetune", str(file), "--model", "resnet_bn", *options, "--out", str(tmp_path / "out")]
        CliRunner().invoke(build_app(), arguments)
        assert handed.pop() == spec


def test_an_expert_is_what_the_reference_loop_makes_of_the_tasks_images(task: ImageTask, base: Base) -> None:
    expert = finetune_task(base, task, LOW_RANK, resamples=0)
    given = {name: value for name, value in asdict(LOW_RANK).items() if name != "epochs"}
    network, start = start_from(base, 4, 0)
    train, _, _ = residents(task, input_format(network), seed=0, augment="light")
    state = train_run(RunSpec(task="dots", base=BASE, **given), network, start, train).states[4]
    assert_same(expert.state, state)
    assert len(expert.record["log"]["clip_factor"]) == 4
    assert expert.row["train_images"] == len(train)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nesterov": True, "momentum": 0.0}, "nesterov: needs optimizer sgd and a momentum above 0"),
        ({"optimizer": "adam"}, "optimizer = 'adam': Input should be 'sgd', 'adamw' or 'sam'"),
        ({"trained": "low_rank"}, "rank: give it with trained = low_rank"),
        ({"rank": 2}, "rank: give it with trained = low_rank"),
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0: Input should be less than 1"),
        ({"clip_norm": 0.0}, "clip_norm = 0.0: Input should be greater than 0"),
    ],
)
def test_bad_options_are_refused_with_their_names(change: dict[str, object], said: str) -> None:
    with pytest.raises(MergeboundError) as error:
        FinetuneSpec(**change).check()  # type: ignore[arg-type]
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_experts_that_were_made_before_the_options_came_are_still_known(task: ImageTask, base: Base) -> None:
    spec = FinetuneSpec(steps=12, seed=3)
    before = {
        **{"learning_rate": 0.05, "batch_size": 64, "steps": 12, "epochs": 8.0, "data_share": 1.0, "momentum": 0.9},
        **{"weight_decay": 1e-4, "schedule": "cosine", "warm_up": 0, "augment": "light", "precision": "float32"},
        "seed": 3,
    }
    content = {
        **{"numerics": NUMERICS_VERSION, "base": base.digest, "architecture": ["resnet_bn", {}]},
        **{"task": task.digest, "spec": before},
    }
    assert identity(base, task, spec) == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    others = [{"optimizer": "sam"}, {"sam_radius": 0.1}, {"clip_norm": 1.0}, {"trained": "head"}, {"beta2": 0.9}]
    assert len({identity(base, task, replace(spec, **other)) for other in [{}, *others]}) == 6  # type: ignore[arg-type]
