"""``sum_i alpha_i (x_i - x_0)``, scaled and added to the base, for one chunk."""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numpy.typing import NDArray

from merging.kernels.pointers import float32_pointer

_BLOCK = 4096  # entries: the block of the result stays in the first-level cache while the experts pass by


@njit(nogil=True, cache=True)
def linear(
    out: NDArray[np.float32],
    base: int,
    experts: NDArray[np.int64],
    weights: NDArray[np.float32],
    factor: np.float32,
    divisor: np.float32,
    shift: np.float32,
) -> None:
    """Write ``M = x_0 + (sum_i w_i Delta_i) * factor / divisor + shift x_0`` of one chunk into ``out``.

    Four experts are read at a time, which keeps more of the memory's channels busy than one after the other.

    Args:
        out: shape ``(n,)``.
        base: address of the base's n float32 entries.
        experts: addresses of the experts' n entries.
        weights: one per expert; empty: a plain sum.
        factor: not applied if it is one.
        divisor: not applied if it is one.
        shift: multiple of the base that is added to the update; not applied if it is zero.
    """
    n = out.shape[0]
    count = experts.shape[0]
    scales = weights if weights.shape[0] > 0 else np.ones(count, np.float32)  # a product with one changes no bit
    origin = carray(float32_pointer(base), n)
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        size = stop - start
        o = out[start:stop]
        z = origin[start:stop]
        i = 0
        while i < count:
            a = carray(float32_pointer(experts[i]), n)[start:stop]
            p = scales[i]
            if count - i >= 4:
                b = carray(float32_pointer(experts[i + 1]), n)[start:stop]
                c = carray(float32_pointer(experts[i + 2]), n)[start:stop]
                d = carray(float32_pointer(experts[i + 3]), n)[start:stop]
                q, r, s = scales[i + 1], scales[i + 2], scales[i + 3]
                if i == 0:
                    for j in range(size):
                        y = z[j]
                        o[j] = (((a[j] - y) * p + (b[j] - y) * q) + (c[j] - y) * r) + (d[j] - y) * s
                else:
                    for j in range(size):
                        y = z[j]
                        o[j] = (((o[j] + (a[j] - y) * p) + (b[j] - y) * q) + (c[j] - y) * r) + (d[j] - y) * s
                i += 4
            else:
                if i == 0:
                    for j in range(size):
                        o[j] = (a[j] - z[j]) * p
                else:
                    for j in range(size):
                        o[j] = o[j] + (a[j] - z[j]) * p
                i += 1
        finish(o, z, factor, divisor, shift)


@njit(nogil=True, cache=True)
def linear_without_base(
    out: NDArray[np.float32],
    experts: NDArray[np.int64],
    weights: NDArray[np.float32],
    factor: np.float32,
    divisor: np.float32,
) -> None:
    """:func:`linear` with a base of zeros."""
    n = out.shape[0]
    count = experts.shape[0]
    scales = weights if weights.shape[0] > 0 else np.ones(count, np.float32)
    for start in range(0, n, _BLOCK):
        stop = min(n, start + _BLOCK)
        size = stop - start
        o = out[start:stop]
        i = 0
        while i < count:
            a = carray(float32_pointer(experts[i]), n)[start:stop]
            p = scales[i]
            if count - i >= 4:
                b = carray(float32_pointer(experts[i + 1]), n)[start:stop]
                c = carray(float32_pointer(experts[i + 2]), n)[start:stop]
                d = carray(float32_pointer(experts[i + 3]), n)[start:stop]
                q, r, s = scales[i + 1], scales[i + 2], scales[i + 3]
                if i == 0:
                    for j in range(size):
                        o[j] = ((a[j] * p + b[j] * q) + c[j] * r) + d[j] * s
                else:
                    for j in range(size):
                        o[j] = (((o[j] + a[j] * p) + b[j] * q) + c[j] * r) + d[j] * s
                i += 4
            else:
                if i == 0:
                    for j in range(size):
                        o[j] = a[j] * p
                else:
                    for j in range(size):
                        o[j] = o[j] + a[j] * p
                i += 1
        if factor != np.float32(1.0):
            for j in range(size):
                o[j] = o[j] * factor
        if divisor != np.float32(1.0):
            for j in range(size):
                o[j] = o[j] / divisor
        for j in range(size):
            o[j] = o[j] + np.float32(0.0)  # as adding a base of zeros does: -0 becomes 0


@njit(nogil=True, cache=True)
def copy(address: int, out: NDArray[np.float32]) -> None:
    """Write the float32 entries at an address into ``out``, bit for bit."""
    values = carray(float32_pointer(address), out.shape[0])
    for j in range(out.shape[0]):
        out[j] = values[j]


@njit(nogil=True, cache=True)
def finish(
    out: NDArray[np.float32],
    base: NDArray[np.float32],
    factor: np.float32,
    divisor: np.float32,
    shift: np.float32,
) -> None:
    """Scale an update in place and add it to the base (see :func:`linear`)."""
    if factor != np.float32(1.0):
        for j in range(out.shape[0]):
            out[j] = out[j] * factor
    if divisor != np.float32(1.0):
        for j in range(out.shape[0]):
            out[j] = out[j] / divisor
    if shift != np.float32(0.0):
        for j in range(out.shape[0]):
            out[j] = out[j] + base[j] * shift
    for j in range(out.shape[0]):
        out[j] = out[j] + base[j]


@njit(nogil=True, cache=True)
def beyond(values: NDArray[np.float32], limit: np.float32) -> int:
    """How many entries are NaN, infinite or of larger magnitude than ``limit``."""
    count: int = 0
    for start in range(0, values.shape[0], _BLOCK):
        part = values[start : start + _BLOCK]
        found = np.int32(0)
        for j in range(part.shape[0]):
            found = np.int32(found + np.int32(not (abs(part[j]) <= limit)))
        count += int(found)
    return count
