"""L1 norms of a task vector before and after a random mask, for one chunk."""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from merging.kernels.pointers import float32_pointer

BLOCK = 4096
"""Entries that are summed together: chunks are multiples of it, so that their size does not change the sums."""


@njit(nogil=True, cache=True)
def masked_norms(base: int, expert: int, keep: NDArray[np.uint8], sums: NDArray[np.float64]) -> None:
    """Add ``sum |x - x_0|`` and ``sum |x - x_0| keep`` of a chunk to ``sums``, in float64."""
    n = keep.shape[0]
    b = carray(float32_pointer(base), n)
    x = carray(float32_pointer(expert), n)
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        total, kept = _block(x[start:stop], b[start:stop], keep[start:stop])
        sums[0] += total
        sums[1] += kept


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _block(x: NDArray[np.float32], b: NDArray[np.float32], keep: NDArray[np.uint8]) -> tuple[float, float]:
    total, kept = 0.0, 0.0
    for j in range(x.shape[0]):
        m = np.float64(abs(np.float32(x[j] - b[j])))
        total += m
        kept += m * np.float64(keep[j])
    return total, kept
