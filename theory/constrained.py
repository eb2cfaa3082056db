"""Where merging coefficients may lie: a box, a simplex or hull in each layer, a given sum, budgets ``A alpha <= b``.

:class:`Polytope` says all of them; :func:`theory.convex.minimise_over` looks for the minimum of a prediction in one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from theory.arguments import advised_fields
from theory.errors import MergeboundError

Array = npt.NDArray[np.float64]

FEASIBLE = 1e-8
"""By how much a constraint may be broken."""


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


@dataclass(frozen=True)
class Groups:
    """Constraints that are sums over disjoint groups of coefficients, each equal to a total or at most that."""

    members: tuple[npt.NDArray[np.intp], ...]
    totals: Array
    exact: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, domain: Polytope) -> Groups | None:
        """The groups of a polytope (none for a box), or None where its constraints are of another kind."""
        rows = np.vstack([domain.equal.reshape(-1, domain.size), domain.at_most.reshape(-1, domain.size)])
        if not np.isin(rows, (0.0, 1.0)).all() or (rows.sum(axis=0) > 1.0).any():
            return None
        exact = np.arange(len(rows)) < len(domain.equal_to)
        return cls(tuple(np.flatnonzero(row) for row in rows), np.concatenate([domain.equal_to, domain.limit]), exact)

    def lowest(self, domain: Polytope, slope: Array) -> Array:
        """Corner of the polytope where ``slope . alpha`` is smallest: the steepest coefficients are filled first."""
        corner = np.where(slope < 0.0, domain.upper, domain.lower)
        for members, total, exact in zip(self.members, self.totals, self.exact, strict=True):
            order = members[np.argsort(slope[members])]
            span = domain.upper[order] - domain.lower[order]
            room = total - domain.lower[order].sum() - (np.cumsum(span) - span)
            wanted = np.ones(len(order), dtype=bool) if exact else slope[order] < 0.0
            corner[order] = domain.lower[order] + np.where(wanted, np.clip(room, 0.0, span), 0.0)
        return corner

    def inside(self, domain: Polytope) -> Array:
        """A point of the polytope, or at least of its box: each group as far between its bounds as its total allows."""
        point = 0.5 * (domain.lower + domain.upper)
        for members, total, exact in zip(self.members, self.totals, self.exact, strict=True):
            low, span = domain.lower[members], domain.upper[members] - domain.lower[members]
            share = (total - low.sum()) / max(float(span.sum()), 1e-300)
            point[members] = low + span * np.clip(share, 0.0, 1.0 if exact else 0.5)
        return point

    def restored(self, domain: Polytope, point: Array) -> Array | None:
        """A point within rounding of the polytope, moved onto it where a group starts at 0; None further away."""
        kept = np.minimum(np.maximum(point, domain.lower), domain.upper)
        if np.abs(kept - point).max() > FEASIBLE:
            return None
        for members, total, exact in zip(self.members, self.totals, self.exact, strict=True):
            reached = float(kept[members].sum())
            if reached > total + FEASIBLE or (exact and reached < total - FEASIBLE):
                return None
            if reached > 0.0 and (exact or reached > total) and not domain.lower[members].any():
                kept[members] *= total / reached
        return kept


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
    return coefficient_box(size).with_equal(_layer_sums(size, layers), np.ones(layers))


def coefficient_hull(size: int, layers: int = 1, high: float = 1.0) -> Polytope:
    """Coefficients between 0 and ``high`` with sum at most one, in each layer: merges between the base and the experts.

    >>> domain = coefficient_hull(2)
    >>> domain.at_most.tolist(), domain.limit.tolist()
    ([[1.0, 1.0]], [1.0])
    """
    return coefficient_box(size, 0.0, high).with_at_most(_layer_sums(size, layers), np.ones(layers))


def coefficients_summing_to(total: float, size: int, low: float = 0.0, high: float = 1.0) -> Polytope:
    """``low <= alpha_i <= high`` with ``sum_i alpha_i = total``.

    >>> domain = coefficients_summing_to(1.0, 3)
    >>> domain.equal.tolist(), domain.equal_to.tolist()
    ([[1.0, 1.0, 1.0]], [1.0])
    """
    return coefficient_box(size, low, high).with_equal(np.ones(size), total)


def coefficient_domain(
    size: int, bounds: tuple[float, float], *, simplex: bool = False, hull: bool = False, layers: int = 1
) -> Polytope:
    """The simplex, else the hull, else the box of the bounds: what ``risk_optimal`` and ``curvature_optimal`` offer.

    Args:
        size: number of coefficients K, a multiple of ``layers``.
        bounds: of every coefficient of a box.
        simplex, hull: in place of the box.  With both, the simplex.
        layers: L; coefficient ``i * L + l`` belongs to expert i and layer l.

    Raises:
        MergeboundError: empty or inverted bounds, or a size that is no multiple of ``layers``.

    >>> coefficient_domain(4, (0.0, 1.0), hull=True, layers=2).limit.tolist()
    [1.0, 1.0]
    """
    low, high = (0.0, 1.0) if simplex or hull else bounds
    if not low < high:
        raise MergeboundError(f"bounds = {bounds!r}: the lower bound must be below the upper one")
    _layer_sums(size, layers)
    if simplex:
        return coefficient_simplex(size, layers)
    return coefficient_hull(size, layers) if hull else coefficient_box(size, low, high)


def _layer_sums(size: int, layers: int) -> Array:
    """One row per layer, that sums its coefficients: (layers, size)."""
    if layers < 1 or size % layers:
        raise MergeboundError(f"{size} coefficients cannot be spread over {layers} layers: give N times as many")
    return np.tile(np.eye(layers), size // layers)
