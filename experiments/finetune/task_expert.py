"""One expert of one task: fine-tuned from a base, evaluated on the task's test images, kept with its record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from experiments.atomic import write_atomically
from experiments.bases.base import Base
from experiments.bases.spec import BaseSpec
from experiments.evaluate.evaluate import evaluate
from experiments.evaluate.results import EvaluationSet
from experiments.finetune.loop import Hyperparameters, Precision
from experiments.finetune.reference import train_run
from experiments.finetune.schedules import ScheduleName, schedule
from experiments.grid.run_spec import RunSpec, Trained
from experiments.inputs.augment import augmentation
from experiments.inputs.resident import residents
from experiments.inputs.shares import subset_size
from experiments.models import head_prefix, replace_head
from experiments.models.form import input_format
from experiments.spec import NUMERICS_VERSION
from experiments.tasks.dataset import ImageTask
from merging.checkpoint import save_state_dict
from theory.errors import MergeboundError

_LATER = (
    *("optimizer", "nesterov", "beta2", "sam_radius"),
    *("label_smoothing", "clip_norm", "trained", "rank"),
)
"""Fields that came later: at their defaults they do not count, so that experts made before are still known."""


@dataclass(frozen=True)
class FinetuneSpec:
    """How experts are fine-tuned.

    Attributes:
        learning_rate, batch_size, data_share, momentum, weight_decay: see
            :class:`~experiments.finetune.loop.Hyperparameters`.
        steps: K; ``None`` takes ``epochs``.
        epochs: passes over the training images that are used, where ``steps`` is not given.
        schedule, warm_up: of the learning rate (``warm_up`` in steps).
        augment: preset of :mod:`experiments.inputs.augment`.
        precision: of the network's arithmetic.
        seed: names the order of batches, the augmentation and the new head.
        optimizer, nesterov, beta2, sam_radius, label_smoothing, clip_norm, trained, rank: see
            :class:`~experiments.grid.run_spec.RunSpec`.
    """

    learning_rate: float = 0.05
    batch_size: int = 64
    steps: int | None = None
    epochs: float = 8.0
    data_share: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: ScheduleName = "cosine"
    warm_up: int = 0
    augment: str = "light"
    precision: Precision = "float32"
    seed: int = 0
    optimizer: Literal["sgd", "adamw", "sam"] = "sgd"
    nesterov: bool = False
    beta2: float = 0.999
    sam_radius: float = 0.05
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    trained: Trained = "full"
    rank: int | None = None

    def hyperparameters(self, images: int) -> Hyperparameters:
        """The loop's hyperparameters for a training part of ``images`` images."""
        used = max(1, round(self.data_share * images))
        steps = self.steps if self.steps is not None else max(1, round(self.epochs * -(-used // self.batch_size)))
        return Hyperparameters(
            learning_rate=self.learning_rate,
            steps=steps,
            batch_size=self.batch_size,
            data_share=self.data_share,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def resolved(self, images: int, task: str, base: BaseSpec) -> RunSpec:
        """The run on a training part of ``images`` images.

        Raises:
            MergeboundError: names the field.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("steps", "epochs")}
        steps = self.hyperparameters(images).steps
        try:
            return RunSpec(task=task, base=base, steps=steps, **given)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            raise MergeboundError(f"{place} = {first['input']!r}: {said}" if place else said) from error

    def check(self) -> None:
        """Everything that can be refused before data are read.

        Raises:
            MergeboundError: names the field.
        """
        if self.steps is None and not 0 < self.epochs < float("inf"):
            raise MergeboundError(f"epochs = {self.epochs!r}: must be a positive number")
        augmentation(self.augment)
        hyper = self.hyperparameters(10**9)
        schedule(self.schedule, hyper.steps, warm_up=self.warm_up)
        if self.precision not in ("float32", "bfloat16"):
            raise MergeboundError(f"precision: {self.precision!r} is unknown; choose float32 or bfloat16")
        self.resolved(10**9, "", BaseSpec(kind="random", architecture="", classes=1))


@dataclass(frozen=True)
class TaskExpert:
    """An expert with its record.

    Attributes:
        state: full state dict x_K.
        record: what was run and measured, JSON data: ``row`` (one row of the table of experts), the specification, the
            training log and what identifies base and split.
    """

    state: Mapping[str, Tensor]
    record: Mapping[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        """One row of the table of experts."""
        return dict(self.record["row"])


def start_from(base: Base, classes: int, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network for a task and x_0: the base's backbone and a new head of ``classes`` outputs (weights of the seed).

    A base whose head has as many classes gets a new head too: classes of two tasks are not the same classes.
    """
    network = replace_head(base.model(), classes, seed)
    return network, {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def finetune_task(base: Base, task: ImageTask, spec: FinetuneSpec, *, resamples: int = 1000) -> TaskExpert:
    """Fine-tune an expert on a task's training images and evaluate it on its test images.

    Raises:
        MergeboundError: images that do not fit the network, or a batch larger than the training part.
    """
    spec.check()
    network, start = start_from(base, task.classes, spec.seed)
    form = input_format(network)
    train, validation, test = residents(task, form, seed=spec.seed, augment=spec.augment)
    run = spec.resolved(len(train), task.name, _stored(base))
    result = train_run(run, network, start, train)
    state, log = result.states[max(result.states)], result.log
    network.load_state_dict(dict(state))
    measured = evaluate(network, EvaluationSet.of_task(task, test), seed=spec.seed, resamples=resamples)
    checked = evaluate(network, validation, task=task.name, digest=task.digest, split_seed=task.seed, resamples=0)
    row = {
        **measured.to_row(),
        "validation_accuracy": checked.metrics.accuracy,
        "train_images": subset_size(len(train), run.data_share),
        "steps": run.steps,
        "finite": log.finite,
        "seconds": round(log.seconds, 2),
        "images_per_second": round(float(log.batch_size.sum()) / max(log.seconds, 1e-9), 1),
    }
    record = {
        "identity": identity(base, task, spec),
        "row": row,
        "base": {"digest": base.digest, "architecture": base.architecture, "source": Path(base.provenance.source).name},
        "task": {"name": task.name, "classes": list(task.class_names), "digest": task.digest, "seed": task.seed},
        "spec": asdict(spec) | {"steps": run.steps},
        "head": head_prefix(network),
        "log": {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(log).items()},
        "numerics_version": NUMERICS_VERSION,
        "versions": {"torch": torch.__version__},
    }
    return TaskExpert(state, record)


def _stored(base: Base) -> BaseSpec:
    """The base as it lies beside its experts; a run's digest takes the tensors, the loop does not look at it."""
    return BaseSpec(
        kind="checkpoint",
        architecture=base.architecture,
        classes=base.classes,
        options=dict(base.options),
        weights=Path("base.safetensors"),
    )


def identity(base: Base, task: ImageTask, spec: FinetuneSpec) -> str:
    """SHA-256 of everything that decides an expert's bits on one machine."""
    content = {
        "numerics": NUMERICS_VERSION,
        "base": base.digest,
        "architecture": [base.architecture, dict(base.options)],
        "task": task.digest,
        "spec": {f.name: getattr(spec, f.name) for f in fields(spec) if _counts(spec, f)},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _counts(spec: FinetuneSpec, field: Field[Any]) -> bool:
    return field.name not in _LATER or getattr(spec, field.name) != field.default


def save_expert(folder: Path, name: str, expert: TaskExpert) -> Path:
    """Write ``<name>.safetensors`` and then ``<name>.json``: an expert whose record is there is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    keys = ("identity", "base", "task", "spec", "head", "numerics_version")
    save_state_dict(weights, dict(expert.state), {key: json.dumps(expert.record[key]) for key in keys})
    write_atomically(folder / f"{name}.json", json.dumps(expert.record).encode())
    return weights


def finished(folder: Path, name: str, wanted: str) -> dict[str, Any] | None:
    """The record of a complete expert of the same identity, or ``None`` where none is complete.

    Raises:
        MergeboundError: another expert lies there under that name.
    """
    record, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    if not record.is_file() or not weights.is_file():
        return None
    content = _record(record)
    if content is None:
        raise MergeboundError(f"{record}: not the record of an expert; give another folder, or remove the file")
    if content["identity"] != wanted:
        raise MergeboundError(
            f"{weights}: another expert (of another base, split or specification) lies there; give another folder, or "
            "remove it and its .json file"
        )
    return content


def records(folder: Path) -> list[dict[str, Any]]:
    """Records of all complete experts in a folder, by file name; other JSON files are passed over."""
    found = (_record(path) for path in sorted(folder.glob("*.json")) if path.with_suffix(".safetensors").is_file())
    return [content for content in found if content is not None]


def _record(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) and {"identity", "row"} <= set(content) else None
