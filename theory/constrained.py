"""Minimising a convex prediction over a polytope of coefficients, with a bound that anyone can check.

A box, a simplex, coefficients that must sum to something, budgets ``A alpha <= b``: :class:`Polytope`.  The objective
needs a value and one subgradient, so the kinks of the curvature prediction are no obstacle.  Every evaluation leaves a
cut ``f(y) >= f_k + g_k . (y - x_k)``; the minimum of their maximum over the polytope is a linear program, and weak
duality turns its multipliers into a lower bound in closed form: the reported gap does not rely on the solver's
tolerances.  (Kelley 1960, *The cutting-plane method for solving convex programs*.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from theory.arguments import advised_fields
from theory.convex import Minimum
from theory.errors import MergeboundError

Array = npt.NDArray[np.float64]
Objective = Callable[[Array], tuple[float, Array]]

_FEASIBLE = 1e-8
_KEPT = 400


def _none() -> Array:
    return np.zeros((0, 0))


@advised_fields
@dataclass(frozen=True)
class Polytope:
    """Coefficients with ``lower <= alpha <= upper``, ``equal alpha = equal_to`` and ``at_most alpha <= limit``.

    Attributes:
        lower, upper: (K,), finite; equal where a coefficient is held fixed.
        equal, equal_to: (m, K) and (m,).
        at_most, limit: (r, K) and (r,).
    """

    lower: Array
    upper: Array
    equal: Array = field(default_factory=_none)
    equal_to: Array = field(default_factory=lambda: np.zeros(0))
    at_most: Array = field(default_factory=_none)
    limit: Array = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if self.lower.ndim != 1 or self.lower.shape != self.upper.shape or not len(self.lower):
            raise MergeboundError(
                f"bounds of shape {self.lower.shape} and {self.upper.shape}: give one per coefficient"
            )
        if not (np.isfinite(self.lower) & np.isfinite(self.upper) & (self.lower <= self.upper)).all():
            raise MergeboundError("bounds must be finite, the lower one not above the upper one: correct them")
        for name, matrix, right in (("equal", self.equal, self.equal_to), ("at_most", self.at_most, self.limit)):
            if matrix.size == 0 and right.size == 0:
                continue
            if matrix.shape != (len(right), self.size) or not (np.isfinite(matrix).all() and np.isfinite(right).all()):
                raise MergeboundError(
                    f"{name} has shape {matrix.shape}, expected ({len(right)}, {self.size}): finite numbers, "
                    "one row per constraint, one column per coefficient"
                )

    @property
    def size(self) -> int:
        """Number of coefficients K."""
        return len(self.lower)

    @property
    def is_box(self) -> bool:
        """Whether bounds are the only constraints."""
        return not len(self.equal_to) and not len(self.limit)

    def violation(self, alpha: Array) -> float:
        """Largest amount by which a constraint is broken at ``alpha`` (K,)."""
        parts = [self.lower - alpha, alpha - self.upper]
        if len(self.equal_to):
            parts.append(np.abs(self.equal @ alpha - self.equal_to))
        if len(self.limit):
            parts.append(self.at_most @ alpha - self.limit)
        return float(max(part.max(initial=0.0) for part in parts))

    def holding(self, index: npt.ArrayLike, value: npt.ArrayLike = 0.0) -> Polytope:
        """The same with some coefficients held at given values (also outside their former bounds)."""
        at = np.asarray(index, dtype=np.int64)
        lower, upper = self.lower.copy(), self.upper.copy()
        lower[at] = upper[at] = value
        return replace(self, lower=lower, upper=upper)

    def with_equal(self, rows: npt.ArrayLike, right: npt.ArrayLike) -> Polytope:
        """The same with further constraints ``rows alpha = right``."""
        more, to = np.atleast_2d(np.asarray(rows, dtype=np.float64)), np.atleast_1d(np.asarray(right, dtype=np.float64))
        old = self.equal.reshape(len(self.equal_to), more.shape[1])
        return replace(self, equal=np.vstack([old, more]), equal_to=np.concatenate([self.equal_to, to]))

    def with_at_most(self, rows: npt.ArrayLike, right: npt.ArrayLike) -> Polytope:
        """The same with further constraints ``rows alpha <= right``."""
        more, to = np.atleast_2d(np.asarray(rows, dtype=np.float64)), np.atleast_1d(np.asarray(right, dtype=np.float64))
        old = self.at_most.reshape(len(self.limit), more.shape[1])
        return replace(self, at_most=np.vstack([old, more]), limit=np.concatenate([self.limit, to]))


def coefficient_box(size: int, low: float = 0.0, high: float = 1.0) -> Polytope:
    """``low <= alpha_i <= high`` for every coefficient.

    >>> coefficient_box(2, -0.5, 1.5).upper.tolist()
    [1.5, 1.5]
    """
    return Polytope(np.full(size, float(low)), np.full(size, float(high)))


def coefficient_simplex(size: int, layers: int = 1) -> Polytope:
    """Nonnegative coefficients with sum one, in each layer (coefficient ``i * layers + l`` is expert i's in layer l).

    >>> coefficient_simplex(4, layers=2).equal.tolist()
    [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    """
    if layers < 1 or size % layers:
        raise MergeboundError(f"{size} coefficients cannot be spread over {layers} layers: give N times as many")
    return coefficient_box(size).with_equal(np.tile(np.eye(layers), size // layers), np.ones(layers))


def coefficients_summing_to(total: float, size: int, low: float = 0.0, high: float = 1.0) -> Polytope:
    """``low <= alpha_i <= high`` with ``sum_i alpha_i = total``.

    >>> domain = coefficients_summing_to(1.0, 3)
    >>> domain.equal.tolist(), domain.equal_to.tolist()
    ([[1.0, 1.0, 1.0]], [1.0])
    """
    return coefficient_box(size, low, high).with_equal(np.ones(size), total)


def minimise_over(
    objective: Objective,
    domain: Polytope,
    start: npt.ArrayLike | None = None,
    *,
    tolerance: float = 1e-7,
    max_iterations: int = 200,
) -> Minimum:
    """Minimise a convex function over a polytope; ``value - gap`` is a proven lower bound of its minimum.

    Args:
        objective: (K,) to value and a subgradient (K,); the gap is a theorem only if it is convex.
        domain: where.
        start: default: a point of the domain.
        tolerance: the solver stops once the gap is below ``tolerance * max(1, |value|)``.
        max_iterations: of the first solver, and again of the cutting planes.

    Returns:
        Point (constraints kept to 1e-8), value, gap, evaluations.

    Raises:
        MergeboundError: no point satisfies the constraints, or the objective is not finite.

    >>> import numpy as np
    >>> goal = np.array([1.0, 0.0])
    >>> domain = coefficients_summing_to(0.5, 2)
    >>> found = minimise_over(lambda a: (float((a - goal) @ (a - goal)), 2 * (a - goal)), domain)
    >>> found.point.round(4).tolist(), round(found.value, 4), found.gap < 1e-6
    ([0.5, 0.0], 0.25, True)
    """
    first = _inside(domain) if start is None else np.asarray(start, dtype=np.float64)
    if first.shape != (domain.size,):
        raise MergeboundError(f"start has shape {first.shape}, expected ({domain.size},)")
    first = np.clip(first, domain.lower, domain.upper)
    if domain.violation(first) > _FEASIBLE:
        first = _inside(domain)  # also where no point satisfies the constraints
    free = domain.upper > domain.lower
    if not free.any():
        value, _ = objective(first)
        return Minimum(first, float(value), 0.0, 1)
    if not free.all():
        small = minimise_over(
            _restricted(objective, domain.lower, free),
            _free_part(domain, free),
            first[free],
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        point = domain.lower.copy()
        point[free] = small.point
        return replace(small, point=point)
    cuts = _Cuts(objective, domain)
    cuts.at(first)
    _descend(cuts, first, tolerance, max_iterations)
    for _ in range(max_iterations):
        if cuts.closed(tolerance):
            break
        vertex = cuts.floor()
        if cuts.closed(tolerance):
            break
        cuts.at(0.5 * (cuts.best + vertex))
        cuts.at(vertex)
    return Minimum(cuts.best, cuts.value, max(cuts.value - cuts.lowest, 0.0), cuts.count)


def _restricted(objective: Objective, held: Array, free: npt.NDArray[np.bool_]) -> Objective:
    """The objective over the free coefficients, the others held."""

    def over(part: Array) -> tuple[float, Array]:
        point = held.copy()
        point[free] = part
        value, slope = objective(point)
        return value, slope[free]

    return over


def _free_part(domain: Polytope, free: npt.NDArray[np.bool_]) -> Polytope:
    """The constraints that the free coefficients have to satisfy."""
    part = Polytope(domain.lower[free], domain.upper[free])
    if len(domain.equal_to):
        rows, right = domain.equal[:, free], domain.equal_to - domain.equal[:, ~free] @ domain.lower[~free]
        keep = (rows != 0.0).any(axis=1)
        if keep.any():
            part = part.with_equal(rows[keep], right[keep])
    if len(domain.limit):
        rows, right = domain.at_most[:, free], domain.limit - domain.at_most[:, ~free] @ domain.lower[~free]
        keep = (rows != 0.0).any(axis=1)
        if keep.any():
            part = part.with_at_most(rows[keep], right[keep])
    return part


class _Cuts:
    """Evaluations so far: the best feasible one, the cuts, and the highest proven lower bound."""

    def __init__(self, objective: Objective, domain: Polytope) -> None:
        self.objective, self.domain = objective, domain
        self.best, self.value, self.lowest, self.count = domain.lower, np.inf, -np.inf, 0
        self.slopes: list[Array] = []
        self.heights: list[float] = []

    def at(self, point: Array) -> tuple[float, Array]:
        value, slope = self.objective(point)
        if not (np.isfinite(value) and np.isfinite(slope).all()):
            raise MergeboundError("the predicted risk is not finite inside the domain: check the collected statistics")
        self.count += 1
        self.slopes.append(slope)
        self.heights.append(value - float(slope @ point))
        if len(self.slopes) > _KEPT:
            del self.slopes[0], self.heights[0]
        if value < self.value and self.domain.violation(point) <= _FEASIBLE:
            self.best, self.value = point.copy(), float(value)
        if self.domain.is_box:  # one cut alone, in closed form
            down = np.maximum(slope * (point - self.domain.lower), slope * (point - self.domain.upper)).sum()
            self.lowest = max(self.lowest, min(float(value - down), self.value))
        return float(value), slope

    def closed(self, tolerance: float) -> bool:
        """Whether the gap is small enough."""
        return self.value - self.lowest <= tolerance * max(1.0, abs(self.value))

    def floor(self) -> Array:
        """Raise the lower bound by all cuts (weak duality); returns where their maximum is smallest."""
        import scipy.optimize

        domain, k = self.domain, len(self.slopes)
        slopes, heights = np.stack(self.slopes), np.array(self.heights)
        above = np.hstack([slopes, -np.ones((k, 1))])
        right = -heights
        if len(domain.limit):
            above = np.vstack([above, np.hstack([domain.at_most, np.zeros((len(domain.limit), 1))])])
            right = np.concatenate([right, domain.limit])
        equal = np.hstack([domain.equal, np.zeros((len(domain.equal_to), 1))]) if len(domain.equal_to) else None
        bounds = [*zip(domain.lower, domain.upper, strict=True), (None, None)]
        cost = np.append(np.zeros(domain.size), 1.0)
        solver: Any = scipy.optimize.linprog
        found = solver(cost, above, right, equal, domain.equal_to if equal is not None else None, bounds)
        if found.x is None:
            return self.best
        weight = np.clip(-found.ineqlin.marginals[:k], 0.0, None)
        if weight.sum() > 0.0:
            weight /= weight.sum()
            tilt, height = weight @ slopes, float(weight @ heights)
            if len(domain.limit):
                price = np.clip(-found.ineqlin.marginals[k:], 0.0, None)
                tilt, height = tilt + price @ domain.at_most, height - float(price @ domain.limit)
            if equal is not None:
                price = found.eqlin.marginals
                tilt, height = tilt - price @ domain.equal, height + float(price @ domain.equal_to)
            bound = height + float(np.minimum(tilt * domain.lower, tilt * domain.upper).sum())
            self.lowest = max(self.lowest, min(bound, self.value))
        return np.asarray(np.clip(found.x[:-1], domain.lower, domain.upper))


def _inside(domain: Polytope) -> Array:
    """Some point of the polytope, away from its boundary where the constraints allow."""
    import scipy.optimize

    middle = 0.5 * (domain.lower + domain.upper)
    if domain.violation(middle) <= _FEASIBLE:
        return middle
    solver: Any = scipy.optimize.linprog
    above = (domain.at_most, domain.limit) if len(domain.limit) else (None, None)
    equal = (domain.equal, domain.equal_to) if len(domain.equal_to) else (None, None)
    bounds = list(zip(domain.lower, domain.upper, strict=True))
    corners = []
    for cost in (np.ones(domain.size), -np.ones(domain.size), *np.eye(domain.size)[:8], *-np.eye(domain.size)[:8]):
        found = solver(cost, *above, *equal, bounds)
        if found.x is None:
            raise MergeboundError("no coefficients satisfy all constraints at once: loosen the bounds or the sums")
        corners.append(found.x)
    return np.asarray(np.clip(np.mean(corners, axis=0), domain.lower, domain.upper))


def _descend(cuts: _Cuts, start: Array, tolerance: float, max_iterations: int) -> None:
    """A smooth solver; every point that it tries leaves a cut."""
    import scipy.optimize

    domain = cuts.domain
    solver: Any = scipy.optimize.minimize
    bounds = list(zip(domain.lower, domain.upper, strict=True))
    options: dict[str, float] = {"maxiter": max_iterations, "ftol": tolerance * 1e-4}
    if domain.is_box:
        options["gtol"] = tolerance
        found = solver(cuts.at, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    else:
        rules = []
        if len(domain.equal_to):
            equal, to = domain.equal, domain.equal_to
            rules.append({"type": "eq", "fun": lambda a: equal @ a - to, "jac": lambda a: equal})
        if len(domain.limit):
            rows, limit = domain.at_most, domain.limit
            rules.append({"type": "ineq", "fun": lambda a: limit - rows @ a, "jac": lambda a: -rows})
        found = solver(cuts.at, start, jac=True, method="SLSQP", bounds=bounds, constraints=rules, options=options)
    if np.isfinite(found.x).all():
        cuts.at(np.clip(found.x, domain.lower, domain.upper))
