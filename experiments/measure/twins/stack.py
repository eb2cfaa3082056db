"""A stack of coupled runs of one network, whatever computes its logits: the cohort engine's ways and update rules.

Rows join while the stack runs: a twin is copied from its base run at the step at which its sample is first drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from experiments.finetune.cohort.folded import fold_network, supports_folding
from experiments.finetune.cohort.rules import Rules
from experiments.finetune.cohort.stack import (
    DTYPES,
    Experts,
    Statistics,
    counters,
    make_layout,
    prepared,
    stacked,
    state_of,
)
from experiments.finetune.cohort.together import Way, batch_losses
from experiments.finetune.cohort.vmapped import Vmapped, supports_vmap
from experiments.grid.run_spec import RunSpec
from experiments.measure.twins.pairs import Batch
from theory.errors import MergeboundError


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One run in the middle of its training.

    Attributes:
        x: (P,) trained numbers, as the engine lays them out.
        buffers: of the optimizer, each (P,).
        statistics: running statistics by name.
    """

    x: Tensor
    buffers: tuple[Tensor, ...] = ()
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        each = (self.x, *self.buffers, *self.statistics.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in each)


class Engine(Protocol):
    """Trains rows side by side on one stream of batches.

    Attributes:
        name: of the way, for reports.
        shared: numbers of a vector that belong to the shared part; they come first.
        size: numbers of a vector, P.
        row_bytes: memory of one row besides what its batch takes.
        dtype: of the trained numbers.
    """

    name: str
    shared: int
    size: int
    row_bytes: int
    dtype: torch.dtype

    def begin(self) -> Snapshot:
        """The run before its first step."""

    def open(self, capacity: int) -> None:
        """Forget all rows; at most so many will join."""

    def join(self, snapshot: Snapshot, count: int) -> None:
        """Append rows that stand where the snapshot does."""

    def step(self, step: int, batch: Batch, *, loss: bool = False) -> Tensor | None:
        """One step of all rows; the first row's loss before it, if wanted."""

    def snapshot(self, row: int) -> Snapshot:
        """A copy of one row."""

    def vectors(self) -> Tensor:
        """Trained numbers of all rows, [M, P], shared part first."""

    def vector(self, snapshot: Snapshot) -> Tensor:
        """Trained numbers (P,) of a snapshot in the order of :meth:`vectors`."""

    def state(self, snapshot: Snapshot, steps: int) -> dict[str, Tensor]:
        """The full state dict of a snapshot after so many steps, on the processor."""


class NetworkStack:
    """Any network that can be folded or put under vmap; an :class:`Engine`.

    Args:
        run: hyperparameters that all rows share.
        network: of the run's architecture; copied.
        start: full state dict x_0.
        device: where the images are.
        way: ``folded``, ``vmap`` or ``auto`` (folded where possible).
        channels_last: memory order of images.

    Raises:
        MergeboundError: neither way takes the network, or the run trains low-rank factors.
    """

    def __init__(
        self,
        run: RunSpec,
        network: nn.Module,
        start: Mapping[str, Tensor],
        device: torch.device,
        *,
        way: str = "auto",
        channels_last: bool = False,
    ) -> None:
        if run.trained == "low_rank":
            raise MergeboundError("twins: low-rank updates have no coordinates of their own; use trained = full")
        self.run, self._start = run, start
        model = prepared(network, [run], [start], device)
        self._way, self.name = _way(model, run, way, channels_last)
        self._counted = counters(self._way.model)
        self._layout = make_layout(self._way.model, run, self._way.transposed)
        self.shared, self.size, self.dtype = self._layout.shared, self._layout.total, DTYPES[run.precision]
        self._first = stacked(self._way.model, [run], [start], self._layout, device)
        self._buffers = 2 if run.optimizer == "adamw" else int(run.momentum > 0)
        moving = sum(tensor.numel() for tensor in self._first.statistics.tensors.values())
        self.row_bytes = (self.size * (3 + self._buffers) + moving) * self.dtype.itemsize
        self.open(0)

    def begin(self) -> Snapshot:
        """See :class:`Engine`."""
        x = self._first.x[0].clone()
        buffers = tuple(torch.zeros_like(x) for _ in range(self._buffers))
        return Snapshot(x, buffers, {n: t[0].clone() for n, t in self._first.statistics.tensors.items()})

    def open(self, capacity: int) -> None:
        """See :class:`Engine`."""
        none = torch.zeros(0, dtype=torch.int64, device=self._first.x.device)
        self._experts = Experts(self._first.x[none], {}, self._first.statistics.select(none), self._layout)
        self._rules = Rules((self.run,), self._first.x, [])
        self._rows_buffers = [self._first.x[none] for _ in range(self._buffers)]

    def join(self, snapshot: Snapshot, count: int) -> None:
        """See :class:`Engine`."""
        old = self._experts
        x = torch.cat([old.x, snapshot.x.expand(count, -1)])
        before = old.statistics.tensors
        joined = {n: torch.cat([before[n], t.expand(count, *t.shape)]) for n, t in snapshot.statistics.items()}
        buffers = [
            torch.cat([rows, new.expand(count, -1)])
            for rows, new in zip(self._buffers_now(), snapshot.buffers, strict=True)
        ]
        frozen = {n: t.expand(len(x), *t.shape[1:]) for n, t in self._first.frozen.items()}
        self._experts = Experts(x, frozen, Statistics(joined), self._layout)
        self._rules = Rules((self.run,) * len(x), x, buffers)

    def step(self, step: int, batch: Batch, *, loss: bool = False) -> Tensor | None:
        """See :class:`Engine`."""
        run, rules, experts = self.run, self._rules, self._experts
        images, labels = spread(batch, len(experts.x), self.dtype)
        losses, gradient = self._gradient(experts, images, labels)
        if run.optimizer == "sam":
            x = experts.x + rules.ascent(gradient)
            moved = Experts(x, experts.frozen, experts.statistics.copy(), experts.layout)
            _, gradient = self._gradient(moved, images, labels)
        if rules.clips:
            gradient = gradient.mul_(rules.clip_factors(gradient)[:, None])
        if rules.coupled:
            gradient = gradient.addcmul_(experts.x, rules.decay)
        rules.update(experts.x, gradient, step)
        return losses[0] if loss else None

    def snapshot(self, row: int) -> Snapshot:
        """See :class:`Engine`."""
        statistics = {n: t[row].clone() for n, t in self._experts.statistics.tensors.items()}
        return Snapshot(self._experts.x[row].clone(), tuple(b[row].clone() for b in self._buffers_now()), statistics)

    def vectors(self) -> Tensor:
        """See :class:`Engine`."""
        return self._experts.x

    def vector(self, snapshot: Snapshot) -> Tensor:
        """See :class:`Engine`."""
        return snapshot.x

    def state(self, snapshot: Snapshot, steps: int) -> dict[str, Tensor]:
        """See :class:`Engine`."""
        statistics = Statistics({n: t[None] for n, t in snapshot.statistics.items()})
        one = Experts(snapshot.x[None], self._first.frozen, statistics, self._layout)
        return state_of(one, 0, self._start, self._counted, steps, statistics)

    def _buffers_now(self) -> list[Tensor]:
        return self._rules.buffers or self._rows_buffers

    def _gradient(self, experts: Experts, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        leaves = self._layout.leaves(experts.x)
        half = self.run.precision == "bfloat16"
        with torch.autocast(experts.x.device.type, torch.bfloat16, enabled=half):
            tensors = self._layout.tensors(leaves, experts.frozen)
            logits = self._way.logits(tensors, experts.statistics.tensors, images)
        count = labels.shape[1]
        losses = batch_losses(logits.to(experts.x.dtype), labels, [count] * len(labels), self._rules.smoothing)
        parts = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        flat = [
            (torch.zeros_like(leaf) if part is None else part).reshape(len(leaf), -1)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return losses.detach(), torch.cat(flat, dim=1)


def spread(batch: Batch, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What each row sees: images [B, M, ...] and labels [M, B]."""
    images = batch.images.to(dtype).unsqueeze(1).repeat(1, rows, *([1] * (batch.images.ndim - 1)))
    labels = batch.labels.repeat(rows, 1)
    if len(batch.twins):
        images[batch.places, batch.twins] = batch.other_images.to(dtype)
        labels[batch.twins, batch.places] = batch.other_labels
    return images, labels


def _way(model: nn.Module, run: RunSpec, wanted: str, channels_last: bool) -> tuple[Way, str]:
    if wanted not in ("auto", "folded", "vmap"):
        raise MergeboundError(f"twins: way {wanted!r} is unknown; choose auto, written, folded or vmap")
    reasons = []
    if wanted in ("auto", "folded"):
        reason = supports_folding(model, prove=wanted == "auto")
        if reason is None:
            return fold_network(model, half=run.precision == "bfloat16", channels_last=channels_last), "folded"
        reasons.append(f"it cannot be folded: {reason}")
    if wanted in ("auto", "vmap"):
        reason = supports_vmap(model)
        if reason is None:
            return Vmapped(model, channels_last=channels_last), "vmap"
        reasons.append(f"vmap does not take it: {reason}")
    raise MergeboundError(f"{run.architecture}: no twins of this network: {'; '.join(reasons)}")
