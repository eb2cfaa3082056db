"""A study over all its pools: one single-threaded process per pool, everything finished kept whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.grid.expand import expand
from experiments.grid.yaml_source import read_grid
from experiments.pipeline import read_finished
from experiments.prediction.draws import Pool, study_pools
from experiments.prediction.job import STAGES, progress_of, run_pool
from experiments.prediction.spec import StudySpec
from experiments.runner import one_thread_children
from experiments.store import Store
from theory.errors import MergeboundError

ERROR = "error.txt"
_POLL = 1.0


@dataclass(frozen=True)
class Status:
    """How far a study is: groups done and in all, over all stages and pools, and the pools at work."""

    done: int
    total: int
    working: tuple[str, ...]


@dataclass(frozen=True)
class Frames:
    """Result tables; ``left_out`` names experts that diverged and take part in no group."""

    merges: pd.DataFrame
    comparison: pd.DataFrame
    prices: pd.DataFrame
    curve: pd.DataFrame
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Work:
    """One pool's job, for another process."""

    spec: StudySpec
    pool: Pool
    store: Path
    folder: Path
    root: str | None
    stages: tuple[str, ...]


def plan_study(spec: StudySpec, stores: Mapping[str, Path]) -> tuple[tuple[Pool, Path], ...]:
    """Every pool with the store of its regime.

    Raises:
        MergeboundError: a regime without a store or a store of no regime, and what
            :func:`experiments.prediction.draws.study_pools` raises.
    """
    if set(stores) != set(spec.regimes):
        raise MergeboundError(
            f"stores: {', '.join(sorted(stores)) or 'none'} given for the regimes {', '.join(sorted(spec.regimes))}; "
            "give one folder per regime, as mild=FOLDER"
        )
    found: list[tuple[Pool, Path]] = []
    for regime, grid in spec.regimes.items():
        runs = expand(read_grid(grid).spec)
        with Store.open(stores[regime], "r") as opened:
            found += [(pool, Path(stores[regime])) for pool in study_pools(spec, regime, opened, runs)]
    return tuple(found)


def run_study(
    spec: StudySpec,
    stores: Mapping[str, Path],
    folder: Path,
    *,
    root: str | Path | None = None,
    workers: int | None = None,
    stages: Sequence[str] = STAGES,
    watch: Callable[[Status], None] | None = None,
) -> Frames:
    """Do what is missing of a study and join its tables.

    Args:
        spec: the study.
        stores: folder of the grid of each regime.
        folder: where rows are kept, under the study's digest; a later call with the same study continues there.
        root: folder of the data sets; default: what ``MERGEBOUND_DATA`` names.
        workers: processes at a time; default one per core.
        stages: which of :data:`experiments.prediction.job.STAGES`.
        watch: called about once a second.

    Raises:
        MergeboundError: what planning raises, or a pool that failed (finished groups are kept).
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise MergeboundError(f"stages: {unknown[0]!r} is none; choose from {', '.join(STAGES)}")
    plan = plan_study(spec, stores)
    place = folder / spec.digest()
    data = None if root is None else str(root)
    waiting = [_Work(spec, pool, store, place / pool.key.folder, data, tuple(stages)) for pool, store in plan]
    context = multiprocessing.get_context("spawn")
    running: dict[str, tuple[multiprocessing.process.BaseProcess, _Work]] = {}
    limit = max(1, workers or os.cpu_count() or 1)
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                work = waiting.pop(0)
                with one_thread_children():
                    process = context.Process(target=_run, args=(work,), daemon=True)
                    process.start()
                running[work.pool.key.folder] = (process, work)
            time.sleep(0.05 if watch is None else _POLL)
            for name, (child, work) in list(running.items()):
                if not child.is_alive():
                    child.join()
                    del running[name]
                    _check(child.exitcode, work)
            if watch is not None:
                watch(status(spec, plan, place, tuple(running)))
    finally:
        for child, _ in running.values():
            child.terminate()
        for child, _ in running.values():
            child.join(timeout=10)
    return read_frames(spec, plan, place)


def _run(work: _Work) -> None:
    """In the worker: errors go to a file that the runner reads."""
    import torch

    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    note = work.folder / ERROR
    note.unlink(missing_ok=True)

    def orphaned(stage: str, done: int, total: int) -> None:
        if os.getppid() != parent:  # the command was killed: do not run on
            os._exit(1)

    try:
        run_pool(work.spec, work.pool, work.store, work.folder, root=work.root, stages=work.stages, progress=orphaned)
    except MergeboundError as error:
        work.folder.mkdir(parents=True, exist_ok=True)
        note.write_text(str(error))
        raise SystemExit(2) from error
    except Exception as error:
        work.folder.mkdir(parents=True, exist_ok=True)
        note.write_text(traceback.format_exc())
        raise SystemExit(1) from error


def _check(code: int | None, work: _Work) -> None:
    if code == 0:
        return
    note = work.folder / ERROR
    text = note.read_text() if note.exists() else "it may have run out of memory; run the same command again"
    if code == 2:
        raise MergeboundError(text)
    raise MergeboundError(f"{work.pool.key.folder}: the worker ended with code {code}: {text}")


def status(spec: StudySpec, plan: Sequence[tuple[Pool, Path]], place: Path, working: tuple[str, ...] = ()) -> Status:
    """How far a study is, from what is on disk."""
    counts = [progress_of(spec, pool, place / pool.key.folder) for pool, _ in plan]
    return Status(sum(done for done, _ in counts), sum(total for _, total in counts), working)


def read_frames(spec: StudySpec, plan: Sequence[tuple[Pool, Path]], place: Path) -> Frames:
    """What is finished, of all pools, in their order."""
    tables = {}
    for stage in STAGES:
        rows = []
        for pool, _ in plan:
            kept = read_finished(place / pool.key.folder / f"{stage}.jsonl")
            rows += [row for group in pool.groups for row in kept.get(str(group.number), [])]
        tables[stage] = pd.DataFrame(rows)
    gone = tuple(name for pool, _ in plan for name in pool.left_out)
    merges = tables["merges"]
    for later in (tables["variances"], tables["accuracies"]):
        if len(merges) and len(later):
            found = later.drop(columns="tier")
            merges = merges.merge(found, on=["group", "settings"], how="left", validate="one_to_one")
    parts = [tables[stage] for stage in ("comparison", "hull", "hull_layers") if len(tables[stage])]
    comparison = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if len(tables["comparison"]):  # methods are paired by group
        comparison = comparison[comparison["group"].isin(set(tables["comparison"]["group"]))]
    return Frames(merges, comparison, tables["prices"], tables["curve"], gone)
