"""Gram matrices of task vectors in each task's curvature: Q_j[i, k] = Delta_i' H_j(s) Delta_k, global and per layer.

One collection prices every choice of coefficients (theory.md section 8, curvature prediction): N Jacobian products per
task and anchor for the Gauss-Newton matrix, N Hessian products for the Hessian, times L for per-layer coefficients
(for which the Hessian still needs N L products).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from experiments.measure.curvature.gram_forms import (
    BLOCKS,
    Anchor,
    Array,
    Progress,
    anchor_point,
    gram_forms,
    image_blocks,
)
from experiments.measure.curvature.number import Number, over_blocks
from experiments.measure.curvature.operators import Kind, check_kind
from experiments.measure.curvature.risk import BATCH, Part, task_risk
from experiments.measure.layerwise import LayerGroup
from experiments.measure.subject import Subject
from merging.statistics import Coefficients
from merging.variances import stays_in_hull
from theory.curvature import CurvatureModel, minimise_curvature, positive_part, predict_curvature
from theory.errors import MergeboundError
from theory.function_space import Optimum, uniform_weights
from theory.laws import best_lambda

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class GramPrediction:
    """R^ of coefficients: ``value`` and its ``standard_error`` over images, (...), in nats.

    The error says how much other images would change the prediction, not how far the quadratic model is off.
    """

    value: Array
    standard_error: Array
    seed: int
    tier: str = "estimated"

    def number(self) -> Number:
        """The one prediction with its 95 % interval.

        Raises:
            MergeboundError: there are several.
        """
        if self.value.size != 1:
            raise MergeboundError(f"{self.value.size} predictions have no single number; take value and standard_error")
        covers = "images (95 %), not the model's error"
        return Number.normal(self.value.item(), self.standard_error.item(), covers, self.seed)


@dataclass(frozen=True, eq=False)
class CurvatureGram:
    """Forms over K = N L coefficients, expert by expert (coefficient ``i L + l``), for N tasks.

    Attributes:
        experts: names.
        groups: the L layers.
        anchors: names.
        blocks: for each task, means over the images of each block, (anchors, blocks, K, K), symmetric, not clipped.
        sizes: for each task, images per block.
        own: for each task, the mean loss of expert j itself on each block, (blocks,).
        kind: which curvature.
        seed: of the images' draw (and of sampled labels).
        tier: of every number.
    """

    experts: tuple[str, ...]
    groups: tuple[LayerGroup, ...]
    anchors: tuple[str, ...]
    blocks: tuple[Array, ...]
    sizes: tuple[tuple[int, ...], ...]
    own: tuple[Array, ...]
    kind: str
    seed: int
    tier: str = "estimated"

    @property
    def size(self) -> int:
        """Number of experts N."""
        return len(self.experts)

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.groups)

    def forms(self, task: int) -> Array:
        """Q_j at each anchor, (anchors, K, K), as measured: an indefinite Hessian stays indefinite."""
        return self._means(task)[0]

    def errors(self, task: int) -> Array:
        """Standard errors of :meth:`forms` over images, (anchors, K, K)."""
        return self._means(task)[1]

    def _means(self, task: int, without: int | None = None) -> tuple[Array, Array]:
        values, sizes = np.moveaxis(self.blocks[task], 1, 0), np.asarray(self.sizes[task])
        if without is not None:
            values, sizes = np.delete(values, without, axis=0), np.delete(sizes, without)
        return over_blocks(values, [int(s) for s in sizes])

    def clipped(self, task: int) -> Array:
        """The nearest positive semidefinite matrices, (anchors, K, K): eigenvalues of the matrix clipped at zero."""
        return np.stack([positive_part(form) for form in self.forms(task)])

    def negative_share(self, task: int) -> Array:
        """What clipping takes away: sum of negative eigenvalues over sum of magnitudes, (anchors,); 0 for PSD."""
        values = np.linalg.eigvalsh(self.forms(task))
        return np.asarray(np.abs(values.clip(max=0.0)).sum(axis=1) / np.maximum(np.abs(values).sum(axis=1), 1e-300))

    def own_risk(self, task: int) -> Number:
        """F_j(x_j) with a 95 % interval over images."""
        value, error = over_blocks(self.own[task], self.sizes[task])
        return Number.normal(float(value), float(error), "images (95 %)", self.seed)

    def models(self) -> list[CurvatureModel]:
        """What ``theory.curvature`` takes: one clipped model per task."""
        return [self._model(j) for j in range(self.size)]

    def _model(self, task: int, without: int | None = None) -> CurvatureModel:
        forms = np.stack([positive_part(form) for form in self._means(task, without)[0]])
        own, sizes = self.own[task], np.asarray(self.sizes[task], dtype=np.float64)
        keep = np.arange(len(own)) != (-1 if without is None else without)
        risk = float(own[keep] @ sizes[keep] / sizes[keep].sum())
        return CurvatureModel(risk, forms, np.repeat(np.eye(self.size)[task], self.depth))

    def predict(self, alpha: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> GramPrediction:
        """R^ and its standard error over images (delete-a-block jackknife, task by task) at coefficients.

        Args:
            alpha: (..., N), or (..., N L) expert by expert.
            weights: p_j, default 1/N.

        Raises:
            MergeboundError: coefficients of another number.
        """
        a = self._expand(alpha)
        p = uniform_weights(self.size) if weights is None else np.asarray(weights, dtype=np.float64)
        models = self.models()
        variance = np.zeros(a.shape[:-1])
        for j, weight in enumerate(p):
            count = len(self.sizes[j])
            if count < 2:
                variance = np.full(a.shape[:-1], np.nan)
                break
            left = np.stack([predict_curvature([self._model(j, b)], a) for b in range(count)])
            variance += weight**2 * (count - 1) / count * ((left - left.mean(axis=0)) ** 2).sum(axis=0)
        return GramPrediction(predict_curvature(models, a, p), np.sqrt(variance), self.seed)

    def optimal(
        self,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        simplex: bool = False,
        hull: bool | None = None,
        weights: npt.ArrayLike | None = None,
    ) -> tuple[Coefficients, Optimum]:
        """Coefficients that minimise R^, as the merging method ``curvature_optimal`` takes them, and the solution.

        ``hull`` (nonnegative, sum at most one in each layer) holds by default where there are running variances
        (:func:`merging.variances.stays_in_hull`).
        """
        inside = stays_in_hull([name for group in self.groups for name in group.tensors], hull, bounds) and not simplex
        found = minimise_curvature(
            self.models(), weights, bounds=bounds, simplex=simplex, hull=inside, layers=self.depth
        )
        table = found.alpha.reshape(self.size, self.depth)
        groups = {group.pattern: tuple(map(float, table[:, l])) for l, group in enumerate(self.groups)}
        default = tuple(map(float, table.mean(axis=1)))
        return Coefficients(default, groups if self.depth > 1 else {}, self.experts), found

    def best_scale(self, anchor: int = 0, weights: npt.ArrayLike | None = None) -> Number:
        """The coefficient of task arithmetic that these forms ask for (theory.md section 7, with cross terms).

        Its interval is a jackknife over images (the b-th block of every task is left out at once).

        Raises:
            AssumptionError: the summed task vector has no curvature under any task.
        """
        gram = self.together()

        def scale(without: int | None) -> float:
            forms = [positive_part(gram._means(j, without)[0][anchor]) for j in range(self.size)]
            return float(best_lambda(np.stack(forms), weights, cross_terms=True))

        count = min(len(sizes) for sizes in self.sizes)
        left = np.array([scale(b) for b in range(count)]) if count > 1 else np.full(1, np.nan)
        error = np.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum()) if count > 1 else np.nan
        return Number.normal(scale(None), float(error), "images (95 %)", self.seed)

    def together(self) -> CurvatureGram:
        """The same with one coefficient per expert: sums over layers."""
        shape = (self.size, self.depth, self.size, self.depth)
        blocks = tuple(b.reshape(*b.shape[:2], *shape).sum(axis=(3, 5)) for b in self.blocks)
        group = LayerGroup("all", tuple(name for group in self.groups for name in group.tensors))
        return replace(self, groups=(group,), blocks=blocks)

    def to_frame(self) -> pd.DataFrame:
        """One row per task, anchor and unordered pair of coefficients, with standard error and clipped value."""
        import pandas as pd

        labels = [(name, group.name) for name in self.experts for group in self.groups]
        rows = []
        for j, task in enumerate(self.experts):
            forms, errors, clipped = self.forms(j), self.errors(j), self.clipped(j)
            for s, anchor in enumerate(self.anchors):
                for a, (first, layer) in enumerate(labels):
                    for b, (second, other) in enumerate(labels[: a + 1]):
                        rows.append(
                            (
                                task,
                                anchor,
                                first,
                                layer,
                                second,
                                other,
                                forms[s, a, b],
                                errors[s, a, b],
                                clipped[s, a, b],
                            )
                        )
        names = ["task", "anchor", "expert", "layer", "other", "other_layer", "value", "standard_error", "clipped"]
        return pd.DataFrame(rows, columns=names).assign(kind=self.kind, tier=self.tier, seed=self.seed)

    def _expand(self, alpha: npt.ArrayLike) -> Array:
        a = np.asarray(alpha, dtype=np.float64)
        if a.shape[-1:] == (self.size,) and self.depth > 1:
            return np.repeat(a, self.depth, axis=-1)
        if a.shape[-1:] != (self.size * self.depth,):
            raise MergeboundError(
                f"alpha has shape {a.shape}: give {self.size} coefficients, or {self.size * self.depth} with layers"
            )
        return a


def curvature_gram(
    subject: Subject,
    *,
    anchors: Sequence[Anchor] = ("own",),
    kind: Kind = "gauss_newton",
    by: str = "all",
    part: Part = "calibration",
    images: int | None = None,
    batch: int = BATCH,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> CurvatureGram:
    """Measure Q_j at anchors, for every task.

    Memory: one batch with its graph, :data:`DIRECTIONS` directions (Hessian: N L products), and
    ``anchors x blocks x K^2`` numbers per task.

    Args:
        subject: base, experts, images.
        anchors: where; see :func:`anchor_point`.
        kind: ``gauss_newton`` (the default: positive semidefinite), ``hessian``, or one of the Fisher matrices.
        by: ``all``, ``layer`` or ``tensor``: which tensors share a coefficient.
        part, images, seed: which images of each task, and how many at most.
        batch: images at a time.
        dtype: of the derivatives; default the subject's.
        progress: told what was done.

    Raises:
        MergeboundError: unknown anchors, kind or grouping; images that are not there; outputs that are not finite.

    Source: theory.md section 8, curvature prediction.
    """
    check_kind(kind)
    if not anchors:
        raise MergeboundError("anchors: give at least one, as own")
    groups = subject.layers(by)
    places = [subject.columns(group) for group in groups]
    tell = progress or (lambda stage, done, total: None)
    names: tuple[str, ...] = ()
    blocks, sizes, owns = [], [], []
    for j in range(subject.size):
        risk = task_risk(subject, j, part=part, images=images, seed=seed, batch=batch, dtype=dtype)
        risk = replace(risk, batch=max(1, min(risk.batch, -(-len(risk) // BLOCKS))))
        cut = image_blocks(risk)
        losses = risk.losses(subject.vectors[j])
        owns.append(np.array([losses[rows].mean() for rows in cut]))
        sizes.append(tuple(rows.stop - rows.start for rows in cut))
        found, labels = [], []
        for anchor in anchors:
            label, point = anchor_point(subject, j, anchor)
            found.append(gram_forms(risk, point, subject.deltas, places, kind, cut, seed))
            labels.append(label)
            tell("curvature", j * len(anchors) + len(found), subject.size * len(anchors))
        names = tuple(labels)
        blocks.append(np.stack(found))
    return CurvatureGram(subject.names, groups, names, tuple(blocks), tuple(sizes), tuple(owns), kind, seed)
