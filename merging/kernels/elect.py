"""Trim by a threshold, elect signs, aggregate what agrees: TIES for one chunk."""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from merging.kernels.pointers import float32_pointer, uint8_pointer

_LARGEST = np.float32(np.finfo(np.float32).max)
_BLOCK = 2048  # entries: N trimmed blocks stay in the second-level cache


@njit(nogil=True, cache=True)
def elect(
    out: NDArray[np.float32],
    base: int,
    experts: NDArray[np.int64],
    lowest: NDArray[np.float32],
    keep: NDArray[np.int64],
    ratios: NDArray[np.float32],
    votes: NDArray[np.float32],
    turns: NDArray[np.float32],
    weights: NDArray[np.float32],
    mean: bool,
    factor: np.float32,
    trimmed: NDArray[np.float32],
) -> int:
    """Write ``M = x_0 + factor * (disjoint mean or sum of the trimmed entries that have the elected sign)``.

    Args:
        out: shape ``(n,)``.
        base: address of the base's n float32 entries.
        experts: addresses of the experts' n entries.
        lowest: per expert, the smallest magnitude that is kept (0: everything; NaN: nothing).
        keep: addresses of n bytes of every expert, zero where an entry is dropped and one elsewhere; empty: none is.
        ratios: factors of the entries that are left, one per expert; empty: none.
        votes: weights of the votes, one per expert; empty: plain sums.
        turns: further factors of the entries, applied before the votes, one per expert; empty: none.
        weights: of the aggregate, one per expert; empty: plain.
        mean: divide by the (weighted) number of experts that agree.
        factor: scale of the update (always applied, also if it is one).
        trimmed: scratch of shape ``(N, 2048)`` or more.

    Returns:
        How many differences ``x_i - x_0`` are NaN or infinite (which elections may hide).
    """
    n = out.shape[0]
    count = experts.shape[0]
    origin = carray(float32_pointer(base), n)
    total = np.empty(_BLOCK, np.float32)
    mass = np.empty(_BLOCK, np.float32)
    sign = np.empty(_BLOCK, np.float32)
    zero, one = np.float32(0.0), np.float32(1.0)
    bad = 0
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        size = stop - start
        b = origin[start:stop]
        before = bad
        for i in range(count):
            x = carray(float32_pointer(experts[i]), n)[start:stop]
            kept = trimmed[i]
            low = lowest[i]
            found = np.int32(0)
            for j in range(size):
                kept[j] = x[j] - b[j]
                found = np.int32(found + np.int32(not (abs(kept[j]) <= _LARGEST)))
            bad += int(found)
            if keep.shape[0] > 0:  # a product, as in the definition, so that the signs of zeros are the same
                mask = carray(uint8_pointer(keep[i]), n)[start:stop]
                for j in range(size):
                    kept[j] = kept[j] * np.float32(mask[j])
            if not low <= zero:
                for j in range(size):
                    kept[j] = kept[j] if abs(kept[j]) >= low else zero
            if ratios.shape[0] > 0:
                for j in range(size):
                    kept[j] = kept[j] * ratios[i]
            if turns.shape[0] > 0:
                for j in range(size):
                    kept[j] = kept[j] * turns[i]
            if votes.shape[0] > 0:
                if i == 0:
                    for j in range(size):
                        sign[j] = kept[j] * votes[0]
                else:
                    for j in range(size):
                        sign[j] = sign[j] + kept[j] * votes[i]
            elif i == 0:
                for j in range(size):
                    sign[j] = kept[j]
            else:
                for j in range(size):
                    sign[j] = sign[j] + kept[j]
        for j in range(size):
            sign[j] = np.float32(sign[j] > zero) - np.float32(sign[j] < zero)
            total[j] = zero
            mass[j] = zero
        for i in range(count):
            kept = trimmed[i]
            if weights.shape[0] > 0:
                w = weights[i]
                for j in range(size):
                    agreeing = kept[j] * sign[j]
                    agreeing = agreeing if agreeing > zero else zero
                    mass[j] = mass[j] + np.float32(agreeing > zero) * w
                    total[j] = total[j] + agreeing * w
            else:
                for j in range(size):
                    agreeing = kept[j] * sign[j]
                    agreeing = agreeing if agreeing > zero else zero
                    mass[j] = mass[j] + np.float32(agreeing > zero)
                    total[j] = total[j] + agreeing
        if bad > before:  # an infinite difference that is voted down or cancels is no number
            for i in range(count):
                for j in range(size):
                    agreeing = trimmed[i, j] * sign[j]
                    total[j] = total[j] if agreeing == agreeing else agreeing
        o = out[start:stop]
        if mean:
            for j in range(size):
                o[j] = total[j] / (mass[j] if mass[j] != zero else one) * sign[j] * factor + b[j]
        else:
            for j in range(size):
                o[j] = total[j] * sign[j] * factor + b[j]
    return bad


@njit(nogil=True, cache=True)
def drop(
    out: NDArray[np.float32],
    base: int,
    experts: NDArray[np.int64],
    keep: NDArray[np.int64],
    ratios: NDArray[np.float32],
    weights: NDArray[np.float32],
    factor: np.float32,
) -> None:
    """Write ``M = x_0 + factor * sum_i w_i m_i Delta_i`` with masks ``m_i`` (see :func:`elect`)."""
    n = out.shape[0]
    origin = carray(float32_pointer(base), n)
    one = np.float32(1.0)
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        size = stop - start
        o = out[start:stop]
        b = origin[start:stop]
        for i in range(experts.shape[0]):
            x = carray(float32_pointer(experts[i]), n)[start:stop]
            ratio = ratios[i] if ratios.shape[0] > 0 else one
            w = weights[i] if weights.shape[0] > 0 else one
            if keep.shape[0] > 0:
                mask = carray(uint8_pointer(keep[i]), n)[start:stop]
                for j in range(size):
                    term = (x[j] - b[j]) * np.float32(mask[j]) * ratio * w
                    o[j] = term if i == 0 else o[j] + term
            else:
                for j in range(size):
                    term = (x[j] - b[j]) * ratio * w
                    o[j] = term if i == 0 else o[j] + term
        for j in range(size):
            o[j] = o[j] * factor + b[j]


@njit(nogil=True, cache=True)
def largest_of(out: NDArray[np.float32], base: int, experts: NDArray[np.int64], factor: np.float32) -> int:
    """Write ``M = x_0 + factor * (the entry of largest magnitude)``; of two opposite ones the positive (MagMax).

    Returns:
        How many differences ``x_i - x_0`` are NaN or infinite.
    """
    n = out.shape[0]
    origin = carray(float32_pointer(base), n)
    low = np.empty(_BLOCK, np.float32)
    bad = 0
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        size = stop - start
        o = out[start:stop]
        b = origin[start:stop]
        for i in range(experts.shape[0]):
            x = carray(float32_pointer(experts[i]), n)[start:stop]
            found = np.int32(0)
            for j in range(size):
                found = np.int32(found + np.int32(not (abs(x[j] - b[j]) <= _LARGEST)))
            bad += int(found)
            if i == 0:
                for j in range(size):
                    o[j] = x[j] - b[j]
                    low[j] = o[j]
            else:
                for j in range(size):
                    v = x[j] - b[j]
                    o[j] = v if v > o[j] else o[j]
                    low[j] = v if v < low[j] else low[j]
        for j in range(size):
            o[j] = (o[j] if o[j] >= -low[j] else low[j]) * factor + b[j]
    return bad
