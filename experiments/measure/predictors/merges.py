"""Merges as predictors see them: coefficients on the task vectors, and a residual where a method is not linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.measure.layerwise import LayerGroup
from experiments.measure.predictors import products as passes
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.subject import Subject
from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.merge import merge_flat
from merging.method import Method
from merging.partition import is_variance
from merging.registry import get
from merging.variances import clamped_share, zero_share
from theory.errors import MergeboundError
from theory.function_space import Array

Projection = Literal["parameters", "function"]
_RIDGE = 1e-6


@dataclass(frozen=True)
class Merge:
    """A merge that is to be predicted: coefficients, a method with its settings, or a merged vector.

    Attributes:
        label: for people; default the method with its settings, or the coefficients.
        alpha: (N,), or by layer (N, L).
        method: a name of :func:`merging.registry.methods`.
        settings: of the method, with ``coefficients`` where it takes them.
        vector: M, (P,), for what no registered method makes.
    """

    label: str = ""
    alpha: npt.ArrayLike | None = None
    method: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    vector: Tensor | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("alpha", "method", "vector") if getattr(self, name) is not None]
        if len(given) != 1:
            raise MergeboundError(
                f"a merge is given by alpha, by a method or by its vector: {', '.join(given) or 'none'} were given"
            )
        if not self.label:
            object.__setattr__(self, "label", self._named())

    def _named(self) -> str:
        if self.method is not None:
            shown = ", ".join(f"{key}={value}" for key, value in self.settings.items())
            return f"{self.method}({shown})" if shown else self.method
        if self.alpha is not None:
            return "alpha(" + ", ".join(f"{v:.4g}" for v in np.asarray(self.alpha, dtype=np.float64).ravel()) + ")"
        return "vector"


@dataclass(frozen=True)
class Formed:
    """A merge ``M = x_0 + sum_il alpha_il Delta_il + r``.

    Attributes:
        label, method: as asked for; ``method`` is empty for coefficients and vectors.
        layers: alpha by layer, (N, L); least squares where the method is not linear.
        residual: r, (P,); ``None`` for linear merges.
        explained: share of ``|M - x_0|^2`` on the span of the task vectors; 1 for linear merges.
        clamped: share of BatchNorm's running variances that become negative, which merging sets to zero
            (:func:`merging.variances.clamped_share`): above 0 no prediction holds.
    """

    label: str
    method: str
    layers: Array
    residual: Tensor | None
    explained: float
    clamped: float = 0.0

    def alpha(self, shares: Array) -> Array:
        """One coefficient per expert, (N,): the mean over layers by their share of the task vector's squared length."""
        return np.asarray((self.layers * shares).sum(axis=1))


def form(subject: Subject, merge: Merge, groups: Sequence[LayerGroup], seed: int = 0) -> Formed:
    """The coefficients of a merge, and its residual where it has one.

    Args:
        subject: base and experts.
        merge: what is asked for.
        groups: layers that may have coefficients of their own.
        seed: for methods that draw random numbers.

    Raises:
        MergeboundError: coefficients of another shape, a method that needs statistics of data, or settings outside
            their domain.
    """
    if merge.alpha is not None:
        table = np.asarray(merge.alpha, dtype=np.float64)
        if table.shape == (subject.size,):
            table = np.repeat(table[:, None], len(groups), axis=1)
        if table.shape != (subject.size, len(groups)) or not np.isfinite(table).all():
            raise MergeboundError(
                f"{merge.label}: coefficients of shape {table.shape}; give {subject.size} finite numbers, or "
                f"({subject.size}, {len(groups)}) by layer"
            )
        return Formed(merge.label, "", table, None, 1.0, _clamped(subject, groups, table))
    if merge.method is not None:
        method = get(merge.method)
        linear = linear_alpha(method, merge.settings, subject.names)
        if linear is not None:
            table = np.repeat(linear[:, None], len(groups), axis=1)
            return Formed(merge.label, merge.method, table, None, 1.0, _clamped(subject, groups, table))
    vector = merged_vector(subject, merge, seed)
    layers, residual = project(subject, vector - subject.base, groups)
    length = float((vector - subject.base).double().square().sum())
    explained = 1.0 - float(residual.double().square().sum()) / length if length > 0.0 else 1.0
    clamped = zero_share(subject.networks[0].space, subject.base, vector, subject.deltas)
    return Formed(merge.label, merge.method or "", layers, residual, explained, clamped)


def _clamped(subject: Subject, groups: Sequence[LayerGroup], table: Array) -> float:
    """The share of running variances that coefficients (N, L) make negative, each with those of its layer."""
    space = subject.networks[0].space
    layer = {name: number for number, group in enumerate(groups) for name in group.tensors}
    variances = [(layer[name], p.stop - p.start) for name, p in space.segments() if is_variance(name)]
    columns = [np.repeat(table[:, [number]], size, axis=1) for number, size in variances]
    if not columns:
        return 0.0
    return clamped_share(space, subject.base, subject.deltas, np.concatenate(columns, axis=1))


def merged_vector(subject: Subject, merge: Merge, seed: int = 0) -> Tensor:
    """M itself, (P,), with BatchNorm's variances kept nonnegative: what evaluating a merge starts from.

    Raises:
        MergeboundError: a method that needs statistics of data, settings outside their domain, or shapes that do not
            fit.
    """
    if merge.vector is not None:
        if merge.vector.shape != subject.base.shape:
            raise MergeboundError(
                f"{merge.label}: the vector has shape {tuple(merge.vector.shape)}, expected {tuple(subject.base.shape)}"
            )
        return merge.vector
    if merge.alpha is not None:
        from experiments.measure.predictors.collect import point_at

        return point_at(subject, np.asarray(merge.alpha, dtype=np.float64))
    assert merge.method is not None
    method = get(merge.method)
    if method.needs_data and not set(method.extras) <= set(merge.settings):
        raise MethodError(
            f"method '{method.name}' needs statistics of data: give them as settings, or the merged vector"
        )
    network = subject.networks[0]
    return merge_flat(
        method,
        subject.base,
        subject.deltas,
        network.space,
        network.partition,
        names=subject.names,
        seed=seed,
        **dict(merge.settings),
    )


def linear_alpha(method: Method, settings: Mapping[str, Any], names: Sequence[str]) -> Array | None:
    """alpha of a linear method, (N,): what it does to N unit vectors; ``None`` where it is not linear, or has settings
    per layer."""
    if not method.linear or any(name in settings for name in method.extras):
        return None
    size = len(names)
    given = dict(settings)
    coefficients = given.pop("coefficients", None)
    filled = method.settings(given)
    if coefficients is not None:
        if isinstance(coefficients, Mapping):
            coefficients = [coefficients[name] for name in names]
        filled["coefficients"] = tuple(float(v) for v in coefficients)
    elif method.coefficients == "required":
        raise MethodError(
            f"method '{method.name}' needs coefficients: add coefficients=({size} numbers) to its settings"
        )
    space = FlatSpace(("unit",), ((size,),), (0, size), torch.float64)
    rows = list(torch.eye(size, dtype=torch.float64))
    return np.asarray(method.on_rows(rows, space, **filled).numpy())


def project(subject: Subject, update: Tensor, groups: Sequence[LayerGroup]) -> tuple[Array, Tensor]:
    """Least-squares coefficients of ``M - x_0`` on the task vectors, layer by layer, and the residual.

    Args:
        update: M - x_0, (P,).
        groups: L layers that hold every merged tensor once.

    Returns:
        alpha (N, L), and r (P,), orthogonal to every ``Delta_il``.
    """
    place = dict(subject.networks[0].space.segments())
    table = np.zeros((subject.size, len(groups)))
    residual = update.clone()
    for l, group in enumerate(groups):
        gram = np.zeros((subject.size, subject.size))
        target = np.zeros(subject.size)
        for name in group.tensors:
            piece = place[name]
            part = (subject.vectors[:, piece] - subject.base[piece]).double()
            gram += (part @ part.T).cpu().numpy()
            target += (part @ update[piece].double()).cpu().numpy()
        table[:, l] = np.linalg.lstsq(gram, target, rcond=None)[0]
        weights = torch.as_tensor(table[:, l], dtype=torch.float64)
        for name in group.tensors:
            piece = place[name]
            part = (subject.vectors[:, piece] - subject.base[piece]).double()
            residual[piece] = (update[piece].double() - weights @ part).to(update.dtype)
    return table, residual


def residual_products(
    subject: Subject, statistics: FieldStatistics, residual: Tensor, anchor: str, batch: int = 128
) -> list[Array]:
    """J_j(a) r on the calibration images of every task, (n_j, C_j) each; a is the base, the own expert or the average.

    Raises:
        MergeboundError: a layer of the network that has no forward-mode derivative.
    """
    found = []
    for j, network in enumerate(subject.networks):
        point = {"base": subject.base, "own": subject.vectors[j]}.get(anchor)
        if point is None:
            point = subject.vectors.mean(dim=0)
        images = subject.calibration[j].images[: statistics.images[j]]
        try:
            rows = [passes.products(network, point, residual[None], part)[0] for part in torch.split(images, batch)]
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            raise MergeboundError(
                f"the network has no forward-mode derivatives ({reason}): choose residual = none"
            ) from error
        found.append(np.array(torch.cat(rows).cpu().numpy(), dtype=np.float64))
    return found


def function_projection(products: Array, target: Array) -> tuple[Array, Array]:
    """Coefficients whose logit change is closest to a given one: least squares over images and classes.

    Args:
        products: J Delta_i, (N, n, C).
        target: J (M - x_0), (n, C).

    Returns:
        alpha (N,), and what it leaves of the target, (n, C).  Constants over the classes do not count; a small ridge
        keeps alpha finite where products are dependent.
    """
    rows = products - products.mean(axis=-1, keepdims=True)
    wanted = target - target.mean(axis=-1, keepdims=True)
    flat = rows.reshape(len(rows), -1)
    gram = flat @ flat.T
    gram += _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    alpha = np.linalg.lstsq(gram, flat @ wanted.ravel(), rcond=None)[0]
    return alpha, target - np.tensordot(alpha, products, axes=1)
