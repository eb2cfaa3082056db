"""A whole study of scale: experts family by family as grids, then cells in one-thread processes; all of it resumes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from experiments.bases.spec import BaseSpec
from experiments.models import head_prefix
from experiments.runner import one_thread_children
from experiments.store import Store
from experiments.studies.engine import Engine, run_store
from experiments.studies.scale.cells import Cell, cells, family_grid, runs_of
from experiments.studies.scale.measure import (
    ABOUT,
    MULTITASK,
    POINTS,
    SHAPE,
    TERMS,
    cell_runs,
    finished,
    measure_cell,
    stages,
)
from experiments.studies.scale.points import Points, read_points
from experiments.studies.scale.spec import ScaleSpec
from theory.errors import MergeboundError

NOW = "now.txt"
_POLL = 0.5
Watch = Callable[[str, int, int], None]
"""Told (what is going on, done, total): runs of a grid, then files of cells."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What is finished of a study.

    Attributes:
        points: by cell.
        about, multitask, terms, shape: tables of all cells, with ``family``, ``architecture``, ``base``,
            ``parameters``.
        done, total: files of cells.
        missing: cells that are not finished.
        classes: of every held-in task, from the experts' heads; empty where their stores are not there.
    """

    points: Mapping[Cell, Points]
    about: pd.DataFrame
    multitask: pd.DataFrame
    terms: pd.DataFrame
    shape: pd.DataFrame
    done: int
    total: int
    missing: tuple[Cell, ...]
    classes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Work:
    spec: ScaleSpec
    cell: Cell
    base: BaseSpec
    store: Path
    folder: Path
    root: str | None


def run_study(
    spec: ScaleSpec,
    work: Path,
    *,
    root: str | Path | None = None,
    workers: int | None = None,
    engine: Engine = Engine(),
    watch: Watch | None = None,
) -> Measured:
    """Do what is missing of a study, and read it all.

    Args:
        spec: the study.
        work: folder of what is finished; experts and cells lie below the study's digest, bases in their own cache.
        root: of the data sets; default: what ``MERGEBOUND_DATA`` names.
        workers: processes at a time for cells, on this machine and its processor; default one per core.
        engine: where the grids of experts run.
        watch: told the progress.

    Raises:
        MergeboundError: what the specification, its grids or the data refuse, or a cell that failed (what is finished
            is kept).
    """
    place = work / spec.digest()
    tell = watch or (lambda stage, done, total: None)
    data = None if root is None else str(root)
    jobs: list[_Work] = []
    for family in spec.families:
        store = place / f"experts-{family.name}"
        mine = [cell for cell in cells(spec) if cell.family == family.name]
        runs = runs_of(spec, family)
        if any(finished(spec, c, place / c.folder) < len(stages(spec, c)) for c in mine):
            _train(spec, family.name, store, data, engine, tell)
        jobs += [_Work(spec, cell, runs[cell][0].base, store, place / cell.folder, data) for cell in mine]
    _measure(jobs, max(1, workers or os.cpu_count() or 1), tell)
    return read_study(spec, work)


def _train(spec: ScaleSpec, name: str, store: Path, root: str | None, engine: Engine, tell: Watch) -> None:
    from experiments.engines.prepare import prepare
    from experiments.grid.expand import expand

    family = next(one for one in spec.families if one.name == name)
    grid = family_grid(spec, family)
    runs = expand(grid)
    meta = {"grid": grid.content(), "digest": grid.digest(), "source": spec.name, "device": engine.device}
    tell(f"{name}: bases and plan", 0, len(runs))
    prepare(
        store, runs, meta, root=root, device=engine.device, download=engine.download,
        report=lambda line: tell(f"{name}: {line.strip()[:60]}", 0, len(runs)),
    )  # fmt: skip
    outcome = run_store(
        store, root, engine, lambda now: tell(f"{name}: experts", now.done, now.total), resamples=0
    )  # fmt: skip
    if outcome.failed:
        cohort, error = next(iter(outcome.failed.items()))
        raise MergeboundError(f"{store}: experts of cohort {cohort} were given up: {error}; run the same command again")


def _measure(jobs: list[_Work], limit: int, tell: Watch) -> None:
    waiting = [job for job in jobs if finished(job.spec, job.cell, job.folder) < len(stages(job.spec, job.cell))]
    waiting.sort(key=lambda job: -job.cell.place)  # large networks first, so that no one is left alone with one
    if not waiting:
        return
    total = sum(len(stages(job.spec, job.cell)) for job in jobs)
    context = multiprocessing.get_context("spawn")
    with one_thread_children(), ProcessPoolExecutor(min(limit, len(waiting)), mp_context=context) as pool:
        running = {pool.submit(_run, job): job for job in waiting}
        try:
            while running:
                ended, _ = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED)
                for future in ended:
                    job = running.pop(future)
                    if text := future.result(timeout=0):
                        raise MergeboundError(f"{job.cell.folder}: {text}")
                done = sum(finished(job.spec, job.cell, job.folder) for job in jobs)
                tell(", ".join(filter(None, (_now(job) for job in running.values()))) or "cells", done, total)
        except BrokenProcessPool as error:
            raise MergeboundError(
                "a worker process ended, perhaps for lack of memory; run the same command again with fewer --workers, "
                "finished cells are kept"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _now(job: _Work) -> str:
    try:
        return f"{job.cell.folder} {(job.folder / NOW).read_text()}".strip()
    except OSError:
        return ""


def _run(job: _Work) -> str:
    """In the worker, cell after cell; returns what went wrong, or nothing."""
    import torch

    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    job.folder.mkdir(parents=True, exist_ok=True)
    now = job.folder / NOW
    last = 0.0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal last
        if os.getppid() != parent:  # the command was killed: do not run on
            os._exit(1)
        if time.monotonic() - last > 1.0:
            last = time.monotonic()
            now.write_text(f"{stage} {done}/{total}")

    try:
        measure_cell(job.spec, job.cell, job.base, job.store, job.folder, job.root, tell)
    except MergeboundError as error:
        return str(error)
    except Exception:
        return traceback.format_exc()
    finally:
        now.unlink(missing_ok=True)
    return ""


def read_study(spec: ScaleSpec, work: Path) -> Measured:
    """What is finished of a study, without running anything.

    Raises:
        MergeboundError: no cell is finished.
    """
    place = work / spec.digest()
    every = cells(spec)
    whole = [c for c in every if finished(spec, c, place / c.folder) == len(stages(spec, c))]
    if not whole:
        raise MergeboundError(f"{place}: no cell of the study is finished yet; run it without --report-only")
    about = _joined(place, whole, ABOUT, None)
    return Measured(
        points={cell: read_points(place / cell.folder / POINTS) for cell in whole},
        about=about,
        multitask=_joined(place, whole, MULTITASK, about),
        terms=_joined(place, whole, TERMS, about),
        shape=_joined(place, whole, SHAPE, about),
        done=sum(finished(spec, c, place / c.folder) for c in every),
        total=sum(len(stages(spec, c)) for c in every),
        missing=tuple(c for c in every if c not in whole),
        classes=classes_of(spec, place, whole[0]),
    )


def classes_of(spec: ScaleSpec, place: Path, cell: Cell) -> dict[str, int]:
    """Classes of every held-in task, from the heads of a cell's experts; empty where their store is not there."""
    store = place / f"experts-{cell.family}"
    family = next(one for one in spec.families if one.name == cell.family)
    base = runs_of(spec, family)[cell][0].base
    try:
        with Store.open(store, "r") as opened:
            runs = cell_runs(opened, spec, cell, base, spec.seeds[0])
            prefix = head_prefix(opened.base(opened.digests(runs[0])[0]).model())
            heads = [opened.state(run)[f"{prefix}weight"] for run in runs]
    except (MergeboundError, KeyError):
        return {}
    return {task: int(head.shape[0]) for task, head in zip(spec.held_in, heads, strict=True)}


def _joined(place: Path, whole: list[Cell], name: str, about: pd.DataFrame | None) -> pd.DataFrame:
    frames = []
    for cell in whole:
        path = place / cell.folder / name
        if not path.is_file():
            continue
        frame = pd.read_csv(path, keep_default_na=True)
        if about is not None:
            own = about[(about["architecture"] == cell.architecture) & (about["base"] == cell.base)].iloc[0]
            for at, column in enumerate(("family", "architecture", "base", "parameters")):
                frame.insert(at, column, own[column])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
