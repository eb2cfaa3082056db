"""Units in which parameters move: as they are, relative to their size, or relative to their filter's norm.

Weights of networks with ReLU or normalisation can be rescaled without changing the function, which changes distances
in the parameters.  Relative units undo that: *elements* (delta_i in units of |x_i|) any rescaling of single units,
*filters* only a common factor of a whole layer (a factor of one unit changes the next layer's filters in one of their
entries, hence their norms unevenly).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from merging.flat import FlatSpace
from theory.errors import MergeboundError

Units = Literal["plain", "elements", "filters"]
UNITS: tuple[Units, ...] = ("plain", "elements", "filters")
DIRECTION = 0xD1EC
"""Names the stream of random directions: ``default_rng([seed, DIRECTION, number])``."""


def gaussian(size: int, seed: int, number: int, like: Tensor) -> Tensor:
    """Direction ``number`` of a seed: independent standard normal entries, (size,), in the type of ``like``."""
    drawn = np.random.default_rng([seed, DIRECTION, number]).standard_normal(size)
    return torch.as_tensor(drawn, dtype=like.dtype, device=like.device)


def signs(size: int, seed: int, number: int, like: Tensor) -> Tensor:
    """Random signs (Rademacher), (size,)."""
    drawn = np.random.default_rng([seed, DIRECTION, number]).integers(0, 2, size=size) * 2 - 1
    return torch.as_tensor(drawn, dtype=like.dtype, device=like.device)


def filters(space: FlatSpace, moving: int) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Where tensors of two or more dimensions lie, and their shape: row k is the filter of output k.

    Biases and the scales and shifts of normalisation are no filters (Li et al. move neither).
    """
    for (_, piece), shape in zip(space.segments(), space.shapes, strict=True):
        if piece.start < moving and len(shape) >= 2:
            yield piece, shape


def units(x: Tensor, space: FlatSpace, moving: int, kind: Units) -> Tensor:
    """By how much each coordinate moves for one unit, (P,): 1, |x_i|, or the norm of its filter over the square root
    of the filter's size (so that a random direction has about the filter's norm); 0 beyond ``moving``.

    With ``filters``, biases and normalisation do not move.

    Raises:
        MergeboundError: another word.
    """
    if kind not in UNITS:
        raise MergeboundError(f"units = {kind!r}: choose from {', '.join(UNITS)}")
    out = torch.zeros_like(x)
    if kind == "plain":
        out[:moving] = 1.0
    elif kind == "elements":
        out[:moving] = x[:moving].abs()
    else:
        for piece, shape in filters(space, moving):
            rows = x[piece].view(shape[0], -1)
            out[piece] = (rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5).expand_as(rows).reshape(-1)
    return out


def filter_normalised(direction: Tensor, x: Tensor, space: FlatSpace, moving: int) -> Tensor:
    """The direction with every filter scaled to the norm of the same filter of x; biases and normalisation zero.

    ``d_k <- d_k |x_k| / |d_k|`` for every filter k of convolutions and linear layers.

    Source: Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018 (arXiv:1712.09913), section 4
    (their figures leave biases and BatchNorm where they are).
    """
    out = torch.zeros_like(direction)
    for piece, shape in filters(space, moving):
        rows, own = direction[piece].view(shape[0], -1), x[piece].view(shape[0], -1)
        norms = rows.norm(dim=1, keepdim=True)
        scaled = rows * torch.where(norms > 0, own.norm(dim=1, keepdim=True) / norms, torch.zeros_like(norms))
        out[piece] = scaled.reshape(-1)
    return out
