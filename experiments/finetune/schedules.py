"""Learning-rate schedules: the factor on the learning rate at step k = 0, 1, ..., K - 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

from theory.errors import MergeboundError

ScheduleName = Literal["constant", "cosine", "linear"]


def schedule(name: ScheduleName, steps: int, *, warm_up: int = 0) -> Callable[[int], float]:
    """A schedule by name.

    After ``warm_up`` steps of linear growth (k + 1) / (warm_up + 1), the factor is 1 (``constant``), falls like half a
    cosine (``cosine``) or in a straight line (``linear``) over the remaining steps; the last step's factor is above 0.

    Raises:
        MergeboundError: unknown name, or a warm-up that leaves no step.
    """
    if name not in get_args(ScheduleName):
        raise MergeboundError(f"schedule: {name!r} is unknown; choose from {', '.join(get_args(ScheduleName))}")
    if not 0 <= warm_up < steps:
        raise MergeboundError(f"warm_up = {warm_up}: give a number from 0 to steps - 1 = {steps - 1}")
    left = steps - warm_up

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        done = (step - warm_up) / left
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0 - done if name == "linear" else 1.0

    return factor
