"""The interval of master bounds over everything that is unknown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from theory.assumptions import Tier
from theory.bound import _table
from theory.checks import one_number, whole_number
from theory.errors import RecipeError
from theory.recipe import Merge
from theory.risk import master_bound
from theory.symbolic import FloatArray
from theory.unknown.family import Family, corner_points, recipe_at
from theory.unknown.guarantee import guaranteed_ends
from theory.unknown.influence import Influence, influences_of
from theory.unknown.stated import OneOf, Range, read_unknowns


@dataclass(frozen=True, eq=False)
class BoundInterval:
    """The interval of master bounds over stated ranges; see the module docstring for ``found`` and ``proven``.

    ``lowest`` and ``highest`` are the points that attain ``found``; ``influences`` come largest share first, and
    ``widest`` is the first; ``infinite`` and ``refused`` are the shares of sampled recipes whose bound is infinite,
    and that are outside the domain (a batch larger than the data set).  ``tier`` is certified only if the interval is
    proven and the bound itself is certified.
    """

    lower: float
    upper: float
    found: tuple[float, float]
    proven: bool
    how: str
    tier: Tier
    lowest: Mapping[str, Any]
    highest: Mapping[str, Any]
    influences: tuple[Influence, ...]
    infinite: float
    refused: float

    @property
    def widest(self) -> str:
        """The unknown with the largest share of the variance."""
        return self.influences[0].name

    def explain(self) -> str:
        """Readable report."""
        kind = "guaranteed" if self.proven else "found, not guaranteed"
        lines = [f"E F(M) <= {self.lower:.4g} to {self.upper:.4g}   ({kind}; tier: {self.tier})"]
        lines += [f"found: {self.found[0]:.4g} to {self.found[1]:.4g}", self.how, ""]
        rows = [
            (
                item.name,
                f"{item.alone:.3g}",
                f"{100 * item.share:.0f} %",
                _word(self.lowest[item.name]),
                _word(self.highest[item.name]),
            )
            for item in self.influences
        ]
        lines += _table([("unknown", "largest/smallest alone", "share", "at the lowest", "at the highest"), *rows])
        lines += ["", f"widened most by: {self.widest}"]
        if self.infinite or self.refused:
            lines.append(
                f"{100 * self.infinite:.0f} % of the sampled recipes have no finite bound, {100 * self.refused:.0f} % "
                "are outside the domain"
            )
        return "\n".join(lines)


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def bound_interval(
    merge: Merge,
    unknown: Mapping[str, Range | OneOf],
    *,
    samples: int = 2048,
    boxes: int = 20_000,
    tolerance: float = 0.01,
    seed: int = 0,
) -> BoundInterval:
    """The interval of master bounds over everything that is unknown, and which unknown widens it most.

    ``unknown`` maps a field to a :class:`Range` or :class:`OneOf`: ``"L"`` (or ``"all.L"``) is **one** value common to
    all experts, ``"each.L"`` (or ``"*.L"``) one per expert, ``"photos.L"`` of one expert; ``"coefficients"`` those of
    the merge.  Such fields may hold any value in ``merge``.  ``samples`` and ``seed`` fix the random sample, ``boxes``
    and ``tolerance`` the splitting of boxes.  The step-by-step recursions are left out.  Raises :class:`RecipeError` or
    its AssumptionError as the bound itself does (an optimizer that is not covered and has no measured drift, a missing
    constant).

    >>> from theory import Expert, Merge
    >>> known = dict(n=1000, batch_size=50, learning_rate=0.1, steps=100, curvature="convex", L=1.0,
    ...              initial_gradient_norm=0.5, sigma=1.0, D_inf=2.0, training_risk=0.05)
    >>> merge = Merge((Expert("a", **known), Expert("b", **known)))
    >>> result = bound_interval(merge, {"each.steps": Range(50, 200, log=True), "sigma": Range(0.5, 1.4)})
    >>> result.proven, result.widest in ("a.steps", "b.steps")
    (True, True)
    """
    family = Family(merge, read_unknowns(merge, unknown))
    samples, seed = whole_number("unknown", "samples", samples, least=1), whole_number("unknown", "seed", seed)
    boxes, tolerance = whole_number("unknown", "boxes", boxes), one_number("unknown", "tolerance", tolerance)
    rng = np.random.default_rng(seed)
    points = np.concatenate([family.draw(rng, samples), corner_points(family, rng)], axis=1)
    value, good = family.values(points)
    if not good.any():
        raise RecipeError("unknown: no recipe in the stated ranges is possible; widen them (is a batch larger than n?)")
    points, value, refused = points[:, good], value[good], float(1 - good[:samples].mean())
    low, smallest = _polished(family, points[:, np.argmin(value)], -1.0)
    high, largest = _polished(family, points[:, np.argmax(value)], 1.0)
    how, proven, lower, upper = "", True, smallest, largest
    try:
        ends, count = guaranteed_ends(family, ((low, smallest), (high, largest)), boxes, tolerance)
        (lower, low, smallest), (upper, high, largest) = ends
        how = f"guaranteed by monotone ingredients on {count} boxes"
    except RecipeError as error:
        proven, lower, upper = False, smallest, largest
        how = f"sampled ({samples} recipes, seed {seed}, and a local search), not guaranteed: {error}"
    reference = recipe_at(family, points[:, int(np.argsort(value)[len(value) // 2])])
    tier: Tier = master_bound(reference, recursion=False).tier if proven else "estimated"
    return BoundInterval(
        lower=lower,
        upper=upper,
        found=(smallest, largest),
        proven=proven,
        how=how,
        tier=tier,
        lowest=family.read(low),
        highest=family.read(high),
        influences=influences_of(family, rng),
        infinite=float(np.isinf(value).mean()),
        refused=refused,
    )


def _polished(family: Family, start: FloatArray, sign: float) -> tuple[FloatArray, float]:
    """Coordinate search from a point: every unknown over a grid, then closer, while the bound gets more extreme."""
    best = start.copy()
    value = float(family.values(best[:, None])[0][0])
    reach = 1.0
    while reach > 1e-3 and np.isfinite(value):
        moved = False
        for row, item in enumerate(family.unknowns):
            if isinstance(item.stated, OneOf):
                grid = np.arange(len(item.stated.values), dtype=np.float64)
            else:
                grid = np.clip(best[row] + reach * np.linspace(-1, 1, 17), 0.0, 1.0)
            trial = np.repeat(best[:, None], len(grid), axis=1)
            trial[row] = grid
            found, good = family.values(trial)
            score = np.where(good, sign * found, -np.inf)
            place = int(np.argmax(score))
            if score[place] > sign * value + 1e-12 * abs(value):
                best, value, moved = trial[:, place], float(found[place]), True
        if not moved:
            reach /= 4
    return best, value
