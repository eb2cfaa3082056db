"""Losses and errors of many parameter vectors on the same images.

One vector is in place at a time, images are prepared once, and what is kept of a point is one loss and one error per
image, so that any number of points fits in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.evaluate.fast import FastModel, fast_evaluator
from experiments.evaluate.metrics import score
from experiments.measure.backbone import Readout
from experiments.measure.landscape.running import clamped, reestimated, with_batchnorm
from experiments.measure.subject import Subject, draw
from experiments.models import head_prefix
from experiments.tasks.types import Split
from theory.errors import MergeboundError

Floats = NDArray[np.float64]
BatchNorm = Literal["merged", "reestimated", "task"]
Path = Literal["plain", "exact", "fast"]
Progress = Callable[[str, int, int], None]
PARTS = ("test", "calibration", "train")
BATCH = 256
_ALLOWED = {"exact": ("fold", "channels_last", "chunk"), "fast": ("fold", "bf16", "channels_last", "chunk")}


@dataclass(frozen=True, eq=False)
class Panel:
    """Images on which points are scored.

    Attributes:
        part: ``test``, ``calibration`` or ``train``.
        seed: names the draw.
        splits: n_j images of each task.
        sources: numbers that say which images are in several tasks (then resampled together); ``None`` for a task
            that shares none.
    """

    part: str
    seed: int
    splits: tuple[Split, ...]
    sources: tuple[NDArray[np.int64] | None, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of each task."""
        return tuple(len(split) for split in self.splits)


def panel(subject: Subject, part: str | None = None, images: int = 256, seed: int = 0) -> Panel:
    """Images of every task.

    Args:
        part: ``test``, ``calibration`` or ``train`` (the expert's own sample, without augmentation); default ``test``
            where every task has one, else ``calibration``.
        images: per task at most.
        seed: names the draw from ``test`` or ``train``.

    Raises:
        MergeboundError: a part that the subject does not have.
    """
    chosen = part or ("test" if all(data is not None for data in subject.test) else "calibration")
    if chosen not in PARTS:
        raise MergeboundError(f"part = {chosen!r}: choose from {', '.join(PARTS)}")
    if images < 1:
        raise MergeboundError(f"images = {images}: give 1 or more")
    if chosen == "calibration":
        splits = tuple(split.take(np.arange(min(images, len(split)))) for split in subject.calibration)
    else:
        found = []
        for name, data in zip(subject.names, getattr(subject, chosen), strict=True):
            if data is None:
                raise MergeboundError(f"expert {name} has no {chosen} images; use part = calibration")
            found.append(draw(data, images, seed))
        splits = tuple(found)
    return Panel(chosen, seed, splits, shared_sources(subject.tasks, splits))


def shared_sources(tasks: Sequence[str], splits: Sequence[Split]) -> tuple[NDArray[np.int64] | None, ...]:
    """Which tasks show the same images: tasks of one data set whose rows and labels agree throughout.

    Row numbers of different data sets mean nothing to each other, so they are given only within such groups.
    """
    family = [task.partition(":")[0].partition(" ")[0] for task in tasks]
    keys = [(family[j], s.source.tobytes(), s.labels.cpu().numpy().tobytes()) for j, s in enumerate(splits)]
    first = [keys.index(key) for key in keys]
    shared = {j for j in first if first.count(j) > 1}
    offset, starts = 0, {}
    for j in sorted(shared):
        starts[j] = offset
        offset += int(splits[j].source.max()) + 1
    return tuple(
        (split.source + starts[j]).astype(np.int64) if j in shared else None
        for j, split in zip(first, splits, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Scores:
    """Losses in nats and errors in {0, 1} of one point: for each task that was scored, (n_j,) each."""

    loss: Mapping[int, Floats]
    error: Mapping[int, Floats]

    def mean_loss(self, weights: Floats | None = None) -> float:
        """Weighted mean over tasks of the mean loss; equal weights when absent."""
        return _mean(self.loss, weights)

    def mean_error(self, weights: Floats | None = None) -> float:
        """The same of errors."""
        return _mean(self.error, weights)


def _mean(tables: Mapping[int, Floats], weights: Floats | None) -> float:
    p = np.full(len(tables), 1.0 / len(tables)) if weights is None else weights
    return float(p @ np.array([values.mean() for values in tables.values()]))


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Scores points; made by :func:`evaluator`.

    Attributes:
        subject, panel: what and on what.
        batchnorm: how running statistics come about at a point.
        path: how the network is run: ``plain``, or the name of a fast path.
        fast: the network on that path; ``None`` for the functional network of the subject.
        heads: by task, for a network that gives features.
        ready: prepared images of each task in batches, with labels.
    """

    subject: Subject
    panel: Panel
    batchnorm: BatchNorm
    path: str
    fast: FastModel | None = field(repr=False)
    heads: tuple[Readout, ...] = field(repr=False)
    ready: tuple[tuple[tuple[Tensor, Tensor], ...], ...] = field(repr=False)

    def score(self, vector: Tensor, tasks: Sequence[int] | None = None) -> Scores:
        """Losses and errors of one point (P,) on some tasks (default all).

        Running variances that extrapolation made negative count as zero.  A logit that is not finite is an infinite
        loss and an error.
        """
        chosen = range(self.subject.size) if tasks is None else tasks
        loss: dict[int, Floats] = {}
        error: dict[int, Floats] = {}
        whole = self._repaired(vector, None) if self.batchnorm != "task" else vector
        for place, j in enumerate(chosen):
            point = self._repaired(vector, j) if self.batchnorm == "task" else whole
            if self.fast is not None and (place == 0 or self.batchnorm == "task"):
                self.fast.load(self._state(point))
            found = [score(self._logits(point, j, images), labels) for images, labels in self.ready[j]]
            loss[j] = np.concatenate([one.loss for one in found])
            error[j] = np.concatenate([~one.correct for one in found]).astype(np.float64)
        return Scores(loss, error)

    def many(
        self, vectors: Iterable[Tensor], tasks: Sequence[int] | None = None, *, progress: Progress | None = None,
        stage: str = "points", total: int = 0,
    ) -> Iterator[Scores]:  # fmt: skip
        """Scores of points that may be made one by one."""
        for done, vector in enumerate(vectors):
            yield self.score(vector, tasks)
            if progress is not None:
                progress(stage, done + 1, total)

    def _logits(self, point: Tensor, j: int, images: Tensor) -> Tensor:
        if self.fast is None:
            return self.subject.networks[j].features(point, images)
        out = self.fast.run(images)
        return self.heads[j].logits(out) if self.heads else out

    def _state(self, point: Tensor) -> dict[str, Tensor]:
        return self.subject.networks[0].space.unflatten(point)

    def _repaired(self, vector: Tensor, task: int | None) -> Tensor:
        if self.batchnorm == "merged":
            return clamped(self.subject, vector)
        return reestimated(self.subject, vector, task)


def evaluator(
    subject: Subject,
    on: Panel,
    *,
    batchnorm: BatchNorm = "merged",
    path: Path = "exact",
    batch_size: int = BATCH,
) -> Evaluator:
    """Make ready to score points.

    Args:
        batchnorm: ``merged``: running statistics are coordinates of the point; ``reestimated``: estimated at every
            point on the calibration images of all tasks together; ``task``: on those of the task that is scored, so
            that every task has its own.
        path: ``plain``: the functional network; ``exact``: the fastest float32 path (BatchNorm folded, memory layout);
            ``fast``: bfloat16 too, where it is faster and close.  Networks whose private tensors are not one linear
            head, and float64, are run plainly.

    Raises:
        MergeboundError: an unknown word, or re-estimation of a network without BatchNorm.
    """
    if batchnorm not in ("merged", "reestimated", "task"):
        raise MergeboundError(f"batchnorm = {batchnorm!r}: choose merged, reestimated or task")
    if path not in ("plain", *_ALLOWED):
        raise MergeboundError(f"path = {path!r}: choose plain, exact or fast")
    if batchnorm != "merged" and not subject.networks[0].partition.buffers:
        raise MergeboundError(f"{subject.architecture} has no running statistics to estimate; use batchnorm = merged")
    fast: FastModel | None = None
    heads: tuple[Readout, ...] = ()
    if path != "plain" and subject.base.dtype == torch.float32:
        fast, heads = _fast(subject, on, path)
    ready = []
    for split in on.splits:
        batches = []
        for start in range(0, len(split), batch_size):
            images, labels = split.images[start : start + batch_size], split.labels[start : start + batch_size]
            batches.append((images if fast is None else fast.prepare(images), labels))
        ready.append(tuple(batches))
    return Evaluator(subject, on, batchnorm, "plain" if fast is None else fast.path, fast, heads, tuple(ready))


def _fast(subject: Subject, on: Panel, path: str) -> tuple[FastModel | None, tuple[Readout, ...]]:
    """A network on a fast path, with the linear heads of all tasks; nothing where heads are of another kind."""
    try:
        prefix = head_prefix(subject.model)
    except MergeboundError:
        prefix = ""
    private = [set(head) for head in subject.heads]
    sample = on.splits[0].images[:64]
    if len(sample) < 2:
        return None, ()
    if not any(private):
        own = dict(subject.model.state_dict())
        pieces = subject.networks[0].space.unflatten(subject.base)
        if any(own[name].shape != tensor.shape for name, tensor in pieces.items()):
            return None, ()
        return fast_evaluator(with_batchnorm(subject.model), sample, allow=_ALLOWED[path]), ()
    linear = {prefix + "weight", prefix + "bias"}
    if not prefix or any(not names <= linear or prefix + "weight" not in names for names in private):
        return None, ()
    heads = tuple(Readout(head[prefix + "weight"], head.get(prefix + "bias")) for head in subject.heads)
    return fast_evaluator(with_batchnorm(subject.model), sample, allow=_ALLOWED[path], heads=heads[:1]), heads
