"""Collecting Gram matrices of task vectors: where the curvature is measured, and products with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.measure.curvature.operators import Kind, curvature_by_outputs
from experiments.measure.curvature.risk import EmpiricalRisk
from experiments.measure.subject import Subject
from theory.errors import MergeboundError, nearest

if TYPE_CHECKING:
    pass

Array = npt.NDArray[np.float64]
Anchor = str | Sequence[float]

ANCHORS = ("own", "base", "average", "own_average", "base_own")
"""Named anchors: x_j, x_0, the experts' average, midway from x_j to the average, and midway from x_0 to x_j."""

BLOCKS = 8
"""Parts of a task's images whose forms are kept apart, for standard errors."""

DIRECTIONS = 16
"""Layer directions that are held at once."""

Progress = Callable[[str, int, int], None]


def anchor_point(subject: Subject, task: int, anchor: Anchor) -> tuple[str, Tensor]:
    """Name and coordinates of an anchor, (P,).

    Args:
        subject: base and experts.
        task: j.
        anchor: one of :data:`ANCHORS`, or coefficients (N,) of ``x_0 + sum alpha_i Delta_i``.

    Raises:
        MergeboundError: another name, or coefficients that do not fit.
    """
    average = subject.vectors.mean(dim=0)
    own, base = subject.vectors[task], subject.base
    if isinstance(anchor, str):
        points = {
            "own": own,
            "base": base,
            "average": average,
            "own_average": 0.5 * (own + average),
            "base_own": 0.5 * (base + own),
        }
        if anchor not in points:
            raise MergeboundError(f"anchor {anchor!r}: {nearest(anchor, ANCHORS)}, or give coefficients")
        return anchor, points[anchor]
    alpha = torch.tensor([float(a) for a in anchor], dtype=subject.base.dtype)
    if len(alpha) != subject.size or not bool(torch.isfinite(alpha).all()):
        raise MergeboundError(f"anchor {list(anchor)}: give {subject.size} finite coefficients, one per expert")
    return ",".join(f"{a:g}" for a in anchor), base + alpha @ subject.deltas


def image_blocks(risk: EmpiricalRisk) -> list[slice]:
    """At most :data:`BLOCKS` blocks of whole batches."""
    starts = list(range(0, len(risk), risk.batch))
    groups = [part for part in np.array_split(starts, min(BLOCKS, len(starts))) if len(part)]
    return [slice(int(g[0]), min(int(g[-1]) + risk.batch, len(risk))) for g in groups]


def _directions(deltas: Tensor, places: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Task vectors restricted to layers, expert by expert, :data:`DIRECTIONS` at a time: places and (D, P)."""
    count, depth = len(deltas), len(places)
    for start in range(0, count * depth, DIRECTIONS):
        stop = min(start + DIRECTIONS, count * depth)
        rows = torch.zeros(stop - start, deltas.shape[1], dtype=deltas.dtype)
        for row, number in enumerate(range(start, stop)):
            i, l = divmod(number, depth)
            rows[row, places[l]] = deltas[i, places[l]]
        yield slice(start, stop), rows


def gram_forms(
    risk: EmpiricalRisk,
    point: Tensor,
    deltas: Tensor,
    places: Sequence[Tensor],
    kind: Kind,
    cut: Sequence[slice],
    seed: int,
) -> Array:
    """Means over each block, (blocks, K, K)."""
    count = len(deltas) * len(places)
    out = np.zeros((len(cut), count, count))
    if kind == "hessian":
        for number, rows in enumerate(cut):
            part = risk.take(np.arange(rows.start, rows.stop))
            for place, directions in _directions(deltas, places):
                products = part.hessian_products(point, directions)
                out[number, :, place] = _against(products, deltas, places)
    else:
        bend = curvature_by_outputs(risk, point, kind, seed=seed)
        block_of = {start: b for b, rows in enumerate(cut) for start in range(rows.start, rows.stop, risk.batch)}
        for rows, jacobian in risk.jacobians(point):
            first = torch.cat([jacobian.push(directions) for _, directions in _directions(deltas, places)])
            second = bend(rows, jacobian.outputs, first)
            form = first.double().flatten(1) @ second.double().flatten(1).T
            out[block_of[rows.start]] += form.cpu().numpy()
        out /= np.array([rows.stop - rows.start for rows in cut])[:, None, None]
    if not np.isfinite(out).all():
        raise MergeboundError(f"{risk.name}: a curvature form is not finite; leave out experts that diverged")
    return np.asarray(0.5 * (out + out.swapaxes(1, 2)))


def _against(products: Tensor, deltas: Tensor, places: Sequence[Tensor]) -> Array:
    """``Delta_il' y`` for every expert, layer and product y of (D, P): (N L, D)."""
    wide = deltas.double()
    columns = [wide[:, place] @ products[:, place].T for place in places]  # (N, D) per layer
    return torch.stack(columns, dim=1).flatten(0, 1).cpu().numpy()
