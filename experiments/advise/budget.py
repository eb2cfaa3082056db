"""Samples that some minutes of one core pay for, measured on a few steps of the very network."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.advise.pilot_spec import PilotSpec
from experiments.atomic import write_atomically
from experiments.bases.spec import BaseSpec
from theory.errors import MergeboundError

STEPS = 6


def samples_of(
    minutes: float,
    tasks: Sequence[str],
    base: BaseSpec,
    pilot: PilotSpec,
    folder: Path,
    *,
    root: str | Path | None = None,
) -> float:
    """Samples of each expert that ``minutes`` of one core pay for (all experts together), by timing a few plain steps.

    The answer is kept in ``folder`` (``budget.json``), so that a second call goes on with the same budget.

    Raises:
        MergeboundError: minutes that are not positive, or a file that was written for other minutes or tasks.
    """
    if not 0.0 < minutes < float("inf"):
        raise MergeboundError(f"budget: minutes = {minutes}: give a positive number")
    path = folder.parent / "budget.json"
    asked = {"minutes": minutes, "tasks": list(tasks), "network": base.architecture}
    if path.exists():
        try:
            kept = json.loads(path.read_text())
            if {name: kept[name] for name in asked} == asked:
                return float(kept["samples"])
        except (ValueError, KeyError, TypeError):
            pass
        raise MergeboundError(f"{path}: was written for another budget, other tasks or another network; remove it, or "
                              "choose another folder with --out")  # fmt: skip
    rate = _samples_per_second(tasks[0], base, max(pilot.batch_sizes), root)
    samples = float(int(60.0 * minutes * rate / len(tasks)))
    write_atomically(path, json.dumps(asked | {"samples": samples}, indent=2).encode())
    return samples


def _samples_per_second(task: str, base: BaseSpec, batch: int, root: str | Path | None) -> float:
    from experiments.bases.base import random_base
    from experiments.finetune.reference import train_run
    from experiments.finetune.task_expert import start_from
    from experiments.grid.run_spec import RunSpec
    from experiments.inputs.resident import residents
    from experiments.models.form import input_format
    from experiments.tasks.named import open_task

    opened = open_task(task, root, seed=0)
    twin = random_base(base.architecture, classes=base.classes or opened.classes, options=base.options, seed=base.seed)
    network, start = start_from(twin, opened.classes, 0)
    train, _, _ = residents(opened, input_format(network), seed=0, augment="none")
    size = min(batch, len(train))
    run = RunSpec(task=task, base=base, learning_rate=1e-3, steps=STEPS, batch_size=size)
    train_run(run, network, start, train)  # warm
    started = time.perf_counter()
    train_run(run, network, start, train)
    return STEPS * size / max(time.perf_counter() - started, 1e-9)
