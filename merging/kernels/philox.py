"""Counter-based random words: Philox4x32-10.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

_BLOCK = 4096


@njit(nogil=True, cache=True)
def words(key: NDArray[np.uint32], start: int, out: NDArray[np.uint32]) -> None:
    """Words number ``start`` to ``start + n`` of a stream; the same as :func:`merging.random_masks.uniform_words`.

    Args:
        key: four words: Philox's key, and the upper half of its counter.
        start: a multiple of four.
        out: shape ``(n,)``.
    """
    n = out.shape[0]
    block = start // 4
    place = 0
    while place < n:  # all but the last blocks, as long as the upper half of the counter stays
        upper = np.uint32(block >> 32)
        lower = np.uint32(block & 0xFFFFFFFF)
        whole = min((n - place) // 4, 2**32 - np.int64(lower))
        _fill(key, lower, upper, out[place : place + 4 * whole])
        block += whole
        place += 4 * whole
        if n - place < 4:
            rest = np.empty(4, np.uint32)
            _fill(key, np.uint32(block & 0xFFFFFFFF), np.uint32(block >> 32), rest)
            for k in range(n - place):
                out[place + k] = rest[k]
            place = n


@njit(nogil=True, cache=True)
def _fill(key: NDArray[np.uint32], lower: np.uint32, upper: np.uint32, out: NDArray[np.uint32]) -> None:
    """Whole blocks of four words, from counter ``(lower, upper)`` on, whose lower word does not overflow."""
    half = np.uint64(32)
    for block in range(out.shape[0] // 4):
        x0, x1 = np.uint32(lower + np.uint32(block)), upper
        x2, x3 = key[2], key[3]
        a, b = key[0], key[1]
        for _ in range(10):
            p = np.uint64(0xD2511F53) * np.uint64(x0)
            q = np.uint64(0xCD9E8D57) * np.uint64(x2)
            y0 = np.uint32(q >> half) ^ x1 ^ a
            y2 = np.uint32(p >> half) ^ x3 ^ b
            x1, x3 = np.uint32(q), np.uint32(p)
            x0, x2 = y0, y2
            a = np.uint32(a + np.uint32(0x9E3779B9))
            b = np.uint32(b + np.uint32(0xBB67AE85))
        out[4 * block] = x0
        out[4 * block + 1] = x1
        out[4 * block + 2] = x2
        out[4 * block + 3] = x3


@njit(nogil=True, cache=True)
def keep(key: NDArray[np.uint32], start: int, least: np.uint32, out: NDArray[np.uint8]) -> None:
    """One where a word (see :func:`words`) is at least ``least``, zero elsewhere; shape ``(n,)``."""
    drawn = np.empty(_BLOCK, np.uint32)
    for begin in range(0, out.shape[0], _BLOCK):
        end = min(out.shape[0], begin + _BLOCK)
        part, kept = drawn[: end - begin], out[begin:end]
        words(key, start + begin, part)
        for j in range(end - begin):
            kept[j] = np.uint8(part[j] >= least)
