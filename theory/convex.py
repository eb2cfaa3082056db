"""Minimising a convex prediction over a polytope of coefficients, with a bound that anyone can check.

The one solver for every domain of :mod:`theory.constrained`.  The objective needs a value and one subgradient, so the
kinks of the curvature prediction are no obstacle.  A smooth solver of scipy goes first.  Every evaluation leaves a cut
``f(y) >= f_k + g_k . (y - x_k)``: over a box, or sums of disjoint groups in a box (simplices, hulls), the smallest
value of one cut is known in closed form (the Frank-Wolfe gap), and where that does not prove enough, the minimum of the
maximum of all cuts is a linear program, whose multipliers weak duality turns into a lower bound in closed form: the
reported gap never relies on a solver's tolerances.  (Kelley 1960, *The cutting-plane method for solving convex
programs*; Jaggi 2013, *Revisiting Frank-Wolfe*.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from theory.constrained import FEASIBLE, Array, Groups, Polytope
from theory.errors import MergeboundError

Objective = Callable[[Array], tuple[float, Array]]

_KEPT = 400
_FINER = (1e-3, 1e-5, 1e-7)


@dataclass(frozen=True)
class Minimum:
    """Where the solver stopped: point (K,), value, gap (value minus minimum is at most that), evaluations."""

    point: Array
    value: float
    gap: float
    iterations: int


def minimise_over(
    objective: Objective,
    domain: Polytope,
    start: npt.ArrayLike | None = None,
    *,
    tolerance: float = 1e-7,
    max_iterations: int = 200,
    planes: int | None = None,
) -> Minimum:
    """Minimise a convex function over a polytope; ``value - gap`` is a proven lower bound of its minimum.

    Args:
        objective: (K,) to value and a subgradient (K,); the gap is a theorem only if it is convex.
        domain: where.
        start: default: a point of the domain.
        tolerance: the solver stops once the gap is below ``tolerance * max(1, |value|)``.
        max_iterations: of the smooth solver.
        planes: rounds of cutting planes after it, default ``max_iterations``.  0 for functions without kinks or not
            convex, in few evaluations: the gap is then whatever the smooth solver left, at its point alone.

    Returns:
        Point (constraints kept to 1e-8), value, gap, evaluations.

    Raises:
        MergeboundError: no point satisfies the constraints, or the objective is not finite.

    >>> import numpy as np
    >>> from theory.constrained import coefficients_summing_to
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
    if domain.violation(first) > FEASIBLE:
        first = _inside(domain)  # also where no point satisfies the constraints
    free = domain.upper > domain.lower
    if not free.any():
        value, _ = objective(first)
        return Minimum(first, float(value), 0.0, 1)
    rounds = max_iterations if planes is None else planes
    if not free.all():
        small = minimise_over(
            _restricted(objective, domain.lower, free),
            _free_part(domain, free),
            first[free],
            tolerance=tolerance,
            max_iterations=max_iterations,
            planes=rounds,
        )
        point = domain.lower.copy()
        point[free] = small.point
        return replace(small, point=point)
    cuts = _Cuts(objective, domain)
    for finer in _FINER if rounds else _FINER[:1]:
        _descend(cuts, cuts.best if cuts.count else first, tolerance * finer, max_iterations)
        cuts.measure()
        if cuts.closed(tolerance):
            break
    for _ in range(rounds):
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
        self.objective, self.domain, self.groups = objective, domain, Groups.of(domain)
        self.best, self.value, self.lowest, self.count = domain.lower, np.inf, -np.inf, 0
        self.slope = np.zeros(domain.size)
        self.slopes: list[Array] = []
        self.heights: list[float] = []

    def at(self, point: Array) -> tuple[float, Array]:
        """Evaluate, at the nearest feasible point where rounding alone separates them."""
        near = self.restored(point)
        point = point if near is None else near
        value, slope = self.objective(point)
        if not (np.isfinite(value) and np.isfinite(slope).all()):
            raise MergeboundError("the predicted risk is not finite inside the domain: check the collected statistics")
        self.count += 1
        self.slopes.append(slope)
        self.heights.append(value - float(slope @ point))
        if len(self.slopes) > _KEPT:
            del self.slopes[0], self.heights[0]
        if near is not None and value < self.value:
            self.best, self.value, self.slope = point.copy(), float(value), slope
        return float(value), slope

    def restored(self, point: Array) -> Array | None:
        """The point with rounding taken out of its constraints; None where it breaks them."""
        if self.groups is not None:
            return self.groups.restored(self.domain, point)
        near = self.domain.violation(point) <= FEASIBLE
        return np.clip(point, self.domain.lower, self.domain.upper) if near else None

    def closed(self, tolerance: float) -> bool:
        """Whether the gap is small enough."""
        return self.value - self.lowest <= tolerance * max(1.0, abs(self.value))

    def measure(self) -> None:
        """Raise the lower bound by the best point's cut alone, in closed form; by all of them where there is none."""
        if self.groups is None:
            self.floor()
            return
        down = float(self.slope @ (self.best - self.groups.lowest(self.domain, self.slope)))
        self.lowest = max(self.lowest, self.value - max(down, 0.0))

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

    groups = Groups.of(domain)
    middle = 0.5 * (domain.lower + domain.upper) if groups is None else groups.inside(domain)
    if domain.violation(middle) <= FEASIBLE:
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


def _descend(cuts: _Cuts, start: Array, decrease: float, max_iterations: int) -> None:
    """A smooth solver, stopped by small relative decreases; every point that it tries leaves a cut."""
    import scipy.optimize

    domain = cuts.domain
    solver: Any = scipy.optimize.minimize
    bounds = list(zip(domain.lower, domain.upper, strict=True))
    options: dict[str, float] = {"maxiter": max_iterations, "ftol": decrease}
    if domain.is_box:
        options["gtol"] = decrease * 1e3
        solver(cuts.at, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return
    rules = []
    if len(domain.equal_to):
        equal, to = domain.equal, domain.equal_to
        rules.append({"type": "eq", "fun": lambda a: equal @ a - to, "jac": lambda a: equal})
    if len(domain.limit):
        rows, limit = domain.at_most, domain.limit
        rules.append({"type": "ineq", "fun": lambda a: limit - rows @ a, "jac": lambda a: -rows})
    solver(cuts.at, start, jac=True, method="SLSQP", bounds=bounds, constraints=rules, options=options)
