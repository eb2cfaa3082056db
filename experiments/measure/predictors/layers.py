"""Predictions for coefficients per layer: linearised layer by layer, and quadratic in the whole with linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from experiments.measure.predictors.predictor import Predictor
from experiments.measure.predictors.statistics import FieldStatistics
from theory.errors import MergeboundError
from theory.function_space import AnyField, Array, Labels, LogitField, secant, tangent

Anchor = Literal["base", "own", "average", "between"]


def layer_fields(statistics: FieldStatistics, kind: str) -> list[LogitField]:
    """Logit fields over the N L coefficients (expert by expert, layer by layer), one per task: convex prices.

    Args:
        kind: ``tangent_base``, ``tangent_own``, ``tangent_average`` or ``tangent_between`` (first order at that
            anchor), or ``secant_layers`` (chords to the base plus one layer of one task vector).

    Raises:
        MergeboundError: it was not collected, or is not layered.
    """
    size, depth = statistics.size, statistics.depth
    found = []
    for j, labels in enumerate(statistics.labels):
        table = statistics.layered(kind, j)
        if kind == "secant_layers":
            found.append(secant(statistics.base_logits(j), table, labels))
            continue
        anchors = {
            "tangent_base": (statistics.base_logits(j), np.zeros(size)),
            "tangent_own": (statistics.own_logits(j), np.eye(size)[j]),
        }
        if kind in ("tangent_average", "tangent_between"):
            value = statistics.of(kind.removeprefix("tangent_"), j)[0]
            anchors[kind] = (value, np.full(size, (1.0 if kind == "tangent_average" else 0.5) / size))
        if kind not in anchors:
            raise MergeboundError(f"kind = {kind!r}: choose secant_layers or one of the tangents")
        value, alpha = anchors[kind]
        found.append(tangent(value, table, labels, np.repeat(alpha, depth)))
    return found


@dataclass(frozen=True)
class LayeredField:
    """A field of the whole model at each expert's mean coefficient, and first order in how layers differ from it.

    ``h(alpha) = whole(mean_l alpha_il) + sum_il (alpha_il - mean) J(a) Delta_il``: equal coefficients in all layers are
    priced as the whole model's predictor prices them.

    Attributes:
        whole: over N coefficients.
        products: J(a) Delta_il, (N L, n, C).
        shares: of the layers in the mean, (N, L).
    """

    whole: AnyField
    products: Array
    shares: Array

    @property
    def labels(self) -> Labels:
        """True classes, (n,)."""
        return self.whole.labels

    @property
    def slopes(self) -> Array:
        """Derivatives by each coefficient at the base, (N L, n, C)."""
        return self.slopes_at(np.zeros(self.shares.size))

    def mean(self, alpha: npt.ArrayLike) -> Array:
        """Mean coefficients (..., N) of alpha (..., N L)."""
        a = np.asarray(alpha, dtype=np.float64)
        if a.shape[-1:] != (self.shares.size,) or not np.isfinite(a).all():
            raise MergeboundError(f"alpha has shape {a.shape} or is not finite: give {self.shares.size} numbers")
        return np.asarray((a.reshape(*a.shape[:-1], *self.shares.shape) * self.shares).sum(axis=-1))

    def at(self, alpha: npt.ArrayLike) -> Array:
        """Logits at the coefficients ``alpha`` of shape (..., N L): shape (..., n, C)."""
        a, mean = np.asarray(alpha, dtype=np.float64), self.mean(alpha)
        apart = a - np.repeat(mean, self.shares.shape[1], axis=-1)
        return np.asarray(self.whole.at(mean) + np.tensordot(apart, self.products, axes=1))

    def slopes_at(self, alpha: Array) -> Array:
        """Derivatives at one coefficient vector (N L,): (N L, n, C)."""
        size, depth = self.shares.shape
        layered = self.products.reshape(size, depth, *self.products.shape[1:])
        common = self.whole.slopes_at(self.mean(alpha)) - layered.sum(axis=1)
        shared = self.shares[..., None, None] * common[:, None]
        return np.asarray((layered + shared).reshape(self.products.shape))


def layered_fields(predictor: Predictor, statistics: FieldStatistics, anchor: Anchor = "base") -> list[LayeredField]:
    """A whole-model predictor for coefficients per layer, one field per task.

    Raises:
        MergeboundError: what it needs, or the products at the anchor, were not collected.
    """
    shares = statistics.shares()
    pairs = enumerate(predictor.fields(statistics))
    return [LayeredField(whole, statistics.layered(f"tangent_{anchor}", j), shares) for j, whole in pairs]
