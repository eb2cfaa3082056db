"""Loss on planes: through three points exactly, or the plane that lies closest to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.measure.landscape.intervals import standard_error
from experiments.measure.landscape.lines import shared_size
from experiments.measure.landscape.scores import Evaluator, Floats, Progress, Scores
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

DEGENERATE = 1e-6
"""Three points span no plane where the sine of the angle between them is smaller."""


@dataclass(frozen=True, eq=False)
class Plane:
    """The points origin + u a_1 + v a_2, with a_1, a_2 orthonormal.

    Inner products are over the first ``measured`` coordinates, the parameters; running statistics follow along as the
    affine functions of (u, v) that pass through the points that the plane was made of.

    Attributes:
        origin: (P,).
        axes: (2, P).
        measured: how many coordinates count in inner products.
        kind: ``three points`` or ``principal``.
        explained: share of the squared distances to the centre that lies in the plane (1 for three points).
    """

    origin: Tensor
    axes: Tensor
    measured: int
    kind: str
    explained: float = 1.0

    def coordinates(self, vectors: Tensor) -> Floats:
        """(u, v) of the feet of K points (K, P): (K, 2)."""
        away = (vectors - self.origin)[:, : self.measured].double()
        return np.asarray((away @ self.axes[:, : self.measured].double().T).cpu().numpy())

    def distances(self, vectors: Tensor) -> Floats:
        """Distance of K points from the plane, (K,), in the parameters."""
        away = (vectors - self.origin)[:, : self.measured].double()
        axes = self.axes[:, : self.measured].double()
        rest = away - (away @ axes.T) @ axes
        return np.asarray(rest.norm(dim=1).cpu().numpy())

    def point(self, u: float, v: float) -> Tensor:
        """The vector (P,) at (u, v)."""
        return self.origin + u * self.axes[0] + v * self.axes[1]


def plane_through(origin: Tensor, first: Tensor, second: Tensor, *, measured: int | None = None) -> Plane:
    """The plane through three points; the first axis points from the origin to ``first``.

    Args:
        origin, first, second: (P,) each.
        measured: how many of the first coordinates count in inner products; default all.

    Raises:
        MergeboundError: the points lie on one line.
    """
    size = origin.numel() if measured is None else measured
    a, b = (first - origin).double(), (second - origin).double()
    long, other = float(a[:size].norm()), float(b[:size].norm())
    if not long > 0.0 or not other > 0.0:
        raise MergeboundError("a plane needs three different points: two of them are the same")
    one = a / long
    rest = b - float(b[:size] @ one[:size]) * one
    rest = rest - float(rest[:size] @ one[:size]) * one  # once more, against rounding
    height = float(rest[:size].norm())
    if height <= DEGENERATE * other:
        raise MergeboundError("the three points lie on one line, so that they span no plane: choose another point")
    return Plane(origin, torch.stack([one, rest / height]).to(origin.dtype), size, "three points")


def principal_plane(vectors: Tensor, *, measured: int | None = None) -> Plane:
    """The plane through the mean of K points (K, P) with the least squared distances to them (their first two
    principal components); signs such that the first point that is not in the middle has positive coordinates.

    Raises:
        MergeboundError: fewer than three points, or all on one line.
    """
    if len(vectors) < 3:
        raise MergeboundError(f"{len(vectors)} points: a principal plane needs 3 or more")
    size = vectors.shape[1] if measured is None else measured
    centre = vectors.double().mean(dim=0)
    away = vectors.double() - centre
    gram = away[:, :size] @ away[:, :size].T
    values, basis = np.linalg.eigh(gram.cpu().numpy())
    values, basis = values[::-1], basis[:, ::-1]
    if values[1] <= DEGENERATE**2 * values[0]:
        raise MergeboundError("all points lie on one line, so that they span no plane: add another point")
    axes = []
    for k in range(2):
        column = basis[:, k] * np.sqrt(values[k])  # the points' coordinates on this axis
        lead = int(np.argmax(np.abs(column) > 1e-6 * np.abs(column).max()))
        weights = torch.as_tensor(np.sign(column[lead]) * basis[:, k] / np.sqrt(values[k]), device=away.device)
        axes.append(weights @ away)
    explained = float(values[:2].sum() / max(values.sum(), 1e-300))
    return Plane(centre.to(vectors.dtype), torch.stack(axes).to(vectors.dtype), size, "principal", explained)


@dataclass(frozen=True)
class Mark:
    """A point that is drawn on a plane.

    Attributes:
        name, kind: ``base``, ``expert`` or ``merge``.
        u, v: its foot on the plane.
        distance: from the plane.
        relative: that distance over the point's distance from the base (0 for the base itself where it lies in it).
        loss, error: joint, of the point itself, not of its foot, with standard errors from the images.
        foot_loss: joint loss of its foot.
    """

    name: str
    kind: Literal["base", "expert", "merge"]
    u: float
    v: float
    distance: float
    relative: float
    loss: float
    loss_se: float
    error: float
    error_se: float
    foot_loss: float


@dataclass(frozen=True, eq=False)
class Surface:
    """Loss and error on a grid of a plane.

    Attributes:
        plane: what was cut.
        u, v: positions, (U,) and (V,).
        loss, error: joint means, (V, U).
        loss_se, error_se: standard errors over images, (V, U).
        task_loss: of each task, (T, V, U).
        tasks: their names.
        marks: base, experts and merges.
        part, images, seed, batchnorm, path: how.
        tier: of every number.
    """

    plane: Plane
    u: Floats
    v: Floats
    loss: Floats
    error: Floats
    loss_se: Floats
    error_se: Floats
    task_loss: Floats
    tasks: tuple[str, ...]
    marks: tuple[Mark, ...]
    part: str
    images: int
    seed: int
    batchnorm: str
    path: str
    tier: Literal["measured"] = field(default="measured")

    def to_frame(self) -> pd.DataFrame:
        """One row per point of the grid."""
        import pandas as pd

        grid_v, grid_u = np.meshgrid(self.v, self.u, indexing="ij")
        columns: dict[str, object] = {"u": grid_u.ravel(), "v": grid_v.ravel()}
        for name in ("loss", "loss_se", "error", "error_se"):
            columns[name] = getattr(self, name).ravel()
        columns["accuracy"] = 1.0 - self.error.ravel()
        columns |= {f"loss {task}": self.task_loss[j].ravel() for j, task in enumerate(self.tasks)}
        return pd.DataFrame(columns).assign(tier=self.tier, seed=self.seed)

    def marks_frame(self) -> pd.DataFrame:
        """One row per marked point."""
        import pandas as pd

        rows = [vars(mark) | {"accuracy": 1.0 - mark.error} for mark in self.marks]
        return pd.DataFrame(rows).assign(tier=self.tier, seed=self.seed)


def surface(
    judge: Evaluator,
    plane: Plane,
    merges: Mapping[str, Tensor] | None = None,
    *,
    grid: int = 15,
    margin: float = 0.25,
    progress: Progress | None = None,
) -> Surface:
    """Score a grid of a plane that covers base, experts and merges, and these points themselves.

    Args:
        judge: scores points; the joint loss weighs tasks equally.
        plane: from :func:`plane_through` or :func:`principal_plane`.
        merges: names and vectors (P,).
        grid: points along the longer side of the rectangle, 3 or more; squares as near as can be.
        margin: how far the rectangle reaches beyond the points, as a share of its longer side.

    Raises:
        MergeboundError: fewer than three points a side, or a negative margin.
    """
    if grid < 3 or not margin >= 0.0:
        raise MergeboundError(f"grid = {grid}, margin = {margin}: give 3 or more, and 0 or more")
    subject = judge.subject
    named = [("base", "base", subject.base)]
    named += [(name, "expert", subject.vectors[i]) for i, name in enumerate(subject.names)]
    named += [(name, "merge", vector) for name, vector in (merges or {}).items()]
    feet = np.concatenate([plane.coordinates(vector[None]) for _, _, vector in named])
    u, v = _rectangle(feet, grid, margin)
    total = len(u) * len(v) + 2 * len(named)
    done = 0

    def tell(stage: str, _done: int, _total: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(stage, done, total)

    marks = tuple(_mark(judge, plane, *one, foot, tell) for one, foot in zip(named, feet, strict=True))
    points = (plane.point(float(a), float(b)) for b in v for a in u)  # one at a time
    rows = [_summary(scores, judge.panel.sources) for scores in judge.many(points, progress=tell, stage="plane")]
    table = np.array(rows).reshape(len(v), len(u), -1)
    sizes = judge.panel.sizes
    return Surface(
        plane, u, v, table[..., 0], table[..., 2], table[..., 1], table[..., 3], np.moveaxis(table[..., 4:], -1, 0),
        subject.names, marks, judge.panel.part, sum(sizes), judge.panel.seed, judge.batchnorm, judge.path,
    )  # fmt: skip


def _rectangle(feet: Floats, grid: int, margin: float) -> tuple[Floats, Floats]:
    low, high = feet.min(axis=0), feet.max(axis=0)
    reach = margin * float((high - low).max())
    low, high = low - reach, high + reach
    sides = high - low
    counts = np.maximum(3, np.round((grid - 1) * sides / sides.max()).astype(int) + 1)
    return np.linspace(low[0], high[0], counts[0]), np.linspace(low[1], high[1], counts[1])


def _mark(
    judge: Evaluator, plane: Plane, name: str, kind: str, vector: Tensor, foot: Floats, tell: Progress
) -> Mark:  # fmt: skip
    there, below = judge.many((vector, plane.point(*foot)), progress=tell, stage="marked points")
    loss, loss_se, error, error_se, *_ = _summary(there, judge.panel.sources)
    distance = float(plane.distances(vector[None])[0])
    size = shared_size(judge.subject)
    away = float((vector - judge.subject.base)[:size].double().norm())
    relative = distance / away if away > 0.0 else 0.0
    u, v = float(foot[0]), float(foot[1])
    return Mark(name, kind, u, v, distance, relative, loss, loss_se, error, error_se, below.mean_loss())  # type: ignore[arg-type]


def _summary(scores: Scores, sources: Sequence[NDArray[np.int64] | None]) -> list[float]:
    """Joint loss and error with standard errors over images, then each task's loss."""
    out: list[float] = []
    for table in (scores.loss, scores.error):
        values = list(table.values())
        out += [float(np.mean([one.mean() for one in values])), standard_error(values, sources)]
    return out + [float(values.mean()) for values in scores.loss.values()]
