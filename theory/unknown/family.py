"""All recipes of the stated ranges: points of a unit cube, turned into recipes and bounds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from theory.chunks import one_recipe
from theory.enclosure import Unchecked, unchecked
from theory.errors import RecipeError
from theory.recipe import Expert, Merge, Schedule, per_expert
from theory.risk import master_bound
from theory.symbolic import FloatArray
from theory.ties import impossible
from theory.unknown.stated import OneOf, Range, Unknown

MOST_COMBINATIONS = 256


@dataclass(frozen=True, eq=False)
class Family:
    """The recipes of all stated ranges: shares in [0, 1] for ranges, places in the list for sets."""

    merge: Merge
    unknowns: tuple[Unknown, ...]

    def __post_init__(self) -> None:
        """Refuse a merge over several configurations: points and configurations would share an axis."""
        one_recipe(self.merge, "a search over unknown fields")

    @property
    def continuous(self) -> tuple[int, ...]:
        """Rows of the unknowns that have a range."""
        return tuple(row for row, item in enumerate(self.unknowns) if isinstance(item.stated, Range))

    @property
    def discrete(self) -> tuple[int, ...]:
        """Rows of the unknowns that have a set of values."""
        return tuple(row for row, item in enumerate(self.unknowns) if isinstance(item.stated, OneOf))

    def combinations(self) -> list[dict[int, int]]:
        """Every choice of values of the sets: row -> place in its list."""
        counts = [range(len(self.unknowns[row].stated.values)) for row in self.discrete]  # type: ignore[union-attr]
        total = int(np.prod([len(count) for count in counts])) if counts else 1
        if total > MOST_COMBINATIONS:
            raise RecipeError(
                f"unknown: the sets have {total} combinations, at most {MOST_COMBINATIONS} are tried; use ranges"
            )
        return [dict(zip(self.discrete, places, strict=True)) for places in itertools.product(*counts)]

    def fixed(self, places: Mapping[int, int]) -> Merge:
        """The merge with its sets settled."""
        changes: dict[int, dict[str, Any]] = {}
        for row, place in places.items():
            item = self.unknowns[row]
            assert isinstance(item.stated, OneOf)
            for index in item.experts:
                changes.setdefault(index, {})[item.field] = item.stated.values[place]
        experts = tuple(_describe(item, changes.get(index, {})) for index, item in enumerate(self.merge.experts))
        return replace(self.merge, experts=experts)

    def ranged(self, merge: Merge, shares: FloatArray) -> Merge:
        """The merge with its ranges at ``shares`` (rows as :attr:`continuous`), fields over candidates."""
        changes: dict[int, dict[str, Any]] = {}
        alpha = None
        for place, row in enumerate(self.continuous):
            item = self.unknowns[row]
            value = item.at(shares[place])
            if item.field == "coefficients":
                if alpha is None:
                    alpha = coefficient_rows(merge, shares.shape[1])
                alpha[list(item.experts)] = value
                continue
            for index in item.experts:
                changes.setdefault(index, {})[item.field] = value
        experts = tuple(_describe(item, changes.get(index, {})) for index, item in enumerate(merge.experts))
        extra: dict[str, Any] = {} if alpha is None else {"coefficients": alpha}
        return replace(merge, experts=experts, **extra)

    def values(self, points: FloatArray) -> tuple[FloatArray, np.ndarray]:
        """Bounds of points (shape ``(unknowns, m)``) and which of them are in the domain."""
        value, good = np.full(points.shape[1], np.inf), np.zeros(points.shape[1], dtype=bool)
        for places in self.combinations():
            here = np.ones(points.shape[1], dtype=bool)
            for row, place in places.items():
                here &= points[row] == place
            if not here.any():
                continue
            merge = self.fixed(places)
            shares = points[list(self.continuous)][:, here]
            inside = in_domain(self.ranged(merge, shares), shares.shape[1])
            found = np.full(shares.shape[1], np.inf)
            if inside.any():
                found[inside] = master_bound(self.ranged(merge, shares[:, inside]), recursion=False).value
            value[here], good[here] = found, inside
        return np.where(np.isnan(value), np.inf, value), good

    def draw(self, rng: np.random.Generator, count: int) -> FloatArray:
        """Random points, shape ``(unknowns, count)``."""
        points = rng.random((len(self.unknowns), count))
        for row in self.discrete:
            stated = self.unknowns[row].stated
            assert isinstance(stated, OneOf)
            points[row] = rng.integers(0, len(stated.values), count)
        return points

    def read(self, point: FloatArray) -> dict[str, Any]:
        """The values of the unknowns at one point."""
        read: dict[str, Any] = {}
        for row, item in enumerate(self.unknowns):
            if isinstance(item.stated, OneOf):
                read[item.name] = item.stated.values[int(point[row])]
            else:
                read[item.name] = float(item.at(point[[row]])[0])
        return read


def coefficient_rows(merge: Merge, count: int) -> FloatArray:
    """The coefficients of the merge, shape ``(N, count)``; refused by name where the method has none."""
    if merge.method not in ("weighted", "task_arithmetic", "dare"):
        raise RecipeError(f"merge: method {merge.method!r} has no coefficients that could be unknown; remove the range")
    given = merge.coefficients if merge.coefficients is not None else per_expert(merge, "weights")
    rows = np.broadcast_to(np.asarray(given, dtype=np.float64), (merge.size,))
    return np.repeat(rows[:, None], count, axis=1)


def _describe(expert: Expert, changes: Mapping[str, Any]) -> Unchecked:
    for field in changes:
        if isinstance(getattr(expert, field), Schedule):
            raise RecipeError(f"expert {expert.name!r}: {field} is a schedule and has a range; give either, not both")
    return unchecked(expert, **changes)


def in_domain(merge: Merge, count: int) -> np.ndarray:
    """Which candidates are recipes at all; the rest of the checks is left to the first one that is."""
    good = np.ones(count, dtype=bool)
    for expert in merge.experts:
        batch, n = expert.batch_size, np.asarray(expert.n, dtype=np.float64)
        if expert.sampling != "with_replacement" and not isinstance(batch, Schedule):
            good &= np.asarray(batch, dtype=np.float64) <= n
        if not isinstance(expert.learning_rate, Schedule) and expert.kappa is not None:
            good &= 1 + np.asarray(expert.learning_rate) * np.asarray(expert.kappa) >= 0
        if expert.mu is not None and expert.L is not None:
            good &= np.asarray(expert.mu) <= np.asarray(expert.L)
        good &= np.asarray(expert.momentum, dtype=np.float64) < 1
        good &= ~impossible(expert)
    first = int(np.argmax(good))
    if good[first]:
        for expert in merge.experts:
            checked_expert(expert, first)
    return good


def checked_expert(expert: Expert, place: int) -> Expert:
    """One candidate as a checked expert: raises what is wrong with the recipe."""
    values: dict[str, Any] = {}
    for item in fields(Expert):
        value = getattr(expert, item.name)
        values[item.name] = value[place] if isinstance(value, np.ndarray) and value.ndim else value
    return Expert(**values)


def recipe_at(family: Family, point: FloatArray) -> Merge:
    """The merge at one point, with checked experts and plain numbers."""
    places = {row: int(point[row]) for row in family.discrete}
    merge = family.ranged(family.fixed(places), point[list(family.continuous)][:, None])
    experts = tuple(checked_expert(expert, 0) for expert in merge.experts)
    if any(item.field == "coefficients" for item in family.unknowns):
        return replace(merge, experts=experts, coefficients=np.asarray(merge.coefficients)[:, 0])
    return replace(merge, experts=experts)


def corner_points(family: Family, rng: np.random.Generator, most: int = 1024) -> FloatArray:
    """Corners of the box (all, or a random choice), every set at random."""
    count = len(family.continuous)
    if count <= 10:
        signs = np.array(list(itertools.product((0.0, 1.0), repeat=count))).T.reshape(count, 2**count)
    else:
        signs = rng.integers(0, 2, (count, most)).astype(np.float64)
    corners = [signs]
    made = []
    for places in family.combinations():
        block = np.zeros((len(family.unknowns), corners[0].shape[1]))
        block[list(family.continuous)] = corners[0]
        for row, place in places.items():
            block[row] = place
        made.append(block)
        if sum(item.shape[1] for item in made) >= 8 * most:
            break
    return np.concatenate(made, axis=1)
