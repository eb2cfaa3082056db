"""Whether observed task vectors can come from the recipe and its stated ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from theory.checks import one_number, whole_number
from theory.enclosure import drift_range, unchecked
from theory.errors import RecipeError
from theory.expert_terms import expert_drift
from theory.recipe import Merge
from theory.symbolic import FloatArray
from theory.unknown.checkpoints import TaskVectors, require_same_experts
from theory.unknown.family import Family, corner_points, in_domain
from theory.unknown.stated import OneOf, Range, read_unknowns


@dataclass(frozen=True)
class Consistency:
    """A task vector against the drift bound over the stated ranges.

    ``drift`` is the largest drift bound on the ranges (guaranteed where ``proven``); ``probability``: if recipe,
    ranges and constants were right, a norm like the observed one would have at most this probability (Markov,
    ``d^2/norm^2``); ``verdict``: *consistent* (bound above the norm), *strained* (below, but possible) or
    *contradicted* (probability below the level: an assumption, a constant or a range is wrong).  ``narrowed`` keeps,
    for every unknown of this expert, the part of its range where sampled recipes are not contradicted.
    """

    expert: str
    observed: float
    drift: float
    proven: bool
    probability: float
    verdict: Literal["consistent", "strained", "contradicted"]
    narrowed: Mapping[str, tuple[float, float]]


def consistency(
    merge: Merge,
    unknown: Mapping[str, Range | OneOf],
    seen: TaskVectors,
    *,
    level: float = 0.05,
    samples: int = 2048,
    seed: int = 0,
) -> tuple[Consistency, ...]:
    """Whether the task vectors can come from the recipe and the stated ranges, expert by expert.

    The drift bounds of Theorem 3 (never the measured drift) over the ranges are compared with the observed norms.  An
    expert whose drift cannot be bounded (its optimizer is not covered, constants are missing) is refused by name.

    >>> from theory import Expert, Merge, Range, task_vectors
    >>> known = dict(n=1000, batch_size=50, learning_rate=0.01, curvature="convex", L=1.0, initial_gradient_norm=0.5,
    ...              sigma0=1.0, D_inf=2.0, training_risk=0.05)
    >>> merge = Merge((Expert("a", steps=10, **known),))
    >>> seen = task_vectors(["a"], norms=[5.0])
    >>> consistency(merge, {"steps": Range(5, 20)}, seen)[0].verdict
    'contradicted'
    """
    require_same_experts(merge, seen)
    family = Family(merge, read_unknowns(merge, unknown))
    samples, seed = whole_number("unknown", "samples", samples, least=1), whole_number("unknown", "seed", seed)
    level = one_number("unknown", "level", level, below=1)
    rng = np.random.default_rng(seed)
    points = np.concatenate([family.draw(rng, samples), corner_points(family, rng)], axis=1)
    made = []
    for index, expert in enumerate(merge.experts):
        drift, good = _drifts(family, points, index)
        largest, proven = _largest_drift(family, index, float(drift[good].max()) if good.any() else 0.0)
        norm = float(seen.norms[index])
        chance = 1.0 if norm == 0 else float(min(1.0, (largest / norm) ** 2))
        verdict: Literal["consistent", "strained", "contradicted"] = "consistent"
        if norm > largest * (1 + 1e-12):
            verdict = "contradicted" if chance < level else "strained"
        possible = good & (drift >= norm * np.sqrt(level))
        narrowed = {}
        for row in family.continuous:
            item = family.unknowns[row]
            if index in item.experts and item.field != "coefficients" and possible.any():
                kept = item.at(points[row][possible])
                narrowed[item.name] = (float(kept.min()), float(kept.max()))
        made.append(Consistency(expert.name, norm, largest, proven, chance, verdict, narrowed))
    return tuple(made)


def _drifts(family: Family, points: FloatArray, index: int) -> tuple[FloatArray, np.ndarray]:
    value, good = np.zeros(points.shape[1]), np.zeros(points.shape[1], dtype=bool)
    for places in family.combinations():
        here = np.ones(points.shape[1], dtype=bool)
        for row, place in places.items():
            here &= points[row] == place
        if not here.any():
            continue
        ranged = family.ranged(family.fixed(places), points[list(family.continuous)][:, here])
        inside = in_domain(ranged, int(here.sum()))
        found, _ = expert_drift(unchecked(ranged.experts[index], drift=None, private_drift=None))
        value[here], good[here] = np.broadcast_to(found, inside.shape), inside
    return value, good


def _largest_drift(family: Family, index: int, found: float) -> tuple[float, bool]:
    """The guaranteed upper end of the drift bound over the ranges, or the largest one found."""
    ends = []
    for places in family.combinations():
        expert = family.fixed(places).experts[index]
        ranges = {
            item.field: (item.stated.lower, item.stated.upper)
            for item in (family.unknowns[row] for row in family.continuous)
            if isinstance(item.stated, Range) and index in item.experts and item.field != "coefficients"
        }
        ranges.pop("drift", None)
        try:
            ends.append(float(drift_range(unchecked(expert, drift=None), ranges)[1]))
        except RecipeError:
            return found, False
    return max(ends), True
