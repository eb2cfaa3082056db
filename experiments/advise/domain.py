"""Which coefficients may be recommended: a box, or for networks with BatchNorm the hull of base and experts.

*Trap:* coefficients that sum to more than one make averaged running variances negative somewhere; a merge clamps them
at zero and its loss explodes, which no prediction sees.  Within the hull (nonnegative, sum at most one) every merged
variance is a mean of variances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.measure.subject import Subject
from merging.variances import stays_in_hull
from theory.constrained import Polytope, coefficient_box, coefficient_hull
from theory.errors import MergeboundError

_SLACK = 1e-6


@dataclass(frozen=True)
class Domain:
    """Allowed coefficients of N experts.

    Attributes:
        size: N.
        bounds: of every coefficient.
        hull: nonnegative with sum at most one.
    """

    size: int
    bounds: tuple[float, float]
    hull: bool

    def polytope(self, layers: int = 1) -> Polytope:
        """Where coefficients are looked for; with layers, coefficient ``i * layers + l`` is expert i's in layer l."""
        if not self.hull:
            return coefficient_box(self.size * layers, *self.bounds)
        return coefficient_hull(self.size * layers, layers, min(self.bounds[1], 1.0))

    def allows(self, alpha: npt.ArrayLike) -> bool:
        """Whether coefficients (N,) lie inside."""
        return self.polytope().violation(np.asarray(alpha, dtype=np.float64)) <= _SLACK

    def largest_scale(self, members: int | None = None) -> float:
        """Largest common coefficient of so many experts (default all)."""
        return min(1.0 / (members or self.size), self.bounds[1]) if self.hull else self.bounds[1]

    @property
    def words(self) -> str:
        """The domain in words."""
        if self.hull:
            return "coefficients are nonnegative with sum at most 1 (the network has BatchNorm)"
        return f"every coefficient lies between {self.bounds[0]:g} and {self.bounds[1]:g}"


def domain_of(subject: Subject, bounds: tuple[float, float] = (0.0, 1.0)) -> Domain:
    """The domain for a network.

    Raises:
        MergeboundError: bounds that are not two finite numbers around 0.
    """
    low, high = float(bounds[0]), float(bounds[1])
    if not (np.isfinite([low, high]).all() and low <= 0.0 < high):
        raise MergeboundError(f"bounds = {bounds}: give a lower bound of at most 0 and an upper bound above it")
    hull = stays_in_hull(subject.networks[0].space.names)
    return Domain(subject.size, (low, high), hull)
