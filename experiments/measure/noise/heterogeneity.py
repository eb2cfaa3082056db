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

    The same samples are used at every point, so that the cosines are those of the samples' mean gradient; standard
    errors are from the jackknife over ten groups of samples.  ``population``: size of S (with all of it there is no
    sampling error).

    Returns:
        Columns ``point``, ``gradient_norm``, ``with_first``, ``with_previous``, ``with_descent`` (against
        -(x_K - x_0); NaN where nothing moved), each cosine with ``_error``.
    """
    groups = np.array_split(np.arange(len(sample)), min(10, len(sample)))
    sums = [[moments(_some(o, sample, g, memory)).mean * len(g) for g in groups] for o in objectives]
    descent = (objectives[0].theta - objectives[-1].theta).double()
    whole = population is not None and len(sample) >= population
    rows = []
    for k, name in enumerate(points):
        before = max(k - 1, 0)
        ways = {"with_first": sums[0], "with_previous": sums[before], "with_descent": None}
        row: dict[str, object] = {"point": name, "gradient_norm": float(sum(sums[k]).norm()) / len(sample)}  # type: ignore[union-attr]
        for column, other in ways.items():
            values = [_angle(sums[k], descent if other is None else other, leave) for leave in range(-1, len(groups))]
            left = np.array(values[1:])
            error = float(np.sqrt((len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()))
            row |= {column: values[0], f"{column}_error": 0.0 if whole else error}
        rows.append(row | {"seed": seed, "tier": "estimated"})
    return pd.DataFrame(rows)


def _some(objective: Objective, sample: Split, rows: np.ndarray, memory: int) -> Rows:
    part = sample.take(rows)
    return Rows(objective, part.images, part.labels, memory)


def _angle(sums: list[Tensor], other: list[Tensor] | Tensor, leave: int) -> float:
    """Cosine of a sum of groups without one (-1: all) and another such sum or a fixed vector."""
    a = torch.stack([v for i, v in enumerate(sums) if i != leave]).sum(dim=0)
    b = other if isinstance(other, Tensor) else torch.stack([v for i, v in enumerate(other) if i != leave]).sum(dim=0)
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else float("nan")
