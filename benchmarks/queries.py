"""What a question costs: comparison, design and an interval of bounds, in seconds per call, on one thread.

Design and interval are held against brute force: the same question answered by evaluating the bound on a grid of
recipes, in arrays (the fairest way) and recipe by recipe.  With three fields a grid in arrays is cheaper (its price is
exponential in their number), and it proves nothing between its points; design and interval come with a guarantee.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from theory import Budget, Expert, Merge, Range, bound_interval, compare, design, master_bound

ROUNDS = 5
GRID = 60
LIMIT = 20_000.0


def seconds(work: Callable[[], object]) -> float:
    """Median processor time of a few calls: a busy machine stretches only wall time."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found)


def pair() -> Merge:
    """Two strongly convex experts whose bound has an optimum inside the range."""
    run = dict(n=2_000, batch_size=32, learning_rate=0.1, steps=100, L=1.0, mu=0.9, G=2.0, B=4.0)
    run |= dict(initial_gradient_norm=1.4, sigma=0.3, D_inf=2.0, initial_risk=1.0, minimal_risk=0.0)
    experts = tuple(Expert(name, curvature="strongly_convex", **run) for name in "ab")  # type: ignore[arg-type]
    stated = {"shared_samples": False, "data_independent_choices": True, "per_sample_loss": True}
    return Merge(experts, orthogonal_task_vectors=True, **stated)  # type: ignore[arg-type]


def moved(merge: Merge, **changes: object) -> Merge:
    return replace(merge, experts=tuple(replace(item, **changes) for item in merge.experts))  # type: ignore[arg-type]


def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Learning rates, steps and batch sizes of every recipe of the grid."""
    steps = np.unique(np.geomspace(1, 2_000, GRID).astype(int)).astype(np.float64)
    batches = np.unique(np.geomspace(1, 256, GRID).astype(int)).astype(np.float64)
    eta, K, b = np.meshgrid(np.geomspace(1e-3, 1.0, GRID), steps, batches, indexing="ij")
    return eta.ravel(), K.ravel(), b.ravel()


def priced(count: int, alone: float, arrays: float, ours: float) -> str:
    """What a grid costs, and our price in terms of it."""
    each = count * alone
    ratios = f"ours / grid: {ours / arrays:.1f} and {ours / each:.1e}"
    return f"{arrays:.2f} s in arrays, {each:.0f} s one by one (extrapolated), {ratios}"


def main() -> None:
    merge = pair()
    alone = seconds(lambda: master_bound(merge, recursion=False))
    print(f"master bound, one recipe of two experts: {alone * 1e3:.2f} ms")
    print(f"compare, the same recipe: {seconds(lambda: compare(merge)) * 1e3:.1f} ms")

    eta, K, b = grid()
    free = {"all.learning_rate": (1e-3, 1.0), "all.steps": (1, 2_000), "all.batch_size": (1, 256)}
    found = design(merge, free, budgets=[Budget("samples", LIMIT)])
    ours = seconds(lambda: design(merge, free, budgets=[Budget("samples", LIMIT)]))
    fits = 2 * K * b <= LIMIT

    def on_grid() -> float:
        fields = {"learning_rate": eta[fits], "steps": K[fits], "batch_size": b[fits]}
        return float(np.min(master_bound(moved(merge, **fields), recursion=False).value))

    least, arrays = on_grid(), seconds(on_grid)
    print(f"design, 3 free fields, one budget: {ours:.2f} s, bound {found.objective:.6f}, proven gap {found.gap:.4f}")
    count = int(fits.sum())
    print(f"grid of {count:,} allowed recipes: {priced(count, alone, arrays, ours)}; smallest bound {least:.6f}")

    ranges = {"all.learning_rate": Range(0.01, 0.5), "all.steps": Range(10, 1_000), "all.batch_size": Range(8, 128)}
    interval = bound_interval(merge, ranges)
    ours = seconds(lambda: bound_interval(merge, ranges))
    inside = (eta >= 0.01) & (eta <= 0.5) & (K >= 10) & (K <= 1_000) & (b >= 8) & (b <= 128)

    def on_ranges() -> tuple[float, float]:
        fields = {"learning_rate": eta[inside], "steps": K[inside], "batch_size": b[inside]}
        value = master_bound(moved(merge, **fields), recursion=False).value
        return float(np.min(value)), float(np.max(value))

    ends, arrays = on_ranges(), seconds(on_ranges)
    count = int(inside.sum())
    print(
        f"bound_interval, 3 unknowns, with influences: {ours:.2f} s, {interval.lower:.6f} to {interval.upper:.6f} "
        f"({interval.how}); found {interval.found[0]:.6f} to {interval.found[1]:.6f}"
    )
    print(f"grid of {count:,} recipes: {priced(count, alone, arrays, ours)}; {ends[0]:.6f} to {ends[1]:.6f}")


if __name__ == "__main__":
    main()
