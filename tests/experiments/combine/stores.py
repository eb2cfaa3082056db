"""A finished grid of the embedded digits in a real store: random weights instead of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.bases.base import random_base
from experiments.bases.spec import BaseSpec
from experiments.finetune.loop import TrainingLog
from experiments.grid.result import RunResult
from experiments.grid.run_spec import RunSpec
from experiments.store import Store
from experiments.tasks.named import open_task
from tests.experiments.combine.grids import expert_state

NAMES = ("digits8:identity", "digits8:rotate90", "digits8:flip")


def log_of(steps: int) -> TrainingLog:
    zeros = np.zeros(steps)
    return TrainingLog(zeros, zeros, zeros, zeros, 0.0, True)


def finished_store(folder: Path, names: tuple[str, ...], *, rates: tuple[float, ...] = (0.01, 0.1)) -> Store:
    """One expert per task and rate, with checkpoints 2 and 4."""
    options = {"img_size": 8, "in_chans": 1}
    spec = BaseSpec(kind="random", architecture="mlp_8", classes=10, options=options, seed=3)
    base = random_base("mlp_8", classes=10, options=options, seed=3)
    store = Store.create(folder, {"name": "test"}, durable=False)
    store.add_base(base)
    number = 0
    for name in names:
        split = open_task(name).digest
        for rate in rates:
            run = RunSpec(task=name, base=spec, learning_rate=rate, steps=4, batch_size=8, checkpoints=(2, 4))
            digest = run.digest(base=base.digest, split=split)
            store.add_runs({digest: run}, base.digest, split)
            states = {step: expert_state(base, 10, 100 * number + step) for step in (2, 4)}
            store.commit(digest, RunResult("finished", states, log_of(4)))
            number += 1
    return store
