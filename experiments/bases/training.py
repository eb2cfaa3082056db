"""Supervised training of a base with AdamW, warm-up and cosine decay, that can stop at any step and go on.

Stopped and resumed training gives the bits of uninterrupted training (on a CPU, with the same number of threads): the
state that is kept holds the weights, the optimizer's moments and step counts, and the generator behind dropout; the
order of samples is drawn anew from its seed and skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bases.base import BaseError
from experiments.finetune.schedules import schedule
from experiments.inputs.shares import nested_subset
from experiments.inputs.training_data import TrainingData

Quality = Literal["none", "weak", "strong"]
State = dict[str, Tensor]


class PretrainSpec(BaseModel):
    """How much, and how, a base is pretrained.

    ``share`` of the training data (a nested seeded subset), ``steps`` of AdamW with batches of ``batch_size``; the
    learning rate grows over the first ``warm_up`` (share of the steps) and falls like half a cosine; weight decay is
    for matrices and filters only; gradients are cut to the Euclidean norm ``gradient_clip`` (0: not cut).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Annotated[int, Field(ge=0)]
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Annotated[int, Field(ge=1)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _finite(self) -> PretrainSpec:
        if not all(math.isfinite(v) for v in (self.learning_rate, self.weight_decay, self.gradient_clip)):
            raise ValueError("learning_rate, weight_decay and gradient_clip must be finite numbers")
        return self


QUALITIES: dict[Quality, PretrainSpec] = {
    "none": PretrainSpec(steps=0),
    "weak": PretrainSpec(steps=300, share=0.1),
    "strong": PretrainSpec(steps=3000, share=1.0),
}
"""The graded qualities: a weak base sees a tenth of the data and a tenth of the steps of a strong one."""


@dataclass(frozen=True)
class Training:
    """The network at some step of its training.

    Attributes:
        step: steps done.
        loss: of the last batch (with label smoothing); NaN before the first.
        keep: gives everything that is needed to go on from here.
    """

    step: int
    loss: float
    keep: Callable[[], State]


def train(
    model: nn.Module,
    data: TrainingData,
    spec: PretrainSpec,
    seed: int,
    *,
    device: str | torch.device = "cpu",
    kept: State | None = None,
) -> Iterator[Training]:
    """Train a network step by step; whoever iterates decides when to keep the state.

    Args:
        model: the network with its initial weights; it is trained in place.
        data: augmented by its own ``batch(rows, epoch)``.
        spec: how.
        seed: names the subset of the data, the order of batches and dropout.
        device: where the network runs.
        kept: what ``keep`` gave at an earlier step, to go on from there.

    Raises:
        BaseError: the loss left the finite numbers, or ``kept`` is not of this network.
    """
    model.to(device).train()
    sample = data.take(np.sort(nested_subset(len(data), spec.share, seed)))
    optimizer = torch.optim.AdamW(_groups(model, spec.weight_decay), lr=spec.learning_rate)
    factor = schedule("cosine", spec.steps, warm_up=round(spec.warm_up * spec.steps)) if spec.steps else None
    first = 0
    with torch.random.fork_rng(devices=_cuda(device)):
        torch.manual_seed(int(np.random.default_rng([seed, 0xD209]).integers(2**63 - 1)))
        if kept is not None:
            first = _restore(model, optimizer, kept, device)
        state = _random_state(device)
    for step, (epoch, rows) in enumerate(order(len(sample), spec.batch_size, spec.steps, seed)):
        if step < first:
            continue
        images, labels = sample.batch(rows, epoch)
        with torch.random.fork_rng(devices=_cuda(device)):
            _set_random_state(state, device)
            for group in optimizer.param_groups:
                group["lr"] = spec.learning_rate * factor(step)  # type: ignore[misc]
            loss = _step(model, optimizer, images.to(device), labels.to(device), spec)
            state = _random_state(device)
        if not math.isfinite(loss):
            raise BaseError(
                f"pretraining: the loss left the finite numbers at step {step + 1} of {spec.steps}; lower "
                f"learning_rate ({spec.learning_rate})"
            )
        now = state
        yield Training(step + 1, loss, lambda step=step, now=now: _keep(model, optimizer, step + 1, now))  # type: ignore[misc]
    model.eval()


def order(count: int, size: int, steps: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Epoch and rows of each batch: every epoch in a new order, whole batches only (what is left over waits)."""
    rng = np.random.default_rng([seed, 0xBA5E])
    size = min(size, count)
    for step in range(steps):
        epoch, place = divmod(step, count // size)
        if place == 0:
            shuffled = rng.permutation(count)
        yield epoch, shuffled[place * size : (place + 1) * size]


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, spec: PretrainSpec
) -> float:
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=spec.precision == "bfloat16"):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=spec.label_smoothing)
    loss.backward()  # type: ignore[no-untyped-call]
    if spec.gradient_clip:
        nn.utils.clip_grad_norm_(model.parameters(), spec.gradient_clip)
    optimizer.step()
    return float(loss.detach())


def _groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Weight decay for tensors of two dimensions or more; none for biases, norms and scales."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _keep(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, random: State) -> State:
    state: State = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            state[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    state |= {f"random.{name}": tensor for name, tensor in random.items()}
    state["step"] = torch.tensor(step)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, kept: State, device: str | torch.device) -> int:
    try:
        model.load_state_dict({n.removeprefix("model."): t for n, t in kept.items() if n.startswith("model.")})
        moments: dict[int, State] = {}
        for name, tensor in kept.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        _set_random_state({n.removeprefix("random."): t for n, t in kept.items() if n.startswith("random.")}, device)
        return int(kept["step"])
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BaseError(f"pretraining: what was kept is not of this network ({reason}); remove it") from error


def _cuda(device: str | torch.device) -> list[torch.device]:
    return [torch.device(device)] if torch.device(device).type == "cuda" else []


def _random_state(device: str | torch.device) -> State:
    state = {"cpu": torch.get_rng_state()}
    for one in _cuda(device):
        state["cuda"] = torch.cuda.get_rng_state(one)
    return state


def _set_random_state(state: State, device: str | torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    for one in _cuda(device):
        torch.cuda.set_rng_state(state["cuda"], one)
