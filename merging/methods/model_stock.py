"""Model Stock: interpolate between the base and the average, by the angle between the experts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.method import Method, Parameter, Rows, apply_flat, combine
from merging.span import Array, cosines, merge_in_span
from merging.types import TaskVector

Scope = Literal["tensor", "global", "filter", "row"]
Average = Literal["cosine", "angle"]

logger = logging.getLogger(__name__)


def model_stock(
    task_vectors: Sequence[TaskVector],
    *,
    scope: Scope = "tensor",
    average: Average = "cosine",
    clamp: bool = False,
) -> dict[str, Tensor]:
    """``t mean_i(Delta_i)`` with ``t = N cos(theta) / (1 + (N - 1) cos(theta))``, theta the angle between task vectors.

    For task vectors of equal length at equal angles this is the point of their affine hull that is closest to the
    base's expected centre of fine-tuned weights: the more the experts agree, the closer to their average.

    Args:
        task_vectors: N >= 2 mappings over the same tensors.
        scope: one angle for each ``"tensor"`` (the paper's layer-wise form, as in its code), for the whole model
            (``"global"``), for each output ``"filter"`` (slices along the first axis of matrices and kernels), or for
            each ``"row"`` (slices along the last axis: mergekit's ``filter_wise``, the same on matrices).
        average: the paper has one theta for N experts and does not say how it is estimated.  The mean of the pairwise
            cosines (``"cosine"``, as mergekit; then ``t = 1`` for equal experts and ``1 + (N - 1) cos(theta) >= 0``
            always), or of the pairwise angles (``"angle"``, as FusionBench).
        clamp: a negative t, for experts more than 90 degrees apart, is set to zero.  The formula as it stands (the
            paper's, and other tools') extrapolates from the average through the base and beyond, without bound as the
            task vectors cancel: experts of one task hardly meet this, those of different tasks do, in biases and
            running statistics above all.  Where it goes further beyond the base than the average is away, a warning
            is logged.

    A zero task vector counts as orthogonal.  Where ``1 + (N - 1) cos(theta)`` is zero (all directions cancel), t is
    zero.  Other tools guard the division of small task vectors by constants (mergekit: ``|Delta_i| |Delta_j|`` of at
    least 1e-6), which pulls tensors that barely moved to the base; here the cosine is that of the directions.

    Raises:
        MethodError: fewer than two experts.

    Source: Jang, Yun and Han, "Model Stock: All we need is just a few fine-tuned models", ECCV 2024 (arXiv:2403.19522),
    section 4 (two experts, then N).
    """
    return apply_flat(
        task_vectors, lambda rows, space: model_stock_flat(rows, space, scope=scope, average=average, clamp=clamp)
    )


def model_stock_flat(
    rows: Rows, space: FlatSpace, *, scope: Scope = "tensor", average: Average = "cosine", clamp: bool = False
) -> Tensor:
    """:func:`model_stock` on N rows of shape ``(P,)``."""
    if len(rows) < 2:
        raise MethodError("Model Stock measures the angle between experts: give at least two")
    lowest: dict[str, float] = {}
    if scope == "filter" or scope == "row":
        merged = _by_slices(rows, space, scope, average, clamp, lowest)
    else:
        ratios: list[float] = []

        def solve(matrix: Array) -> Array:
            ratios.append(float(interpolation(cosines(matrix), average, clamp)))
            return np.full(len(rows), ratios[-1] / len(rows))

        merged = merge_in_span(rows, space, solve, scope=scope)
        lowest = dict(zip(space.names if scope == "tensor" else ("the whole model",), ratios, strict=True))
    warn_beyond(lowest)
    return merged


def warn_beyond(lowest: Mapping[str, float]) -> None:
    """Say which tensors were moved away from the experts by more than their average is away."""
    beyond = sorted((ratio, name) for name, ratio in lowest.items() if ratio < -1.0)
    if beyond:
        ratio, name = beyond[0]
        others = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        logger.warning(
            "Model Stock moves '%s'%s away from the experts (t = %.2f), whose task vectors point in opposite "
            "directions there: set clamp=true to stop at the base",
            name,
            others,
            ratio,
        )


def interpolation(cosine: Array, average: Average = "cosine", clamp: bool = False) -> Array:
    """The ratio t for cosines of shape ``(..., N, N)``; shape ``(...)``."""
    experts = cosine.shape[-1]
    pairs = cosine[(..., *np.triu_indices(experts, 1))]
    common = pairs.mean(axis=-1) if average == "cosine" else np.cos(np.arccos(pairs).mean(axis=-1))
    denominator = 1.0 + (experts - 1) * common
    valid = np.abs(denominator) > 1e-9
    ratio: Array = np.where(valid, experts * common / np.where(valid, denominator, 1.0), 0.0)
    return np.clip(ratio, 0.0, None) if clamp else ratio


def _by_slices(
    rows: Rows, space: FlatSpace, scope: Scope, average: Average, clamp: bool, lowest: dict[str, float]
) -> Tensor:
    out = combine(rows).div_(len(rows))
    for (name, piece), shape in zip(space.segments(), space.shapes, strict=True):
        if piece.stop == piece.start:
            continue
        sizes = (1, -1) if len(shape) < 2 else (shape[0], -1) if scope == "filter" else (-1, shape[-1])
        stack = torch.stack([row[piece].view(sizes).double() for row in rows], dim=1)  # (slices, N, entries)
        inner = torch.stack([(stack * stack[:, i : i + 1]).sum(dim=-1) for i in range(len(rows))], dim=-1).cpu().numpy()
        lengths = np.sqrt(np.diagonal(inner, axis1=1, axis2=2))
        lengths = np.where(lengths > 0.0, lengths, 1.0)
        cosine = np.clip(inner / lengths[:, :, None] / lengths[:, None, :], -1.0, 1.0)
        ratios = interpolation(cosine, average, clamp)
        lowest[name] = float(ratios.min())
        ratio = torch.from_numpy(ratios).to(out)
        out[piece] = (out[piece].view(sizes) * ratio.unsqueeze(1)).view(-1)
    return out


METHOD = Method(
    name="model_stock",
    function=model_stock,
    flat=model_stock_flat,
    summary="between base and average, by the angle between the experts",
    paper="Jang et al. 2024, arXiv:2403.19522",
    parameters=(
        Parameter("scope", "tensor", "what shares an angle", choices=("tensor", "global", "filter", "row")),
        Parameter("average", "cosine", "mean of cosines or of angles", choices=("cosine", "angle")),
        Parameter("clamp", False, "no extrapolation beyond the base"),
    ),
    tensorwise=True,
    idempotent=True,
    merges_buffers=True,
    experts=(2, None),
)
