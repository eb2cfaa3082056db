"""Minimising a smooth convex function of merging coefficients over a box, simplices or hulls, with a proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from theory.errors import MergeboundError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Minimum:
    """Where the solver stopped: point (K,), value, Frank-Wolfe gap (value minus minimum is at most that), steps."""

    point: Array
    value: float
    gap: float
    iterations: int


def minimise(
    objective: Callable[[Array], tuple[float, Array]],
    start: Array,
    *,
    bounds: tuple[float, float],
    simplex: bool = False,
    hull: bool = False,
    layers: int = 1,
    tolerance: float = 1e-7,
    max_iterations: int = 500,
) -> Minimum:
    """Minimise a convex function given with its gradient.

    Args:
        objective: (K,) to value and gradient (K,).
        start: where to start, inside the domain.
        bounds: lower and upper bound of every coefficient.
        simplex: nonnegative coefficients with sum one instead, for each layer.
        hull: nonnegative coefficients with sum at most one instead, for each layer: merges between the base and the
            experts.  With ``simplex``, that one holds.
        layers: L; coefficient ``i * L + l`` belongs to expert i and layer l.
        tolerance: relative tolerance of the solver.
        max_iterations: limit of its iterations.

    Raises:
        MergeboundError: empty or inverted bounds, or a size that is no multiple of ``layers``.
    """
    import scipy.optimize

    solver: Any = scipy.optimize.minimize
    low, high = (0.0, 1.0) if simplex or hull else bounds
    if not low < high:
        raise MergeboundError(f"bounds = {bounds!r}: the lower bound must be below the upper one")
    if layers < 1 or len(start) % layers:
        raise MergeboundError(f"{len(start)} coefficients cannot be spread over {layers} layers: give N times as many")
    box = [(low, high)] * len(start)
    options: dict[str, float] = {"maxiter": max_iterations, "ftol": tolerance * 1e-3}
    if simplex or hull:
        sums = np.tile(np.eye(layers), len(start) // layers)
        kind = "eq" if simplex else "ineq"
        constraint = {"type": kind, "fun": lambda a: 1.0 - sums @ a, "jac": lambda a: -sums}
        found = solver(
            objective, start, jac=True, method="SLSQP", bounds=box, constraints=[constraint], options=options
        )
        table = np.clip(found.x, 0.0, None).reshape(-1, layers)
        total = table.sum(axis=0)
        point = (table / (total if simplex else np.maximum(total, 1.0))).ravel()
    else:
        options["gtol"] = tolerance
        found = solver(objective, start, jac=True, method="L-BFGS-B", bounds=box, options=options)
        point = np.clip(found.x, low, high)
    value, gradient = objective(point)
    if simplex or hull:
        slopes = gradient.reshape(-1, layers)
        lowest = slopes.min(axis=0) if simplex else np.minimum(slopes.min(axis=0), 0.0)
        gap = float((slopes * point.reshape(-1, layers)).sum() - lowest.sum())
    else:
        gap = float(np.maximum(gradient * (point - low), gradient * (point - high)).sum())
    return Minimum(point, float(value), max(gap, 0.0), int(found.nit))
