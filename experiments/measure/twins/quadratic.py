"""Twins of the quadratic family (theory.md section 9), whose eps_i has a closed form: the check of the estimators."""

from __future__ import annotations

import numpy as np

from theory.quadratic import QuadraticTask, draw_batches, draw_data, simulate_sgd
from theory.recipe import Expert

_QUADRATIC = 0x0A4D


def quadratic_twins(task: QuadraticTask, base: np.ndarray, expert: Expert, replicates: int, seed: int) -> np.ndarray:
    """x_K of coupled runs: base run first, then every S^(j), in fresh replicates of data, fresh samples and batches.

    Args:
        task: with Gaussian samples.
        base: x_0, (d,).
        expert: what is run.
        replicates: R.
        seed: names all draws.

    Returns:
        (R, n + 1, d).
    """
    n, d = int(expert.n), len(task.theta)
    rng = np.random.default_rng([seed, _QUADRATIC])
    found = np.empty((replicates, n + 1, d))
    for r in range(replicates):
        data, fresh = draw_data(task, n, 1, rng)[0], draw_data(task, n, 1, rng)[0]
        batches = [np.repeat(rows, n + 1, axis=0) for rows in draw_batches(expert, 1, rng)]
        every = np.repeat(data[None], n + 1, axis=0)
        every[np.arange(1, n + 1), np.arange(n)] = fresh
        found[r] = simulate_sgd(task, base, expert, every, batches)
    return found
