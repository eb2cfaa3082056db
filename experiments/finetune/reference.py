"""The sequential reference loop: one run, one step after the other, nothing clever; other ways are held against it.

One step, for batch B_k at x_k:

1. g = grad F_{B_k}(x_k), F the mean cross-entropy with smoothed labels.  ``sam`` takes it at x_k + rho g / ||g||
   instead.  There BatchNorm normalises by the batch, but its running statistics move in the first pass only, and the
   same units are dropped out (both as in the authors' code, github.com/google-research/sam).  The first gradient is
   neither clipped nor decayed: the paper's objective has the decay outside the maximum.
2. Clipping: g <- g min(1, clip_norm / (||g|| + 1e-6)), ||g|| over all trained parameters, **before** decay is added
   (``clip_grad_norm_`` followed by an optimizer with weight decay).
3. ``sgd``, ``sam``: coupled decay g <- g + omega x_k, then heavy ball (or Nesterov).  ``adamw``: decoupled decay.

Decay falls on everything that is trained: biases and norms, and with ``low_rank`` the factors A and B.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.finetune.loop import TrainingLog, batches
from experiments.finetune.optimizers import Update, adamw, ascent, clip_factor, heavy_ball
from experiments.finetune.schedules import schedule
from experiments.finetune.trained import TrainedNetwork, trained_network
from experiments.grid.result import RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.order import with_epochs
from experiments.inputs.prefetch import Batch, in_order
from experiments.inputs.shares import nested_subset
from experiments.inputs.training_data import TrainingData

_BATCHES = 0xBA7C
_DROPOUT = 0x9E3779B97F4A7C15


def train_run(run: RunSpec, network: nn.Module, start: Mapping[str, Tensor], data: TrainingData) -> RunResult:
    """Fine-tune one expert.

    Args:
        run: what to do; ``run.task`` and ``run.base`` are not looked at, and ``run.augment`` is the data's affair.
        network: the architecture; it is copied and stays as it is.
        start: full state dict x_0, head included.
        data: the training part; ``run.data_share`` of it is used (a nested subset named by the seed).  The run is
            trained on the device where its labels are.

    Returns:
        States at the checkpoints that were reached, on the processor, and the log; no metrics.  ``diverged``: a loss,
        gradient norm, weight or running statistic of the next step is not finite; that step is undone, and the state
        before it is kept at its number.  The log has one entry for every step that counts, so its length is the number
        of the last state.  States are float64 where ``run.precision`` is, float32 otherwise.

    Raises:
        MergeboundError: the batch is larger than the data used, or the network has no classifier.
    """
    with _own_generator(data.labels.device):
        started = time.perf_counter()
        net = trained_network(run, network, start, data.labels.device)
        with closing(_loaded(run, data)) as loaded:
            states, log, finite = _train(run, net, loaded)
        seconds = time.perf_counter() - started
    return RunResult("finished" if finite else "diverged", states, _log(run, log, seconds, finite), seconds=seconds)


Entry = tuple[float, ...]
"""Of one step: batch size, loss, gradient norms (shared, head), clip factor, norms of what was used (shared, head)."""


def _train(
    run: RunSpec, net: TrainedNetwork, loaded: Iterator[Batch]
) -> tuple[dict[int, dict[str, Tensor]], list[Entry], bool]:
    x, g = net.x, net.gradient
    update, factor = _update(run, x), schedule(run.schedule, run.steps, warm_up=run.warm_up)
    coupled = 0.0 if run.optimizer == "adamw" else run.weight_decay
    states: dict[int, dict[str, Tensor]] = {}
    log: list[Entry] = []
    x_k, buffers_k = torch.empty_like(x), [torch.empty_like(buffer) for buffer in net.buffers]
    for step, (images, labels) in enumerate(loaded):
        for kept, now in zip((x_k, *buffers_k), (x, *net.buffers), strict=True):
            kept.copy_(now)
        loss = _gradient(run, net, images, labels, step)
        worst = _sam_gradient(run, net, images, labels, step) if run.optimizer == "sam" else loss
        before = _norms(torch.add(g, x, alpha=coupled) if run.clip_norm is not None else g, net.shared)
        clip = 1.0 if run.clip_norm is None else clip_factor(g, run.clip_norm)
        if clip < 1.0:
            g.mul_(clip)
        if coupled:
            g.add_(x, alpha=coupled)
        used = _norms(g, net.shared)
        before = before if run.clip_norm is not None else used
        finite = bool(np.isfinite([loss, worst, *before, *used]).all())
        if finite:
            update(x, g, run.learning_rate * factor(step))
            finite = _finite(x) and (not net.statistics or _finite(torch.cat([*net.statistics])))
        if not finite:
            _restore(net, x_k, buffers_k)
            states[step] = net.state()
            return states, log, False
        log.append((float(len(labels)), loss, *before, clip, *used))
        if step + 1 in run.checkpoints:
            states[step + 1] = net.state()
    return states, log, True


def _gradient(run: RunSpec, net: TrainedNetwork, images: Tensor, labels: Tensor, step: int) -> float:
    """The batch loss; its gradient is in ``net.gradient`` afterwards.  Seed and step name what is dropped out."""
    _generator(images.device).manual_seed((run.seed * _DROPOUT + step) % 2**63)
    net.gradient.zero_()
    images = images.to(net.dtype)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=run.precision == "bfloat16"):
        logits = net.logits(images)
    loss = F.cross_entropy(logits.to(net.dtype), labels, label_smoothing=run.label_smoothing)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _sam_gradient(run: RunSpec, net: TrainedNetwork, images: Tensor, labels: Tensor, step: int) -> float:
    """From the gradient at x_k to the gradient at its worst neighbour, and the loss there."""
    here, buffers = net.x.clone(), [buffer.clone() for buffer in net.buffers]
    net.x.add_(ascent(net.gradient, run.sam_radius))
    loss = _gradient(run, net, images, labels, step)
    _restore(net, here, buffers)
    return loss


def _restore(net: TrainedNetwork, x: Tensor, buffers: Sequence[Tensor]) -> None:
    net.x.copy_(x)
    for buffer, before in zip(net.buffers, buffers, strict=True):
        buffer.copy_(before)


def _update(run: RunSpec, x: Tensor) -> Update:
    if run.optimizer == "adamw":
        return adamw(x, run.momentum, run.beta2, run.epsilon, run.weight_decay)
    return heavy_ball(x, run.momentum, nesterov=run.nesterov)


def _loaded(run: RunSpec, data: TrainingData) -> Generator[Batch, None, None]:
    rows = nested_subset(len(data), run.data_share, run.seed)
    rng = np.random.default_rng([run.seed, _BATCHES])
    order = batches(len(rows), run.batch_size, run.steps, run.sampling, rng)
    return in_order(data.take(rows), with_epochs(order, len(rows)))


def _log(run: RunSpec, log: list[Entry], seconds: float, finite: bool) -> TrainingLog:
    size, loss, shared, head, clip, used_shared, used_head = np.asarray(log, dtype=np.float64).reshape(-1, 7).T.copy()
    if run.clip_norm is None:
        return TrainingLog(size, loss, shared, head, seconds, finite)
    return TrainingLog(size, loss, shared, head, seconds, finite, clip, used_shared, used_head)


def _norms(gradient: Tensor, shared: int) -> tuple[float, float]:
    return float(gradient[:shared].norm()), float(gradient[shared:].norm())


def _finite(numbers: Tensor) -> bool:
    """Whether all are: their sum is then, but for an overflow, and takes one pass."""
    return bool(torch.isfinite(numbers.sum())) or bool(torch.isfinite(numbers).all())


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def _own_generator(device: torch.device) -> AbstractContextManager[None]:
    """Whatever is drawn from torch's generator inside, the caller's is left as it was."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
