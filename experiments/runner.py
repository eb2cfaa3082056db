"""One single-threaded worker process per architecture, with progress, and everything finished kept on interruption."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.pipeline import Frames, join_frames, run_architecture
from experiments.spec import ValidationSpec
from theory.errors import MergeboundError

STAGE_SHARES = {
    "pretrain": 0.02,
    "fine-tune": 0.28,
    "collect": 0.15,
    "non-linear merges": 0.15,
    "merges": 0.28,
    "coefficients": 0.03,
    "lines": 0.01,
    "optimal": 0.08,
}
"""Rough shares of a regime's time, for the time-left estimate only."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Status:
    """Progress of one worker: ``fraction`` of its whole job, and the stage it is in."""

    architecture: str
    stage: str
    fraction: float


def _work(spec: ValidationSpec, architecture: str, folder: Path, channel: Any) -> None:
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", category=FutureWarning)  # timm scripts functions at import
    import torch

    torch.set_num_threads(1)
    regimes = list(spec.regimes)
    last = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        if os.getppid() != parent:  # the command was killed: do not run on as an orphan
            os._exit(1)
        regime, _, name = stage.partition(": ")
        before = sum(share for key, share in STAGE_SHARES.items() if _order(key) < _order(name))
        inside = STAGE_SHARES.get(name, 0.0) * done / max(total, 1)
        fraction = (regimes.index(regime) + before + inside) / len(regimes)
        if time.monotonic() - last > 0.2 or done == total:
            last = time.monotonic()
            channel.put(("status", architecture, Status(architecture, f"{stage} {done}/{total}", fraction)))

    try:
        channel.put(("done", architecture, run_architecture(spec, architecture, folder, report)))
    except MergeboundError as error:
        channel.put(("refused", architecture, str(error)))
    except BaseException:
        channel.put(("failed", architecture, traceback.format_exc()))


def _order(stage: str) -> int:
    names = list(STAGE_SHARES)
    return names.index(stage) if stage in names else len(names)


@contextmanager
def one_thread_children() -> Iterator[None]:
    """Children inherit one thread per process; the parent's environment is restored."""
    saved = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_validation(
    spec: ValidationSpec,
    folder: Path,
    *,
    workers: int | None = None,
    watch: Callable[[Status], None] | None = None,
    silence_limit: float = 900.0,
) -> Frames:
    """Run every architecture of the spec, each in a process of its own, and join their tables.

    Args:
        spec: what to run.
        folder: where experts and finished rows are kept; a later call with the same spec continues there.
        workers: processes at a time; default: one per CPU core, at most one per architecture.
        watch: called with the progress of workers.
        silence_limit: seconds without a sign of life after which the run is given up.

    Raises:
        MergeboundError: a worker refused its input, failed, died or fell silent.
    """
    place = folder / spec.digest()
    place.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    channel = context.Queue()
    waiting = list(spec.architectures)
    limit = max(1, min(workers or os.cpu_count() or 1, len(waiting)))
    running: dict[str, Any] = {}
    results: dict[str, Frames] = {}
    heard = time.monotonic()
    try:
        while len(results) < len(spec.architectures):
            while waiting and len(running) < limit:
                name = waiting.pop(0)
                with one_thread_children():
                    process = context.Process(
                        target=_work, args=(spec, name, place / name, channel), name=name, daemon=True
                    )
                    process.start()
                running[name] = process
            try:
                kind, name, content = channel.get(timeout=0.5)
            except queue.Empty:
                _check_alive(running, heard, silence_limit)
                continue
            heard = time.monotonic()
            if kind == "status":
                if watch is not None:
                    watch(content)
            elif kind == "done":
                results[name] = content
                running.pop(name).join(timeout=10)
                if watch is not None:
                    watch(Status(name, "done", 1.0))
            elif kind == "refused":
                raise MergeboundError(content)
            else:
                raise MergeboundError(f"{name}: the worker failed; report this traceback:\n{content}")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(timeout=10)
    return join_frames([results[name] for name in spec.architectures])


def _check_alive(running: dict[str, Any], heard: float, limit: float) -> None:
    dead = [name for name, process in running.items() if not process.is_alive()]
    if dead and time.monotonic() - heard > 5.0:
        raise MergeboundError(
            f"{dead[0]}: the worker process ended (exit code {running[dead[0]].exitcode}), perhaps for lack of memory; "
            "run the same command again to continue where it stopped"
        )
    if time.monotonic() - heard > limit:
        raise MergeboundError(
            f"no worker has reported for {limit:.0f} seconds; run the same command again to continue where it stopped"
        )
