"""Whether what a grid has still to store fits on the disk: counted as ``grid plan`` does, without what is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.engines.growing import shape_of
from experiments.grid.cost import NetworkFacts, network_facts
from experiments.grid.errors import GridError
from experiments.grid.facts import TaskFacts
from experiments.grid.preflight import check_disk, facts_without_data, said_by
from experiments.grid.run_spec import RunSpec
from experiments.grid.yaml_source import GridFile
from experiments.store import Store
from experiments.store.database import DATABASE


def check_room(
    file: GridFile | None,
    runs: Sequence[RunSpec],
    store: str | Path,
    root: str | Path | None = None,
    task_vectors: str | None = None,
) -> list[GridError]:
    """Whether the checkpoints of runs that are not stored yet fit on the disk.

    Args:
        file: of the grid, which a problem is placed in where it says the store.
        runs: of the grid, or those that are missing.
        store: folder; it need not be there yet.
        root: of the data sets.
        task_vectors: of a new store; one that is there knows its own.

    Raises:
        MergeboundError: a network or a task that is not known, or a damaged store.
    """
    done: list[RunSpec] = []
    if (Path(store) / DATABASE).is_file():
        with Store.open(store, "r") as kept:
            task_vectors = kept.task_vectors
            missing = set(kept.missing())
            done = [run for run, *_ in kept.known([one for one in kept.runs() if one not in missing]).values()]
    needed = bytes_of(without(runs, done), root)
    needed = needed // 2 if task_vectors == "bfloat16" else needed
    if file is None:
        return check_disk(store, needed)
    found = [said_by(file.spec, "store", store, each) for each in check_disk(store, needed)]
    return [file.error(each) if each.place else each for each in found]


def bytes_of(runs: Iterable[RunSpec], root: str | Path | None = None) -> int:
    """Bytes of the weights of all checkpoints, at most: each in full."""
    networks: dict[str, NetworkFacts] = {}
    tasks: dict[str, TaskFacts] = {}
    total = 0
    for run in runs:
        key = run.base.model_dump_json()
        if key not in networks:
            networks[key] = network_facts(run.base)
        if run.task not in tasks:
            tasks |= facts_without_data([run.task], root, {})
        total += networks[key].at(tasks[run.task].classes)[1] * len(run.checkpoints)
    return total


def without(runs: Sequence[RunSpec], done: Sequence[RunSpec]) -> list[RunSpec]:
    """Runs less those that are done, as far as specifications tell, whatever the paths of tasks and weights."""
    there = Counter(shape_of(run) for run in done)
    left = []
    for run in runs:
        shape = shape_of(run) if there else ""
        if there[shape] > 0:
            there[shape] -= 1
        else:
            left.append(run)
    return left
