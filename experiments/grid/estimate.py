"""What a grid is and costs, all together: the content of ``mergebound grid plan``."""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments.bases.spec import BaseSpec
from experiments.grid.calibrate import Timing, calibrate
from experiments.grid.calibrate_cohorts import CohortTiming, calibrate_cohorts
from experiments.grid.checks import all_bases
from experiments.grid.cost import Cost, NetworkFacts, costs, network_facts
from experiments.grid.errors import GridError
from experiments.grid.expand import Expansion
from experiments.grid.facts import TaskFacts
from experiments.grid.preflight import (
    check_disk,
    check_grid,
    check_store,
    existing,
    facts_without_data,
    open_tasks,
    said_by,
)
from experiments.grid.pretraining_time import Pretraining, pretrained, pretraining
from experiments.grid.run_spec import RunSpec
from experiments.grid.wall_time import Work, storing, wall_clock, work_of
from experiments.grid.yaml_source import GridFile, read_runs
from experiments.tasks.dataset import ImageTask
from theory.errors import MergeboundError

PLAIN = 0.25
"""Share of the calibration that plain steps are timed for; the rest is for the planner's probe."""
WITHIN = 1.5
"""A factor within which cohorts on a quiet machine should lie."""


@dataclass(frozen=True)
class Row:
    """One base of the grid.

    Attributes:
        architecture, kind: of the base.
        parameters: with a head for the task of most classes.
        cost: of all its runs.
        batch_sizes: of its runs, ascending.
        timing: of plain steps, measured; ``None`` without calibration.
        seconds: of training and evaluation together, one worker; ``None`` without calibration.
        low, high: between which ``seconds`` should lie.
        cohorts: how runs are trained together, measured; ``None`` where steps take too long to be tried out, so that
            ``seconds`` is the networks' arithmetic in a plain loop.
        work: what a command does with them, with the probes of the planner; ``None`` without ``cohorts``.
    """

    architecture: str
    kind: str
    parameters: int
    cost: Cost
    batch_sizes: tuple[int, ...]
    timing: Timing | None = None
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    cohorts: CohortTiming | None = None
    work: Work | None = None


@dataclass(frozen=True)
class Estimate:
    """What a grid costs.

    Attributes:
        name: of the grid.
        runs: how many.
        rows: per base.
        total: over all of them.
        tasks: how many.
        published: tasks whose sizes are those of their source's publication, as the data are not here.
        notes: what expansion left out or merged.
        problems: what would stop the grid here.
        device, machine: what was timed.
        workers: that the time is divided by.
        free_bytes: on the disk of the store.
        seconds, low, high: wall clock from the command to its end with all workers, pretraining included, reading data
            left out; ``None`` without calibration.
        pretraining: of the bases, which are made before the first run.
    """

    name: str
    runs: int
    rows: tuple[Row, ...]
    total: Cost
    tasks: int
    published: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[GridError, ...]
    device: str
    machine: str
    workers: int
    free_bytes: int
    seconds: float | None
    low: float | None
    high: float | None
    pretraining: tuple[Pretraining, ...] = ()


def estimate(
    file: GridFile,
    *,
    root: str | Path | None = None,
    store: str | Path | None = None,
    device: str = "cpu",
    workers: int | None = None,
    seconds: float = 20.0,
    download: bool = False,
    check: bool = True,
) -> Estimate:
    """Count a grid, look for what would stop it, and time a few steps.

    Args:
        file: the grid.
        root: folder of the data sets.
        store: folder of the results.
        device: ``cpu`` or ``cuda``; calibration falls back on the CPU where there is no such device.
        workers: one-thread processes; default: one per core, one on a GPU.
        seconds: for calibration, all networks together; 0 leaves it out.
        download: whether published weights may be downloaded.
        check: whether data, weights, store and device are looked at.

    Raises:
        GridError: the grid cannot be expanded.
        MergeboundError: a network or a task that is not known.
    """
    expansion: Expansion = read_runs(file)
    runs = expansion.runs
    problems = check_grid(file, root, store, device, download=download, runs=runs) if check else []
    opened, _ = open_tasks(file.spec, runs, root) if check else ({}, [])
    tasks = facts_without_data(dict.fromkeys(run.task for run in runs), root, opened)
    bases = all_bases(file.spec)
    index = {id(base): k for k, base in enumerate(bases)}
    numbers = [index[id(run.base)] if id(run.base) in index else bases.index(run.base) for run in runs]
    networks = {k: _network(file, bases[k]) for k in dict.fromkeys(numbers)}
    alike = pretrained([bases[k] for k in sorted(networks)])
    sources = _sources([some[0].data for some in alike.values()], root, opened, bool(problems))
    summed = costs(runs, networks, numbers, tasks)
    total = sum(summed.values(), Cost())
    usable = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    count = workers or (1 if usable != "cpu" else len(os.sched_getaffinity(0)))
    share = seconds / max(1, len(networks) + len(alike))
    rows = []
    for k in sorted(networks):
        own = [run for run, number in zip(runs, numbers, strict=True) if number == k]
        rows.append(_row(bases[k], networks[k], summed[k], own, tasks, usable, share))
    before = tuple(
        pretraining(some, networks[bases.index(some[0])], sources, device=usable, seconds=share)
        for some in alike.values()
        if some[0].data in sources
    )
    where = existing(store if store is not None else Path.cwd())
    if store is not None and check and not check_store(store):
        found = [said_by(file.spec, "store", store, each) for each in check_disk(store, total.bytes)]
        problems = [*problems, *(file.error(each) if each.place else each for each in found)]
    wall = _wall(rows, before, count)
    return Estimate(
        file.spec.name,
        len(runs),
        tuple(rows),
        total,
        len(tasks),
        tuple(name for name, facts in tasks.items() if not facts.opened),
        expansion.notes,
        tuple(problems),
        usable,
        machine(usable),
        count,
        shutil.disk_usage(where).free,
        *wall,
        before,
    )


def _sources(
    names: Sequence[str], root: str | Path | None, opened: Mapping[tuple[str, int], ImageTask], troubled: bool
) -> dict[str, TaskFacts]:
    """Sizes of the tasks that bases are pretrained on; what is wrong with one is among the problems already."""
    found: dict[str, TaskFacts] = {}
    for name in dict.fromkeys(names):
        try:
            found |= facts_without_data([name], root, opened)
        except MergeboundError:
            if not troubled:
                raise
    return found


def _wall(
    rows: Sequence[Row], before: Sequence[Pretraining], workers: int
) -> tuple[float | None, float | None, float | None]:
    """Seconds with all workers, and between which they should lie; planned networks and plain ones added up."""
    times = [(row.seconds, row.low, row.high) for row in rows]
    if not rows or any(each[0] is None for each in times):
        return None, None, None
    work = [row.work or Work(0.0, row.seconds or 0.0, row.cost.runs, 0.0) for row in rows]
    found = wall_clock(work, workers)
    busy = sum(each[0] or 0.0 for each in times)
    low, high = (sum(each[k] or 0.0 for each in times) / busy if busy else 1.0 for k in (1, 2))
    made = [sum(getattr(each, name) or 0.0 for each in before) for name in ("seconds", "low", "high")]
    return found + made[0], found * low + made[1], found * high + made[2]


def _network(file: GridFile, base: BaseSpec) -> NetworkFacts:
    try:
        return network_facts(base)
    except MergeboundError as error:
        raise file.error(GridError(str(error), ("base",))) from error


def _row(
    base: BaseSpec,
    network: NetworkFacts,
    cost: Cost,
    runs: Sequence[RunSpec],
    tasks: Mapping[str, TaskFacts],
    device: str,
    seconds: float,
) -> Row:
    classes = max(tasks[run.task].classes for run in runs)
    sizes = tuple(sorted({run.batch_size for run in runs}))
    row = Row(base.architecture, base.kind, network.at(classes)[0], cost, sizes)
    if seconds <= 0:
        return row
    precision = Counter(run.precision for run in runs).most_common(1)[0][0]
    share = seconds * PLAIN
    timing = calibrate(base, network, sizes, device=device, precision=precision, seconds=share, classes=classes)
    passes = cost.flops / max(network.at(classes)[2] * cost.samples, 1.0)
    together = calibrate_cohorts(runs, network, timing, device=device, seconds=seconds - share, classes=classes)
    if together is not None:
        work = work_of(runs, cost, tasks, together, passes)
        low, high = min(timing.low, 1.0 / WITHIN), max(timing.high, WITHIN)
        return replace(
            row, timing=timing, seconds=work.busy, low=work.busy * low, high=work.busy * high, cohorts=together,
            work=work,
        )  # fmt: skip
    rest = seconds - share
    timing = calibrate(base, network, sizes, device=device, precision=precision, seconds=rest, classes=classes)
    rate = timing.per_sample / 3.0  # a forward pass is a third of a step
    odd = min(max(passes / 3.0, 1 / 3), 2.0) if _odd(runs) else 1.0
    guess = timing.seconds(cost.steps, cost.samples * odd) + rate * cost.evaluated + storing(cost)
    return replace(row, timing=timing, seconds=guess, low=guess * timing.low, high=guess * timing.high)


def _odd(runs: Sequence[RunSpec]) -> bool:
    """Whether steps are not all one forward and one backward pass through everything."""
    return any(run.optimizer == "sam" or run.trained == "head" for run in runs)


def machine(device: str) -> str:
    """The processor or accelerator by name."""
    if device != "cpu":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
