"""From timings and runs to the wall clock of a grid: planning, cohorts handed to workers, and what comes on top."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.grid.calibrate_cohorts import CohortTiming
from experiments.grid.cost import Cost
from experiments.grid.facts import TaskFacts
from experiments.grid.run_spec import RunSpec

START = 10.0
"""Seconds until a command's workers are there: Python, PyTorch and timm are imported by the command, then by them."""
PER_RUN, PER_BYTE = 0.005, 1e-8
"""Seconds in which a run is stored: at most so many (``benchmarks/store.py``), and about 100 MB/s to pack and write."""


@dataclass(frozen=True)
class Work:
    """What one network's runs take.

    Attributes:
        planning: seconds of the planner's probes, before anything is trained.
        busy: seconds of all workers together: training, evaluation, storing.
        cohorts: how many pieces the work is handed out in.
        longest: seconds of the longest of them.
    """

    planning: float
    busy: float
    cohorts: int
    longest: float


def work_of(
    runs: Sequence[RunSpec], cost: Cost, tasks: Mapping[str, TaskFacts], timing: CohortTiming, passes: float
) -> Work:
    """What the runs of one network take.

    Args:
        runs: of one base.
        cost: of all of them.
        tasks: sizes by name.
        timing: of the network.
        passes: forward passes per step, on average over the runs' samples.
    """
    from experiments.finetune.cohort.planner import LOOPED, kind_of

    factor = passes / timing.passes
    images = [sum(len(run.checkpoints) * getattr(tasks[run.task], part) for run in runs) for part in _PARTS]
    busy = factor * timing.training(cost.steps, cost.samples) + timing.evaluation(cost.checkpoints, *images)
    busy += storing(cost)
    groups: dict[tuple[str, int], list[RunSpec]] = {}
    for run in runs:
        groups.setdefault((kind_of(run), tasks[run.task].classes), []).append(run)
    size = LOOPED if timing.way == "loop" else timing.chunk
    cohorts = sum(math.ceil(len(group) / size) for group in groups.values())
    seeds = {(run.seed, tasks[run.task].classes) for run in runs}
    longest = max(
        sum(factor * timing.training(run.steps, run.steps * run.batch_size) for run in _longest(group, size))
        for group in groups.values()
    )
    kinds = len({kind for kind, _ in groups})
    return Work(timing.choosing * kinds, busy + timing.opening * len(seeds), cohorts, longest)


def storing(cost: Cost) -> float:
    """Seconds in which runs are stored."""
    return PER_RUN * cost.runs + PER_BYTE * cost.bytes


_PARTS = ("validation", "test")


def _longest(group: Sequence[RunSpec], size: int) -> list[RunSpec]:
    return sorted(group, key=lambda run: -run.steps)[:size]


def wall_clock(work: Sequence[Work], workers: int) -> float:
    """Seconds from the command to its end: probes come first, then no worker is idle while there are cohorts left."""
    busy = sum(each.busy for each in work)
    return START + sum(each.planning for each in work) + max(busy / workers, *(each.longest for each in work))
