"""Inner products of a chunk of every expert, in float64."""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from merging.kernels.pointers import float32_pointer

_BLOCK = 1024


@njit(nogil=True, cache=True)
def add_gram(base: int, experts: NDArray[np.int64], n: int, weights: bool, out: NDArray[np.float64]) -> None:
    """Add ``<v_i, v_j>`` over n entries to the ``(N, N)`` matrix ``out`` (both triangles).

    ``v_i = x_i - x_0``, rounded to float32 as task vectors are; with ``weights``, that plus ``x_0`` in float64, which
    is what methods on whole weights use.  Sums are in blocks; the order within a block is the compiler's, so that the
    last bits may differ between kinds of processors (not between runs, threads or sizes of chunks).
    """
    count = experts.shape[0]
    b = carray(float32_pointer(base), n)
    block = np.zeros((count, _BLOCK), np.float64)
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        size = stop - start
        for i in range(count):
            x = carray(float32_pointer(experts[i]), n)[start:stop]
            row, origin = block[i], b[start:stop]
            if weights:
                for j in range(size):
                    row[j] = np.float64(np.float32(x[j] - origin[j])) + np.float64(origin[j])
            else:
                for j in range(size):
                    row[j] = np.float64(np.float32(x[j] - origin[j]))
        for i in range(count):
            for k in range(0, i + 1, 2):
                if k < i:
                    first, second = _dots(block[i, :size], block[k, :size], block[k + 1, :size])
                    _add(out, i, k, first)
                    _add(out, i, k + 1, second)
                else:
                    _add(out, i, k, _dot(block[i, :size], block[k, :size]))


@njit(nogil=True, cache=True)
def _add(out: NDArray[np.float64], i: int, k: int, value: float) -> None:
    out[i, k] += value
    if i != k:
        out[k, i] += value


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dot(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    total = 0.0
    for j in range(left.shape[0]):
        total += left[j] * right[j]
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dots(left: NDArray[np.float64], one: NDArray[np.float64], two: NDArray[np.float64]) -> tuple[float, float]:
    first, second = 0.0, 0.0
    for j in range(left.shape[0]):
        first += left[j] * one[j]
        second += left[j] * two[j]
    return first, second
