"""Gradients of all tasks at one point: norms, cosines and how much tasks disagree; and cosines along training.

At a common point x the shared gradients of the tasks are compared (heads differ in shape and meaning).  The
heterogeneity is zeta^2 = sum_j p_j |grad F_j(x) - grad F(x)|^2 with uniform p: what a merge that descends F cannot have
for all tasks at once (the dispersion of theory.md section 7 starts as eta^2 K^2 zeta^2 while drift dominates).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.measure.noise.at_point import PARTS, part_of
from experiments.measure.noise.constant import Constant, from_parts, root
from experiments.measure.noise.objective import Objective
from experiments.measure.noise.per_sample import MEMORY, Rows, along, moments
from experiments.tasks.types import Split
from theory.errors import MergeboundError


@dataclass(frozen=True)
class TaskGradients:
    """Gradients of N tasks at one point, without decay, in one part of the coordinates.

    Attributes:
        point: its name.
        tasks: names.
        norms: |grad F_j|, freed of sampling bias.
        cosines: N rows of N; 1 on the diagonal.
        heterogeneity: zeta.
        joint: |grad F|, F the mean of the tasks.
    """

    point: str
    tasks: tuple[str, ...]
    norms: tuple[Constant, ...]
    cosines: tuple[tuple[Constant, ...], ...]
    heterogeneity: Constant
    joint: Constant

    def to_frame(self) -> pd.DataFrame:
        """One row per pair of tasks: norms, cosine and its interval."""
        rows = []
        for a, name in enumerate(self.tasks):
            for b in range(a + 1, len(self.tasks)):
                cosine = self.cosines[a][b]
                rows.append(
                    {
                        "point": self.point,
                        "task": name,
                        "other": self.tasks[b],
                        "norm": self.norms[a].value,
                        "other_norm": self.norms[b].value,
                        "cosine": cosine.value,
                        "low": cosine.low,
                        "high": cosine.high,
                        "heterogeneity": self.heterogeneity.value,
                        "joint_norm": self.joint.value,
                        "seed": cosine.seed,
                        "tier": cosine.tier,
                    }
                )
        return pd.DataFrame(rows)


def task_gradients(
    objectives: Sequence[Objective],
    samples: Sequence[Split],
    populations: Sequence[int | None],
    tasks: Sequence[str],
    *,
    point: str = "",
    part: str = "shared",
    seed: int = 0,
    memory: int = MEMORY,
) -> TaskGradients:
    """Compare the tasks' gradients.

    Args:
        objectives: one per task, at the common point (or each at its own).
        samples: of each task, drawn independently of the other tasks'.
        populations: sizes of the samples S_j they come from; ``None`` for draws of the task itself.
        tasks: names.
        point: name of the place.
        part: ``shared``, ``head`` or ``all``.
        seed: of the draws (recorded).
        memory: bytes for per-sample gradients.

    Raises:
        MergeboundError: the parts differ in length, or an unknown part.
    """
    if part not in PARTS:
        raise MergeboundError(f"part = {part!r}: choose from {', '.join(PARTS)}")
    rows = [
        Rows(o, split.images, split.labels, memory // max(len(objectives), 1))
        for o, split in zip(objectives, samples, strict=True)
    ]
    found = [moments(r) for r in rows]
    pieces = [m.mean[part_of(part, o.shared)] for m, o in zip(found, objectives, strict=True)]
    if len({piece.numel() for piece in pieces}) != 1:
        raise MergeboundError(f"part = {part!r}: the tasks' gradients differ in length there; compare the shared part")
    means = torch.stack(pieces)
    inner = [_inner(r, means, o, part_of(part, o.shared)) for r, o in zip(rows, objectives, strict=True)]
    squares = [_part_squares(m.squares, part) for m in found]
    gram = (means @ means.T).numpy()
    size = len(rows)
    bias = np.array([_bias(s, u[:, j], n) for j, (s, u, n) in enumerate(zip(squares, inner, populations, strict=True))])
    own = np.maximum(np.diag(gram) - bias, 0.0)
    norms = tuple(
        root(from_parts(own[j], (2 * inner[j][:, j], populations[j]), seed=seed, lowest=0.0)) for j in range(size)
    )
    cosines = tuple(tuple(_cosine(a, b, gram, own, inner, populations, seed) for b in range(size)) for a in range(size))
    total = float(gram.sum() - np.trace(gram) + own.sum()) / size**2
    joint = [2 * u.mean(axis=1) / size for u in inner]
    spread = [2 * (u[:, j] - u.mean(axis=1)) / size for j, u in enumerate(inner)]
    parts = list(zip(joint, populations, strict=True))
    zeta = from_parts(float(own.mean()) - total, *zip(spread, populations, strict=True), seed=seed, lowest=0.0)
    return TaskGradients(
        point, tuple(tasks), norms, cosines, root(zeta), root(from_parts(total, *parts, seed=seed, lowest=0.0))
    )


def _inner(rows: Rows, means: Tensor, objective: Objective, span: slice) -> np.ndarray:
    """Inner products of per-sample gradients with the tasks' means in one part, (m, N)."""
    wide = torch.zeros(len(means), objective.size, dtype=torch.float64)
    wide[:, span] = means
    return np.asarray(along(rows, wide).sum(axis=2))


def _part_squares(squares: np.ndarray, part: str) -> np.ndarray:
    found = squares.sum(axis=1) if part == "all" else squares[:, 0 if part == "shared" else 1]
    return np.asarray(found)


def _bias(squares: np.ndarray, inner: np.ndarray, population: int | None) -> float:
    m = len(squares)
    if m < 2 or (population is not None and m >= population):
        return 0.0
    left = 1.0 if population is None else 1.0 - m / population
    return left * float((squares - inner).mean()) / (m - 1)


def _cosine(
    a: int,
    b: int,
    gram: np.ndarray,
    own: np.ndarray,
    inner: Sequence[np.ndarray],
    populations: Sequence[int | None],
    seed: int,
) -> Constant:
    if a == b:
        return Constant(1.0, 1.0, 1.0, len(inner[a]), "by definition", seed)
    count = len(inner[a]) + len(inner[b])
    if own[a] <= 0 or own[b] <= 0:
        return Constant(float("nan"), -1.0, 1.0, count, "a gradient is not distinguishable from zero", seed)
    scale = float(np.sqrt(own[a] * own[b]))
    value = float(gram[a, b]) / scale
    first = inner[a][:, b] / scale - value * inner[a][:, a] / own[a]
    second = inner[b][:, a] / scale - value * inner[b][:, b] / own[b]
    found = from_parts(value, (first, populations[a]), (second, populations[b]), seed=seed)
    low, high = max(found.low, -1.0), min(found.high, 1.0)
    return Constant(min(max(value, -1.0), 1.0), low, high, found.samples, found.how, seed)


def successive_cosines(
    objectives: Sequence[Objective],
    sample: Split,
    points: Sequence[str],
    *,
    population: int | None = None,
    seed: int = 0,
    memory: int = MEMORY,
) -> pd.DataFrame:
    """How one expert's training gradient turns on its way: every point against the first, the one before and -Delta.

    The same m samples are used at every point.  Their mean gradients g_k, g_l share sampling noise, so that
    ``<g_k, g_l>`` exceeds ``<grad F_S(x_k), grad F_S(x_l)>`` by ``(1 - m/n) s_kl / m`` in expectation, s_kl the trace
    of the cross-covariance of single-sample gradients (divisor n - 1; 1 - m/n is 1 for independent draws).  The
    estimate of it, ``(1 - m/n) (mean_j <g_kj, g_lj> - <g_k, g_l>) / (m - 1)``, is taken off every inner product and
    squared norm (as :func:`task_gradients` does for norms), which makes them unbiased; a cosine is a ratio of such
    estimates.  Standard errors: the jackknife over single samples (Efron, *The Jackknife, the Bootstrap and Other
    Resampling Plans*, SIAM 1982, chapter 3) with the factor 1 - m/n.

    Args:
        objectives: of the points in order, at least one.
        sample: m samples of S, drawn without replacement.
        points: their names.
        population: size n of S (with all of it there is no sampling error); ``None`` for independent draws.
        seed: of the draw (recorded).
        memory: bytes for per-sample gradients, of all points together.

    Returns:
        Columns ``point``, ``gradient_norm`` (|grad F_S|, without decay), ``with_first``, ``with_previous``,
        ``with_descent`` (against -(x_K - x_0); NaN where nothing moved), each with ``_error``.  A cosine is NaN where
        a gradient is not distinguishable from zero (its squared norm without bias is not positive).
    """
    rows = [Rows(o, sample.images, sample.labels, memory // max(len(objectives), 1)) for o in objectives]
    descent = (objectives[0].theta - objectives[-1].theta).double()
    length = float(descent.norm())
    means, own = _in_step(rows)
    seen = np.stack([along(r, torch.cat([means, descent[None]])).sum(axis=2) for r in rows], axis=1)
    inner, down = seen[:, :, :-1], seen[:, :, -1]
    count = len(sample)
    products = _products(inner, own, population)
    downs = np.concatenate([down.mean(axis=0)[None], (down.sum(axis=0) - down) / max(count - 1, 1)])
    left = 1.0 if population is None else max(1.0 - count / population, 0.0)
    found = []
    for k, name in enumerate(points):
        norms = np.sqrt(np.maximum(products[:, k, k], 0.0))
        values = {"gradient_norm": norms}
        for column, other in (("with_first", 0), ("with_previous", max(k - 1, 0))):
            others = np.sqrt(np.maximum(products[:, other, other], 0.0))
            values[column] = (
                np.where(norms > 0, 1.0, np.nan) if other == k else _ratio(products[:, k, other], norms * others)
            )
        values["with_descent"] = _ratio(downs[:, k], norms * length)
        row: dict[str, object] = {"point": name}
        for column, every in values.items():
            row |= {column: float(every[0]), f"{column}_error": _jackknife(every[1:], left)}
        found.append(row | {"seed": seed, "tier": "estimated"})
    return pd.DataFrame(found)


def _in_step(rows: Sequence[Rows]) -> tuple[Tensor, np.ndarray]:
    """Mean gradients (P, d) of P points and inner products of every sample's gradients at them, (m, P, P)."""
    means = torch.zeros(len(rows), rows[0].objective.size, dtype=torch.float64)
    parts = []
    for blocks in zip(*(r.blocks() for r in rows), strict=True):
        each = [block.double() for block, _ in blocks]
        means += torch.stack([block.sum(dim=0) for block in each])
        products = torch.stack([torch.stack([(a * b).sum(dim=1) for b in each], dim=1) for a in each], dim=1)
        parts.append(products.numpy())
    return means / len(rows[0]), np.concatenate(parts)


def _products(inner: np.ndarray, own: np.ndarray, population: int | None) -> np.ndarray:
    """Inner products of gradients at P points without sampling bias, from all m samples (first) and from all but one.

    Args:
        inner: of each sample's gradient at a point with the points' means, (m, P, P).
        own: of each sample's gradients at two points, (m, P, P).
        population: n, or ``None``.

    Returns:
        (m + 1, P, P).
    """
    m = len(own)
    total = m * inner.sum(axis=0)  # sum over all pairs of samples
    pairs = np.concatenate([total[None], total - m * (inner + inner.transpose(0, 2, 1)) + own])
    same = np.concatenate([own.sum(axis=0)[None], own.sum(axis=0) - own])
    sizes = np.array([m] + [m - 1] * m, dtype=np.float64)[:, None, None]
    mean = pairs / np.maximum(sizes, 1.0) ** 2
    left = 1.0 if population is None else np.maximum(1.0 - sizes / population, 0.0)
    if population is not None and m >= population:
        left = np.zeros_like(sizes)
    return np.asarray(mean - left * (same / np.maximum(sizes, 1.0) - mean) / np.maximum(sizes - 1.0, 1.0))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Cosines, within -1 and 1; NaN where a norm is zero."""
    return np.clip(np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan), -1.0, 1.0)


def _jackknife(values: np.ndarray, left: float) -> float:
    """Standard error from the values without each sample in turn; 0 with all of a finite population."""
    if left == 0.0:
        return 0.0
    if len(values) < 2:
        return float("nan")
    return float(np.sqrt(left * (len(values) - 1) * values.var()))
