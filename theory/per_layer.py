"""Coefficients per layer: flat and tabular forms, and maps between fields with many and with few coefficients.

A merge with L layers and N experts is ``x_0 + sum_il alpha_il Delta_il``, ``Delta_il`` being expert i's task vector in
layer l and zero elsewhere.  To the predictions these are K = N L directions, expert by expert: coefficient
``i * L + l``.  People write them as a table with one row per layer, (L, N); :func:`flatten` and :func:`unflatten` go
between the two.  Fewer coefficients (one per expert, one per block of layers, one for everything, some held fixed) are
affine maps of the full ones: :func:`reparametrise` and its named cases return an ordinary field over what is left.

*Trap:* a chord per layer, ``h(x_0 + Delta_il) - h(x_0)``, makes a field that does not pass through the experts: chords
of layers do not add up to the chord of the expert (:func:`layer_interaction`; to second order the difference is
``sum_{l < m} B_{il,im}``).  Tangents do add up.  :func:`layered_secant` passes through base and experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from theory.curvature import CurvatureModel
from theory.errors import MergeboundError
from theory.function_space import (
    Array,
    Field,
    Labels,
    LogitField,
    Optimum,
    QuadraticField,
    minimise_risk,
    predict_risk,
)
from theory.linearization_error import LogitCurvature


def flatten(table: npt.ArrayLike) -> Array:
    """Coefficients from one row per layer, (..., L, N), to the flat form (..., N L).

    >>> flatten([[1.0, 3.0], [2.0, 4.0]]).tolist()  # two layers (rows) of two experts
    [1.0, 2.0, 3.0, 4.0]
    """
    rows = np.asarray(table, dtype=np.float64)
    if rows.ndim < 2:
        raise MergeboundError(f"table has shape {rows.shape}, expected (layers, experts)")
    return np.ascontiguousarray(rows.swapaxes(-1, -2)).reshape(*rows.shape[:-2], -1)


def unflatten(alpha: npt.ArrayLike, layers: int) -> Array:
    """Coefficients from the flat form (..., N L) to one row per layer, (..., L, N).

    >>> unflatten([1.0, 2.0, 3.0, 4.0], layers=2).tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    """
    flat = np.asarray(alpha, dtype=np.float64)
    experts = _experts(flat.shape[-1] if flat.ndim else 0, layers)
    return np.ascontiguousarray(flat.reshape(*flat.shape[:-1], experts, layers).swapaxes(-1, -2))


def everywhere(alpha: npt.ArrayLike, layers: int) -> Array:
    """The flat form of coefficients (..., N) that are the same in every layer: (..., N L)."""
    return np.repeat(np.asarray(alpha, dtype=np.float64), layers, axis=-1)


def layered_tangent(anchor_logits: Array, products: Array, labels: Labels, anchor: Array | None = None) -> LogitField:
    """The tangent over N L coefficients.

    Args:
        anchor_logits: h_j(a), (n, C).
        products: J_j(a) Delta_il, (N, L, n, C).
        labels: (n,).
        anchor: coefficients of a, one row per layer, (L, N); default the base.

    >>> products = np.array([[[[1.0, 0.0]], [[2.0, 0.0]]]])  # one expert, two layers
    >>> layered_tangent(np.zeros((1, 2)), products, np.array([0])).at([1.0, 0.5]).tolist()
    [[2.0, 0.0]]
    """
    flat = _products(anchor_logits, products)
    constant = anchor_logits if anchor is None else anchor_logits - np.tensordot(flatten(anchor), flat, axes=1)
    return LogitField(constant, flat, labels, "tangent")


def layered_secant(
    base_logits: Array, expert_logits: Array, products: Array, labels: Labels, shares: npt.ArrayLike | None = None
) -> LogitField:
    """A field over N L coefficients that passes through the base and through every expert.

    Each layer moves along its tangent; what the tangents of all layers miss of the expert's chord is shared out, with
    weight ``shares`` to each layer:

        s_il = J_j Delta_il + shares_il (h_j(x_i) - h_j(x_0) - sum_m J_j Delta_im).

    Equal coefficients in all layers give the secant, whatever the shares.  *Estimated*.

    Args:
        base_logits: h_j(x_0), (n, C).
        expert_logits: h_j(x_i), (N, n, C).
        products: J_j(x_0) Delta_il, (N, L, n, C).
        labels: (n,).
        shares: (N, L), each row with sum one; default in proportion to the products' root mean square.

    >>> products = np.array([[[[1.0, 0.0]], [[2.0, 0.0]]]])  # one expert, two layers
    >>> field = layered_secant(np.zeros((1, 2)), np.array([[[4.0, 0.0]]]), products, np.array([0]))
    >>> field.at([1.0, 1.0]).round(9).tolist()  # all layers together: the expert
    [[4.0, 0.0]]
    """
    flat = _products(base_logits, products)
    experts, layers = products.shape[:2]
    if expert_logits.shape != (experts, *base_logits.shape):
        raise MergeboundError(f"expert_logits have shape {expert_logits.shape}, expected {experts} of the base's shape")
    if shares is None:
        size = np.sqrt((products**2).mean(axis=(-2, -1)))
        total = size.sum(axis=1, keepdims=True)
        part = np.where(total > 0.0, size / np.where(total > 0.0, total, 1.0), 1.0 / layers)
    else:
        part = np.asarray(shares, dtype=np.float64)
        if part.shape != (experts, layers) or not np.allclose(part.sum(axis=1), 1.0):
            raise MergeboundError(f"shares must be {experts} rows of {layers} numbers that sum to one")
    missed = expert_logits - base_logits - products.sum(axis=1)
    slopes = flat + (part[:, :, None, None] * missed[:, None]).reshape(flat.shape)
    return LogitField(base_logits, slopes, labels, "secant")


def layer_interaction(whole: LogitField, by_layer: LogitField) -> Array:
    """Chord of each expert minus the sum of the chords of its layers, (N, n, C): zero for tangents.

    Args:
        whole: secant over N coefficients.
        by_layer: secant over N L coefficients, from ``h(x_0 + Delta_il)``.
    """
    layers = _layers(len(by_layer.slopes), len(whole.slopes))
    return np.asarray(whole.slopes - by_layer.slopes.reshape(-1, layers, *whole.slopes.shape[1:]).sum(axis=1))


def reparametrise(field: LogitField, matrix: npt.ArrayLike, offset: npt.ArrayLike | None = None) -> LogitField:
    """The field over m coefficients beta with ``alpha = offset + matrix beta``: exact, and again affine.

    Args:
        field: over K coefficients.
        matrix: (K, m).
        offset: (K,), default zero.
    """
    A = np.asarray(matrix, dtype=np.float64)
    if A.ndim != 2 or len(A) != len(field.slopes):
        raise MergeboundError(f"matrix has shape {A.shape}, expected ({len(field.slopes)}, m): one row per coefficient")
    constant = field.constant if offset is None else field.at(offset)
    return LogitField(constant, np.tensordot(A.T, field.slopes, axes=1), field.labels, field.kind)


def collapse(field: Field, layers: int) -> Field:
    """The same field with one coefficient per expert for all its layers: N coefficients instead of N L.

    ``collapse(field, L).at(a)`` equals ``field.at(everywhere(a, L))``.
    """
    experts = _experts(len(field.slopes), layers)
    slopes = field.slopes.reshape(experts, layers, *field.slopes.shape[1:]).sum(axis=1)
    if isinstance(field, QuadraticField):
        squares = field.squares.reshape(experts, layers, *field.squares.shape[1:]).sum(axis=1)
        return QuadraticField(field.constant, slopes, squares, field.labels, field.kind)
    return LogitField(field.constant, slopes, field.labels, field.kind)


def tie_layers(field: LogitField, groups: Sequence[int]) -> LogitField:
    """Layers of one group share their coefficients: N G coefficients, expert by expert.

    Args:
        field: over N L coefficients.
        groups: group 0..G-1 of every layer, (L,).
    """
    experts = _experts(len(field.slopes), len(groups))
    return reparametrise(field, np.kron(np.eye(experts), _membership(groups)))


def untie_layers(alpha: npt.ArrayLike, groups: Sequence[int]) -> Array:
    """Coefficients (..., N G) of :func:`tie_layers` as coefficients of all layers, (..., N L)."""
    flat = np.asarray(alpha, dtype=np.float64)
    experts = _experts(flat.shape[-1], len(set(groups)))
    return np.asarray(flat @ np.kron(np.eye(experts), _membership(groups)).T)


def fix(field: LogitField, known: Mapping[int, float]) -> LogitField:
    """Some coefficients held at given values; a field over the others, in their order.

    >>> import numpy as np
    >>> field = LogitField(np.zeros((1, 2)), np.ones((3, 1, 2)), np.array([0]), "secant")
    >>> fix(field, {1: 0.5}).constant.tolist()
    [[0.5, 0.5]]
    """
    size = len(field.slopes)
    if any(not 0 <= index < size for index in known):
        raise MergeboundError(f"known names coefficients {sorted(known)}, but there are {size}, counted from 0")
    offset = np.zeros(size)
    offset[list(known)] = list(known.values())
    free = [index for index in range(size) if index not in known]
    return reparametrise(field, np.eye(size)[:, free], offset)


def one_layer(field: LogitField, layers: int, layer: int, others: npt.ArrayLike) -> LogitField:
    """Only one layer's coefficients free, (N,), the other layers held at ``others`` (L, N)."""
    flat = flatten(others)
    experts = _experts(len(field.slopes), layers)
    if flat.shape != (len(field.slopes),):
        raise MergeboundError(f"others has {flat.size} coefficients, expected {layers} rows of {experts}")
    if not 0 <= layer < layers:
        raise MergeboundError(f"layer = {layer}, expected 0..{layers - 1}")
    free = np.arange(experts) * layers + layer
    return fix(field, {int(i): float(flat[i]) for i in range(len(flat)) if i not in free})


def collapse_logit_curvature(curvature: LogitCurvature, layers: int) -> LogitCurvature:
    """Second derivatives between whole task vectors from those between their layers: ``sum_lm B_{il,km}``.

    Raises:
        MergeboundError: the mixed terms between layers were not collected (own terms of layers do not give those of
            the expert).
    """
    experts = _experts(curvature.size, layers)
    if curvature.mixed is None:
        if layers == 1:
            return curvature
        raise MergeboundError("mixed is missing: an expert's own term needs the mixed terms of its layers")
    index = np.arange(curvature.size)
    table = curvature.mixed.copy()
    table[index, index] = curvature.own
    shape = (experts, layers, experts, layers, *table.shape[2:])
    whole = table.reshape(shape).sum(axis=(1, 3))
    return LogitCurvature(whole[np.arange(experts), np.arange(experts)], whole)


def collapse_model(model: CurvatureModel, layers: int) -> CurvatureModel:
    """A curvature model with one coefficient per expert, for models centred at the same value in all layers.

    Raises:
        MergeboundError: the centre differs between the layers of an expert.
    """
    experts = _experts(len(model.centre), layers)
    centre = model.centre.reshape(experts, layers)
    if not (centre == centre[:, :1]).all():
        raise MergeboundError("centre differs between layers of an expert: it has no form with one coefficient each")
    shape = (len(model.forms), experts, layers, experts, layers)
    return CurvatureModel(model.own_risk, model.forms.reshape(shape).sum(axis=(2, 4)), centre[:, 0].copy())


@dataclass(frozen=True)
class LayeredOptimum:
    """Per-layer coefficients that minimise a prediction, next to the best with one coefficient per expert.

    Attributes:
        layered: over N L coefficients; ``layered.gap`` bounds its distance from the minimum.
        whole: the best with one coefficient per expert, over N.
        table: coefficients, one row per layer, (L, N).
        gain: predicted risk that the layers save, at least 0.
        tier: always ``"estimated"``.
    """

    layered: Optimum
    whole: Optimum
    table: Array
    gain: float
    tier: str = "estimated"


def minimise_per_layer(
    fields: Sequence[LogitField],
    layers: int,
    weights: npt.ArrayLike | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    simplex: bool = False,
    hull: bool = False,
    tolerance: float = 1e-7,
    max_iterations: int = 500,
) -> LayeredOptimum:
    """Minimise the prediction over N coefficients, then over N L from there: never worse, with a proven gap for each.

    Args:
        fields: one per task, over N L coefficients.
        layers: L.
        weights: p_j, default 1/N.
        bounds, simplex, hull: of every coefficient; simplex and hull hold in each layer.
        tolerance, max_iterations: of the solver.

    >>> products = np.array([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # the first layer helps, the second hurts
    >>> best = minimise_per_layer([layered_tangent(np.zeros((1, 2)), products, np.array([0]))], layers=2)
    >>> best.table.round(3).tolist(), best.gain > 0
    ([[1.0], [0.0]], True)
    """
    together = [collapse(field, layers) for field in fields]
    whole = minimise_risk(
        together,
        weights,
        bounds=bounds,
        simplex=simplex,
        hull=hull,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    start = everywhere(whole.alpha, layers)
    found = minimise_risk(
        fields,
        weights,
        bounds=bounds,
        simplex=simplex,
        hull=hull,
        layers=layers,
        start=start,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    if found.risk > whole.risk:
        lowest = found.risk - found.gap
        risk = float(predict_risk(fields, start, weights).risk)
        found = Optimum(start, risk, max(risk - lowest, 0.0), found.iterations)
    return LayeredOptimum(found, whole, unflatten(found.alpha, layers), max(whole.risk - found.risk, 0.0))


def _membership(groups: Sequence[int]) -> Array:
    names = sorted(set(groups))
    if names != list(range(len(names))):
        raise MergeboundError(f"groups = {list(groups)}: number the groups of layers 0, 1, 2, ... without holes")
    return np.eye(len(names))[list(groups)]


def _products(base: Array, products: Array) -> Array:
    if products.ndim != 4 or products.shape[2:] != base.shape:
        raise MergeboundError(f"products have shape {products.shape}, expected (experts, layers, *{base.shape})")
    return products.reshape(-1, *base.shape)


def _experts(size: int, layers: int) -> int:
    if layers < 1 or size < 1 or size % layers:
        raise MergeboundError(f"{size} coefficients cannot be spread over {layers} layers: give N times as many")
    return size // layers


def _layers(size: int, experts: int) -> int:
    if experts < 1 or size % experts:
        raise MergeboundError(f"{size} coefficients are not a multiple of {experts} experts")
    return size // experts
