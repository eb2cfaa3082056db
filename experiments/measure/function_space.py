"""Collecting the statistics of function-space prediction for one group of experts, and pricing merges with them.

For task j (its own head, its own calibration images) and experts i of the group:

* ``h_j(x_0)``, ``h_j(x_i)``: forward passes (the secant);
* ``J_j(x_0) Delta_i``, ``J_j(x_j) Delta_i``: Jacobian products (the tangents).

A merge is ``M = x_0 + sum_i alpha_i Delta_i + r``.  Linear methods have r = 0; for TIES and DARE alpha is the least-
squares projection on the task vectors and ``J r`` is one more Jacobian product per task and anchor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.measure.backbone import Backbone, Readout
from theory import certificate
from theory.function_space import (
    Array,
    Field,
    Labels,
    LogitField,
    combine,
    cross_entropy,
    joint_standard_error,
    predict_from_logits,
    secant,
    second_order_field,
    tangent,
    uniform_weights,
)

PREDICTORS = (
    "secant",
    "tangent_base",
    "tangent_expert",
    "tangent_both",
    "secant_tangent",
    "second_order",
)
"""Function-space predictors that price every coefficient vector from one collection."""


@dataclass(frozen=True)
class GroupStatistics:
    """What predictions need of N experts; tuples run over the tasks j = 1..N (task j is expert j's).

    Attributes:
        labels: (n,) true classes of task j's calibration images.
        base_logits: h_j(x_0), (n, C).
        expert_logits: h_j(x_i), (N, n, C).
        base_products: J_j(x_0) Delta_i, (N, n, C); empty tuple if not collected.
        own_products: J_j(x_j) Delta_i, (N, n, C); empty tuple if not collected.
        gram: inner products of the task vectors, (N, N).
        sources: names of the calibration images, (n,) per task, if tasks share some; see
            :func:`theory.function_space.joint_standard_error`.
    """

    labels: tuple[Labels, ...]
    base_logits: tuple[Array, ...]
    expert_logits: tuple[Array, ...]
    base_products: tuple[Array, ...]
    own_products: tuple[Array, ...]
    gram: Array
    sources: tuple[Labels, ...] | None = None

    @property
    def size(self) -> int:
        """Number of experts N."""
        return len(self.labels)

    def own_logits(self, j: int) -> Array:
        """h_j(x_j), (n, C)."""
        return np.asarray(self.expert_logits[j][j])

    def own_risks(self) -> Array:
        """Each expert's loss on its own calibration images, (N,)."""
        return np.array([cross_entropy(self.own_logits(j), self.labels[j]).mean() for j in range(self.size)])

    def base_risks(self) -> Array:
        """The base's loss under each expert's final head, (N,)."""
        return np.array([cross_entropy(h, y).mean() for h, y in zip(self.base_logits, self.labels, strict=True)])

    def fields(self, kind: str) -> Sequence[Field]:
        """Logit fields over alpha, one per task, of one of :data:`PREDICTORS`."""
        tasks = range(self.size)
        if kind == "secant":
            return [self._secant(j) for j in tasks]
        if kind == "tangent_base":
            return [self._tangent(j) for j in tasks]
        if kind == "tangent_expert":
            return [self._own_tangent(j) for j in tasks]
        if kind == "tangent_both":
            return [combine(self._tangent(j), self._own_tangent(j)) for j in tasks]
        if kind == "secant_tangent":
            return [combine(self._secant(j), self._tangent(j)) for j in tasks]
        return [second_order_field(self._secant(j), self._tangent(j)) for j in tasks]

    def _secant(self, j: int) -> LogitField:
        return secant(self.base_logits[j], self.expert_logits[j], self.labels[j])

    def _tangent(self, j: int) -> LogitField:
        return tangent(self.base_logits[j], self.base_products[j], self.labels[j])

    def _own_tangent(self, j: int) -> LogitField:
        return tangent(self.own_logits(j), self.own_products[j], self.labels[j], np.eye(self.size)[j])

    def available(self) -> tuple[str, ...]:
        """Predictors that the collected statistics allow."""
        base, own = bool(self.base_products), bool(self.own_products)
        needs = {
            "secant": True,
            "tangent_base": base,
            "tangent_expert": own,
            "tangent_both": base and own,
            "secant_tangent": base,
            "second_order": base,
        }
        return tuple(name for name in PREDICTORS if needs[name])


def collect(
    backbone: Backbone,
    base: Tensor,
    experts: Sequence[Tensor],
    readouts: Sequence[Readout],
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    base_tangent: bool = True,
    own_tangent: bool = True,
) -> GroupStatistics:
    """Collect the statistics of one group.

    Args:
        backbone: the network as a function of its merged coordinates.
        base: x_0, (P,).
        experts: x_i, each (P,).
        readouts: each expert's head.
        images, labels: calibration data of each expert's task.
        base_tangent, own_tangent: collect J_j(x_0) Delta_i and J_j(x_j) Delta_i as well (N^2 products each).
    """
    deltas = torch.stack([x - base for x in experts])
    base_logits, expert_logits, base_products, own_products = [], [], [], []
    for j, (readout, x) in enumerate(zip(readouts, images, strict=True)):
        base_logits.append(_numpy(readout.logits(backbone.features(base, x))))
        expert_logits.append(_numpy(torch.stack([readout.logits(backbone.features(vector, x)) for vector in experts])))
        if base_tangent:
            base_products.append(_numpy(readout.products(backbone.products(base, deltas, x))))
        if own_tangent:
            own_products.append(_numpy(readout.products(backbone.products(experts[j], deltas, x))))
    wide = deltas.double()
    return GroupStatistics(
        tuple(y.numpy() for y in labels),
        tuple(base_logits),
        tuple(expert_logits),
        tuple(base_products),
        tuple(own_products),
        (wide @ wide.T).numpy(),
    )


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy())


@dataclass(frozen=True)
class MergePoint:
    """A merge as predictions see it: M = x_0 + sum_i alpha_i Delta_i + r.

    Attributes:
        alpha: coefficients (of the projection, for non-linear methods), (N,).
        base_residual: J_j(x_0) r for each task, (n, C); ``None`` for linear merges.
        own_residual: J_j(x_j) r for each task; ``None`` for linear merges or if not collected.
        dispersion: V(M) = sum_j p_j |M - x_j|^2.
    """

    alpha: Array
    base_residual: tuple[Array, ...] | None
    own_residual: tuple[Array, ...] | None
    dispersion: float


@dataclass(frozen=True)
class Midpoint:
    """What was collected half-way between x_j and M, for each task j.

    Attributes:
        logits: h_j((x_j + M)/2), (n, C).
        products: J_j((x_j + M)/2) (M - x_j), (n, C).
    """

    logits: tuple[Array, ...]
    products: tuple[Array, ...]


def project(direction: Tensor, deltas: Tensor) -> tuple[Array, Tensor]:
    """Least-squares coefficients of M - x_0 on the task vectors and the residual r.

    Args:
        direction: M - x_0, (P,).
        deltas: (N, P).
    """
    wide, target = deltas.double(), direction.double()
    gram = wide @ wide.T
    alpha = torch.linalg.lstsq(gram, (wide @ target)[:, None], driver="gelsd").solution[:, 0]
    residual = (target - alpha @ wide).to(direction.dtype)
    return np.asarray(alpha.numpy()), residual


def predicted_logits(stats: GroupStatistics, merge: MergePoint, kind: str) -> list[Array]:
    """Predicted logits of the merge on every task, (n, C) each.

    The secant knows chords to the experts only, so it takes M at its projection on their span.  (Adding J(x_0) r to it
    was tried: where merging hurts, that first-order term overshoots by far and spoils the bracket.)
    """
    if kind == "tangent_both":
        return _mean(predicted_logits(stats, merge, "tangent_base"), predicted_logits(stats, merge, "tangent_expert"))
    if kind == "secant_tangent":
        return _mean(predicted_logits(stats, merge, "secant"), predicted_logits(stats, merge, "tangent_base"))
    logits = [field.at(merge.alpha) for field in stats.fields(kind)]
    residual = {"secant": None, "tangent_expert": merge.own_residual}.get(kind, merge.base_residual)
    return logits if residual is None else [h + r for h, r in zip(logits, residual, strict=True)]


def _mean(first: list[Array], second: list[Array]) -> list[Array]:
    return [0.5 * (a + b) for a, b in zip(first, second, strict=True)]


def price(
    stats: GroupStatistics, merge: MergePoint, midpoint: Midpoint | None = None, weights: Array | None = None
) -> dict[str, float]:
    """Every prediction and certificate of one merge.

    Returns:
        ``pred_<name>``: predicted joint risk (function space; curvature at the end-point, along the segment, gradient-
        aware; midpoint rule), ``cert_<name>``: what claims to be an upper bound (tier estimated), and
        ``se_secant``: standard error of the secant's risk from the calibration images.
    """
    p = uniform_weights(stats.size) if weights is None else weights
    labels = stats.labels
    out: dict[str, float] = {}
    logits = {kind: predicted_logits(stats, merge, kind) for kind in stats.available()}
    for kind, values in logits.items():
        prediction = predict_from_logits(values, labels, p)
        out[f"pred_{kind}"] = float(prediction.risk)
        if kind == "secant":
            losses = [cross_entropy(h, y) for h, y in zip(values, labels, strict=True)]
            out["se_secant"] = joint_standard_error(losses, stats.sources, p)
    own = stats.own_risks()
    if "tangent_base" in logits:
        centre, half = (
            logits["secant_tangent"],
            [0.5 * (t - s) for s, t in zip(logits["secant"], logits["tangent_base"], strict=True)],
        )
        out["cert_bracket"] = _joint(
            p, [certificate.remainder_bound(*c) for c in zip(centre, labels, half, strict=True)]
        )
    if "tangent_expert" not in logits:
        return out
    changes = [h - stats.own_logits(j) for j, h in enumerate(logits["tangent_expert"])]
    curvature = np.array([certificate.directional_curvature(stats.own_logits(j), c) for j, c in enumerate(changes)])
    out["pred_curvature_endpoint"] = float(certificate.curvature_risk(own, curvature, p))
    out["cert_output"] = _joint(p, [certificate.output_bound(f, c) for f, c in zip(own, changes, strict=True)])
    if midpoint is None:
        return out
    middle = np.array(
        [certificate.directional_curvature(h, c) for h, c in zip(midpoint.logits, midpoint.products, strict=True)]
    )
    largest = np.maximum(curvature, middle)
    slope = np.array([certificate.directional_slope(stats.own_logits(j), labels[j], c) for j, c in enumerate(changes)])
    out["pred_curvature_segment"] = float(certificate.curvature_risk(own, largest, p))
    out["pred_curvature_gradient"] = float(certificate.gradient_aware_risk(own, slope, largest, p))
    out["cert_curvature_segment"] = out["pred_curvature_segment"]
    remainder = [b - a for a, b in zip(changes, midpoint.products, strict=True)]
    out["cert_remainder"] = _joint(
        p,
        [
            certificate.remainder_bound(h, y, r)
            for h, y, r in zip(logits["tangent_expert"], labels, remainder, strict=True)
        ],
    )
    ends = [stats.own_logits(j) + c for j, c in enumerate(midpoint.products)]
    out["pred_midpoint"] = float(predict_from_logits(ends, labels, p).risk)
    return out


def _joint(weights: Array, per_task: Sequence[Array]) -> float:
    return float(np.dot(weights, [float(v) for v in per_task]))


def trivial(stats: GroupStatistics, merge: MergePoint) -> dict[str, float]:
    """Trivial predictors: what a prediction has to beat."""
    norms = np.sqrt(np.diag(stats.gram))
    cosines = stats.gram / np.maximum(np.outer(norms, norms), 1e-30)
    off = ~np.eye(stats.size, dtype=bool)
    mean_logits = [h.mean(axis=0) for h in stats.expert_logits]
    return {
        "trivial_expert_risk": float(stats.own_risks().mean()),
        "trivial_base_risk": float(stats.base_risks().mean()),
        "trivial_task_vector_norm": float(norms.mean()),
        "trivial_V": merge.dispersion,
        "trivial_cosine": float(cosines[off].mean()),
        "trivial_N": float(stats.size),
        "trivial_logit_mean": float(predict_from_logits(mean_logits, stats.labels).risk),
    }


def sweep(stats: GroupStatistics, alphas: Array, kinds: Sequence[str]) -> Mapping[str, Array]:
    """Predicted joint risk of many coefficient vectors (A, N), by predictor."""
    return {kind: predict_from_logits([f.at(alphas) for f in stats.fields(kind)], stats.labels).risk for kind in kinds}
