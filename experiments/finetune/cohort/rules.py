"""The reference's update rules for rows of experts: every hyperparameter is a column of one number per expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.finetune.schedules import schedule
from experiments.grid.run_spec import RunSpec

_CLIP_EPSILON = 1e-6
_LEAST_NORM = 1e-12


@dataclass
class Rules:
    """Hyperparameters and optimizer state of M experts, for rows x [M, P].

    Attributes:
        runs: of the experts.
        like: says the type of numbers and the device.
        buffers: of the optimizer, each [M, P].
    """

    runs: tuple[RunSpec, ...]
    like: Tensor
    buffers: list[Tensor]

    def __post_init__(self) -> None:
        self._factors = [schedule(run.schedule, run.steps, warm_up=run.warm_up) for run in self.runs]
        self.momentum = self.column([run.momentum for run in self.runs])
        self.decay = self.column([run.weight_decay for run in self.runs])
        self.beta2 = self.column([run.beta2 for run in self.runs])
        self.epsilon = self.column([run.epsilon for run in self.runs])
        self.radius = self.column([run.sam_radius for run in self.runs])
        self.clip = self.column([np.inf if run.clip_norm is None else run.clip_norm for run in self.runs])
        self.smoothing = self.column([run.label_smoothing for run in self.runs])[:, 0]
        self.clips = any(run.clip_norm is not None for run in self.runs)
        self.adaptive = self.runs[0].optimizer == "adamw"
        self.coupled = not self.adaptive and any(run.weight_decay for run in self.runs)
        self.moves = any(run.momentum for run in self.runs)
        self.nesterov = any(run.nesterov for run in self.runs)
        self.looks_ahead = self.column([run.momentum if run.nesterov else 0.0 for run in self.runs])
        self.own = self.column([1.0 if run.nesterov else 0.0 for run in self.runs])
        self.plain = 1.0 - self.own

    def column(self, values: Sequence[float]) -> Tensor:
        """(M, 1) of one number per expert."""
        return torch.tensor(values, dtype=torch.float64).to(self.like)[:, None]

    def rates(self, step: int) -> list[float]:
        """Scheduled learning rates at a step."""
        return [run.learning_rate * factor(step) for run, factor in zip(self.runs, self._factors, strict=True)]

    def select(self, kept: Tensor) -> Rules:
        """Those of some experts; buffers are copied."""
        runs = tuple(self.runs[int(m)] for m in kept)
        return Rules(runs, self.like, [buffer[kept] for buffer in self.buffers])

    def ascent(self, gradient: Tensor) -> Tensor:
        """SAM's step to the worst neighbour, rho g / ||g||."""
        norm = row_norms(gradient).clamp(min=_LEAST_NORM)
        return gradient * (self.radius / norm[:, None])

    def clip_factors(self, gradient: Tensor) -> Tensor:
        """(M,): what each gradient is multiplied by."""
        return (self.clip[:, 0] / (row_norms(gradient) + _CLIP_EPSILON)).clamp(max=1.0)

    @torch.no_grad()
    def update(self, x: Tensor, gradient: Tensor, step: int) -> None:
        """One step of all experts, in place; the gradient has clipping and coupled decay in it and is used up."""
        rates = self.rates(step)
        if self.adaptive:
            self._adamw(x, gradient, rates, step + 1)
            return
        rate = self.column([-r for r in rates])
        if not self.moves:
            x.addcmul_(gradient, rate)
            return
        if not self.buffers:
            self.buffers = [torch.zeros_like(x)]
        buffer = self.buffers[0].mul_(self.momentum).add_(gradient)
        if self.nesterov:
            # g + beta v where the run is Nesterov's, v where it is not
            ahead = torch.addcmul(gradient, buffer, self.looks_ahead).mul_(self.own)
            buffer = ahead.addcmul_(buffer, self.plain) if bool((self.plain > 0).any()) else ahead
        x.addcmul_(buffer, rate)

    def _adamw(self, x: Tensor, gradient: Tensor, rates: Sequence[float], count: int) -> None:
        if not self.buffers:
            self.buffers = [torch.zeros_like(x), torch.zeros_like(x)]
        mean, square = self.buffers
        runs = self.runs
        x.mul_(self.column([1.0 - r * run.weight_decay for r, run in zip(rates, runs, strict=True)]))
        mean.lerp_(gradient, 1.0 - self.momentum)
        square.mul_(self.beta2).addcmul_(
            gradient.mul_(self.column([np.sqrt(1.0 - run.beta2) for run in runs])), gradient
        )
        root = self.column([1.0 / np.sqrt(1.0 - run.beta2**count) for run in runs])
        divisor = square.sqrt().mul_(root).add_(self.epsilon)
        rate = self.column([-r / (1.0 - run.momentum**count) for r, run in zip(rates, runs, strict=True)])
        x.addcmul_(divisor.reciprocal_().mul_(mean), rate)


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms of rows [M, P], (M,)."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
