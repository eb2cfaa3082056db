"""Intervals of curves and of their heights: images are resampled, jointly for all points of a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.evaluate.bootstrap import bootstrap_means
from experiments.measure.landscape.scores import Floats, Panel, Scores


@dataclass(frozen=True)
class Height:
    """How far a curve rises above a reference, over the points of a line.

    Attributes:
        value: the largest excess; 0 where nothing rises.
        at: the position t where it is reached.
        standard_error: of ``value``, over resampled images (a maximum over noisy points is biased upwards).
        low, high: interval from a simultaneous band: with the stated confidence *every* point's excess lies in its
            band, hence the largest one between the largest lower and the largest upper edge.  Unlike percentiles of
            the maximum, ``low`` stays at 0 on a line that only looks rough because images are few.
        level: of the interval.
    """

    value: float
    at: float
    standard_error: float
    low: float
    high: float
    level: float


@dataclass(frozen=True, eq=False)
class Curve:
    """K values with pointwise percentile bands, and the R resampled curves that they come from, (R, K)."""

    value: Floats
    low: Floats
    high: Floats
    draws: Floats


def curves(
    points: Sequence[Scores],
    on: Panel,
    tasks: Sequence[int],
    quantity: str,
    *,
    weights: Floats | None = None,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[int | None, Curve]:
    """Curves of each task, and of their weighted mean under the key ``None``.

    Args:
        points: K points that were scored on all of ``tasks``.
        on: the images; tasks that show the same images resample them together.
        quantity: ``loss`` or ``error``.
        weights: p_j of ``tasks``; equal when absent.
        resamples: R.
    """
    tables = [np.stack([getattr(point, quantity)[j] for point in points], axis=1) for j in tasks]
    sources = [on.sources[j] for j in tasks]
    means = bootstrap_means(tables, sources=sources, resamples=resamples, seed=on.seed)
    p = np.full(len(tasks), 1.0 / len(tasks)) if weights is None else np.asarray(weights, float)
    out: dict[int | None, Curve] = {}
    values = [table.mean(axis=0) for table in tables]
    for j, value, draws in zip(tasks, values, means, strict=True):
        out[j] = banded(value, draws, level)
    joint = sum(w * v for w, v in zip(p, values, strict=True))
    drawn = sum(w * d for w, d in zip(p, means, strict=True))
    out[None] = banded(np.asarray(joint), np.asarray(drawn), level)
    return out


def standard_error(tables: Sequence[Floats], sources: Sequence[NDArray[np.int64] | None]) -> float:
    """Of the mean over tasks of each task's mean over images; images that several tasks show count once, with the sum
    of what they are in each.  NaN where a task has fewer than two images."""
    sums: dict[object, Floats] = {}
    for j, (table, source) in enumerate(zip(tables, sources, strict=True)):
        key = j if source is None else source.tobytes()
        sums[key] = sums[key] + table if key in sums else table
    with np.errstate(invalid="ignore"):
        parts = [float(total.var(ddof=1)) / len(total) if len(total) > 1 else math.nan for total in sums.values()]
    return math.sqrt(sum(parts)) / len(tables)


def banded(value: Floats, draws: Floats, level: float) -> Curve:
    """A curve with pointwise percentile bands; infinite values have infinite bands."""
    tail = (1.0 - level) / 2.0
    low, high = np.full_like(value, np.nan), np.full_like(value, np.nan)
    for k in range(len(value)):
        kept = draws[~np.isnan(draws[:, k]), k]
        if len(kept) > 1:
            method = "inverted_cdf" if np.isinf(kept).any() else "linear"
            low[k], high[k] = np.quantile(kept, [tail, 1.0 - tail], method=method)  # type: ignore[call-overload]
    return Curve(value, low, high, draws)


def chord(path: Floats, t: Floats) -> Floats:
    """The straight line between the ends of (..., K) values."""
    line: Floats = (1.0 - t) * path[..., :1] + t * path[..., -1:]
    return line


def middle(path: Floats, t: Floats) -> Floats:
    """The mean of the ends of (..., K) values, at every point."""
    line: Floats = 0.5 * (path[..., :1] + path[..., -1:]) + 0.0 * t
    return line


def height(curve: Curve, t: Floats, *, reference: str = "chord", level: float = 0.95) -> Height:
    """The largest excess of a curve over the ``chord`` between its ends, or over their ``mean``, with its interval.

    NaN (without interval) where the curve is not finite.
    """
    line = chord if reference == "chord" else middle
    if not (np.isfinite(curve.value).all() and np.isfinite(curve.draws).all()):
        with np.errstate(invalid="ignore"):
            excess = curve.value - line(curve.value, t)
        value = math.inf if np.isposinf(excess).any() else math.nan
        at = float(t[int(np.argmax(np.isposinf(excess)))]) if math.isinf(value) else math.nan
        return Height(value, at, math.nan, math.nan, math.nan, level)
    excess = curve.value - line(curve.value, t)
    drawn = curve.draws - line(curve.draws, t)
    if reference == "chord":
        excess[[0, -1]] = 0.0
        drawn[:, [0, -1]] = 0.0
    spread = drawn.std(axis=0, ddof=1) if len(drawn) > 1 else np.full_like(excess, np.nan)
    noisy = spread > 1e-12 * max(1.0, float(np.abs(curve.value).max()))
    radius = np.zeros_like(excess)
    if noisy.any():
        worst = (np.abs(drawn - excess)[:, noisy] / spread[noisy]).max(axis=1)
        radius[noisy] = np.quantile(worst, level) * spread[noisy]
    place = int(np.argmax(excess))
    value = max(0.0, float(excess[place]))
    error = float(np.maximum(drawn.max(axis=1), 0.0).std(ddof=1)) if len(drawn) > 1 else math.nan
    low, high = max(0.0, float((excess - radius).max())), max(0.0, float((excess + radius).max()))
    return Height(value, float(t[place]), error, low, high, level)
