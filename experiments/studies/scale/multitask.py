"""The multitask baseline: one backbone and a head for each task, trained on all tasks, twice.

A step takes one batch of one task; every round visits each task once, in an order drawn by the seed.  The optimizer
(SGD or AdamW), its settings and the schedule are the experts': the schedule runs over all steps that may be taken, that
is over the fixed number of steps, or over the budget.  A head moves in its own task's steps only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from experiments.finetune.loop import batches
from experiments.finetune.schedules import schedule
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from experiments.studies.scale.spec import MultitaskSpec
from experiments.tasks.types import Split
from theory.errors import MergeboundError

ORDER = 0x3A11
"""Names the stream of task orders: ``default_rng([seed, ORDER])``."""
PATIENCE, BUDGET, DIVERGED = "patience", "budget", "diverged"


@dataclass(frozen=True, eq=False)
class MultitaskModel:
    """A trained multitask model.

    Attributes:
        shared: backbone tensors by name.
        heads: head tensors of each task.
        rate, steps: learning rate, and steps after which these weights were taken.
        trained: steps that were spent in all (over all rates).
        validation_loss: mean over tasks, nats; NaN where it was not measured.
        trace: (rate, step, validation loss) of every measurement.
    """

    shared: Mapping[str, Tensor]
    heads: tuple[Mapping[str, Tensor], ...]
    rate: float
    steps: int
    trained: int
    validation_loss: float
    trace: tuple[tuple[float, int, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Start:
    """Where multitask training starts: a network in x_0, the heads' names, and each task's head before training."""

    model: nn.Module
    state: Mapping[str, Tensor]
    heads: tuple[Mapping[str, Tensor], ...]


def train_fixed(start: Start, train: Sequence[TrainingData], run: RunSpec, seed: int) -> MultitaskModel:
    """As many steps as the experts of all tasks took together, with their learning rate."""
    total = run.steps * len(train)
    job = _Job(start, train, run, run.learning_rate, total, seed)
    for _ in range(total):
        job.step()
    return job.model(total, total, math.nan, ())


def train_optimised(
    start: Start,
    train: Sequence[TrainingData],
    validation: Sequence[Split],
    run: RunSpec,
    spec: MultitaskSpec,
    seed: int,
) -> MultitaskModel:
    """The best of several learning rates and of all measured steps, by validation loss, with early stopping.

    Raises:
        MergeboundError: no rate gave a finite validation loss.
    """
    most = rounds(spec, run.steps)
    best: MultitaskModel | None = None
    spent = 0
    trace: list[tuple[float, int, float]] = []
    for factor in spec.rates:
        rate = factor * run.learning_rate
        job = _Job(start, train, run, rate, most * len(train), seed)
        losses: list[float] = []
        for number in range(1, most + 1):
            for _ in range(len(train)):
                job.step()
            if number % spec.every and number != most:
                continue
            step = number * len(train)
            loss = job.loss(validation)
            trace.append((rate, step, loss))
            losses.append(loss)
            if math.isfinite(loss) and (best is None or loss < best.validation_loss):
                best = job.model(step, 0, loss, ())
            if why_stopped(losses, spec.patience) != BUDGET:
                break
        spent += job.steps
    if best is None:
        raise MergeboundError("multitask: no learning rate kept the loss finite; lower multitask.rates")
    return MultitaskModel(best.shared, best.heads, best.rate, best.steps, spent, best.validation_loss, tuple(trace))


def rounds(spec: MultitaskSpec, steps: int) -> int:
    """Rounds over the tasks that the budget allows, for experts of ``steps`` steps."""
    return max(1, round(spec.budget * steps))


def why_stopped(losses: Sequence[float], patience: int) -> str:
    """What ended the training of one rate, from its validation losses in order.

    Returns:
        ``diverged`` (the last loss is not finite), ``patience`` (as many measurements without a smaller loss), or
        ``budget`` (neither: it goes on while the budget lasts).
    """
    if losses and not math.isfinite(losses[-1]):
        return DIVERGED
    lowest, since = math.inf, 0
    for loss in losses:
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
    return PATIENCE if since >= patience else BUDGET


_PLAIN: Mapping[str, object] = {
    "label_smoothing": 0.0, "clip_norm": None, "precision": "float32", "trained": "full", "sampling": "reshuffle",
    "augment": "none",
}  # fmt: skip
"""What the baseline does of settings that it does not follow."""


def _check(run: RunSpec) -> None:
    if run.optimizer not in ("sgd", "adamw"):
        raise MergeboundError(f"multitask: optimizer {run.optimizer} is not followed by the baseline; use sgd or adamw")
    for name, value in _PLAIN.items():
        if getattr(run, name) != value:
            raise MergeboundError(
                f"multitask: the experts' {name} = {getattr(run, name)} is not followed by the baseline; "
                f"leave it at {value}, or leave multitask out"
            )


class _Job:
    """Training with one learning rate for at most ``most`` steps."""

    def __init__(
        self, start: Start, train: Sequence[TrainingData], run: RunSpec, rate: float, most: int, seed: int
    ) -> None:
        _check(run)
        self._network, self._train, self.rate = start.model, train, rate
        names = set(start.heads[0])
        parameters = {name for name, _ in start.model.named_parameters()}
        self._shared = {
            name: tensor.detach().clone().requires_grad_(name in parameters)
            for name, tensor in start.state.items()
            if name not in names
        }
        self._heads = [{name: t.detach().clone().requires_grad_(True) for name, t in h.items()} for h in start.heads]
        everything = [t for t in self._shared.values() if t.requires_grad]
        everything += [t for head in self._heads for t in head.values()]
        self._optimizer: torch.optim.Optimizer
        if run.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(
                everything, rate, (run.momentum, run.beta2), run.epsilon, weight_decay=run.weight_decay
            )
        else:
            self._optimizer = torch.optim.SGD(
                everything, rate, momentum=run.momentum, weight_decay=run.weight_decay, nesterov=run.nesterov
            )
        self._factor = schedule(run.schedule, most, warm_up=min(run.warm_up * len(train), most - 1))
        self._order = np.random.default_rng([seed, ORDER])
        self._batches = [
            batches(
                len(data), min(run.batch_size, len(data)), 1 << 40, "reshuffle", np.random.default_rng([seed, ORDER, j])
            )
            for j, data in enumerate(train)
        ]
        self._waiting: list[int] = []
        self.steps = 0

    def step(self) -> None:
        """One batch of one task."""
        if not self._waiting:
            self._waiting = [int(j) for j in self._order.permutation(len(self._train))]
        j = self._waiting.pop()
        images, labels = self._train[j].batch(next(self._batches[j]), self.steps // len(self._train))
        self._network.train()
        self._optimizer.zero_grad(set_to_none=True)
        logits: Any = functional_call(self._network, {**self._shared, **self._heads[j]}, (images,))
        functional.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate * self._factor(self.steps)
        self._optimizer.step()
        self.steps += 1

    @torch.no_grad()
    def loss(self, validation: Sequence[Split]) -> float:
        """Mean over tasks of the mean loss on validation images."""
        self._network.eval()
        found = [
            float(
                functional.cross_entropy(
                    functional_call(self._network, {**self._shared, **head}, (s.images,)), s.labels
                )
            )
            for head, s in zip(self._heads, validation, strict=True)
        ]
        return float(np.mean(found))

    def model(
        self, steps: int, trained: int, loss: float, trace: tuple[tuple[float, int, float], ...]
    ) -> MultitaskModel:
        """A copy of the weights as they are."""
        shared = {name: tensor.detach().clone() for name, tensor in self._shared.items()}
        heads = tuple({name: tensor.detach().clone() for name, tensor in head.items()} for head in self._heads)
        return MultitaskModel(shared, heads, self.rate, steps, trained, loss, trace)
