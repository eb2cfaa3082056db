"""The loss that an expert was trained on, as a function of one flat vector of what was trained, around one point.

The coordinates theta are those that the gradient moves: shared parameters first, then the head, as far as the run
trained them.  BatchNorm's running statistics belong to the merged coordinates but no gradient moves them: they are held
at the point's values.  BatchNorm is in evaluation mode, so that the loss is a per-sample loss (theory.md A3); training
used batch statistics, which the theory does not cover, and constants of such networks describe the evaluation loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from experiments.measure.subject import Subject
from merging.partition import is_statistic
from theory.errors import MergeboundError

if TYPE_CHECKING:
    from experiments.store import Store

Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``losses(theta, inputs, labels)``: theta (d,), inputs (m, ...), labels (m,); one loss per sample, (m,)."""


@dataclass(frozen=True, eq=False)
class Objective:
    """Per-sample losses and the point at which they are looked at.

    Attributes:
        losses: twice differentiable in theta almost everywhere; can be vmapped over samples and points.
        theta: the point, (d,): shared part first, head last.
        shared: entries of the shared part.
        decay: omega of coupled weight decay, which training adds as ``omega theta`` to the gradient.
    """

    losses: Losses
    theta: Tensor
    shared: int
    decay: float = 0.0

    @property
    def size(self) -> int:
        """Number of trained coordinates d."""
        return int(self.theta.numel())

    def at(self, theta: Tensor) -> Objective:
        """The same losses at another point."""
        return replace(self, theta=theta)

    def mean(self, theta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch, without decay."""
        return self.losses(theta, inputs, labels).mean()


@dataclass(frozen=True, eq=False)
class Point:
    """A place on an expert's way: merged coordinates and head.

    Attributes:
        name: ``base``, ``step 30``, ``expert``, or ``between 0.5`` (on the chord: not visited).
        step: of training, -1 where there is none.
        x: merged coordinates, (P,).
        head: private tensors.
    """

    name: str
    step: int
    x: Tensor
    head: Mapping[str, Tensor]


def objective_of(subject: Subject, j: int, point: Point) -> Objective:
    """The objective of task j at a point: cross-entropy with the run's label smoothing and its coupled decay.

    Where the run is unknown everything is taken as trained, without smoothing or decay.  ``low_rank`` runs train
    factors; here the matrices themselves are the coordinates.
    """
    net, run = subject.networks[j], subject.runs[j]
    cut = net.space.offsets[len(net.partition.shared)]
    trained = "full" if run is None else run.trained
    names = [n for n, t in point.head.items() if t.is_floating_point() and not is_statistic(n)]
    names = names if trained != "backbone" else []
    shared = cut if trained != "head" else 0
    smoothing = 0.0 if run is None else run.label_smoothing
    decay = 0.0 if run is None or run.optimizer == "adamw" else run.weight_decay
    shapes = [point.head[n].shape for n in names]
    offsets = [0, *accumulate(point.head[n].numel() for n in names)]
    fixed = {**net.constants, **{f"model.{n}": t for n, t in point.head.items()}}
    whole = point.x.detach()
    segments = [
        (f"model.{n}", piece, shape) for (n, piece), shape in zip(net.space.segments(), net.space.shapes, strict=True)
    ]
    module: nn.Module = net.module

    def losses(theta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        x = torch.cat([theta[:shared], whole[shared:]])
        private = theta[shared:]
        named = {n: x[piece].view(shape) for n, piece, shape in segments}
        heads = {
            f"model.{n}": private[a:b].view(shape)
            for n, a, b, shape in zip(names, offsets, offsets[1:], shapes, strict=False)
        }
        logits = functional_call(module, {**fixed, **named, **heads}, (inputs,))
        return cross_entropy(logits, labels, smoothing)

    parts = [whole[:shared], *(point.head[n].detach().reshape(-1).to(whole.dtype) for n in names)]
    return Objective(losses, torch.cat(parts), shared, decay)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each sample, (m,), written so that every transform of torch.func passes through it."""
    logs = torch.log_softmax(logits, dim=-1)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    picked = (labels[..., None] == classes).to(logits.dtype)
    target = (1.0 - smoothing) * picked + smoothing / logits.shape[-1]
    return -(target * logs).sum(dim=-1)


def path_of(subject: Subject, j: int, *, checkpoints: Sequence[Point] = (), between: int = 0) -> tuple[Point, ...]:
    """The points of expert j's way: base with the head before training, checkpoints, expert.

    Args:
        subject: with ``start_heads`` where they are known; elsewhere the base gets the final head, which is another
            point than the one where training began (its name is then ``base, final head``).
        j: which expert.
        checkpoints: visited points in order, as :func:`checkpoint_points` reads them.
        between: so many equally spaced points of the chord from base to expert are added; training did not visit them.
    """
    first, last = subject.start_heads[j], subject.heads[j]
    run = subject.runs[j]
    known = first is not None or not last
    start = Point("base" if known else "base, final head", 0, subject.base, first if first is not None else last)
    end = Point("expert", -1 if run is None else run.steps, subject.vectors[j], last)
    chord = []
    for number in range(1, between + 1):
        share = number / (between + 1)
        head = {n: torch.lerp(start.head[n], last[n], share) if last[n].is_floating_point() else last[n] for n in last}
        chord.append(Point(f"between {share:.2f}", -1, torch.lerp(start.x, end.x, share), head))
    return (start, *checkpoints, *chord, end)


def checkpoint_points(store: Store, runs: Sequence[str], subject: Subject, most: int = 4) -> list[tuple[Point, ...]]:
    """The kept checkpoints of runs between base and expert, at most ``most`` of each, spread over its steps.

    Args:
        store: that holds the runs.
        runs: whole digests, in the order of the subject's experts.
        subject: opened from the same runs.
        most: points of each run.

    Raises:
        MergeboundError: other runs than the subject's, or a damaged file.
    """
    import numpy as np

    if len(runs) != subject.size:
        raise MergeboundError(f"runs: {len(runs)} digests for {subject.size} experts; give the subject's own")
    found = []
    for j, digest in enumerate(runs):
        inner = store.spec(digest).checkpoints[:-1]
        chosen = sorted({inner[int(i)] for i in np.linspace(0, len(inner) - 1, min(most, len(inner)))}) if inner else []
        points = []
        for step in chosen:
            state = store.state(digest, step)
            x = subject.networks[j].space.flatten(state).to(subject.base.dtype)
            head = {n: state[n].to(t.dtype) for n, t in subject.heads[j].items()}
            points.append(Point(f"step {step}", step, x, head))
        found.append(tuple(points))
    return found
