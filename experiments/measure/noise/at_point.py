"""Gradient, noise and gradient gap of one expert at one point (theory.md sections 1, 5 and 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from experiments.measure.noise.constant import Constant, from_parts, largest, quantile, root
from experiments.measure.noise.objective import Objective
from experiments.measure.noise.per_sample import MEMORY, Rows, along, moments, squared_gaps
from experiments.tasks.types import Split

PARTS = ("all", "shared", "head")
"""Of the gradient: everything trained, the shared part, the head."""
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class PartNoise:
    """Of one part of the gradient at one point; all in loss per unit of parameter.

    Attributes:
        gradient: norm of grad F_S without decay.
        objective_gradient: norm of grad F_S + omega x (theory.md's g_i at x_0).
        sigma: rms noise of single-sample gradients within S, sigma^2 = trace of their covariance with divisor n.
        gap: D_2 at this point, rms over pairs of the gap between a training and a fresh sample's gradient.
        largest_gap: largest such gap among the pairs that were looked at (a lower estimate of D_inf).
        largest_norm: largest per-sample gradient among training and fresh samples (a lower estimate of G).
        norms: quantiles of per-sample gradient norms over S, by their share.
    """

    gradient: Constant
    objective_gradient: Constant
    sigma: Constant
    gap: Constant
    largest_gap: Constant
    largest_norm: Constant
    norms: tuple[tuple[float, Constant], ...]


@dataclass(frozen=True)
class PointNoise:
    """Everything at one point.

    Attributes:
        point, step: where.
        loss: F_S at the point.
        fresh_loss: F from fresh samples; ``None`` without them.
        pl_ratio: |grad|^2 / (2 (objective - F*)), decay included in both; the PL constant is its minimum over x.
        parts: by :data:`PARTS`.
        fresh: whether the gap compares training samples with fresh ones, as theory.md section 5 asks; otherwise it is
            of two training samples, which is not enough.
    """

    point: str
    step: int
    loss: Constant
    fresh_loss: Constant | None
    pl_ratio: Constant
    parts: dict[str, PartNoise]
    fresh: bool

    def __getitem__(self, part: str) -> PartNoise:
        return self.parts[part]


def noise_at(
    objective: Objective,
    train: Split,
    fresh: Split | None,
    *,
    population: int | None,
    point: str = "",
    step: int = -1,
    pairs: int = 64,
    least: float = 0.0,
    seed: int = 0,
    memory: int = MEMORY,
) -> PointNoise:
    """Measure one point.

    Args:
        objective: of one task at the point.
        train: m samples of S, drawn without replacement.
        fresh: samples of the same task that served neither training nor any choice.
        population: size n of S; ``None`` where ``train`` are independent draws of the task themselves.
        point, step: names of the place.
        pairs: so many training samples and so many fresh ones make the pairs of the largest gap.
        least: F*, smallest value of the objective.
        seed: with which samples were drawn (recorded).
        memory: bytes for per-sample gradients.

    Returns:
        sigma^2 is (n-1)/n s^2, s^2 the sample variance with divisor m-1: unbiased for the divisor-n variance within S
        (exact when m = n).  Squared norms of the mean gradient are freed of their bias (1 - m/n) s^2/m.  The squared
        gap is the mean over all pairs, unbiased: half-widths count both samples.
    """
    rows = Rows(objective, train.images, train.labels, memory)
    others = None if fresh is None else Rows(objective, fresh.images, fresh.labels, memory)
    own, other = moments(rows), None if others is None else moments(others)
    pull = objective.decay * objective.theta.double()
    means = torch.stack([own.mean, pull] if other is None else [own.mean, pull, other.mean])
    inner = along(rows, means)
    back = None if others is None else along(others, means[[0, 2]])
    few = _first(rows, pairs)
    gaps = squared_gaps(few, few if others is None else _first(others, pairs))
    parts = {}
    for name in PARTS:
        span = part_of(name, objective.shared)
        parts[name] = _part(
            _Sample(_pick(own.squares, name), _pick(inner, name), population),
            None if other is None or back is None else _Sample(_pick(other.squares, name), _pick(back, name), None),
            _pick(gaps, name),
            float(pull[span] @ pull[span]),
            float(own.mean[span] @ pull[span]),
            seed,
        )
    loss = from_parts(float(own.losses.mean()), (own.losses, population), seed=seed, lowest=0.0)
    fresh_loss = None
    if other is not None:
        fresh_loss = from_parts(float(other.losses.mean()), (other.losses, None), seed=seed, lowest=0.0)
    everything = _Sample(_pick(own.squares, "all"), _pick(inner, "all"), population)
    ratio = _pl_ratio(objective, everything, own.losses, least, seed)
    return PointNoise(point, step, loss, fresh_loss, ratio, parts, fresh is not None)


@dataclass(frozen=True, eq=False)
class _Sample:
    """Squared norms (m,) of gradients and their inner products with (own mean, decay, fresh mean) or, for fresh
    samples, with (training mean, own mean); and the population's size."""

    squares: np.ndarray
    inner: np.ndarray
    population: int | None

    @property
    def count(self) -> int:
        return len(self.squares)

    def correction(self) -> float:
        """Factor from the divisor-m variance to the one wanted: divisor n within S, or the distribution's."""
        m = self.count
        if m < 2:
            return float("nan")
        unbiased = m / (m - 1)
        return unbiased if self.population is None else unbiased * (self.population - 1) / self.population

    def bias(self, variance: float) -> float:
        """Excess of the squared norm of the mean gradient; ``variance`` with divisor m."""
        m = self.count
        if self.population is not None and m >= self.population:
            return 0.0
        left = 1.0 if self.population is None else 1.0 - m / self.population
        return left * variance / max(m - 1, 1)


def _part(train: _Sample, fresh: _Sample | None, gaps: np.ndarray, pull: float, drag: float, seed: int) -> PartNoise:
    """Constants of one part; ``pull`` = |omega theta|^2, ``drag`` = <mean gradient, omega theta>."""
    squares, inner, n = train.squares, train.inner, train.population
    mean_square = float(inner[:, 0].mean())
    around = squares - 2.0 * inner[:, 0] + mean_square
    spread = float(around.mean())
    bias = train.bias(spread)
    gradient = from_parts(mean_square - bias, (2.0 * inner[:, 0], n), seed=seed, lowest=0.0)
    total = mean_square + 2.0 * drag + pull - bias
    objective_gradient = from_parts(total, (2.0 * (inner[:, 0] + inner[:, 1]), n), seed=seed, lowest=0.0)
    factor = train.correction()
    sigma = from_parts(factor * spread, (factor * around, n), seed=seed, lowest=0.0)
    if fresh is None:
        gap = from_parts(2.0 * factor * spread, (2.0 * factor * around, n), seed=seed, lowest=0.0)
        norms = squares
    else:
        first = squares - 2.0 * inner[:, 2]
        second = fresh.squares - 2.0 * fresh.inner[:, 0]
        value = float(squares.mean() + second.mean())
        gap = from_parts(value, (first, n), (second, None), seed=seed, lowest=0.0)
        norms = np.concatenate([squares, fresh.squares])
    return PartNoise(
        gradient=root(gradient),
        objective_gradient=root(objective_gradient),
        sigma=root(sigma),
        gap=root(gap),
        largest_gap=largest(np.sqrt(gaps), seed, samples=min(gaps.shape)),
        largest_norm=largest(np.sqrt(norms), seed),
        norms=tuple((share, quantile(np.sqrt(squares), share, seed, n)) for share in QUANTILES),
    )


def _pl_ratio(objective: Objective, train: _Sample, losses: np.ndarray, least: float, seed: int) -> Constant:
    theta = objective.theta.double()
    pull, square = objective.decay * theta, float(theta @ theta)
    mean_square = float(train.inner[:, 0].mean())
    spread = float((train.squares - train.inner[:, 0]).mean())
    drag = float(train.inner[:, 1].mean())
    top = max(mean_square + 2.0 * drag + float(pull @ pull) - train.bias(spread), 0.0)
    bottom = 2.0 * (float(losses.mean()) + 0.5 * objective.decay * square - least)
    if bottom <= 0.0:
        return Constant(float("inf"), float("inf"), float("inf"), train.count, "at the minimum", seed)
    influence = (2.0 * (train.inner[:, 0] + train.inner[:, 1]) - 2.0 * losses * top / bottom) / bottom
    return from_parts(top / bottom, (influence, train.population), seed=seed, lowest=0.0)


def _pick(values: np.ndarray, part: str) -> np.ndarray:
    """One part of numbers whose last axis is (shared, head)."""
    found = values.sum(axis=-1) if part == "all" else values[..., PARTS.index(part) - 1]
    return np.asarray(found)


def part_of(part: str, cut: int) -> slice:
    """Where a part of :data:`PARTS` lies in theta; ``cut`` is the length of the shared part."""
    return {"all": slice(None), "shared": slice(None, cut), "head": slice(cut, None)}[part]


def _first(rows: Rows, count: int) -> Rows:
    return Rows(rows.objective, rows.inputs[:count], rows.labels[:count], rows.memory)
