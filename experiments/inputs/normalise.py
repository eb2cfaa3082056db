"""Normalisation of 8-bit pixels by table: exact in every floating type, and the same on every device."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from experiments.tasks.form import InputFormat
from theory.errors import MergeboundError

_BITS: dict[torch.dtype, tuple[torch.dtype, type[np.unsignedinteger]]] = {
    torch.float32: (torch.int32, np.uint32),
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
    torch.float64: (torch.int64, np.uint64),
}


def bits(dtype: torch.dtype) -> tuple[torch.dtype, type[np.unsignedinteger]]:
    """Integer types of torch and numpy that are as wide as a floating type.

    Raises:
        MergeboundError: not a type that images can have.
    """
    if dtype not in _BITS:
        known = ", ".join(str(each).removeprefix("torch.") for each in _BITS)
        raise MergeboundError(f"dtype = {dtype}: images can be {known}")
    return _BITS[dtype]


@lru_cache(maxsize=64)
def normalisation_table(form: InputFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(v / 255 - mean) / std`` for v = 0 .. 255, computed in float64 and rounded once.

    Returns:
        (channels, 256) of the given type, on the CPU; shared, not to be written to.
    """
    mean, std = (
        np.broadcast_to(np.asarray(each, dtype=np.float64), form.channels)[:, None] for each in (form.mean, form.std)
    )
    return torch.from_numpy((np.arange(256) / 255 - mean) / std).to(dtype)


def look_up(pixels: Tensor, table: Tensor) -> Tensor:
    """Normalise a batch.

    Args:
        pixels: uint8 (m, channels, height, width).
        table: (channels, 256), on the pixels' device.

    Returns:
        (m, channels, height, width) of the table's type.
    """
    first = torch.arange(0, table.numel(), 256, dtype=torch.int32, device=pixels.device).view(1, -1, 1, 1)
    found: Tensor = table.flatten()[pixels.int() + first]
    return found


def cutout_colour(form: InputFormat) -> tuple[int, ...]:
    """The pixel nearest to the mean that normalisation subtracts, one whole number per channel."""
    mean = np.broadcast_to(np.asarray(form.mean, dtype=np.float64), form.channels)
    return tuple(int(each) for each in np.clip(np.rint(255 * mean), 0, 255))
