"""Updates of stacked rows in one pass over memory, compiled: flat arrays."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_FAST = {"contract", "reassoc", "nsz", "arcp"}


@njit(nogil=True, cache=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def heavy_ball(
    x: np.ndarray, v: np.ndarray, g: np.ndarray, rate: float, beta: float, decay: float, nesterov: bool
) -> None:
    """v <- beta v + g + decay x;  x <- x - rate v, or x - rate (g + decay x + beta v) for Nesterov."""
    if nesterov:
        for k in range(x.size):
            gradient = g[k] + decay * x[k]
            v[k] = beta * v[k] + gradient
            x[k] -= rate * (gradient + beta * v[k])
    else:
        for k in range(x.size):
            v[k] = beta * v[k] + (g[k] + decay * x[k])
            x[k] -= rate * v[k]


@njit(nogil=True, cache=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def plain(x: np.ndarray, g: np.ndarray, rate: float, decay: float) -> None:
    """x <- x - rate (g + decay x)."""
    for k in range(x.size):
        x[k] -= rate * (g[k] + decay * x[k])


@njit(nogil=True, cache=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def adamw(
    x: np.ndarray,
    v: np.ndarray,
    square: np.ndarray,
    g: np.ndarray,
    rate: float,
    numbers: np.ndarray,
) -> None:
    """AdamW; ``numbers``: 1 - beta1, beta2, 1 - beta2, epsilon, 1 - rate omega, 1 - beta1^t, sqrt(1 - beta2^t)."""
    first, keep2, second, epsilon, keep = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    pace, root = rate / numbers[5], (rate * 0 + 1) / numbers[6]
    for k in range(x.size):
        gradient = g[k]
        v[k] += first * (gradient - v[k])
        square[k] = keep2 * square[k] + second * gradient * gradient
        x[k] = keep * x[k] - pace * v[k] / (math.sqrt(square[k]) * root + epsilon)
