"""What a run leaves, and how runs are grouped to be trained together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from experiments.finetune.loop import TrainingLog

Way = Literal["loop", "vmap", "folded", "written"]
"""How a cohort is trained: one expert after the other; ``torch.func.vmap``; experts folded into groups and batched
matrix products; backward passes written out (logistic regression and MLPs)."""


@dataclass(frozen=True)
class RunResult:
    """A run that is over.

    Attributes:
        outcome: ``finished``, or ``diverged`` where a loss, gradient or weight left the finite numbers.
        states: full state dict by step, for every checkpoint that was reached; a diverged run has its last finite
            state at the step that it belongs to.
        log: one entry per step.
        metrics: rows of numbers measured on the states: ``step``, ``part`` (train, validation, test), ``name``,
            ``value``, ``low``, ``high``, ``n``, ``tier``.
        seconds: of training; a cohort's time is shared out by samples.
    """

    outcome: Literal["finished", "diverged"]
    states: Mapping[int, Mapping[str, Tensor]]
    log: TrainingLog
    metrics: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Cohort:
    """Runs that are trained together, and how; frozen in the store, so that a resumed grid has the same bits.

    Attributes:
        name: of the cohort, unique in its plan.
        runs: digests of the runs, in the order in which they are stacked.
        way: how they are trained.
        chunk: experts at a time.
        options: of the way (``compile``, ``channels_last``, ``threads``), JSON data.
        reason: why this way, in words (the measured probe).
    """

    name: str
    runs: tuple[str, ...]
    way: Way = "loop"
    chunk: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What a grid will do, frozen before its first run.

    Attributes:
        cohorts: in the order in which they are handed out.
        device: ``cpu`` or ``cuda``, as the probe found it.
        machine: name of the processor or accelerator, and versions, as text.
        seed: of the probe.
    """

    cohorts: tuple[Cohort, ...]
    device: str = "cpu"
    machine: str = ""
    seed: int = 0
