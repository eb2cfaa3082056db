"""How fast the loss rises around a point: the worst rise in a ball or box, the average one, and the curvature.

Ascent: with g the gradient at the present point, the next displacement is the one of the ball or box that maximises
<g, delta>.  For convex losses this never goes down (generalised power method, Journee et al. 2010, JMLR 11, section 2);
the best displacement that was seen counts, so every maximum here is a lower estimate, and more steps never lower it.

Intervals resample images at the displacement that was found (which was chosen on the same images, so that the value is
biased upwards where images are few); for averages and traces they contain the spread of the random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from experiments.evaluate.bootstrap import bootstrap_means
from experiments.measure.landscape.directions import filter_normalised, gaussian, signs
from experiments.measure.landscape.intervals import standard_error
from experiments.measure.landscape.objective import Loss, value
from experiments.measure.landscape.scores import Floats
from merging.flat import FlatSpace
from theory.errors import MergeboundError

START, SUBSPACE, PROBE = 1 << 20, 1 << 21, 1 << 22
_RESAMPLES = 500


@dataclass(frozen=True)
class Sharpness:
    """One number about the loss around a point.

    Attributes:
        measure: its name.
        value: in nats (Keskar's in per cent, the trace in nats per squared parameter).
        standard_error, low, high: over images, or draws, or both; ``setting`` says what.
        level: of the interval.
        setting: radius, steps, draws.
        seed: names the draws.
        tier: ``estimated``.
    """

    measure: str
    value: float
    standard_error: float
    low: float
    high: float
    level: float
    setting: str
    seed: int
    tier: Literal["estimated"] = "estimated"


def ascend(loss: Loss, x: Tensor, best: Callable[[Tensor], Tensor], steps: int, seed: int = 0) -> tuple[Tensor, float]:
    """The displacement with the largest loss that was seen, and that loss.

    Args:
        best: the displacement of the allowed set that maximises <g, delta>, given g.
        steps: gradients that are taken.
        seed: names the start where the gradient vanishes.

    Raises:
        MergeboundError: no step.
    """
    if steps < 1:
        raise MergeboundError(f"steps = {steps}: give 1 or more")
    found, top = torch.zeros_like(x), value(loss, x)
    here = found
    for step in range(steps):
        gradient = loss.gradient(x + here)
        if not bool(gradient.abs().max() > 0):
            gradient = torch.zeros_like(x)
            gradient[: loss.moving] = gaussian(loss.moving, seed, START + step, x)
        here = best(gradient)
        height = value(loss, x + here)
        if height > top:
            found, top = here, height
    return found, top


def ball(unit: Tensor, radius: float) -> Callable[[Tensor], Tensor]:
    """The maximiser of <g, delta> over |delta / unit| <= radius: radius unit^2 g / |unit g|."""

    def best(gradient: Tensor) -> Tensor:
        pulled = unit * gradient
        norm = pulled.double().norm().clamp(min=1e-300)
        farthest: Tensor = radius * unit.double() * pulled.double() / norm
        return farthest.to(gradient.dtype)

    return best


def sam_sharpness(
    loss: Loss, x: Tensor, unit: Tensor, radius: float, *, steps: int = 1, seed: int = 0, level: float = 0.95,
    name: str = "sam",
) -> Sharpness:  # fmt: skip
    """max_{|delta / unit| <= radius} F(x + delta) - F(x) by ascent.

    With ``unit`` one and one step it is the rise that SAM's own ascent step finds; with ``unit`` = |x|, adaptive
    sharpness, which does not change when weights are rescaled without changing the function.

    Args:
        unit: (P,), see :func:`~experiments.measure.landscape.directions.units`.

    Source: Foret et al., "Sharpness-aware minimization", ICLR 2021 (arXiv:2010.01412), equations 1 and 2; Kwon et al.,
    "ASAM: adaptive sharpness-aware minimization", ICML 2021 (arXiv:2102.11600), definition 2 and equation 7.
    """
    _positive("radius", radius)
    delta, _ = ascend(loss, x, ball(unit, radius), steps, seed)
    rise, low, high, error = _rise(loss, x, delta, seed, level)
    setting = f"radius {radius:g}, {steps} {'step' if steps == 1 else 'steps'}; interval over images"
    return Sharpness(name, rise, error, low, high, level, setting, seed)


def epsilon_sharpness(
    loss: Loss, x: Tensor, *, epsilon: float = 1e-3, steps: int = 10, dimension: int | None = None, seed: int = 0,
    level: float = 0.95,
) -> Sharpness:  # fmt: skip
    """100 (max_{delta in C} F(x + delta) - F(x)) / (1 + F(x)), C the box |delta_i| <= epsilon (|x_i| + 1).

    With ``dimension`` p, delta = A y for a random A (P, p) and |y_k| <= epsilon (|(A^+ x)_k| + 1).  The maximum is
    sought by ascent over corners (the paper: ten iterations of L-BFGS-B).

    Source: Keskar et al., "On large-batch training for deep learning", ICLR 2017 (arXiv:1609.04836), section 2.2.2,
    metric 2.1.
    """
    _positive("epsilon", epsilon)
    if dimension is None:
        bound = torch.zeros_like(x)
        bound[: loss.moving] = epsilon * (x[: loss.moving].abs() + 1.0)

        def best(gradient: Tensor) -> Tensor:
            corner: Tensor = bound * torch.sign(gradient)
            return corner

    else:
        _positive("dimension", dimension)
        basis = torch.zeros(dimension, x.numel(), dtype=x.dtype, device=x.device)
        for k in range(dimension):
            basis[k, : loss.moving] = gaussian(loss.moving, seed, SUBSPACE + k, x)
        own = torch.linalg.solve(basis.double() @ basis.double().T, basis.double() @ x.double())
        box = (epsilon * (own.abs() + 1.0)).to(x.dtype)

        def best(gradient: Tensor) -> Tensor:
            corner: Tensor = (box * torch.sign(basis @ gradient)) @ basis
            return corner

    delta, _ = ascend(loss, x, best, steps, seed)
    height = value(loss, x)
    rise, low, high, error = _rise(loss, x, delta, seed, level)
    scale = 100.0 / (1.0 + height)
    where = "all parameters" if dimension is None else f"{dimension} random directions"
    setting = f"epsilon {epsilon:g}, {where}, {steps} steps; interval over images at fixed F(x)"
    return Sharpness("epsilon", scale * rise, scale * error, scale * low, scale * high, level, setting, seed)


def average_sharpness(
    loss: Loss, x: Tensor, unit: Tensor, radius: float, *, draws: int = 8, seed: int = 0, level: float = 0.95,
    name: str = "average",
) -> Sharpness:  # fmt: skip
    """E F(x + radius unit z) - F(x), z standard normal, each draw used with both signs (which removes the slope).

    The interval adds the spread of the draws to that of the images (normal, two standard errors).
    """
    _positive("radius", radius)
    if draws < 2:
        raise MergeboundError(f"draws = {draws}: give 2 or more, so that their spread can be seen")
    own = loss.losses(x)
    single: list[float] = []
    total = [np.zeros_like(table) for table in own]
    for number in range(draws):
        z = torch.zeros_like(x)
        z[: loss.moving] = gaussian(loss.moving, seed, number, x)
        step = radius * unit * z
        pair = [0.5 * (a + b) - c for a, b, c in zip(loss.losses(x + step), loss.losses(x - step), own, strict=True)]
        single.append(float(np.mean([table.mean() for table in pair])))
        total = [t + p / draws for t, p in zip(total, pair, strict=True)]
    over_images = standard_error(total, loss.sources)
    over_draws = float(np.std(single, ddof=1) / np.sqrt(draws))
    error = float(np.hypot(over_images, over_draws))
    mean = float(np.mean(single))
    half = float(stats.t.ppf(0.5 + level / 2.0, draws - 1)) * over_draws
    half = float(np.hypot(half, stats.norm.ppf(0.5 + level / 2.0) * over_images))
    setting = f"radius {radius:g}, {draws} pairs of draws; interval over draws and images"
    return Sharpness(name, mean, error, mean - half, mean + half, level, setting, seed)


def hessian_trace(loss: Loss, x: Tensor, *, probes: int = 8, seed: int = 0, level: float = 0.95) -> Sharpness:
    """Trace of the Hessian of F at x by Hutchinson's estimator with random signs; unbiased, interval over probes.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990.
    """
    if probes < 2:
        raise MergeboundError(f"probes = {probes}: give 2 or more, so that their spread can be seen")
    found = []
    for number in range(probes):
        z = torch.zeros_like(x)
        z[: loss.moving] = signs(loss.moving, seed, PROBE + number, x)
        found.append(float(z.double() @ loss.product(x, z).double()))
    mean, error = float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(probes))
    half = float(stats.t.ppf(0.5 + level / 2.0, probes - 1)) * error
    return Sharpness("trace", mean, error, mean - half, mean + half, level, f"{probes} probes; interval over probes",
                     seed)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Rise:
    """F(x + s d) along filter-normalised random directions d.

    Attributes:
        steps: s, (K,), with 0 among them.
        values: (D, K), one row per direction.
        low, high: pointwise interval of the mean over directions (Student's t), (K,).
        seed, tier: of the directions; ``estimated``.
    """

    steps: Floats
    values: Floats
    low: Floats
    high: Floats
    seed: int
    tier: Literal["estimated"] = "estimated"

    @property
    def mean(self) -> Floats:
        """Over directions, (K,)."""
        return np.asarray(self.values.mean(axis=0))


def filter_rise(
    loss: Loss, x: Tensor, space: FlatSpace, steps: Sequence[float], *, directions: int = 4, seed: int = 0,
    level: float = 0.95,
) -> Rise:  # fmt: skip
    """The loss along random directions whose filters have the norms of the network's own (Li et al. 2018).

    Args:
        steps: s; 1 moves every filter by its own norm.
        directions: D, 2 or more.
    """
    if directions < 2:
        raise MergeboundError(f"directions = {directions}: give 2 or more, so that their spread can be seen")
    rows = []
    for number in range(directions):
        raw = torch.zeros_like(x)
        raw[: loss.moving] = gaussian(loss.moving, seed, number, x)
        d = filter_normalised(raw, x, space, loss.moving)
        rows.append([value(loss, x + float(s) * d) for s in steps])
    table = np.array(rows)
    half = stats.t.ppf(0.5 + level / 2.0, directions - 1) * table.std(axis=0, ddof=1) / np.sqrt(directions)
    mean = table.mean(axis=0)
    return Rise(np.asarray(steps, float), table, mean - half, mean + half, seed)


def _rise(loss: Loss, x: Tensor, delta: Tensor, seed: int, level: float) -> tuple[float, float, float, float]:
    """Rise at a displacement with its percentile interval and standard error over images."""
    tables = [a - b for a, b in zip(loss.losses(x + delta), loss.losses(x), strict=True)]
    drawn = bootstrap_means([t[:, None] for t in tables], sources=loss.sources, resamples=_RESAMPLES, seed=seed)
    joint = np.mean([d[:, 0] for d in drawn], axis=0)
    tail = (1.0 - level) / 2.0
    low, high = np.nanquantile(joint, [tail, 1.0 - tail])
    mean = float(np.mean([t.mean() for t in tables]))
    return mean, float(low), float(high), float(np.nanstd(joint, ddof=1))


def _positive(name: str, number: float) -> None:
    if not number > 0:
        raise MergeboundError(f"{name} = {number:g}: give a positive number")
