"""Experts of several tasks in one-thread worker processes; what is finished stays, and a second call goes on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from experiments.bases.base import Base, read_base, save_base
from experiments.finetune.task_expert import FinetuneSpec, finetune_task, finished, identity, save_expert
from experiments.runner import one_thread_children
from experiments.tasks.dataset import ImageTask
from experiments.tasks.named import open_task
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

Watch = Callable[[dict[str, Any], bool], None]
"""Called with an expert's row, and whether it was there already."""


def finetune_tasks(
    base: Base,
    names: Sequence[str],
    spec: FinetuneSpec,
    folder: Path,
    *,
    root: str | Path | None = None,
    split_seed: int = 0,
    workers: int | None = None,
    watch: Watch | None = None,
    limit: float = 24 * 3600.0,
) -> list[dict[str, Any]]:
    """Fine-tune one expert per task from one base.

    Every data set is opened, and its batch size checked, before anything runs.  Experts of the same identity (base,
    split, specification, numerics version) that lie in the folder are not made again.

    Args:
        base: x_0.
        names: of tasks, as :func:`experiments.tasks.named.open_task` takes them.
        spec: for all of them.
        folder: for ``base.safetensors``, ``<task>.safetensors`` and ``<task>.json``.
        root: of the data sets.
        split_seed: names the splits.
        workers: processes; default: one per core, at most one per task.
        watch: is told of every finished expert.
        limit: seconds after which the run is given up.

    Returns:
        One row per task, in the order of ``names``.

    Raises:
        MergeboundError: a task that cannot be opened or does not fit, a folder with other experts of the same names or
            of another base, or a worker that ended.
    """
    spec.check()
    rows: dict[str, dict[str, Any]] = {}
    jobs: list[tuple[str, str]] = []
    stems = _stems(names)
    for name in names:
        task = open_task(name, root, seed=split_seed)
        _check(name, task, spec)
        kept = finished(folder, stems[name], identity(base, task, spec))
        if kept is not None:
            rows[name] = dict(kept["row"])
            if watch is not None:
                watch(rows[name], True)
        else:
            jobs.append((name, stems[name]))
    file = folder / "base.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_base(file, base)
    elif read_base(file).digest != base.digest:
        raise MergeboundError(f"{file}: experts of another base lie there; give another folder")
    if jobs:
        _run(jobs, spec, folder, file, root, split_seed, workers, watch, limit, rows)
    return [rows[name] for name in names]


def _stems(names: Sequence[str]) -> dict[str, str]:
    """File names of the experts: the task's name without its family or folder."""
    found: dict[str, str] = {}
    for name in names:
        stem = Path(name.rpartition(":")[2]).stem if not Path(name).is_dir() else Path(name).resolve().name
        taken = {each.lower() for each in (*found.values(), "base")}
        numbers = (f"{stem}-{number}" for number in range(1, len(names) + 2))
        found[name] = next(each for each in (stem, *numbers) if each.lower() not in taken)
    return found


def _check(name: str, task: ImageTask, spec: FinetuneSpec) -> None:
    used = max(1, round(spec.data_share * len(task.train)))
    if spec.batch_size > used:
        raise MergeboundError(
            f"{name}: batch_size = {spec.batch_size} is larger than the {used} training images that are used; lower it"
        )


def _run(
    jobs: Sequence[tuple[str, str]],
    spec: FinetuneSpec,
    folder: Path,
    base: Path,
    root: str | Path | None,
    split_seed: int,
    workers: int | None,
    watch: Watch | None,
    limit: float,
    rows: dict[str, dict[str, Any]],
) -> None:
    count = max(1, min(workers or os.cpu_count() or 1, len(jobs)))
    ends = time.monotonic() + limit
    context = multiprocessing.get_context("spawn")
    with one_thread_children(), ProcessPoolExecutor(count, mp_context=context) as pool:
        running: dict[Future[dict[str, Any]], str] = {
            pool.submit(_one, name, stem, spec, folder, base, root, split_seed): name for name, stem in jobs
        }
        try:
            while running:
                left = ends - time.monotonic()
                done, _ = wait(running, timeout=min(60.0, max(left, 0.0)), return_when=FIRST_COMPLETED)
                if not done and left <= 0:
                    raise MergeboundError(
                        f"{len(running)} experts were not ready after {limit:.0f} s; run the command again to go on"
                    )
                for future in done:
                    name = running.pop(future)
                    rows[name] = future.result(timeout=0)
                    if watch is not None:
                        watch(rows[name], False)
        except BrokenProcessPool as error:
            raise MergeboundError(
                "a worker process ended, perhaps for lack of memory; run the same command again with fewer --workers, "
                "finished experts are kept"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _one(
    name: str, stem: str, spec: FinetuneSpec, folder: Path, base: Path, root: str | Path | None, split_seed: int
) -> dict[str, Any]:
    """One expert, in a worker."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # timm scripts functions at import
    import torch

    torch.set_num_threads(1)
    expert = finetune_task(read_base(base), open_task(name, root, seed=split_seed), spec)
    save_expert(folder, stem, expert)
    return expert.row
