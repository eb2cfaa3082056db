"""The pool of experts of one architecture: made once, kept on disk, read back when a run continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.atomic import write_atomically
from experiments.finetune.loop import TrainingLog, finetune, pretrain
from experiments.inputs.shares import nested_subset
from experiments.models import build_model
from experiments.pool import PlannedExpert
from experiments.spec import ValidationSpec
from experiments.tasks.types import Family, Split
from merging.checkpoint import load_state_dict, save_state_dict

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Expert:
    """A fine-tuned expert.

    ``state``: full state dict; ``training_loss``: F_S(x_K) on its own sample in evaluation mode; ``log``: its run.
    """

    plan: PlannedExpert
    state: Mapping[str, Tensor]
    samples: int
    training_loss: float
    log: TrainingLog


def mean_loss(model: nn.Module, split: Split) -> float:
    """Mean cross-entropy of the model in evaluation mode, in nats."""
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(split.images), split.labels))


def make_base(spec: ValidationSpec, architecture: str, family: Family, folder: Path) -> dict[str, Tensor]:
    """The pretrained base x_0, from disk if it is there."""
    path = folder / "base.safetensors"
    model = build_model(architecture, classes=10, seed=spec.seed)
    if path.exists():
        stored = load_state_dict(path)
        return {name: stored[name] for name in model.state_dict()}  # a file keeps no order; vectors are laid out by it
    state = pretrain(
        model,
        {k: v.clone() for k, v in model.state_dict().items()},
        family.pretraining,
        steps=spec.base.steps,
        learning_rate=spec.base.learning_rate,
        batch_size=spec.base.batch_size,
        seed=spec.seed,
        turns=spec.base.turns,
    )
    save_state_dict(path, state, {"architecture": architecture, "seed": spec.seed, **spec.base.model_dump()})
    return state


def make_expert(
    plan: PlannedExpert,
    spec: ValidationSpec,
    architecture: str,
    family: Family,
    base: Mapping[str, Tensor],
    model: nn.Module,
    folder: Path,
) -> Expert:
    """One expert, from disk if it is complete there (the record is written last), else fine-tuned and stored."""
    weights, record = folder / f"{plan.name}.safetensors", folder / f"{plan.name}.json"
    if record.exists() and weights.exists():
        saved = json.loads(record.read_text())
        arrays = {k: np.asarray(v) for k, v in saved["log"].items() if isinstance(v, list)}
        log = TrainingLog(**arrays, seconds=saved["log"]["seconds"], finite=saved["log"]["finite"])
        return Expert(plan, load_state_dict(weights), saved["samples"], saved["training_loss"], log)
    train = family.tasks[plan.task].train
    state, log = finetune(model, base, train, plan.hyper, plan.seed, freeze_head=spec.heads == "frozen")
    rows = nested_subset(len(train), plan.hyper.data_share, plan.seed)
    training_loss = mean_loss(model, train.take(rows)) if log.finite else float("inf")
    save_state_dict(weights, state, {"architecture": architecture, "task": plan.task, **asdict(plan.hyper)})
    saved = {
        "expert": plan.name,
        "task": plan.task,
        "half": plan.half,
        "seed": plan.seed,
        "hyperparameters": asdict(plan.hyper),
        "samples": len(rows),
        "training_loss": training_loss,
        "log": {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(log).items()},
    }
    write_atomically(record, json.dumps(saved).encode())
    return Expert(plan, state, len(rows), training_loss, log)


def make_pool(
    spec: ValidationSpec,
    architecture: str,
    family: Family,
    base: Mapping[str, Tensor],
    pool: tuple[PlannedExpert, ...],
    folder: Path,
    progress: Progress,
) -> list[Expert]:
    """Every expert of the pool, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(architecture, classes=10, seed=spec.seed)
    experts = []
    for number, plan in enumerate(pool):
        experts.append(make_expert(plan, spec, architecture, family, base, model, folder))
        progress("fine-tune", number + 1, len(pool))
    return experts
