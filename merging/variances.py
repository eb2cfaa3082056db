"""Running variances that a merge makes negative: what no linear prediction sees, read off the checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merging.flat import FlatSpace
from merging.partition import is_variance

DEAD = 1e-6
"""A channel whose variance is below this share of the base's in every expert is dead in all of them: a merged variance
of zero there is theirs, whatever rounding made of it."""

Rows = Sequence[Tensor] | Tensor


BOX = (0.0, 1.0)
"""Between which coefficients are chosen unless told otherwise."""


def stays_in_hull(names: Iterable[str], hull: bool | None = None, bounds: tuple[float, float] = BOX) -> bool:
    """Whether coefficients that are *chosen* are kept nonnegative with a sum of at most one.

    Args:
        names: of the tensors that are merged.
        hull: what was asked for; ``None``: where some of them are running variances and ``bounds`` are as they come,
            since larger sums make such variances negative (:func:`clamped_share`).
        bounds: of every coefficient.
    """
    return hull if hull is not None else tuple(bounds) == BOX and any(is_variance(name) for name in names)


def clamped_share(space: FlatSpace, origin: Tensor, deltas: Rows, alpha: npt.ArrayLike) -> float:
    """Share of BatchNorm's running variances that ``x_0 + sum_i alpha_i Delta_i`` makes negative; 0.0 without any.

    Merging clamps them at zero, after which a channel is divided by sqrt(eps) alone and the loss explodes; predictors
    see the negative values' logits only through lines and planes, hence not at all.  Coefficients that are nonnegative
    with a sum of at most one never do it: the merged variance is then a convex combination of positive ones.  Channels
    that are dead in every expert do not count (:data:`DEAD`).

    Args:
        space: the layout of the coordinates, with the tensors' names.
        origin: x_0, (P,).
        deltas: task vectors, (N, P).
        alpha: merging coefficients, (N,); or (N, V), by variance in the order of the layout.
    """
    pieces = _pieces(space)
    if not pieces:
        return 0.0
    rows = torch.stack([torch.cat([row[p] for p in pieces]) for row in deltas]).double()
    base = torch.cat([origin[p] for p in pieces]).double()
    weights = torch.as_tensor(np.asarray(alpha, dtype=np.float64))
    merged = base + (weights @ rows if weights.ndim == 1 else (weights * rows).sum(dim=0))
    return float(((merged < 0.0) & _alive(base, rows)).double().mean())


def zero_count(space: FlatSpace, origin: Tensor, merged: Tensor, deltas: Rows) -> int:
    """How many running variances are zero in a merge (P,) though they are not in the base and not in every expert:
    those that merging clamped."""
    return int(sum(zero[0] for zero in _zeros(space, origin, merged[None], deltas)))


def zero_share(space: FlatSpace, origin: Tensor, merged: Tensor, deltas: Rows) -> float:
    """:func:`zero_count` over the number of running variances; 0.0 without any."""
    return zero_shares(space, origin, merged[None], deltas)[0]


def zero_shares(space: FlatSpace, origin: Tensor, merges: Tensor, deltas: Rows) -> list[float]:
    """:func:`zero_share` of every merge of a block, (C, P); some microseconds a merge and layer.

    Args:
        space: the layout of the coordinates, with the tensors' names.
        origin: x_0, (P,).
        merges: as :func:`merging.many.merge_many` makes them.
        deltas: task vectors, (N, P).
    """
    total = sum(p.stop - p.start for p in _pieces(space))
    counts = _zeros(space, origin, merges, deltas)
    return [sum(layer) / total for layer in zip(*counts, strict=True)] if total else [0.0] * len(merges)


def negative_count(values: Tensor) -> int:
    """How many merged variances of one tensor, before they are clamped, are negative beyond rounding."""
    return int((values < -DEAD * values.abs().amax()).sum()) if values.numel() else 0


def _pieces(space: FlatSpace) -> list[slice]:
    return [piece for name, piece in space.segments() if is_variance(name)]


def _alive(origin: Tensor, rows: Rows) -> Tensor:
    """Channels that some expert uses: boolean, shaped like ``origin``."""
    largest: Tensor = reduce(torch.maximum, list(rows))
    alive: Tensor = origin + largest > DEAD * origin
    return alive


def _zeros(space: FlatSpace, origin: Tensor, merges: Tensor, deltas: Rows) -> list[list[int]]:
    """By layer, the zeros of every merge."""
    found = []
    for p in _pieces(space):
        counts = (origin[p] > 0.0) & _alive(origin[p], [row[p] for row in deltas])
        found.append(((merges[:, p] <= 0.0) & counts).sum(dim=1).tolist())
    return found


CLAMPED = (
    "%s of BatchNorm's running variances became negative and were set to 0: such a merge is usually far worse than its "
    "experts. Keep the coefficients nonnegative with a sum of at most 1, or re-estimate the statistics on images "
    "(merging.batchnorm.reestimate_batchnorm)"
)
"""Logged as a warning by whoever merges for a user, with how many there were."""
