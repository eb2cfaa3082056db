"""Count and collect magnitudes around a threshold: the loops under exact selection in a stream."""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from merging.kernels.pointers import float32_pointer

_BLOCK = 2048


@njit(nogil=True, cache=True)
def around(
    base: int,
    expert: int,
    n: int,
    low: np.float32,
    high: np.float32,
    first: int,
    shift: int,
    histogram: NDArray[np.int32] | NDArray[np.int64],
) -> int:
    """Count ``|x - x_0|`` above ``high``, and add those in ``[low, high]`` to a histogram over bit patterns.

    Args:
        base: address of the base's n float32 entries.
        expert: address of the expert's n entries.
        n: number of entries.
        low: lower end of the bracket.
        high: upper end.
        first: bit pattern of ``low``.
        shift: the bin of a magnitude with bit pattern p is ``(p - first) >> shift``.
        histogram: added to.

    Returns:
        How many magnitudes are above ``high``.
    """
    b = carray(float32_pointer(base), n)
    x = carray(float32_pointer(expert), n)
    magnitudes = np.empty(_BLOCK, np.float32)
    inside = np.empty(_BLOCK, np.uint8)
    inside_by_8 = inside.view(np.uint64)
    bits = magnitudes.view(np.uint32)
    collected = np.empty(_BLOCK + 8, np.uint32)
    above = 0
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        size = stop - start
        one, zero = x[start:stop], b[start:stop]
        found = np.int32(0)
        for j in range(size):
            m = abs(one[j] - zero[j])
            magnitudes[j] = m
            found = np.int32(found + np.int32(m > high))
            inside[j] = np.uint8((m >= low) & (m <= high))
        for j in range(size, (size + 7) // 8 * 8):
            inside[j] = np.uint8(0)
        above += int(found)
        count = 0
        for k in range((size + 7) // 8):
            if inside_by_8[k] != np.uint64(0):
                for j in range(8 * k, 8 * k + 8):
                    collected[count] = bits[j]
                    count += int(inside[j])
        for k in range(count):
            histogram[(np.int64(collected[k]) - first) >> shift] += np.int32(1)
    return above


@njit(nogil=True, cache=True)
def collect(
    base: int, expert: int, n: int, low: np.float32, high: np.float32, out: NDArray[np.float32]
) -> tuple[int, int]:
    """Count ``|x - x_0|`` above ``high``, and write those in ``[low, high]`` to ``out`` in index order.

    Returns:
        How many are above, and how many are inside (those that do not fit into ``out`` are counted, not written).
    """
    b = carray(float32_pointer(base), n)
    x = carray(float32_pointer(expert), n)
    magnitudes = np.empty(_BLOCK, np.float32)
    inside = np.empty(_BLOCK, np.uint8)
    inside_by_8 = inside.view(np.uint64)
    collected = np.empty(_BLOCK + 8, np.float32)
    above = 0
    total = 0
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        size = stop - start
        one, zero = x[start:stop], b[start:stop]
        found = np.int32(0)
        for j in range(size):
            m = abs(one[j] - zero[j])
            magnitudes[j] = m
            found = np.int32(found + np.int32(m > high))
            inside[j] = np.uint8((m >= low) & (m <= high))
        for j in range(size, (size + 7) // 8 * 8):
            inside[j] = np.uint8(0)
        above += int(found)
        count = 0
        for k in range((size + 7) // 8):
            if inside_by_8[k] != np.uint64(0):
                for j in range(8 * k, 8 * k + 8):
                    collected[count] = magnitudes[j]
                    count += int(inside[j])
        if total + count <= out.shape[0]:
            for k in range(count):
                out[total + k] = collected[k]
        total += count
    return above, total


@njit(nogil=True, cache=True)
def count_equal(base: int, expert: int, n: int, value: np.float32) -> int:
    """How many of n entries have ``|x - x_0| = value``."""
    b = carray(float32_pointer(base), n)
    x = carray(float32_pointer(expert), n)
    count = 0
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        found = np.int32(0)
        one, zero = x[start:stop], b[start:stop]
        for j in range(stop - start):
            found = np.int32(found + np.int32(abs(one[j] - zero[j]) == value))
        count += int(found)
    return count


@njit(nogil=True, cache=True)
def place_of_equal(base: int, expert: int, n: int, value: np.float32, number: int) -> int:
    """The place just behind the ``number``-th entry (from one) with ``|x - x_0| = value``; n if there are fewer."""
    b = carray(float32_pointer(base), n)
    x = carray(float32_pointer(expert), n)
    seen = 0
    for j in range(n):
        if abs(x[j] - b[j]) == value:
            seen += 1
            if seen == number:
                return j + 1
    return n


@njit(nogil=True, cache=True)
def not_finite(base: int, expert: int, n: int) -> int:
    """How many of n differences ``x - x_0`` are NaN or infinite."""
    b = carray(float32_pointer(base), n)
    x = carray(float32_pointer(expert), n)
    count = 0
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        found = np.int32(0)
        one, zero = x[start:stop], b[start:stop]
        for j in range(stop - start):
            found = np.int32(found + np.int32(not (abs(one[j] - zero[j]) <= np.float32(3.4028234663852886e38))))
        count += int(found)
    return count


@njit(nogil=True, cache=True)
def magnitudes_of(base: int, expert: int, n: int, out: NDArray[np.float32]) -> None:
    """Write ``|x - x_0|`` of n entries into ``out``."""
    b = carray(float32_pointer(base), n)
    x = carray(float32_pointer(expert), n)
    for j in range(n):
        out[j] = abs(x[j] - b[j])


@njit(nogil=True, cache=True)
def runs_of(base: int, expert: int, n: int, out: NDArray[np.float32]) -> None:
    """Write ``|x - x_0|`` of R evenly spread runs of n entries into ``out`` of shape ``(R, length)``."""
    b = carray(float32_pointer(base), n)
    x = carray(float32_pointer(expert), n)
    runs, length = out.shape
    for run in range(runs):
        start = (n - length) * run // max(1, runs - 1)
        for j in range(length):
            out[run, j] = abs(x[start + j] - b[start + j])
