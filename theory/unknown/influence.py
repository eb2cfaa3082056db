"""Which unknown widens the interval most: ratios one at a time, and Shapley shares of the variance."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from theory.symbolic import FloatArray
from theory.unknown.family import Family
from theory.unknown.stated import Range


@dataclass(frozen=True)
class Influence:
    """How much one unknown widens the interval.

    ``alone``: ratio of the largest to the smallest bound when only it varies and the others are at their middle;
    ``share``: its Shapley share of the variance of the log bound over the stated ranges (shares add up to 1).
    """

    name: str
    alone: float
    share: float


def influences_of(family: Family, rng: np.random.Generator, samples: int = 512) -> tuple[Influence, ...]:
    """How much every unknown widens the interval, largest share first."""
    count = len(family.unknowns)
    middle = np.full(count, 0.5)
    for row in family.discrete:
        middle[row] = 0.0
    alone = []
    for row, item in enumerate(family.unknowns):
        grid = np.linspace(0, 1, 33) if isinstance(item.stated, Range) else np.arange(len(item.stated.values))
        trial = np.repeat(middle[:, None], len(grid), axis=1)
        trial[row] = grid
        value, good = family.values(trial)
        seen = value[good]
        ratio = np.inf if not len(seen) or np.isinf(seen.max()) else seen.max() / seen.min() if seen.min() > 0 else 1.0
        alone.append(float(ratio))
    shares = _shapley(family, rng, samples)
    made = [Influence(item.name, alone[row], shares[row]) for row, item in enumerate(family.unknowns)]
    return tuple(sorted(made, key=lambda item: -item.share))


def _shapley(family: Family, rng: np.random.Generator, samples: int) -> list[float]:
    """Shapley shares of ``Var log(bound)``: increments of ``Var E[log bound | known unknowns]`` (pick and freeze).

    All orders up to four unknowns, 24 random ones beyond; infinite bounds count as ten times the largest finite one.
    """
    count = len(family.unknowns)
    first, second = family.draw(rng, samples), family.draw(rng, samples)

    def logs(points: FloatArray) -> FloatArray:
        value, good = family.values(points)
        finite = good & np.isfinite(value) & (value > 0)
        if not finite.any():
            return np.zeros(len(value))
        top = np.log(value[finite]).max() + np.log(10.0)
        return np.where(finite, np.log(np.where(finite, value, 1.0)), np.where(good, top, np.nan))

    base = logs(first)
    cache: dict[frozenset[int], float] = {}

    def explained(known: frozenset[int]) -> float:
        if known not in cache:
            mixed = second.copy()
            mixed[list(known)] = first[list(known)]
            other = logs(mixed)
            both = ~np.isnan(base) & ~np.isnan(other)
            if both.sum() < 2:
                return 0.0
            cache[known] = float(np.mean((base[both] - base[both].mean()) * (other[both] - other[both].mean())))
        return cache[known]

    orders = list(itertools.permutations(range(count))) if count <= 4 else [rng.permutation(count) for _ in range(24)]
    shares = np.zeros(count)
    for order in orders:
        known: frozenset[int] = frozenset()
        for row in order:
            more = known | {int(row)}
            shares[row] += explained(more) - explained(known)
            known = more
    total = shares.sum()
    return [float(share / total) if total > 0 else 0.0 for share in shares]
