"""Ten thousand merges of eight experts of 100,000 parameters in memory: merges per second, and the ratio to a loop.

A loop over :func:`merging.merge.merge_flat` and :func:`merging.many.merge_many` take turns (A B A B ...) on one thread;
medians of processor time and of wall time.  The loop makes a sample of the merges, and the result says of how many.
Every sampled merge is compared bit by bit first.

Run it as ``python -P benchmarks/merging_many.py``: without ``-P`` this folder's ``merging.py`` hides the package.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the packages first, not `merging.py` beside this file
    here, root = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
    sys.path[:] = [str(root), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]

import numpy as np
import torch

from merging.flat import FlatSpace
from merging.many import ManyMerges, merge_many
from merging.many_request import merge_one
from merging.partition import Partition

EXPERTS, PARAMETERS, MERGES, SAMPLE, ROUNDS = 8, 100_000, 10_000, 40, 3


@dataclass(frozen=True)
class Rate:
    """Merges per second of one task.

    Attributes:
        task: which merges.
        merges: how many were made.
        per_second: merges per second of processor time.
        per_second_wall: merges per second of wall time.
        loop_per_second: merges per second of processor time by a loop over ``merge_flat``.
        sample: how many of the merges the loop made.
    """

    task: str
    merges: int
    per_second: float
    per_second_wall: float
    loop_per_second: float
    sample: int

    @property
    def ratio(self) -> float:
        """How many times as many merges as the loop."""
        return self.per_second / self.loop_per_second


def tasks(merges: int, experts: int, seed: int = 0) -> dict[str, tuple[str, dict[str, Any]]]:
    """Method and arguments of every task."""
    rng = np.random.default_rng(seed)
    subsets = rng.random((merges, experts)) < 0.5
    subsets[np.arange(merges), rng.integers(0, experts, merges)] = True
    alphas = rng.random((merges, experts))
    lambdas = np.linspace(0.1, 2.0, merges)
    return {
        "average over subsets": ("average", {"subsets": subsets}),
        "task arithmetic over coefficient vectors": ("task_arithmetic", {"coefficients": alphas, "coefficient": 0.3}),
        "the same by matrix product": (
            "task_arithmetic",
            {"coefficients": alphas, "coefficient": 0.3, "exact": False},
        ),
        "task arithmetic over lambdas": ("task_arithmetic", {"each": {"coefficient": lambdas}}),
        "TIES over subsets": ("ties", {"subsets": subsets, "density": 0.2}),
        "TIES over lambdas": ("ties", {"each": {"coefficient": lambdas}, "density": 0.2}),
        "TIES over weights": ("ties", {"coefficients": 0.1 + alphas, "density": 0.2}),
        "TIES over densities": ("ties", {"each": {"density": np.linspace(0.01, 1.0, merges)}}),
        "TIES over subsets, per tensor": ("ties", {"subsets": subsets, "density": 0.2, "scope": "tensor"}),
        "MagMax over subsets": ("magmax", {"subsets": subsets}),
        "DARE over seeds": ("dare", {"seed": list(range(min(merges, 500)))}),
    }


def small_experts(
    experts: int, parameters: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, FlatSpace, Partition]:
    """Base, task vectors, layout and partition of a network with a few matrices."""
    rng = np.random.default_rng(seed)
    side = int((parameters / 4) ** 0.5)
    shapes = {f"blocks.{i}.weight": (side, side) for i in range(4)}
    shapes["blocks.3.bias"] = (parameters - 4 * side * side,)
    parts = Partition(tuple(shapes))
    space = FlatSpace.of({name: torch.empty(shape) for name, shape in shapes.items()})
    base = torch.from_numpy(rng.normal(size=space.size).astype(np.float32))
    deltas = torch.from_numpy((0.05 * rng.normal(size=(experts, space.size))).astype(np.float32))
    return base, deltas, space, parts


def measure_many(
    merges: int = MERGES,
    experts: int = EXPERTS,
    parameters: int = PARAMETERS,
    sample: int = SAMPLE,
    rounds: int = ROUNDS,
    watch: Callable[[str], None] | None = None,
) -> list[Rate]:
    """Merges per second of every task; blocks are made into one buffer and looked at nowhere else.

    Raises:
        AssertionError: a merge differs from the definition's by a bit (or, by matrix product, by more than rounding).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base, deltas, space, parts = small_experts(experts, parameters)
        found = []
        for task, (method, arguments) in tasks(merges, experts).items():
            if watch is not None:
                watch(task)

            def make(m: str = method, a: dict[str, Any] = arguments) -> ManyMerges:
                return merge_many(m, base, deltas, space, parts, **a)

            found.append(_rate(task, make, sample, rounds))
        return found
    finally:
        torch.set_num_threads(threads)


def _rate(task: str, make: Callable[[], ManyMerges], sample: int, rounds: int) -> Rate:
    merges = make()
    rows = list(merges.rows)
    chosen = np.linspace(0, len(merges) - 1, min(sample, len(merges))).astype(int).tolist()

    def one(index: int) -> torch.Tensor:
        return merge_one(
            merges.method, merges.base, rows, merges.names, merges.space, merges.partition, merges.wanted, index
        )

    out = torch.empty((min(len(merges), 2**25 // (4 * merges.space.size)), merges.space.size))
    wanted = {index: one(index) for index in chosen}
    for start, block in merges.blocks(out=out):  # also compiles
        for index in range(start, start + len(block)):
            if index in wanted and merges.exact:
                assert torch.equal(block[index - start], wanted[index]), (task, index)
            elif index in wanted:
                torch.testing.assert_close(block[index - start], wanted[index])
    ours, walls, loop = [], [], []
    for _ in range(rounds):
        processor, wall = time.process_time(), time.perf_counter()
        for _, _ in make().blocks(out=out):
            pass
        ours.append(time.process_time() - processor)
        walls.append(time.perf_counter() - wall)
        processor = time.process_time()
        for index in chosen:
            one(index)
        loop.append(time.process_time() - processor)
    return Rate(
        task,
        len(merges),
        len(merges) / statistics.median(ours),
        len(merges) / statistics.median(walls),
        len(chosen) / statistics.median(loop),
        len(chosen),
    )


def main() -> None:
    print(f"{MERGES} merges of {EXPERTS} experts of {PARAMETERS} parameters, float32, one thread")
    print(f"{'task':42s} {'merges/s':>9s} {'(wall)':>9s} {'loop':>7s} {'ratio':>6s}")
    for rate in measure_many():
        print(
            f"{rate.task:42s} {rate.per_second:9.0f} {rate.per_second_wall:9.0f} {rate.loop_per_second:7.0f} "
            f"{rate.ratio:6.1f}"
        )


if __name__ == "__main__":
    main()
