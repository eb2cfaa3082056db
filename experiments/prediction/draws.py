"""Which experts of a grid's store are in which half, and which groups of them are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.grid.run_spec import RunSpec
from experiments.prediction.spec import StudySpec
from experiments.store import Store
from theory.errors import MergeboundError

GROUPS = 0x9B0B
"""Names the stream of groups: ``default_rng([seed, GROUPS, regime, network, half, size])``."""


@dataclass(frozen=True)
class StudyExpert:
    """One expert: its run's digest, a name for tables, its task, and the number of its recipe in the grid."""

    digest: str
    name: str
    task: str
    recipe: int


@dataclass(frozen=True)
class StudyGroup:
    """Indices into the experts of one pool, tasks distinct, ascending by task."""

    number: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class PoolKey:
    """A pool: the experts of one half, of one network, in one regime; merges never leave it."""

    regime: str
    architecture: str
    half: str

    @property
    def folder(self) -> str:
        """A name for files."""
        return f"{self.regime}-{self.architecture}-{self.half}"


@dataclass(frozen=True)
class Pool:
    """A pool with its experts (by task, then recipe) and the groups drawn from them."""

    key: PoolKey
    experts: tuple[StudyExpert, ...]
    groups: tuple[StudyGroup, ...]
    left_out: tuple[str, ...] = ()


def group_columns(pool: Pool, group: StudyGroup, names: Sequence[str], seed: int) -> dict[str, Any]:
    """The columns that say which group a row of a table is about; ``names`` are those of the pool's experts."""
    return {
        "regime": pool.key.regime,
        "architecture": pool.key.architecture,
        "half": pool.key.half,
        "seed": seed,
        "group": f"{pool.key.folder}-{group.number}",
        "N": len(group.members),
        "experts": ";".join(names[j] for j in group.members),
    }


def recipe_numbers(runs: Sequence[RunSpec]) -> dict[float, int]:
    """Learning rate to the number of its recipe, in the order of first occurrence in the expanded grid."""
    return {rate: k for k, rate in enumerate(dict.fromkeys(run.learning_rate for run in runs))}


def study_pools(spec: StudySpec, regime: str, store: Store, runs: Sequence[RunSpec]) -> tuple[Pool, ...]:
    """The pools of one regime.

    Args:
        spec: the study.
        regime: one of its regimes.
        store: where the regime's grid was run.
        runs: that grid expanded, in its order.

    Raises:
        MergeboundError: a grid whose recipes have equal learning rates (their order then says nothing), halves that
            name recipes it lacks, unfinished runs, or too few experts for the groups.
    """
    numbers = recipe_numbers(runs)
    wanted = {point for points in spec.halves.values() for point in points}
    if max(wanted) >= len(numbers):
        raise MergeboundError(
            f"halves: recipe {max(wanted)} of regime {regime}, whose grid has {len(numbers)} learning rates; name "
            "recipes of the grid"
        )
    stored = {digest: store.spec(digest) for digest in store.runs()}
    architectures = list(dict.fromkeys(run.architecture for run in runs))
    tasks = list(dict.fromkeys(run.task for run in runs))
    planned = {run.model_dump_json() for run in runs}
    missing = planned - {run.model_dump_json() for run in stored.values()}
    if missing:
        raise MergeboundError(
            f"{store.folder}: {len(missing)} of {len(planned)} runs of regime {regime} are not in this store; give the "
            "store of that grid"
        )
    pools = []
    for number, architecture in enumerate(architectures):
        for position, (half, points) in enumerate(spec.halves.items()):
            key = PoolKey(regime, architecture, half)
            found: list[StudyExpert] = []
            gone: list[StudyExpert] = []
            for digest, run in stored.items():
                recipe = numbers.get(run.learning_rate, -1)
                if run.architecture != architecture or recipe not in points:
                    continue
                if run.model_dump_json() not in planned:
                    continue
                expert = StudyExpert(digest, f"{regime}-{architecture}-{_short(run.task)}-{recipe}", run.task, recipe)
                outcome = store.outcome(digest)
                if outcome is None:
                    raise MergeboundError(
                        f"{store.folder}: run {digest[:12]} is not finished; first "
                        f"`mergebound grid resume {store.folder}`"
                    )
                (found if outcome == "finished" else gone).append(expert)
            experts = tuple(sorted(found, key=lambda e: (tasks.index(e.task), e.recipe)))
            streams = (spec.seed, GROUPS, sorted(spec.regimes).index(regime), number, position)
            groups = draw_groups(spec, experts, streams)
            pools.append(Pool(key, experts, groups, tuple(expert.name for expert in gone)))
    return tuple(pools)


def draw_groups(spec: StudySpec, experts: Sequence[StudyExpert], streams: Sequence[int]) -> tuple[StudyGroup, ...]:
    """Groups of every size: tasks without replacement, then one expert of each; no group twice where others are left.

    Raises:
        MergeboundError: fewer tasks than a group needs.
    """
    by_task: dict[str, list[int]] = {}
    for index, expert in enumerate(experts):
        by_task.setdefault(expert.task, []).append(index)
    groups: list[StudyGroup] = []
    for size, count in spec.groups.items():
        if size > len(by_task):
            raise MergeboundError(
                f"groups: {size} experts of distinct tasks asked for, but there are {len(by_task)} tasks"
            )
        rng = np.random.default_rng([*streams, size])
        taken: set[tuple[int, ...]] = set()
        for _ in range(count):
            for _ in range(100):
                chosen = sorted(rng.choice(len(by_task), size=size, replace=False))
                names = list(by_task)
                members = tuple(int(rng.choice(by_task[names[t]])) for t in chosen)
                if members not in taken:
                    break
            taken.add(members)
            groups.append(StudyGroup(len(groups), members))
    return tuple(groups)


def _short(task: str) -> str:
    return task.rpartition(":")[2]
