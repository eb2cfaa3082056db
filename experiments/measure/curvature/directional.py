"""Curvature of a task's risk along segments: phi(t) = F(x + t u) with its first two derivatives, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch import Tensor

from experiments.measure.curvature.number import Number
from experiments.measure.curvature.risk import EmpiricalRisk
from theory.certificate import curvature_risk, gradient_aware_risk
from theory.errors import MergeboundError
from theory.function_space import uniform_weights
from theory.lemma import curvature_on_segment, first_derivative_curvature

if TYPE_CHECKING:
    import pandas as pd

Array = npt.NDArray[np.float64]
Statistic = Callable[[npt.NDArray[np.bool_]], float]
BLOCKS = 20
"""Parts of the images that are left out in turn for the standard error of a nonlinear function of them."""


@dataclass(frozen=True, eq=False)
class SegmentCurvature:
    """What was measured at points of one segment; arrays are (points, images), in nats (per unit of t, of t^2).

    Attributes:
        times: t of each point, ascending.
        losses: phi of each image.
        slopes: phi'.
        bends: phi''.
        gauss_newton: the part of phi'' from the loss's curvature, ``J u`` in the outputs; never negative.
        length: ``|u|``.
        name: of the task.
        seed: of the images' draw.
        tier: of every number here: curvature between the points is not known.
    """

    times: Array
    losses: Array
    slopes: Array
    bends: Array
    gauss_newton: Array
    length: float
    name: str
    seed: int
    tier: str = "estimated"

    @property
    def images(self) -> int:
        """Images n."""
        return int(self.losses.shape[1])

    def largest(self, *, gauss_newton: bool = False) -> Number:
        """The largest phi'' over the points, with a 95 % interval over images at that point.

        It errs low for the segment: the supremum may lie between the points.
        """
        values = self.gauss_newton if gauss_newton else self.bends
        row = values[int(values.mean(axis=1).argmax())]
        covers = "images (95 %); a maximum over sampled points, so it errs low for the segment"
        return Number.normal(float(row.mean()), _error(row), covers, self.seed)

    def upper(self, *, gauss_newton: bool = False) -> Number:
        """Lemma 1's A: ``max(max phi'', phi'(0)_+^2 / (2 phi(0)), 0)``; jackknife interval over images."""
        bends = self.gauss_newton if gauss_newton else self.bends

        def value(keep: npt.NDArray[np.bool_]) -> float:
            top = bends[:, keep].mean(axis=1).max()
            return float(curvature_on_segment(top, self.slopes[0, keep].mean(), self.losses[0, keep].mean()))

        return self._jackknife(value, "curvature on the segment")

    def from_slopes(self) -> Number:
        """``Lambda = max phi'_+^2 / (2 phi)`` over the points: no second derivatives; jackknife over images."""

        def value(keep: npt.NDArray[np.bool_]) -> float:
            means = self.slopes[:, keep].mean(axis=1), self.losses[:, keep].mean(axis=1)
            return float(first_derivative_curvature(*means))

        return self._jackknife(value, "first derivatives on the segment")

    def _jackknife(self, value: Statistic, what: str) -> Number:
        found, error = jackknife(value, self.images)
        return Number.normal(found, error, f"images (95 %); {what}, at sampled points: errs low", self.seed)

    def to_frame(self) -> pd.DataFrame:
        """One row per point: means with standard errors over images."""
        import pandas as pd

        columns: dict[str, object] = {"task": self.name, "t": self.times}
        for name in ("losses", "slopes", "bends", "gauss_newton"):
            table = getattr(self, name)
            label = {"losses": "risk", "slopes": "slope", "bends": "curvature"}.get(name, name)
            columns[label] = table.mean(axis=1)
            columns[f"{label}_error"] = np.array([_error(row) for row in table])
        return pd.DataFrame({**columns, "tier": self.tier, "seed": self.seed})


def _error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def jackknife(value: Statistic, images: int, blocks: int = BLOCKS) -> tuple[float, float]:
    """A function of a set of images (a mask, (n,)) on all of them, and its delete-a-block standard error.

    The error is NaN where there are too few images to leave any out.
    """
    count = min(blocks, images)
    whole = float(value(np.ones(images, dtype=bool)))
    if count < 2:
        return whole, float("nan")
    member = np.arange(images) * count // images
    left = np.array([float(value(member != b)) for b in range(count)])
    return whole, float(np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum()))


def segment_curvature(
    risk: EmpiricalRisk, start: Tensor, end: Tensor, *, points: int = 5, times: Sequence[float] | None = None
) -> SegmentCurvature:
    """Sample phi, phi' and phi'' on the segment from ``start`` (t = 0) to ``end`` (t = 1).

    Args:
        risk: of one task, on n images.
        start, end: (P,), such as x_j and the merge, or x_0 and x_i.
        points: equally spaced, ends included.
        times: these points instead; the first must be 0.

    Returns:
        Exact derivatives at the points (two forward-mode passes each).

    Raises:
        MergeboundError: fewer than two points, times that do not begin with 0 or descend, or a network without
            forward-mode derivatives.

    Source: theory.md section 2, directional form; ``theory.lemma.curvature_on_segment`` turns it into A.
    """
    if times is None and points < 2:
        raise MergeboundError(f"points = {points}: give 2 or more, the ends of the segment included")
    at = np.linspace(0.0, 1.0, points) if times is None else np.asarray(times, dtype=np.float64)
    if at.ndim != 1 or not len(at) or at[0] != 0.0 or (np.diff(at) <= 0).any():
        raise MergeboundError(f"times = {at.tolist()}: give ascending numbers that begin with 0, the segment's start")
    direction = end - start
    rows: list[tuple[Array, ...]] = []
    for t in at:
        value, first, second = risk.along(start, direction, float(t))
        slope = risk.loss.slopes(value, risk.labels)
        bend = (first * risk.loss.bend(value, first)).sum(dim=-1)
        columns = (
            risk.loss.values(value, risk.labels),
            (slope * first).sum(dim=-1),
            bend,
            (slope * second).sum(dim=-1),
        )
        rows.append(tuple(c.double().cpu().numpy() for c in columns))
    losses, slopes, gauss_newton, rest = (np.stack(c) for c in zip(*rows, strict=True))
    if not np.isfinite(losses + slopes + gauss_newton + rest).all():
        raise MergeboundError(f"{risk.name}: a derivative along the segment is not finite; leave diverged experts out")
    return SegmentCurvature(
        at,
        losses,
        slopes,
        gauss_newton + rest,
        gauss_newton,
        float(direction.double().norm()),
        risk.name,
        risk.images_seed,
    )


@dataclass(frozen=True)
class SegmentPrediction:
    """Predictions of a merge's joint risk from segments ``x_j -> M``, in nats, with 95 % intervals over images.

    Attributes:
        endpoint: square-root form with the curvature at x_j alone.
        segment: with A, the largest over the sampled points (and the slope at x_j).
        slopes: with Lambda, from first derivatives only.
        taylor: slope at x_j plus half the largest curvature.
        tier: estimated; the first errs low for saturated experts, the others were upper estimates in the pilots.
    """

    endpoint: Number
    segment: Number
    slopes: Number
    taylor: Number
    tier: str = "estimated"


def predict_from_segments(
    segments: Sequence[SegmentCurvature], weights: npt.ArrayLike | None = None, *, gauss_newton: bool = False
) -> SegmentPrediction:
    """The curvature predictions of theory.md section 8 from one measured segment ``x_j -> M`` per task.

    Args:
        segments: one per task, the first point x_j, the last M.
        weights: p_j, default 1/N.
        gauss_newton: Gauss-Newton curvature in place of phi''.

    Raises:
        MergeboundError: no segment.
    """
    if not segments:
        raise MergeboundError("segments: give one per task")
    p = uniform_weights(len(segments)) if weights is None else np.asarray(weights, dtype=np.float64)

    def task(segment: SegmentCurvature, kind: str, keep: npt.NDArray[np.bool_]) -> float:
        bends = (segment.gauss_newton if gauss_newton else segment.bends)[:, keep].mean(axis=1)
        losses, slopes = segment.losses[:, keep].mean(axis=1), segment.slopes[:, keep].mean(axis=1)
        if kind == "taylor":
            return float(gradient_aware_risk(losses[:1], slopes[:1], bends.max(keepdims=True), np.ones(1)))
        chosen = bends[:1]
        if kind == "segment":
            chosen = curvature_on_segment(bends.max(), slopes[:1], losses[:1])
        elif kind == "slopes":
            chosen = first_derivative_curvature(slopes, losses).reshape(1)
        return float(curvature_risk(losses[:1], chosen, np.ones(1)))

    def joint(kind: str) -> Number:
        found = [jackknife(partial(task, s, kind), s.images) for s in segments]
        value = float(p @ [f[0] for f in found])
        error = float(np.sqrt((p**2) @ [f[1] ** 2 for f in found]))
        return Number.normal(value, error, "images (95 %), not the model's error", segments[0].seed)

    return SegmentPrediction(joint("endpoint"), joint("segment"), joint("slopes"), joint("taylor"))
