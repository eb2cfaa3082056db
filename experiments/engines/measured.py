"""What is measured on the checkpoints of a run: validation and test numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from experiments.engines.workplace import Job
from experiments.evaluate.evaluate import evaluate
from experiments.evaluate.results import METRICS, EvaluationSet
from experiments.inputs.training_data import TrainingData

RESAMPLES = 200
"""Bootstrap samples behind the intervals of test numbers; validation numbers have none."""


def measure(
    job: Job, states: Mapping[int, Mapping[str, Tensor]], *, resamples: int = RESAMPLES
) -> tuple[dict[str, Any], ...]:
    """Rows ``step``, ``part``, ``name``, ``value``, ``low``, ``high``, ``n``, ``tier`` for every checkpoint.

    Networks are evaluated in float32, whatever the run was trained in.

    Args:
        job: the run; its network's weights are overwritten.
        states: full state dicts by step.
        resamples: of the bootstrap over test images; 0 for no intervals.
    """
    rows: list[dict[str, Any]] = []
    for step, state in states.items():
        job.network.load_state_dict(dict(state))
        for part, data, draws in (("validation", job.validation, 0), ("test", job.test, resamples)):
            rows += _rows(job, step, part, data, draws)
    return tuple(rows)


def _rows(job: Job, step: int, part: str, data: TrainingData, resamples: int) -> list[dict[str, Any]]:
    images = EvaluationSet(job.task.name, data, job.task.digest, job.task.seed)
    found = evaluate(job.network, images, resamples=resamples)
    rows = []
    for name in METRICS:
        estimate = found.intervals[name]
        low, high = (estimate.low, estimate.high) if resamples else (None, None)
        row = {"step": step, "part": part, "name": name, "value": estimate.value, "low": low, "high": high}
        rows.append(row | {"n": found.metrics.n, "tier": found.tier})
    return rows
