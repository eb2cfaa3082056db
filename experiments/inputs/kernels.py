"""Batches of 8-bit images on a CPU, in one pass: gather, augment, normalise.

Normalisation is a look-up in a table of 256 values per channel, so that it is exact in every floating type; the kernels
see the values as bits.  :func:`experiments.inputs.augment.augment` says the same in whole tensors.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ONE = 65536


@njit(nogil=True, cache=True)
def look_up(images: np.ndarray, rows: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Gather and normalise.

    Args:
        images: uint8 (n, stored, height, width), contiguous; stored is 1 or the number of channels.
        rows: (m,) int64, checked by the caller.
        table: (channels, 256) unsigned, bits of the normalised values.
        out: (m, channels, height, width) of the table's type, in any memory order.
    """
    count, channels, height, width = out.shape
    last = images.shape[1] - 1
    for i in range(count):
        for c in range(channels):
            values = table[c]
            plane = images[rows[i], min(c, last)]
            target = out[i, c]
            for y in range(height):
                for x in range(width):
                    target[y, x] = values[plane[y, x]]


@njit(nogil=True, cache=True)
def augmented(
    images: np.ndarray,
    rows: np.ndarray,
    draws: np.ndarray,
    reflect: bool,
    cutout: int,
    fill: np.ndarray,
    table: np.ndarray,
    out: np.ndarray,
) -> None:
    """Gather, augment and normalise.

    Args:
        images, rows, table, out: as for :func:`look_up`.
        draws: (m, 7) int32, see :meth:`experiments.inputs.augment.Draws.table`.
        reflect: mirror at the border; otherwise black comes in.
        cutout: side of the square; 0 for none.
        fill: (channels,) uint8, colour of the cutout.
    """
    count, channels, height, width = out.shape
    last = images.shape[1] - 1
    columns = np.empty(width, np.uint64)
    line = np.zeros(width + 1, np.uint8)  # the last entry is the black beyond the border
    own = np.empty((channels, 256), table.dtype)
    for i in range(count):
        dy, dx, flip, gain, offset = draws[i, 0], draws[i, 1], draws[i, 2], draws[i, 3], draws[i, 4]
        for x in range(width):
            old = (width - 1 - x if flip else x) + dx
            if old < 0 or old >= width:
                old = (width - 1) - abs(abs(old) - (width - 1)) if reflect else width
            columns[x] = np.uint64(old)
        for v in range(256):
            new = ((v - 128) * gain + offset + 128 * _ONE + _ONE // 2) >> 16
            new = min(max(new, 0), 255)
            for c in range(channels):
                own[c, v] = table[c, new]
        for c in range(channels):
            values = own[c]
            plane = images[rows[i], min(c, last)]
            target = out[i, c]
            for y in range(height):
                old = y + dy
                if old < 0 or old >= height:
                    old = (height - 1) - abs(abs(old) - (height - 1)) if reflect else -1
                if old < 0:
                    line[:width] = 0
                else:
                    line[:width] = plane[old]
                for x in range(width):
                    target[y, x] = values[line[columns[x]]]
            if cutout:
                top, left = draws[i, 5] - cutout // 2, draws[i, 6] - cutout // 2
                for y in range(max(top, 0), min(top + cutout, height)):
                    for x in range(max(left, 0), min(left + cutout, width)):
                        target[y, x] = table[c, fill[c]]
