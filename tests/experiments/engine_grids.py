"""Tiny grids on the embedded digits, and runners that tests can kill."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments.engines.prepare import Prepared, prepare
from experiments.grid.result import Cohort, Plan, Way
from experiments.grid.run_spec import RunSpec
from experiments.store import Store

META: dict[str, Any] = {"grid": {"name": "tiny"}, "digest": "tiny"}
HEAVY = [
    *("torch", "torch.func", "timm", "sklearn.datasets", "scipy.stats", "experiments.inputs.kernels"),
    *("experiments.engines.local", "experiments.engines.cohort_job", "experiments.engines.worker"),
    *("experiments.finetune.reference", "experiments.finetune.cohort.vmapped", "experiments.models.build"),
]


def tiny_runs(tasks: tuple[str, ...] = ("identity", "flip"), seeds: int = 4, **fields: Any) -> tuple[RunSpec, ...]:
    """``len(tasks) * 2 * seeds`` runs of a small perceptron."""
    base = {"kind": "random", "architecture": "mlp_16", "classes": 10}
    common = {"steps": 12, "batch_size": 8, "momentum": 0.9, "checkpoints": (6, 12), "base": base} | fields
    return tuple(
        RunSpec(task=f"digits8:{task}", learning_rate=rate, seed=seed, **common)
        for task in tasks
        for rate in (0.02, 0.1)
        for seed in range(seeds)
    )


def planner_of(way: Way = "loop", chunk: int = 1, size: int = 4) -> Any:
    """Cohorts of ``size`` runs in the order in which they come."""

    def planner(runs: Mapping[str, RunSpec], *, open_network: Any, device: str = "cpu") -> Plan:
        names = list(runs)
        parts = [tuple(names[k : k + size]) for k in range(0, len(names), size)]
        return Plan(tuple(Cohort(f"c{k}", part, way, chunk) for k, part in enumerate(parts)), device)

    return planner


def tiny_store(folder: Path, runs: tuple[RunSpec, ...], **plan: Any) -> Prepared:
    """A store that is ready to be run."""
    return prepare(folder, runs, META, planner=planner_of(**plan), durable=False)


def contents(folder: Path) -> dict[str, str]:
    """By run: a hash of its outcome, every bit of its states and log, and its metrics."""
    found = {}
    with Store.open(folder, "r") as store:
        assert not store.missing()
        for digest in store.runs():
            result = store.result(digest)
            state = hashlib.sha256()
            for step, tensors in sorted(result.states.items()):
                for name, tensor in sorted(tensors.items()):
                    state.update(f"{step}{name}{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
            state.update(result.log.batch_loss.tobytes() + result.log.gradient_norm_shared.tobytes())
            rows = sorted(json.dumps(dict(row), sort_keys=True, default=str) for row in result.metrics)
            found[digest] = f"{result.outcome} {state.hexdigest()} {json.dumps(rows)}"
    return found


@pytest.fixture(scope="session")
def warm() -> Any:
    """Processes that have everything imported when they start: forks of this one, where torch has one thread."""
    if os.environ.get("OMP_NUM_THREADS") == "1":
        from tests.experiments import warmed

        warmed.once()
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def run_in_group(folder: str, options: Mapping[str, Any], channel: Any, trap: str = "") -> None:
    """A runner in a process group of its own; tells how it ended."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    import torch

    from experiments.engines import cohort_job, waiting
    from experiments.engines.local import run_local
    from theory.errors import MergeboundError

    torch.set_num_threads(1)
    waiting.LOOK = 0.3
    plain = cohort_job.run_cohort

    def trapped(store: Any, cohort: Cohort, *rest: Any, **more: Any) -> int:
        if cohort.name == "c1":
            if trap == "killed":
                os.kill(os.getpid(), 9)
            if trap == "refused":
                raise MergeboundError("this cannot be trained")
            if trap == "stuck":
                import time

                time.sleep(60)
            if trap == "once" and not (Path(folder) / "tried").exists():
                (Path(folder) / "tried").touch()
                raise RuntimeError("a passing trouble")
        return plain(store, cohort, *rest, **more)

    if trap:
        cohort_job.run_cohort = trapped
    try:
        outcome = run_local(folder, start="fork", **options)
        channel.send(("outcome", outcome))
    except KeyboardInterrupt:
        channel.send(("stopped", None))
    except MergeboundError as error:
        channel.send(("error", str(error)))
