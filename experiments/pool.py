"""Drawing the pool of heterogeneous experts and the groups that are merged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.finetune.loop import Hyperparameters
from experiments.spec import RegimeSpec, ValidationSpec


@dataclass(frozen=True)
class PlannedExpert:
    """One expert to fine-tune: name, task, half of the pool (A or B), hyperparameters, seed of its batches."""

    name: str
    task: str
    half: str
    hyper: Hyperparameters
    seed: int


@dataclass(frozen=True)
class PlannedGroup:
    """One group to merge: indices into the pool, all of one half, tasks distinct."""

    number: int
    half: str
    members: tuple[int, ...]


def draw_hyperparameters(regime: RegimeSpec, rng: np.random.Generator) -> Hyperparameters:
    """Every hyperparameter independently: ranges log-uniform, choices uniform."""
    rate = float(np.exp(rng.uniform(*np.log(regime.learning_rate))))
    steps = round(float(np.exp(rng.uniform(*np.log(regime.steps)))))
    return Hyperparameters(
        learning_rate=float(f"{rate:.4g}"),
        steps=steps,
        batch_size=int(rng.choice(regime.batch_size)),
        data_share=float(rng.choice(regime.data_share)),
        momentum=float(rng.choice(regime.momentum)),
        weight_decay=float(rng.choice(regime.weight_decay)),
    )


def draw_pool(spec: ValidationSpec, regime: str) -> tuple[PlannedExpert, ...]:
    """``experts_per_task`` experts of every task; the first half of them is half A, the others half B."""
    number = sorted(spec.regimes).index(regime)
    rng = np.random.default_rng([spec.seed, 0xE4BE, number])
    pool = []
    for task in spec.family.tasks:
        for copy in range(spec.experts_per_task):
            pool.append(
                PlannedExpert(
                    name=f"{regime}-{task}-{copy}",
                    task=task,
                    half="A" if copy < (spec.experts_per_task + 1) // 2 else "B",
                    hyper=draw_hyperparameters(spec.regimes[regime], rng),
                    seed=int(rng.integers(2**31)),
                )
            )
    return tuple(pool)


def draw_groups(spec: ValidationSpec, regime: str, pool: tuple[PlannedExpert, ...]) -> tuple[PlannedGroup, ...]:
    """``groups_per_size`` groups of every size, alternating between the halves.

    Tasks within a group are distinct; with a shared head (soups) all experts of a group are of one task.
    """
    number = sorted(spec.regimes).index(regime)
    rng = np.random.default_rng([spec.seed, 0x6809, number])
    groups: list[PlannedGroup] = []
    for size in spec.group_sizes:
        for copy in range(spec.groups_per_size):
            half = "AB"[copy % 2]
            if spec.heads == "shared":
                task = str(rng.choice(spec.family.tasks))
                own = [i for i, e in enumerate(pool) if e.half == half and e.task == task]
                chosen = rng.choice(own, size=size, replace=False)
                groups.append(PlannedGroup(len(groups), half, tuple(sorted(int(i) for i in chosen))))
                continue
            tasks = rng.choice(len(spec.family.tasks), size=size, replace=False)
            members = []
            for task in sorted(tasks):
                own = [i for i, e in enumerate(pool) if e.half == half and e.task == spec.family.tasks[task]]
                members.append(int(rng.choice(own)))
            groups.append(PlannedGroup(len(groups), half, tuple(members)))
    return tuple(groups)
