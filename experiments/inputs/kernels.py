"""Batches of 8-bit images on a CPU: gather and augment in one pass, normalise in another.

Normalisation is a look-up in a table of 256 values per channel, so that it is exact in every floating type; the kernel
sees the values as bits.  :func:`experiments.inputs.augment.augment` says the same in whole tensors.  Few argument types
keep the time low that compiling takes, once per machine.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ONE = 65536


@njit(nogil=True, cache=True)
def look_up(images: np.ndarray, rows: np.ndarray, table: np.ndarray, out: np.ndarray, steps: np.ndarray) -> None:
    """Gather and normalise.

    Args:
        images: uint8 (n, stored, pixels), contiguous; stored is 1 or the number of channels.
        rows: (m,) int64, checked by the caller.
        table: (channels, 256) unsigned, bits of the normalised values.
        out: (m * channels * pixels,) of the table's type.
        steps: where sample i, channel c and pixel p go in ``out``: ``i steps[0] + c steps[1] + p steps[2]``.
    """
    last = images.shape[1] - 1
    step = steps[2]
    for i in range(rows.shape[0]):
        for c in range(table.shape[0]):
            values = table[c]
            plane = images[rows[i], min(c, last)]
            place = i * steps[0] + c * steps[1]
            for p in range(plane.shape[0]):
                out[place + p * step] = values[plane[p]]


@njit(nogil=True, cache=True)
def augment(
    images: np.ndarray,
    rows: np.ndarray,
    draws: np.ndarray,
    reflect: bool,
    cutout: int,
    fill: np.ndarray,
    out: np.ndarray,
) -> None:
    """Gather and augment.

    Args:
        images: uint8 (n, stored, height, width), contiguous; stored is 1 or the number of channels.
        rows: (m,) int64, checked by the caller.
        draws: (m, 7) int32, see :meth:`experiments.inputs.augment.Draws.table`.
        reflect: mirror at the border; otherwise black comes in.
        cutout: side of the square; 0 for none.
        fill: (channels,) uint8, colour of the cutout.
        out: uint8 (m, channels, height, width), contiguous.
    """
    count, channels, height, width = out.shape
    last = images.shape[1] - 1
    columns = np.empty(width, np.uint64)
    line = np.zeros(width + 1, np.uint8)  # the last entry is the black beyond the border
    changed = np.empty(256, np.uint8)
    for i in range(count):
        dy, dx, flip, gain, offset = draws[i, 0], draws[i, 1], draws[i, 2], draws[i, 3], draws[i, 4]
        for x in range(width):
            old = (width - 1 - x if flip else x) + dx
            if old < 0 or old >= width:
                old = (width - 1) - abs(abs(old) - (width - 1)) if reflect else width
            columns[x] = np.uint64(old)
        for v in range(256):
            changed[v] = np.uint8(min(max(((v - 128) * gain + offset + 128 * _ONE + _ONE // 2) >> 16, 0), 255))
        for c in range(channels):
            plane = images[rows[i], min(c, last)]
            target = out[i, c]
            for y in range(height):
                old = y + dy
                if old < 0 or old >= height:
                    old = (height - 1) - abs(abs(old) - (height - 1)) if reflect else -1
                for x in range(width):
                    line[x] = plane[old, x] if old >= 0 else 0
                for x in range(width):
                    target[y, x] = changed[line[columns[x]]]
            if cutout:
                top, left = draws[i, 5] - cutout // 2, draws[i, 6] - cutout // 2
                for y in range(max(top, 0), min(top + cutout, height)):
                    for x in range(max(left, 0), min(left + cutout, width)):
                        target[y, x] = fill[c]
