"""Running variances that a merge makes negative: what no linear prediction sees, read off the checkpoints."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merging.flat import FlatSpace
from merging.partition import is_variance


def clamped_share(space: FlatSpace, origin: Tensor, deltas: Tensor, alpha: npt.ArrayLike) -> float:
    """Share of BatchNorm's running variances that ``x_0 + sum_i alpha_i Delta_i`` makes negative; 0.0 without any.

    Merging clamps them at zero, after which a channel is divided by sqrt(eps) alone and the loss explodes; predictors
    see the negative values' logits only through lines and planes, hence not at all.  Coefficients that are nonnegative
    with a sum of at most one never do it: the merged variance is then a convex combination of positive ones.

    Args:
        space: the layout of the coordinates, with the tensors' names.
        origin: x_0, (P,).
        deltas: task vectors, (N, P).
        alpha: merging coefficients, (N,).
    """
    pieces = [piece for name, piece in space.segments() if is_variance(name)]
    if not pieces:
        return 0.0
    weights = torch.as_tensor(np.asarray(alpha), dtype=origin.dtype)
    merged = torch.cat([origin[p] + weights @ deltas[:, p] for p in pieces])
    return float((merged < 0.0).double().mean())


def zero_count(space: FlatSpace, origin: Tensor, merged: Tensor) -> int:
    """How many running variances are zero in a merge (P,) and were not in the base (P,): those that were clamped."""
    pieces = [piece for name, piece in space.segments() if is_variance(name)]
    return sum(int(((merged[p] <= 0.0) & (origin[p] > 0.0)).sum()) for p in pieces)


def zero_share(space: FlatSpace, origin: Tensor, merged: Tensor) -> float:
    """:func:`zero_count` over the number of running variances; 0.0 without any."""
    total = sum(p.stop - p.start for name, p in space.segments() if is_variance(name))
    return zero_count(space, origin, merged) / total if total else 0.0


def zero_shares(space: FlatSpace, origin: Tensor, merges: Tensor) -> list[float]:
    """:func:`zero_share` of every merge of a block, (C, P); some microseconds a merge and layer.

    Args:
        space: the layout of the coordinates, with the tensors' names.
        origin: x_0, (P,).
        merges: as :func:`merging.many.merge_many` makes them.
    """
    pieces = [piece for name, piece in space.segments() if is_variance(name)]
    total = sum(p.stop - p.start for p in pieces)
    if not total:
        return [0.0] * len(merges)
    counts = sum(((merges[:, p] <= 0.0) & (origin[p] > 0.0)).sum(dim=1) for p in pieces)
    assert isinstance(counts, Tensor)
    return [count / total for count in counts.tolist()]


CLAMPED = (
    "%s of BatchNorm's running variances became negative and were set to 0: such a merge is usually far worse than its "
    "experts. Keep the coefficients nonnegative with a sum of at most 1, or re-estimate the statistics on images "
    "(merging.batchnorm.reestimate_batchnorm)"
)
"""Logged as a warning by whoever merges for a user, with how many there were."""
