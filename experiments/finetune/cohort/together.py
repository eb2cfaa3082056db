"""Training of M experts step by step, whatever way computes their logits.

Experts stand in rows of one matrix.  An expert whose steps are done, or whose numbers are no longer finite, leaves it:
the rows of the others are copied together, and nothing that it computed reaches them.  The update is the reference's
(:mod:`experiments.finetune.reference`), row by row.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.finetune.cohort.rules import Rules, row_norms
from experiments.finetune.cohort.stack import Experts, Statistics, counters, make_layout, stacked, state_of
from experiments.finetune.cohort.supply import Supply, gather
from experiments.finetune.loop import TrainingLog
from experiments.grid.result import RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.training_data import TrainingData
from theory.errors import MergeboundError

_FILL = 0.25
"""Short batches are filled up where no more than this share of the samples is added, and samples do not interact."""
_LARGE = 1e30
"""Where a number might be larger than that, a step is checked before it counts."""


class Way(Protocol):
    """How the logits of M experts are computed.

    Attributes:
        model: the network in the modes in which it is trained.
        transposed: names of matrices that are wanted as (in, out).
        mixes: whether the samples of a batch see each other (BatchNorm that normalises by the batch).
    """

    model: nn.Module
    transposed: frozenset[str]
    mixes: bool

    def logits(self, tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Logits [M, B, K] of images [B, M, ...]; moves the statistics [M, C] in place.

        Args:
            tensors: parameters and fixed statistics by name, [M, ...].
        """


def train_together(
    way: Way,
    runs: Sequence[RunSpec],
    starts: Sequence[Mapping[str, Tensor]],
    data: Sequence[TrainingData],
    *,
    chunk: int,
) -> list[RunResult]:
    """Train runs, ``chunk`` at a time, in order.

    Raises:
        MergeboundError: runs that cannot be trained together, or a batch larger than the data.
    """
    check_alike(runs)
    results: list[RunResult] = []
    for begin in range(0, len(runs), max(1, chunk)):
        part = slice(begin, begin + max(1, chunk))
        results += _Chunk(way, runs[part], starts[part], data[part]).train()
    return results


def check_alike(runs: Sequence[RunSpec]) -> None:
    """Check that runs share what a cohort must share.

    Raises:
        MergeboundError: names the field.
    """
    for field in ("optimizer", "trained", "precision", "rank"):
        values = {getattr(run, field) for run in runs}
        if len(values) > 1:
            said = ", ".join(sorted(str(value) for value in values))
            raise MergeboundError(f"{field}: runs of one cohort share it, but these have {said}; make cohorts of each")


class _Chunk:
    """Experts that are trained at the same time."""

    def __init__(
        self,
        way: Way,
        runs: Sequence[RunSpec],
        starts: Sequence[Mapping[str, Tensor]],
        data: Sequence[TrainingData],
    ) -> None:
        self.way, self.runs, self.starts = way, runs, starts
        device = data[0].labels.device
        layout = make_layout(way.model, runs[0], way.transposed)
        self.counted = counters(way.model)
        self.experts = stacked(way.model, runs, starts, layout, device)
        self.rules = Rules(tuple(runs), self.experts.x, [])
        self.active = list(range(len(runs)))
        self.supplies = [Supply(run, sample) for run, sample in zip(runs, data, strict=True)]
        self.states: list[dict[int, Mapping[str, Tensor]]] = [{} for _ in runs]
        self.entries = [np.empty((run.steps, 7)) for run in runs]
        self.done = [0] * len(runs)
        self.finite = [True] * len(runs)
        self.bound = self.experts.x.abs().amax(1).double().cpu().numpy() if layout.total else np.zeros(len(runs))

    def train(self) -> list[RunResult]:
        """All steps of all experts."""
        started = time.perf_counter()
        with ExitStack() as stack:
            for supply in self.supplies:
                stack.callback(supply.close)
            step = 0
            while self.active:
                self._step(step)
                step += 1
        seconds = time.perf_counter() - started
        samples = [float(entries[:done, 0].sum()) for entries, done in zip(self.entries, self.done, strict=True)]
        share = seconds / max(sum(samples), 1.0)
        return [self._result(m, samples[m] * share) for m in range(len(self.runs))]

    def _step(self, step: int) -> None:
        before = self.experts.statistics.copy()
        batches = self._batches()
        losses, gradient = self._gradient(self.experts, batches)
        worst = losses
        if self.rules.runs[0].optimizer == "sam":
            moved = Experts(
                self.experts.x + self.rules.ascent(gradient),
                self.experts.frozen,
                self.experts.statistics.copy(),
                self.experts.layout,
            )
            worst, gradient = self._gradient(moved, batches)
        entries, gradient = self._entries(losses, worst, gradient)
        for rows, lengths, _, _ in batches:
            entries[rows, 0] = lengths
        good = np.isfinite(entries).all(1)
        if worst is not losses:
            good &= np.isfinite(worst.double().cpu().numpy())
        self._finish_step(step, entries, good, gradient, before)

    def _finish_step(
        self, step: int, entries: np.ndarray, good: np.ndarray, gradient: Tensor, before: Statistics
    ) -> None:
        """Update, note, keep checkpoints, and let go of who is done or has diverged."""
        kept = self.experts.statistics.finite()
        if len(kept):
            good = good & kept.numpy()
        if not good.all():
            self._drop_diverged(step, good, before)
            if not self.active:
                return
            rows = torch.from_numpy(np.flatnonzero(good)).to(gradient.device)
            gradient, before, entries = gradient[rows], before.select(rows), entries[good]
        risky = self._risky(step, entries)
        x_k = self.experts.x.clone() if risky else None
        self.rules.update(self.experts.x, gradient, step)
        if x_k is not None:
            sound = torch.isfinite(self.experts.x).all(1).cpu().numpy()
            if not sound.all():
                reached, self.experts.x = self.experts.x, x_k
                rows = torch.from_numpy(np.flatnonzero(sound)).to(reached.device)
                self._drop_diverged(step, sound, before)
                self.experts.x, entries = reached[rows], entries[sound]
        for row, m in enumerate(self.active):
            self.entries[m][step] = entries[row]
            self.done[m] = step + 1
            if step + 1 in self.runs[m].checkpoints:
                self.states[m][step + 1] = self._state(row, step + 1, self.experts.statistics)
        ended = np.array([self.runs[m].steps > step + 1 for m in self.active], dtype=bool)
        if not ended.all():
            self._keep(ended)

    # --- gradients ---

    def _batches(self) -> list[tuple[list[int], list[int], Tensor, Tensor]]:
        """Groups of rows with as many samples: rows, lengths, images [B, G, ...], labels [G, B]."""
        lengths = [self.supplies[m].advance() for m in self.active]
        size = max(lengths)
        groups: dict[int, list[int]] = {}
        if not self.way.mixes and size * len(lengths) - sum(lengths) <= _FILL * sum(lengths):
            groups[size] = list(range(len(lengths)))
        else:
            for row, length in enumerate(lengths):
                groups.setdefault(length, []).append(row)
        found = []
        for length, rows in sorted(groups.items(), reverse=True):
            images, labels = gather([self.supplies[self.active[row]] for row in rows], length)
            found.append((rows, [lengths[row] for row in rows], images, labels))
        return found

    def _gradient(
        self, experts: Experts, batches: Sequence[tuple[list[int], list[int], Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Losses (M,) and their gradients [M, P]; moves the statistics."""
        if len(batches) == 1:
            rows, lengths, images, labels = batches[0]
            return self._one_gradient(experts, rows, lengths, images, labels)
        losses, gradient = experts.x.new_empty(len(experts.x)), torch.empty_like(experts.x)
        for rows, lengths, images, labels in batches:
            index = torch.tensor(rows, device=experts.x.device)
            some = experts.select(index)
            losses[index], gradient[index] = self._one_gradient(some, rows, lengths, images, labels)
            experts.statistics.put(index, some.statistics)
        return losses, gradient

    def _one_gradient(
        self, experts: Experts, rows: Sequence[int], lengths: Sequence[int], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, layout = experts.x, experts.layout
        leaves = layout.leaves(x)
        half = self.runs[0].precision == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            tensors = layout.tensors(leaves, experts.frozen)
            logits = self.way.logits(tensors, experts.statistics.tensors, images.to(x.dtype))
        smoothing = self.rules.smoothing[torch.tensor(rows, device=x.device)]
        losses = batch_losses(logits.to(x.dtype), labels, lengths, smoothing)
        parts = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        flat = [
            (torch.zeros_like(leaf) if part is None else part).reshape(len(x), -1)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return losses.detach(), torch.cat(flat, dim=1)

    def _entries(self, losses: Tensor, worst: Tensor, gradient: Tensor) -> tuple[np.ndarray, Tensor]:
        """The log's columns [M, 7] (without sizes), and the gradient clipped and with coupled decay."""
        x, rules, shared = self.experts.x, self.rules, self.experts.layout.shared
        columns = [torch.zeros_like(losses), losses]
        factors = torch.ones_like(losses)
        if rules.clips:
            decayed = torch.addcmul(gradient, x, rules.decay) if rules.coupled else gradient
            columns += [row_norms(decayed[:, :shared]), row_norms(decayed[:, shared:])]
            factors = rules.clip_factors(gradient)
            gradient = gradient.mul_(factors[:, None])
        if rules.coupled:
            gradient = gradient.addcmul_(x, rules.decay)
        used = [row_norms(gradient[:, :shared]), row_norms(gradient[:, shared:])]
        columns += used if not rules.clips else []
        return torch.stack([*columns, factors, *used], dim=1).double().cpu().numpy(), gradient

    def _risky(self, step: int, entries: np.ndarray) -> bool:
        """Whether a number may become too large in this step, going by what it can have become at most."""
        rates = np.array(self.rules.rates(step))
        norms = np.hypot(entries[:, 5], entries[:, 6])
        momentum = np.array([run.momentum for run in self.rules.runs])
        with np.errstate(over="ignore"):
            if self.rules.adaptive:
                decay = np.array([run.weight_decay for run in self.rules.runs])
                self.bound = self.bound * np.maximum(np.abs(1.0 - rates * decay), 1.0) + 1e6 * rates
            else:
                self.bound = self.bound + rates * norms / (1.0 - momentum) ** 2
        return not bool((self.bound < _LARGE).all())

    # --- coming and going ---

    def _drop_diverged(self, step: int, good: np.ndarray, before: Statistics) -> None:
        for row in np.flatnonzero(~good):
            m = self.active[int(row)]
            self.states[m][step] = self._state(int(row), step, before)
            self.finite[m] = False
        self._keep(good)

    def _keep(self, kept: np.ndarray) -> None:
        rows = torch.from_numpy(np.flatnonzero(kept))
        for row in np.flatnonzero(~kept):
            self.supplies[self.active[int(row)]].close()
        self.active = [self.active[int(row)] for row in rows]
        if self.active:
            place = rows.to(self.experts.x.device)
            self.experts, self.rules, self.bound = (
                self.experts.select(place),
                self.rules.select(place),
                self.bound[kept],
            )

    def _state(self, row: int, steps: int, statistics: Statistics) -> dict[str, Tensor]:
        return state_of(self.experts, row, self.starts[self.active[row]], self.counted, steps, statistics)

    def _result(self, m: int, seconds: float) -> RunResult:
        size, loss, shared, head, clip, used_shared, used_head = self.entries[m][: self.done[m]].T.copy()
        clipped = () if self.runs[m].clip_norm is None else (clip, used_shared, used_head)
        log = TrainingLog(size, loss, shared, head, seconds, self.finite[m], *clipped)
        return RunResult("finished" if self.finite[m] else "diverged", self.states[m], log, seconds=seconds)


def batch_losses(logits: Tensor, labels: Tensor, lengths: Sequence[int], smoothing: Tensor) -> Tensor:
    """Mean cross-entropy of each expert's batch, (M,), as ``F.cross_entropy`` with label smoothing has it.

    Args:
        logits: [M, B, K].
        labels: [M, B].
        lengths: samples that count, of each expert; behind them is filling.
        smoothing: (M,) share of uniform labels.
    """
    logs = F.log_softmax(logits, dim=-1)
    right = -logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    each = (1.0 - smoothing)[:, None] * right - smoothing[:, None] * logs.mean(-1)
    size = labels.shape[1]
    counts = torch.tensor(lengths, device=logits.device)
    if all(length == size for length in lengths):
        return each.mean(1)
    real = torch.arange(size, device=logits.device) < counts[:, None]
    return torch.where(real, each, torch.zeros_like(each)).sum(1) / counts
