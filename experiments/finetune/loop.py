"""The sequential reference loop: SGD with heavy-ball momentum and coupled weight decay, and the log that theory needs.

    g_k = grad F_B(x_k) + omega x_k,   v <- beta v + g_k,   x <- x - eta v      (learning rate outside the buffer)

All trainable tensors live in one flat vector (shared part first, head last), so that the optimizer costs three vector
operations a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.inputs.order import with_epochs
from experiments.inputs.prefetch import in_order
from experiments.inputs.shares import nested_subset
from experiments.inputs.training_data import TrainingData
from experiments.models import head_prefix
from theory.errors import MergeboundError

Sampling = Literal["reshuffle", "without_replacement", "with_replacement"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Hyperparameters:
    """How one expert is fine-tuned (theory.md's eta, K, b, beta, omega and the share of the task's data)."""

    learning_rate: float
    steps: int
    batch_size: int
    data_share: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    sampling: Sampling = "reshuffle"

    def __post_init__(self) -> None:
        checks = (
            ("learning_rate", 0 < self.learning_rate < float("inf"), "a positive number"),
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("data_share", 0 < self.data_share <= 1, "in (0, 1]"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "nonnegative"),
            ("sampling", self.sampling in ("reshuffle", "without_replacement", "with_replacement"), "a known scheme"),
        )
        for field, good, wanted in checks:
            if not good:
                raise MergeboundError(f"{field} = {getattr(self, field)!r}: must be {wanted}")


@dataclass(frozen=True)
class TrainingLog:
    """What a run leaves behind besides its weights; arrays have one entry per step.

    Attributes:
        batch_size: samples of each batch.
        batch_loss: mean of the loss that is differentiated, before the step: with smoothed labels where they are
            smoothed (theory.md 5 and 6(d) need the loss whose gradient is taken), without decay; of ``sam`` at x_k.
        gradient_norm_shared, gradient_norm_head: Euclidean norms of the batch gradient before clipping, with coupled
            decay (none of ``adamw``), as theory.md 6(d) needs them; of ``sam`` the gradient at the worst neighbour,
            with decay at x_k; of ``low_rank`` the gradient by the factors, which bounds their drift, not the merged
            matrices'.
        seconds: of training.
        finite: whether the run stayed within the finite numbers.
        clip_factor: what the batch gradient without decay was multiplied by, in (0, 1]; ``None`` without clipping.
        used_norm_shared, used_norm_head: norms of what enters the momentum buffer, that is of the clipped gradient with
            decay: under clipping theory.md 6(d) holds with these; ``None`` without clipping, where nothing differs.
    """

    batch_size: np.ndarray
    batch_loss: np.ndarray
    gradient_norm_shared: np.ndarray
    gradient_norm_head: np.ndarray
    seconds: float
    finite: bool
    clip_factor: np.ndarray | None = None
    used_norm_shared: np.ndarray | None = None
    used_norm_head: np.ndarray | None = None


def batches(n: int, size: int, steps: int, sampling: Sampling, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Index batches.  ``reshuffle`` visits every sample once per epoch and keeps the short last batch.

    Raises:
        MergeboundError: the batch is larger than the sample.
    """
    if size > n:
        raise MergeboundError(f"batch_size = {size} is larger than the {n} training samples; lower it to {n} or less")
    done = 0
    while done < steps:
        if sampling == "reshuffle":
            order = rng.permutation(n)
            for start in range(0, n, size):
                if done == steps:
                    return
                yield order[start : start + size]
                done += 1
        else:
            yield rng.choice(n, size=size, replace=sampling == "with_replacement")
            done += 1


def finetune(
    model: nn.Module,
    start: Mapping[str, Tensor],
    train: TrainingData,
    hyper: Hyperparameters,
    seed: int,
    *,
    freeze_head: bool = False,
    transform: Callable[[Tensor, np.random.Generator], Tensor] | None = None,
    schedule: Callable[[int], float] | None = None,
    precision: Precision = "float32",
) -> tuple[dict[str, Tensor], TrainingLog]:
    """Fine-tune ``model`` from ``start`` on ``train``.

    Args:
        model: the network; its weights are overwritten.
        start: full state dict x_0 (head included).
        train: the sample; ``hyper.data_share`` of it is used (a nested seeded subset).
        seed: names the order of batches (and the augmentation's draws); twins share it.
        freeze_head: train the shared part only.
        transform: augmentation of a batch of images, given the run's generator.
        schedule: factor on the learning rate at step k; constant when absent.
        precision: ``bfloat16`` runs the network under autocast (weights, gradients and updates stay as they are).

    Returns:
        The final state dict (detached copies) and the log; ``log.finite`` is False if the run left the finite numbers
        (the state is then the last finite one).
    """
    model.load_state_dict(dict(start))
    model.train()
    prefix = head_prefix(model)
    named = sorted(model.named_parameters(), key=lambda item: item[0].startswith(prefix))
    if freeze_head:
        for name, parameter in named:
            parameter.requires_grad_(not name.startswith(prefix))
        named = [(name, p) for name, p in named if p.requires_grad]
    shared = sum(p.numel() for name, p in named if not name.startswith(prefix))
    flat, gradient = flatten([p for _, p in named])
    buffer = torch.zeros_like(flat)
    rng = np.random.default_rng([seed, 0xBA7C])
    rows = nested_subset(len(train), hyper.data_share, seed)
    sample = train.take(rows)
    log: list[tuple[float, float, float, float]] = []
    started = time.perf_counter()
    finite = True
    statistics = {n: b for n, b in model.named_buffers()}
    kept: dict[str, Tensor] = {}
    order = with_epochs(batches(len(rows), hyper.batch_size, hyper.steps, hyper.sampling, rng), len(rows))
    loaded = in_order(sample, order, ahead=transform is None)  # a transform draws from rng between the batches
    for step, (x, labels) in enumerate(loaded):
        x = x if transform is None else transform(x, rng)
        gradient.zero_()
        kept = {name: tensor.clone() for name, tensor in statistics.items()}
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(x)
        loss = F.cross_entropy(logits if precision == "float32" else logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if hyper.weight_decay:
            gradient.add_(flat, alpha=hyper.weight_decay)
        norms = (float(gradient[:shared].norm()), float(gradient[shared:].norm()))
        value = float(loss.detach())
        if not np.isfinite([value, *norms]).all():
            finite = False
            for name, tensor in kept.items():  # the failed forward pass has moved BatchNorm's statistics
                statistics[name].copy_(tensor)
            break
        log.append((float(len(labels)), value, *norms))
        buffer.mul_(hyper.momentum).add_(gradient)
        rate = hyper.learning_rate * (schedule(step) if schedule is not None else 1.0)
        flat.sub_(buffer, alpha=rate)
    loaded.close()
    columns = np.ascontiguousarray(np.asarray(log, dtype=np.float64).reshape(-1, 4).T)
    seconds = time.perf_counter() - started
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    finite = finite and all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())
    _release(model)
    return state, TrainingLog(columns[0], columns[1], columns[2], columns[3], seconds, finite)


def flatten(parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Move parameters and their gradients into two flat vectors, of which they become views."""
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    gradient = torch.zeros_like(flat)
    offset = 0
    for p in parameters:
        stop = offset + p.numel()
        p.data = flat[offset:stop].view_as(p)
        p.grad = gradient[offset:stop].view_as(p)
        offset = stop
    return flat, gradient


def _release(model: nn.Module) -> None:
    """Give every parameter storage of its own again."""
    for p in model.parameters():
        p.data = p.data.clone()
        p.grad = None
        p.requires_grad_(True)
    model.eval()


def pretrain(
    model: nn.Module,
    start: Mapping[str, Tensor],
    train: TrainingData,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    weight_decay: float = 0.05,
    turns: float = 0.0,
    views: bool = True,
) -> dict[str, Tensor]:
    """Pretrain a base x_0 with AdamW and cosine decay, with generic augmentation (:func:`random_views`) if ``views``.

    ``steps = 0`` returns the random start.
    """
    model.load_state_dict(dict(start))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    rng = np.random.default_rng([seed, 0xBA5E])
    order = with_epochs(batches(len(train), min(batch_size, len(train)), steps, "reshuffle", rng), len(train))
    for images, labels in in_order(train, order, ahead=not views):  # random_views draws from rng between the batches
        optimizer.zero_grad()
        loss = F.cross_entropy(model(random_views(images, rng, turns) if views else images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def random_views(images: Tensor, rng: np.random.Generator, turns: float = 0.0) -> Tensor:
    """Seeded generic augmentation of a batch: contrast in [0.5, 1] (one draw a batch) and pixel noise (sd 0.3).

    With ``turns`` > 0 the batch is cut into eight parts, and each part is turned by a random number of quarter turns
    and mirrored at random with that probability.
    """
    if turns > 0:
        parts = []
        for part in images.chunk(8):
            if rng.random() < turns:
                part = torch.rot90(part, int(rng.integers(0, 4)), (2, 3))
                part = part.flip(3) if rng.random() < 0.5 else part
            parts.append(part)
        images = torch.cat(parts)
    noise = torch.from_numpy(rng.standard_normal(tuple(images.shape), dtype=np.float32))
    return images * float(rng.uniform(0.5, 1.0)) + 0.3 * noise
