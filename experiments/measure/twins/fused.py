"""Updates of stacked rows in one pass over memory, compiled: arrays (lines, columns), lines perhaps apart in memory."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_FAST = {"contract", "reassoc", "nsz", "arcp"}


@njit(nogil=True, cache=True, fastmath=_FAST)
def heavy_ball(
    x: np.ndarray, v: np.ndarray, g: np.ndarray, rate: float, beta: float, decay: float, nesterov: bool
) -> None:
    """v <- beta v + g + decay x;  x <- x - rate v, or x - rate (g + decay x + beta v) for Nesterov."""
    columns = x.shape[1]
    for i in range(x.shape[0]):
        xs, vs, gs = x[i], v[i], g[i]
        if nesterov:
            for k in range(columns):
                gradient = gs[k] + decay * xs[k]
                vs[k] = beta * vs[k] + gradient
                xs[k] -= rate * (gradient + beta * vs[k])
        else:
            for k in range(columns):
                vs[k] = beta * vs[k] + (gs[k] + decay * xs[k])
                xs[k] -= rate * vs[k]


@njit(nogil=True, cache=True, fastmath=_FAST)
def plain(x: np.ndarray, g: np.ndarray, rate: float, decay: float) -> None:
    """x <- x - rate (g + decay x)."""
    columns = x.shape[1]
    for i in range(x.shape[0]):
        xs, gs = x[i], g[i]
        for k in range(columns):
            xs[k] -= rate * (gs[k] + decay * xs[k])


@njit(nogil=True, cache=True, fastmath=_FAST)
def adamw(
    x: np.ndarray,
    v: np.ndarray,
    square: np.ndarray,
    g: np.ndarray,
    rate: float,
    numbers: np.ndarray,
) -> None:
    """AdamW; ``numbers``: 1 - beta1, beta2, 1 - beta2, epsilon, 1 - rate omega, 1 - beta1^t, sqrt(1 - beta2^t)."""
    columns = x.shape[1]
    first, keep2, second, epsilon, keep = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    pace, root = rate / numbers[5], 1 / numbers[6]
    for i in range(x.shape[0]):
        xs, vs, ss, gs = x[i], v[i], square[i], g[i]
        for k in range(columns):
            gradient = gs[k]
            vs[k] += first * (gradient - vs[k])
            ss[k] = keep2 * ss[k] + second * gradient * gradient
            xs[k] = keep * xs[k] - pace * vs[k] / (math.sqrt(ss[k]) * root + epsilon)
