"""The bits of tensors as integers, and integers that grow with the floats whose bits they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
"""Types that are packed, with the bytes of one number."""
PACKED = FLOATS | {torch.int64: 8}
"""Those and counters, which are packed as the integers that they are."""
_INTEGERS = {8: np.int64, 4: np.int32, 2: np.int16}
_REST = {2: 2**15 - 1, 4: 2**31 - 1, 8: 2**63 - 1}
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in PACKED}
TYPES = {name: dtype for dtype, name in _NAMES.items()}
"""Types that are packed, by their names in files."""


def fits(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are of one shape and type."""
    return other is not None and tensor.shape == other.shape and tensor.dtype == other.dtype


def named(dtype: torch.dtype) -> str:
    """A type as files name it."""
    return _NAMES[dtype]


def kind_of(dtype: torch.dtype) -> Any:
    """The integers that numbers of a type are taken for."""
    return _INTEGERS[PACKED[dtype]]


def integers(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor, row by row, as integers."""
    plain = tensor.detach()
    if tensor.dtype is torch.bfloat16:  # numpy has no such type
        plain = plain.contiguous().view(torch.int16)
    found: np.ndarray = plain.numpy().reshape(-1).view(kind_of(tensor.dtype))
    return found


def ordered(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Integers that grow with the floats whose bits they are (-0.0 just below 0.0); its own inverse."""
    if dtype not in FLOATS:
        return bits
    width = bits.dtype.itemsize
    found: np.ndarray = bits ^ ((bits >> (8 * width - 1)) & _REST[width])
    return found
