"""Steps of optimizers on stacked tensors, plain and compiled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from experiments.grid.run_spec import RunSpec

CLIP_EPSILON = 1e-6
LEAST_NORM = 1e-12


def compiled(
    run: RunSpec, x: np.ndarray, g: np.ndarray, buffers: list[np.ndarray], rate: float, powers: tuple[float, float]
) -> None:
    """One step of every row in place, in one compiled pass; ``buffers`` and ``powers`` are the optimizer's."""
    from experiments.measure.twins import fused

    typed = x.dtype.type
    if run.optimizer == "adamw":
        numbers = (1 - run.momentum, run.beta2, 1 - run.beta2, run.epsilon, 1 - rate * run.weight_decay, *powers)
        fused.adamw(x, *buffers, g, typed(rate), np.array(numbers, dtype=x.dtype))
    elif buffers:
        fused.heavy_ball(x, buffers[0], g, typed(rate), typed(run.momentum), typed(run.weight_decay), run.nesterov)
    else:
        fused.plain(x, g, typed(rate), typed(run.weight_decay))


def plain(run: RunSpec, x: Tensor, g: Tensor, buffers: list[Tensor], rate: float, powers: tuple[float, float]) -> None:
    """The same step by plain tensor operations, in place; overwrites ``g``."""
    if run.optimizer == "adamw":
        mean, square = buffers
        x.mul_(1.0 - rate * run.weight_decay)
        mean.lerp_(g, 1.0 - run.momentum)
        square.mul_(run.beta2).addcmul_(g, g, value=1.0 - run.beta2)
        x.addcdiv_(mean, square.sqrt().div_(powers[1]).add_(run.epsilon), value=-rate / powers[0])
        return
    g.add_(x, alpha=run.weight_decay)
    if not buffers:
        x.sub_(g, alpha=rate)
        return
    buffer = buffers[0].mul_(run.momentum).add_(g)
    x.sub_(torch.add(g, buffer, alpha=run.momentum) if run.nesterov else buffer, alpha=rate)
