"""Logits and logit Jacobian products of a group of experts, layer by layer, and the coefficients they lead to.

    h_j(x_0 + sum_il alpha_il Delta_il)  ~  h_j(x_0) + sum_il alpha_il J_j(x_0) Delta_il,

where ``Delta_il`` is expert i's task vector in layer l and zero elsewhere: one Jacobian product per task, expert and
layer prices every choice of per-layer coefficients.  With a single layer it is the statistics of the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from experiments.measure.backbone import CHUNK_IMAGES, Backbone, Readout
from merging.layers import layers_of
from merging.statistics import Coefficients
from merging.variances import stays_in_hull
from theory.certificate import gauss_newton_form
from theory.curvature import CurvatureModel, minimise_curvature, positive_part
from theory.errors import MergeboundError
from theory.function_space import (
    Array,
    Labels,
    LogitField,
    Optimum,
    combine,
    cross_entropy,
    minimise_risk,
    secant,
    tangent,
)

Anchor = Literal["base", "own"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerGroup:
    """Tensors that share coefficients: ``name`` for people, and the tensors' names."""

    name: str
    tensors: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """Regular expression that matches these tensors and no others."""
        return "|".join(re.escape(tensor) for tensor in self.tensors)


def whole_model(names: Iterable[str]) -> tuple[LayerGroup, ...]:
    """All tensors in one group."""
    return (LayerGroup("all", tuple(names)),)


def by_layer(names: Iterable[str]) -> tuple[LayerGroup, ...]:
    """One group per repeated block, and one each for what comes before and after them, in the order of depth."""
    ordered = tuple(names)
    layers = layers_of(ordered)
    groups: dict[tuple[float, str], list[str]] = {}
    for name in ordered:
        index = layers.index[name]
        if index is not None:
            key = (float(index), f"layer {index}")
        else:
            key = (-1.0, "before the layers") if layers.depth(name) < 0.5 else (float(layers.count), "after the layers")
        groups.setdefault(key, []).append(name)
    return tuple(LayerGroup(label, tuple(members)) for (_, label), members in sorted(groups.items()))


def by_tensor(names: Iterable[str]) -> tuple[LayerGroup, ...]:
    """One group per tensor."""
    return tuple(LayerGroup(name, (name,)) for name in names)


@dataclass(frozen=True)
class LayerStatistics:
    """What coefficients are solved from, for N tasks with an expert each and L layers; tuples run over the tasks.

    Attributes:
        experts: names.
        groups: the layers.
        labels: (n,) true classes of task j's images.
        base_logits: h_j(x_0), (n, C).
        expert_logits: h_j(x_i), (N, n, C).
        base_products: J_j(x_0) Delta_il, (N, L, n, C); empty tuple if not collected.
        own_products: J_j(x_j) Delta_il, (N, L, n, C); empty tuple if not collected.
    """

    experts: tuple[str, ...]
    groups: tuple[LayerGroup, ...]
    labels: tuple[Labels, ...]
    base_logits: tuple[Array, ...]
    expert_logits: tuple[Array, ...]
    base_products: tuple[Array, ...] = ()
    own_products: tuple[Array, ...] = ()

    @property
    def size(self) -> int:
        """Number of experts N."""
        return len(self.experts)

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return len(self.groups)

    def tensors(self) -> list[str]:
        """Names of all tensors of all layers."""
        return [name for group in self.groups for name in group.tensors]

    def own_logits(self, j: int) -> Array:
        """h_j(x_j), (n, C)."""
        return np.asarray(self.expert_logits[j][j])

    def centre(self, j: int) -> Array:
        """The coefficients of expert j, (N L,): one in all of its layers, zero for the others."""
        return np.repeat(np.eye(self.size)[j], self.depth)

    def tangents(self, anchor: Anchor = "base") -> list[LogitField]:
        """Logit fields over the N L coefficients (expert by expert), one per task.

        Raises:
            MergeboundError: the products at that anchor were not collected.
        """
        products = self._products(anchor)
        fields = []
        for j, y in enumerate(self.labels):
            if anchor == "base":
                fields.append(tangent(self.base_logits[j], products[j], y))
            else:
                fields.append(tangent(self.own_logits(j), products[j], y, self.centre(j)))
        return fields

    def secants(self) -> list[LogitField]:
        """Chords to the experts, over N coefficients.

        Raises:
            MergeboundError: there are several layers, whose chords were not collected.
        """
        if self.depth > 1:
            raise MergeboundError("secants have one coefficient per expert: choose the objective tangent for layers")
        parts = zip(self.base_logits, self.expert_logits, self.labels, strict=True)
        return [secant(base, logits, y) for base, logits, y in parts]

    def curvatures(self, anchors: Sequence[Anchor] = ("own",)) -> list[CurvatureModel]:
        """Gauss-Newton models of each task's risk at the anchors ``"own"`` (x_j) and ``"base"`` (x_0).

        Raises:
            MergeboundError: no anchor, or products that were not collected.
        """
        if not anchors:
            raise MergeboundError("a curvature model needs an anchor: choose own, base, or both")
        found = []
        for j, y in enumerate(self.labels):
            logits = {"own": self.own_logits(j), "base": self.base_logits[j]}
            forms = [positive_part(gauss_newton_form(logits[a], self._products(a)[j])) for a in anchors]
            own = float(cross_entropy(self.own_logits(j), y).mean())
            found.append(CurvatureModel(own, np.stack(forms), self.centre(j)))
        return found

    def _products(self, anchor: Anchor) -> list[Array]:
        found = self.base_products if anchor == "base" else self.own_products
        if not found:
            raise MergeboundError(f"the Jacobian products at the {anchor} anchor were not collected: collect them too")
        return [products.reshape(self.size * self.depth, *products.shape[2:]) for products in found]

    def coefficients(self, optimum: Optimum) -> Coefficients:
        """A solution as what the merging methods take."""
        table = optimum.alpha.reshape(self.size, self.depth)
        groups = {group.pattern: tuple(map(float, table[:, l])) for l, group in enumerate(self.groups)}
        mean = tuple(map(float, table.mean(axis=1)))
        return Coefficients(mean, groups if self.depth > 1 else {}, self.experts)


def collect_layers(
    networks: Sequence[Backbone],
    readouts: Sequence[Readout],
    base: Tensor,
    experts: Sequence[Tensor],
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    *,
    groups: Sequence[LayerGroup] | None = None,
    anchors: Sequence[Anchor] = ("base",),
    names: Sequence[str] | None = None,
    batch: int = 256,
    progress: Progress | None = None,
) -> LayerStatistics:
    """Collect the statistics of one group of experts.

    Args:
        networks: features of each task as a function of the merged coordinates (all the same network if the heads are
            in ``readouts``).
        readouts: each task's head; ``Readout()`` where ``networks`` return logits.
        base, experts: x_0 and x_i, (P,).
        images, labels: calibration data of each task.
        groups: which tensors share a coefficient; default one group.
        anchors: where products are taken: N x L of them per task and anchor.
        names: of the experts.
        batch: images per pass.

    Raises:
        MergeboundError: groups that do not hold every tensor exactly once, or a layer of the network that has no
            forward-mode derivative.
    """
    space = networks[0].space
    chosen = tuple(whole_model(space.names) if groups is None else groups)
    if sorted(name for group in chosen for name in group.tensors) != sorted(space.names):
        raise MergeboundError("the groups do not hold every merged tensor exactly once: correct them")
    label = tuple(str(i) for i in range(len(experts))) if names is None else tuple(names)
    tell = progress or (lambda stage, done, total: None)
    total = len(networks) * (1 + len(anchors) * len(experts))
    place = dict(space.segments())
    base_logits, expert_logits = [], []
    products: dict[Anchor, list[Array]] = {anchor: [] for anchor in anchors}
    done = 0
    for j, (network, readout, x) in enumerate(zip(networks, readouts, images, strict=True)):
        parts = torch.split(x, min(batch, CHUNK_IMAGES))
        base_logits.append(_logits(network, readout, base, parts))
        expert_logits.append(np.stack([_logits(network, readout, vector, parts) for vector in experts]))
        done += 1
        tell("forward passes", done, total)
        for anchor in anchors:
            point = base if anchor == "base" else experts[j]
            rows = []
            for vector in experts:
                rows.append(_layers(network, readout, point, vector - base, parts, chosen, place))
                done += 1
                tell("Jacobian products", done, total)
            products[anchor].append(np.stack(rows))
    return LayerStatistics(
        label,
        chosen,
        tuple(y.numpy() for y in labels),
        tuple(base_logits),
        tuple(expert_logits),
        tuple(products.get("base", ())),
        tuple(products.get("own", ())),
    )


def _logits(network: Backbone, readout: Readout, vector: Tensor, parts: Sequence[Tensor]) -> Array:
    with torch.no_grad():
        return _wide(torch.cat([readout.logits(network.call(vector, part)) for part in parts]))


def _layers(
    network: Backbone,
    readout: Readout,
    point: Tensor,
    delta: Tensor,
    parts: Sequence[Tensor],
    groups: Sequence[LayerGroup],
    place: dict[str, slice],
) -> Array:
    """J(point) Delta_l for every layer l, (L, n, C)."""
    rows = []
    for group in groups:
        direction = torch.zeros_like(delta)
        for name in group.tensors:
            direction[place[name]] = delta[place[name]]
        try:
            found = [readout.products(network.products(point, direction[None], part))[0] for part in parts]
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise MergeboundError(
                f"the network has no forward-mode derivatives ({reason}): choose the objective secant"
            ) from error
        rows.append(_wide(torch.cat(found)))
    return np.stack(rows)


def _wide(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().cpu().numpy())


def risk_optimal_coefficients(
    statistics: LayerStatistics,
    objective: Literal["secant", "tangent", "middle"] = "tangent",
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    simplex: bool = False,
    hull: bool | None = None,
) -> tuple[Coefficients, Optimum]:
    """Coefficients that minimise the function-space prediction of the joint risk, per expert and layer.

    With layers, the solver starts at the best coefficients per expert, so that the prediction is never worse.  ``hull``
    (nonnegative, sum at most one in each layer) holds by default where there are running variances
    (:func:`merging.variances.stays_in_hull`).
    """
    hull = stays_in_hull(statistics.tensors(), hull, bounds) and not simplex
    if objective == "secant":
        fields = statistics.secants()
    elif objective == "tangent":
        fields = statistics.tangents()
    else:
        pairs = zip(statistics.secants(), statistics.tangents(), strict=True)
        fields = [combine(one, other) for one, other in pairs]
    start = None
    if statistics.depth > 1:
        together = [_together(field, statistics.depth) for field in fields]
        start = np.repeat(minimise_risk(together, bounds=bounds, simplex=simplex, hull=hull).alpha, statistics.depth)
    found = minimise_risk(fields, bounds=bounds, simplex=simplex, hull=hull, layers=statistics.depth, start=start)
    return statistics.coefficients(found), found


def _together(field: LogitField, depth: int) -> LogitField:
    """The same field with one coefficient per expert for all layers."""
    slopes = field.slopes.reshape(-1, depth, *field.slopes.shape[1:]).sum(axis=1)
    return LogitField(field.constant, slopes, field.labels, field.kind)


def curvature_optimal_coefficients(
    statistics: LayerStatistics,
    anchors: Sequence[Anchor] = ("own",),
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    simplex: bool = False,
    hull: bool | None = None,
) -> tuple[Coefficients, Optimum]:
    """Coefficients that minimise the curvature model of the joint risk, per expert and layer; ``hull`` as above."""
    hull = stays_in_hull(statistics.tensors(), hull, bounds) and not simplex
    found = minimise_curvature(
        statistics.curvatures(anchors), bounds=bounds, simplex=simplex, hull=hull, layers=statistics.depth
    )
    return statistics.coefficients(found), found
