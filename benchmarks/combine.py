"""Merges that are evaluated per second: many groups at once, against the loop that everybody writes.

The loop reads the experts' checkpoints of a group, merges them (:func:`merging.merge.merge_state_dicts`), loads the
merge with each task's head into a network and evaluates it on the task's test images, which it keeps in memory.
:func:`experiments.combine.api.combine` does the same with task vectors kept in one matrix, merges in blocks, and the
backbone's features computed once.  Both measure the same groups, in turns (A B A B ...), on one thread; medians of
processor time.  Every metric is compared bit by bit first.

Run it as ``python -P benchmarks/combine.py``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the packages first, not `merging.py` beside this file
    here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]

import numpy as np
import torch
from torch import Tensor

from experiments.bases.base import random_base
from experiments.bases.spec import BaseSpec
from experiments.combine.api import combine
from experiments.combine.designs import random_groups
from experiments.combine.groups import Group
from experiments.combine.merge_many_groups import merge_jobs, reference_jobs
from experiments.combine.recipe import Evaluate, MergeMethod
from experiments.combine.work import Setup, Worker
from experiments.evaluate.evaluate import evaluate
from experiments.evaluate.results import EvaluationSet
from experiments.finetune.loop import TrainingLog
from experiments.finetune.task_expert import start_from
from experiments.grid.result import RunResult
from experiments.grid.run_spec import RunSpec
from experiments.inputs.resident import residents
from experiments.models import head_prefix, input_format
from experiments.store import Store
from experiments.tasks.digits8 import EIGHT
from experiments.tasks.named import open_task
from merging.merge import merge_state_dicts
from merging.partition import partition

EXPERTS, GROUPS, SIZE, ROUNDS = 6, 48, 6, 5
NETWORKS = ("mlp_64", "resnet_bn", "vit")
METHODS = (MergeMethod("average"), MergeMethod("ties", {"density": 0.2}))


def store_of(folder: Path, architecture: str) -> Store:
    """Eight tasks of the embedded digits, six experts each, with random weights in place of training."""
    options = {"img_size": 8, "in_chans": 1} if architecture == "mlp_64" else {}
    spec = BaseSpec(kind="random", architecture=architecture, classes=10, options=options)
    base = random_base(architecture, classes=10, options=options)
    store = Store.create(folder, durable=False)
    store.add_base(base)
    log = TrainingLog(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1), 0.0, True)
    rng = torch.Generator().manual_seed(0)
    for name in EIGHT:
        split = open_task(f"digits8:{name}").digest
        for number in range(EXPERTS):
            run = RunSpec(
                task=f"digits8:{name}", base=spec, learning_rate=0.01 * (number + 1), steps=1, batch_size=8
            )  # fmt: skip
            state = {key: _moved(key, tensor, rng) for key, tensor in base.state.items()}
            digest = run.digest(base=base.digest, split=split)
            store.add_runs({digest: run}, base.digest, split)
            store.commit(digest, RunResult("finished", {1: state}, log))
    return store


def _moved(name: str, tensor: Tensor, rng: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or name.endswith("running_var"):
        return tensor.clone()
    return tensor + 0.02 * torch.randn(tensor.shape, generator=rng)


def loop(store: Store, groups: Sequence[Group], method: MergeMethod, tests: dict[str, Any]) -> list[float]:
    """Joint losses of groups, one group after the other."""
    found = []
    for group in groups:
        base = store.base(group.base)
        states = {member.name: store.state(member.run, member.step) for member in group.members}
        network, _ = start_from(base, 10, 0)
        prefix = head_prefix(network)
        parts = partition(base.state, private=[f"{prefix}*"])
        merged = merge_state_dicts(method.name, base.state, states, partition=parts, **method.settings)
        losses = []
        for member in group.members:
            head = {key: value for key, value in states[member.name].items() if key.startswith(prefix)}
            network.load_state_dict({**merged, **head})
            losses.append(evaluate(network, tests[member.task], resamples=0).metrics.loss)
        found.append(sum(1.0 / len(losses) * value for value in losses))
    return found


def measure(architecture: str, groups: int, rounds: int, fast: bool = False) -> list[dict[str, Any]]:
    """Rates of both ways for every method."""
    out = []
    with tempfile.TemporaryDirectory() as folder, store_of(Path(folder) / "store", architecture) as store:
        chosen = list(random_groups(store.frame(), sizes=(SIZE,), groups=groups))
        network = store.base(chosen[0].base).model()
        tests = {}
        for name in EIGHT:
            task = open_task(f"digits8:{name}")
            tests[f"digits8:{name}"] = EvaluationSet.of_task(task, residents(task, input_format(network))[2])
        for method in METHODS:
            few = chosen[: max(4, groups // 6)]
            rows = combine(store, chosen, [method], evaluate=Evaluate())
            same = list(rows["loss"])[: len(few)] == loop(store, few, method, tests)
            worker, references = _worker(store, chosen, Evaluate(fast=fast))
            ours = partial(_ours, worker, chosen, method, references)
            a, b = _turns(ours, partial(loop, store, few, method, tests), rounds)
            rate, slow = groups / statistics.median(a), len(few) / statistics.median(b)
            ratios = sorted(y / len(few) / (x / groups) for x, y in zip(a, b, strict=True))
            out.append(
                {
                    "network": architecture,
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "method": method.label,
                    "merges_per_s": rate,
                    "loop_per_s": slow,
                    "ratio": rate / slow,
                    "ratios": (ratios[0], ratios[-1]),
                    "same_bits": same,
                }
            )
    return out


def _worker(store: Store, groups: Sequence[Group], spec: Evaluate) -> tuple[Worker, dict[str, Any]]:
    base = groups[0].base
    everybody = tuple(sorted({member for group in groups for member in group.members}))
    setup = Setup(lambda: store, lambda name, seed: open_task(name, seed=seed), spec, {base: everybody})
    worker = Worker(setup)
    rows = [row for one in reference_jobs(everybody, base) for row in worker.do(one, {})]
    return worker, {row["experts"]: row for row in rows}


def _ours(worker: Worker, groups: Sequence[Group], method: MergeMethod, references: dict[str, Any]) -> None:
    for job in merge_jobs(groups, method, groups[0].base):
        worker.do(job, references)


def _turns(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for kept, function in zip(seconds, (first, second), strict=True):
            started = time.process_time()
            function()
            kept.append(time.process_time() - started)
    return seconds


def main() -> None:
    """Print one line for each network and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--fast", action="store_true", help="ours by the fastest path that is close enough")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    print(f"groups of {SIZE} of {8 * EXPERTS} experts, 400 test images per task, one thread, processor time")
    for architecture in options.networks:
        for row in measure(architecture, options.groups, options.rounds, options.fast):
            low, high = row["ratios"]
            print(
                f"{row['network']:>10} {row['parameters']:>9,} parameters  {row['method']:<18} "
                f"{row['merges_per_s']:8.1f} merges/s  loop {row['loop_per_s']:7.1f}/s  "
                f"ratio {row['ratio']:5.1f} ({low:.1f} to {high:.1f})  same bits: {row['same_bits']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
