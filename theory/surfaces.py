"""A predicted joint risk as a function of the merging coefficients, and the rules by which a subset is merged.

:class:`Surface` is what the queries of :mod:`theory.what_if` and :mod:`theory.subsets` are asked of: a function-space
or a curvature prediction from collected statistics; nothing is merged and nothing is evaluated.  Tier *estimated*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from theory.arguments import advised_fields
from theory.constrained import Polytope, coefficient_domain
from theory.convex import Minimum, minimise_over
from theory.curvature import CurvatureModel
from theory.errors import MergeboundError
from theory.function_space import Array, Field, LogitField, cross_entropy, risk_gradient, uniform_weights

Part = Field | CurvatureModel
Kind = Literal["average", "task_arithmetic", "optimal"]

_CHUNK = 4_000_000


@advised_fields
@dataclass(frozen=True)
class Surface:
    """A predicted joint risk ``sum_j p_j R_j(alpha)`` over K = N * layers coefficients, expert by expert.

    Attributes:
        parts: one per task: logit fields (function-space prediction) or curvature models.
        weights: p_j, (tasks,), nonnegative.
        layers: coefficients per expert.

    Raises:
        MergeboundError: no task, parts of different sizes or kinds, weights that do not fit.

    >>> import numpy as np
    >>> helps = LogitField(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 1.0]]]), np.array([0]), "secant")
    >>> values = Surface((helps,), np.ones(1)).risk([[1.0, 0.0], [0.0, 1.0]])
    >>> values.round(3).tolist()
    [0.127, 1.313]
    """

    parts: tuple[Part, ...]
    weights: Array
    layers: int = 1

    def __post_init__(self) -> None:
        if not self.parts:
            raise MergeboundError("parts is empty: give the statistics of at least one task")
        sizes = {_size(part) for part in self.parts}
        if len(sizes) != 1:
            raise MergeboundError(f"parts have {sorted(sizes)} coefficients: collect all tasks for the same experts")
        if len({isinstance(part, CurvatureModel) for part in self.parts}) != 1:
            raise MergeboundError("parts mix logit fields and curvature models: ask two surfaces instead")
        if self.layers < 1 or self.size % self.layers:
            raise MergeboundError(f"layers = {self.layers} does not divide the {self.size} coefficients")
        p = self.weights
        if p.shape != (len(self.parts),) or not (np.isfinite(p) & (p >= 0.0)).all():
            raise MergeboundError(f"weights has shape {p.shape}: give {len(self.parts)} nonnegative numbers")

    @property
    def size(self) -> int:
        """Number of coefficients K."""
        return _size(self.parts[0])

    @property
    def experts(self) -> int:
        """Number of experts N."""
        return self.size // self.layers

    @property
    def convex(self) -> bool:
        """Whether the prediction is convex in the coefficients (all kinds but fields that are quadratic in alpha)."""
        return all(isinstance(part, LogitField | CurvatureModel) for part in self.parts)

    def per_task(self, alpha: npt.ArrayLike) -> Array:
        """R_j at coefficients (..., K): (..., tasks)."""
        a = np.asarray(alpha, dtype=np.float64)
        if a.shape[-1:] != (self.size,):
            raise MergeboundError(f"alpha has shape {a.shape}, expected {self.size} coefficients")
        if not np.isfinite(a).all():
            raise MergeboundError("alpha holds values that are not finite: give one number per coefficient")
        flat = a.reshape(-1, self.size)
        rows = [_risks(part, flat) for part in self.parts]
        return np.stack(rows, axis=-1).reshape(*a.shape[:-1], len(self.parts))

    def risk(self, alpha: npt.ArrayLike) -> Array:
        """Predicted joint risk at coefficients (..., K): (...)."""
        return np.asarray(self.per_task(alpha) @ self.weights)

    def gradient(self, alpha: Array) -> tuple[float, Array]:
        """Predicted joint risk and a (sub)gradient at one coefficient vector (K,)."""
        fields = [part for part in self.parts if not isinstance(part, CurvatureModel)]
        if fields:
            return risk_gradient(fields, alpha, self.weights)
        value, slope = 0.0, np.zeros(self.size)
        for part, p in zip(self.parts, self.weights, strict=True):
            if isinstance(part, CurvatureModel):
                one, along = _curvature_gradient(part, alpha)
                value, slope = value + float(p) * one, slope + float(p) * along
        return value, slope

    def on_tasks(self, tasks: Iterable[int]) -> Surface:
        """The risk of some of the tasks, their weights rescaled to the same sum."""
        chosen = indices(tasks, len(self.parts), "task")
        p = self.weights[list(chosen)]
        if not chosen or p.sum() <= 0.0:
            raise MergeboundError(f"tasks = {list(chosen)} carry no weight: keep a task that counts")
        return replace(self, parts=tuple(self.parts[j] for j in chosen), weights=p * (self.weights.sum() / p.sum()))

    def require_convex(self, purpose: str) -> None:
        """Raise where the prediction is not convex."""
        if not self.convex:
            raise MergeboundError(
                f"{purpose} needs a convex prediction, and a field that is quadratic in alpha is none: use the secant "
                "or the tangent, or read the minimum off a curve"
            )


def risk_surface(parts: Sequence[Part], weights: npt.ArrayLike | None = None, layers: int = 1) -> Surface:
    """A :class:`Surface` with weights 1/N by default: the predicted joint risk, to be asked for minima and subsets.

    >>> helps = LogitField(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 1.0]]]), np.array([0]), "secant")
    >>> risk_surface([helps]).risk([1.0, 0.0]).round(3).tolist()
    0.127
    """
    p = uniform_weights(len(parts)) if weights is None and parts else np.asarray(weights, dtype=np.float64)
    return Surface(tuple(parts), p, layers)


@dataclass(frozen=True)
class MergingRule:
    """How a subset of experts is merged: :func:`averaging`, :func:`task_arithmetic`, :func:`optimal_coefficients`."""

    kind: Kind
    coefficient: float = 1.0
    bounds: tuple[float, float] = (0.0, 1.0)
    on_simplex: bool = False

    def domain(self, surface: Surface) -> Polytope:
        """Where the rule ``optimal`` looks for coefficients."""
        return coefficient_domain(surface.size, self.bounds, simplex=self.on_simplex, layers=surface.layers)

    def shared(self, members: int) -> float:
        """The coefficient of each of ``members`` experts under a rule that gives all the same."""
        return 1.0 / members if self.kind == "average" else self.coefficient


def averaging() -> MergingRule:
    """Each of k experts with coefficient 1/k.

    >>> averaging().shared(4)
    0.25
    """
    return MergingRule("average")


def task_arithmetic(coefficient: float) -> MergingRule:
    """Each expert with the same given coefficient lambda.

    >>> task_arithmetic(0.3).shared(4)
    0.3
    """
    if not np.isfinite(coefficient):
        raise MergeboundError(f"coefficient = {coefficient}: task arithmetic needs a number")
    return MergingRule("task_arithmetic", float(coefficient))


def optimal_coefficients(bounds: tuple[float, float] = (0.0, 1.0), *, on_simplex: bool = False) -> MergingRule:
    """Coefficients that minimise the prediction, in a box that contains 0, or on the simplex (layer by layer).

    >>> optimal_coefficients((-0.5, 1.5)).bounds
    (-0.5, 1.5)
    """
    if not on_simplex and not bounds[0] <= 0.0 <= bounds[1]:
        raise MergeboundError(f"bounds = {bounds}: an expert that is left out has coefficient 0, so include it")
    return MergingRule("optimal", bounds=bounds, on_simplex=on_simplex)


@dataclass(frozen=True)
class PredictedMerge:
    """A merge of some of the experts and its predicted risk.

    Attributes:
        experts: members, ascending.
        alpha: (K,), zero for the others.
        risk: predicted joint risk, in nats.
        gap: ``risk`` exceeds the best of what was searched (coefficients, subsets) by at most this.
        method: how it was searched.
        tier: always ``"estimated"``.
    """

    experts: tuple[int, ...]
    alpha: Array
    risk: float
    gap: float
    method: str
    tier: str = "estimated"


def predicted_merge(surface: Surface, rule: MergingRule, experts: Iterable[int]) -> PredictedMerge:
    """Merge exactly these experts; no expert is the base, alpha = 0.

    >>> helps = LogitField(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 1.0]]]), np.array([0]), "secant")
    >>> predicted_merge(risk_surface([helps]), averaging(), (0, 1)).alpha.tolist()
    [0.5, 0.5]
    """
    members = indices(experts, surface.experts, "expert")
    if not members:
        zero = np.zeros(surface.size)
        return PredictedMerge((), zero, float(surface.risk(zero)), 0.0, "base")
    if rule.kind != "optimal":
        alpha = coefficients_of(surface, rule, [members])[0]
        return PredictedMerge(members, alpha, float(surface.risk(alpha)), 0.0, rule.kind)
    surface.require_convex("optimal coefficients")
    found = minimise_on(surface, domain_without(surface, rule, set(range(surface.experts)) - set(members)))
    return PredictedMerge(members, found.point, found.value, found.gap, rule.kind)


def domain_without(surface: Surface, rule: MergingRule, outside: Iterable[int]) -> Polytope:
    """Where ``optimal`` looks when some experts stay out: their coefficients are 0 in every layer."""
    index = [i * surface.layers + l for i in outside for l in range(surface.layers)]
    return rule.domain(surface).holding(index, 0.0)


def minimise_on(
    surface: Surface,
    domain: Polytope,
    start: Array | None = None,
    *,
    tolerance: float = 1e-7,
    max_iterations: int = 200,
) -> Minimum:
    """Coefficients that minimise a convex prediction over any polytope: bounds, simplices, sums, budgets.

    Args:
        surface: function-space or curvature prediction, global or per layer.
        domain: over the K coefficients (:func:`theory.coefficient_box`, ``with_at_most`` and others).
        start: (K,).
        tolerance, max_iterations: see :func:`theory.convex.minimise_over`.

    Returns:
        ``value - gap`` is a proven lower bound of the prediction on the domain.

    >>> import numpy as np
    >>> from theory.constrained import coefficient_box
    >>> task = LogitField(np.zeros((1, 2)), np.array([[[1.0, 0.0]], [[2.0, 0.0]]]), np.array([0]), "secant")
    >>> minimise_on(risk_surface([task]), coefficient_box(2).with_at_most([1.0, 1.0], 1.5)).point.round(3).tolist()
    [0.5, 1.0]
    """
    surface.require_convex("a proven minimum")
    return minimise_over(surface.gradient, domain, start, tolerance=tolerance, max_iterations=max_iterations)


def coefficients_of(surface: Surface, rule: MergingRule, subsets: Sequence[Sequence[int]]) -> Array:
    """Coefficients (len(subsets), K) under a rule that gives all members the same."""
    alphas = np.zeros((len(subsets), surface.experts))
    for row, subset in zip(alphas, subsets, strict=True):
        if subset:
            row[list(subset)] = rule.shared(len(subset))
    return np.repeat(alphas, surface.layers, axis=1)


def _size(part: Part) -> int:
    return len(part.centre) if isinstance(part, CurvatureModel) else len(part.slopes)


def _risks(part: Part, alphas: Array) -> Array:
    """Risk of one task at coefficients (m, K): (m,), in chunks of bounded memory."""
    if isinstance(part, CurvatureModel):
        return np.asarray((np.sqrt(part.own_risk) + np.sqrt(part.curvature(alphas) / 2.0)) ** 2)
    step = max(1, _CHUNK // max(part.constant.size, 1))
    evaluate: Callable[[Array], Array] = lambda a: cross_entropy(part.at(a), part.labels).mean(axis=-1)  # noqa: E731
    return np.concatenate([evaluate(alphas[k : k + step]) for k in range(0, len(alphas), step)])


def _curvature_gradient(model: CurvatureModel, alpha: Array) -> tuple[float, Array]:
    """Value and a subgradient of ``(sqrt(F) + sqrt(max_s q_s / 2))^2``; zero at the kink ``alpha = centre``."""
    d = alpha - model.centre
    slopes = model.forms @ d
    forms = slopes @ d
    active = int(np.argmax(forms))
    height = float(np.sqrt(max(forms[active], 0.0) / 2.0))
    root = float(np.sqrt(model.own_risk))
    if height == 0.0:
        return root**2, np.zeros_like(alpha)
    return (root + height) ** 2, (1.0 + root / height) * slopes[active]


def indices(chosen: Iterable[int], count: int, name: str) -> tuple[int, ...]:
    """Distinct numbers in ascending order, refused by name unless all are in 0..count-1."""
    found = tuple(sorted({int(i) for i in chosen}))
    if found and not 0 <= found[0] <= found[-1] < count:
        raise MergeboundError(f"{name}s {list(found)} are not all in 0..{count - 1}")
    return found
