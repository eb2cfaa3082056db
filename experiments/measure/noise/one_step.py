"""The one-step factor measured: two runs at a distance r take one step on the same batch (theory.md section 1).

    q = |x' - y'| / |x - y|,   kappa = (q - 1) / eta,   x' = x - eta (grad F_B(x) + omega x)

If the Hessian of the batch loss lies in [m, L] along the segment, then
q <= max(|1 - eta (m + omega)|, |1 - eta (L + omega)|).  Random directions of a high-dimensional space feel the mean
curvature only and say little about the largest factor; the eigenvectors of both ends of the spectrum attain it to first
order in r, and ``exchange`` (the difference of two samples' gradients) is where twins really part.

Networks with ReLU have no Hessian at their kinks: pairs that straddle one part faster than the spectrum at the point
allows, the more so the nearer they are.  ``factor`` above ``limit`` shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.func import grad

from experiments.measure.noise.constant import Constant, largest, quantile
from experiments.measure.noise.objective import Objective
from experiments.measure.noise.smoothness import ends
from theory.errors import MergeboundError

_PAIRS = 0x0E57
DIRECTIONS = ("random", "drift", "exchange", "top", "bottom")


@dataclass(frozen=True)
class Pair:
    """One pair of runs and one step.

    Attributes:
        point: around which the pair is placed.
        batch: number of the batch.
        direction: of :data:`DIRECTIONS`.
        distance: r before the step.
        factor: q.
        limit: what the batch Hessian's ends at the point allow, max(|1 - eta (m + omega)|, |1 - eta (L + omega)|).
        lowest, highest: m and L of the batch at the point (estimates from inside the spectrum).
    """

    point: str
    batch: int
    direction: str
    distance: float
    factor: float
    limit: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class OneStep:
    """Factors of many pairs of one expert.

    Attributes:
        learning_rate: eta of the step.
        pairs: in the order measured.
        largest: largest q over batches and directions; ``limit`` likewise from the batch Hessians.
        quantiles: of q over batches, by direction: median with exact limits (batches are the samples).
        kappa: (largest q - 1) / eta, what :class:`theory.recipe.Expert` takes; like ``largest`` a lower estimate, since
            other batches, points and directions may part faster: no upper limit.
        seed: of batches and directions.
    """

    learning_rate: float
    pairs: tuple[Pair, ...]
    largest: Constant
    limit: Constant
    quantiles: dict[str, Constant]
    kappa: Constant
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """One row per pair."""
        frame = pd.DataFrame([vars(pair) for pair in self.pairs])
        return frame.assign(kappa=(frame["factor"] - 1.0) / self.learning_rate, seed=self.seed, tier="estimated")


def one_step(
    points: Sequence[tuple[str, Objective]],
    inputs: Tensor,
    labels: Tensor,
    *,
    learning_rate: float,
    batch_size: int,
    batches: int = 4,
    distances: Sequence[float] = (0.01, 0.3),
    drift: Tensor | None = None,
    randoms: int = 1,
    replace: bool = False,
    iterations: int = 30,
    seed: int = 0,
) -> OneStep:
    """Measure pairs around points of a path.

    Args:
        points: names and objectives (their decay counts).
        inputs, labels: samples from which batches are drawn.
        learning_rate: eta; of Nesterov's form eta (1 + beta).
        batch_size: b, at most the number of samples.
        batches: drawn at every point.
        distances: r, as multiples of ``|drift|`` (of |theta| without one).
        drift: x_K - x_0 of what was trained, (d,).
        randoms: random directions per batch.
        replace: whether a batch may hold a sample twice.
        iterations: Lanczos steps for the ends of a batch's spectrum.
        seed: names batches and directions (``default_rng([seed, 0x0E57])``).

    Raises:
        MergeboundError: a batch larger than the samples without ``replace``, or no point, batch or distance.
    """
    if not points or batches < 1 or not distances or min(distances) <= 0 or learning_rate <= 0:
        raise MergeboundError(
            "one_step: give at least one point, one batch, positive distances and a positive learning rate"
        )
    if batch_size > len(labels) and not replace:
        raise MergeboundError(f"batch_size = {batch_size}: larger than the {len(labels)} samples; give more samples")
    rng = np.random.default_rng([seed, _PAIRS])
    found: list[Pair] = []
    for name, objective in points:
        unit = float((objective.theta if drift is None else drift).norm()) or 1.0
        for number in range(batches):
            rows = torch.from_numpy(rng.choice(len(labels), size=batch_size, replace=replace))
            batch, classes = inputs[rows], labels[rows]
            low, bottom, high, top = ends(objective, batch, classes, seed=seed, iterations=iterations)
            limit = max(abs(1 - learning_rate * (value + objective.decay)) for value in (low, high))
            ways = {"top": [top], "bottom": [bottom], "drift": [] if drift is None else [drift]}
            ways["random"] = [_normal(rng, objective) for _ in range(randoms)]
            ways["exchange"] = [_exchange(objective, inputs, labels, rng)]
            for kind in DIRECTIONS:
                for way in ways[kind]:
                    for share in distances:
                        if float(way.norm()) == 0.0:
                            continue
                        r = share * unit
                        q = _factor(objective, batch, classes, r * way / way.norm(), learning_rate)
                        found.append(Pair(name, number, kind, r, q, limit, low, high))
    return _summary(found, learning_rate, batches * len(points), seed)


def _factor(objective: Objective, inputs: Tensor, labels: Tensor, apart: Tensor, rate: float) -> float:
    """q of two runs at theta -+ apart/2; the difference of the steps is taken before the difference of the points."""
    slope = grad(objective.mean)
    with torch.no_grad():
        there = slope(objective.theta + 0.5 * apart, inputs, labels)
        here = slope(objective.theta - 0.5 * apart, inputs, labels)
    change = (there - here).double() + objective.decay * apart.double()
    return float((apart.double() - rate * change).norm() / apart.double().norm())


def _exchange(objective: Objective, inputs: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
    first, second = (int(v) for v in rng.choice(len(labels), size=2, replace=len(labels) < 2))
    slope = grad(objective.mean)
    with torch.no_grad():
        one: Tensor = slope(objective.theta, inputs[first : first + 1], labels[first : first + 1])
        two: Tensor = slope(objective.theta, inputs[second : second + 1], labels[second : second + 1])
    return one - two


def _normal(rng: np.random.Generator, objective: Objective) -> Tensor:
    return torch.from_numpy(rng.standard_normal(objective.size)).to(objective.theta.dtype)


def _summary(pairs: list[Pair], rate: float, independent: int, seed: int) -> OneStep:
    factors = np.array([pair.factor for pair in pairs])
    top = largest(factors, seed, samples=independent)
    limit = largest([pair.limit for pair in pairs], seed, samples=independent)
    medians = {}
    for kind in DIRECTIONS:
        mine = [pair for pair in pairs if pair.direction == kind]
        if mine:
            places = sorted({(pair.point, pair.batch) for pair in mine})
            worst = [max(p.factor for p in mine if (p.point, p.batch) == place) for place in places]
            medians[kind] = quantile(worst, 0.5, seed)
    value = (top.value - 1.0) / rate
    kappa = Constant(value, value, float("inf"), top.samples, top.how, seed, exceeding=top.exceeding)
    return OneStep(rate, tuple(pairs), top, limit, medians, kappa, seed)
