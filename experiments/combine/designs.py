"""Which groups are merged: by a factor with everything else held, at random, or all of them.

Every draw comes from ``default_rng([seed, constant])`` of the group's own seed, so a design with more groups, other
sizes or other levels keeps the groups that it shares with this one.  With one seed, the groups of a smaller size are
parts of those of a larger one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd

from experiments.combine.cells import Cell, factor_cells, restricted
from experiments.combine.groups import Group, Member, grid_table, group_of, members
from theory.errors import MergeboundError

MOST = 1_000_000
"""Groups that a design may have."""
SIZE, GROUPS = 6, 10
"""Protocol A: 10 random groups of 6 tasks."""
_ATTEMPTS, _LISTED_AFTER = 10_000, 64
"""Draws without a new group after which there is none, or after which the groups that are left are listed."""
_DRAW, _LEVEL, _RANDOM, _LEFT = 0x6209, 0x1E7E, 0x4A4D, 0x1EF7

T = TypeVar("T")
Others = Literal["middle", "all", "free"]


@dataclass(frozen=True)
class Design:
    """Groups that are counted and not yet made; iterate for them.

    Attributes:
        kind: ``factor``, ``random`` or ``all``.
        sizes: experts per group.
        count: how many groups there are.
        factor: what varies.
        levels: of the factor.
        strata: what is held, one entry for each combination.
        left_out: tasks that some level lacks, in words.
    """

    kind: str
    sizes: tuple[int, ...]
    count: int
    factor: str = ""
    levels: tuple[Any, ...] = ()
    strata: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    _cells: tuple[Cell, ...] = field(default=(), repr=False)
    _options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Group]:
        if self.kind == "factor":
            return _factor_groups(self)
        return _random_groups(self) if self.kind == "random" else _all_groups(self)


def by_factor(
    frame: pd.DataFrame,
    factor: str,
    *,
    sizes: Sequence[int] = (SIZE,),
    groups: int = GROUPS,
    seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
    others: Others = "middle",
    matched: bool = True,
    bins: int | None = None,
    on_missing: Literal["error", "leave_out"] = "error",
) -> Design:
    """Groups for the effect of one hyperparameter (protocol A).

    Args:
        frame: table of the grid, one row per run and checkpoint.
        factor: a column of :data:`~experiments.combine.groups.FACTORS`; ``step`` compares checkpoints of the same runs.
            Everywhere else the last checkpoint of every run counts, unless ``fixed`` names a ``step``.
        sizes: experts per group, one per task.
        groups: per level, size and stratum; their seeds are ``seed``, ``seed + 1``, ...
        fixed: values that other hyperparameters (or ``base_digest``, ``seed``) are held at.
        others: what happens to varying hyperparameters that ``fixed`` leaves open: held at their ``middle`` value (the
            lower of two); ``all`` combinations, each a stratum; or ``free``, drawn at random with the expert (for grids
            of random or Sobol samples).
        matched: the same tasks at every level, so that differences are paired, and the same seeds of fine-tuning; with
            ``others`` that are free, the same seeds only where every level has them alike (``Group.matched_seeds``).
            Otherwise every level draws its own.
        bins: cut the factor into this many intervals of equal counts; an expert is drawn among all runs of its interval
            (of the seed that is drawn first).
        on_missing: whether a task that some level lacks is an ``error`` or is left out at every level.

    Raises:
        MergeboundError: an unknown factor, a factor with one level, or an empty cell, naming what is missing.
    """
    table = restricted(grid_table(frame), fixed or {}, keep_steps=factor == "step")
    held = ({} if fixed is None else dict(fixed)).keys() - {factor}
    wanted = _sizes(sizes)
    if groups < 1:
        raise MergeboundError(f"groups = {groups}: give one or more")
    cells, levels, left_out = factor_cells(
        table, factor, held=held, others=others, matched=matched, bins=bins, leave_out=on_missing == "leave_out"
    )
    for cell in cells:
        if len(cell.tasks) < wanted[-1]:
            raise MergeboundError(
                f"groups of {wanted[-1]} tasks were asked for, but {cell.words} has {len(cell.tasks)} tasks at every "
                f"level of {factor}{_lost(left_out)}; ask for smaller groups"
            )
    count = _bounded(groups * len(levels) * len(wanted) * len(cells))
    options = {"groups": groups, "seed": seed, "matched": matched}
    strata = tuple(cell.stratum for cell in cells)
    return Design("factor", wanted, count, factor, levels, strata, left_out, cells, options)


def random_groups(
    frame: pd.DataFrame,
    *,
    sizes: Sequence[int] = (SIZE,),
    groups: int = GROUPS,
    seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
    steps: Literal["last", "any"] = "last",
) -> Design:
    """Different groups at random: tasks without repetition, and for each any of its experts.

    Args:
        frame, sizes, fixed: as :func:`by_factor`.
        groups: per size and base; a design with more of them begins with these.
        seed: of the draws; groups have the seeds ``seed``, ``seed + 1``, ...
        steps: the ``last`` checkpoint of every run, or ``any`` of them.

    Raises:
        MergeboundError: more groups than there are, or fewer tasks than experts per group.
    """
    pools = _pools(frame, fixed, steps)
    wanted = _sizes(sizes)
    if groups < 1:
        raise MergeboundError(f"groups = {groups}: give one or more")
    for base, pool in pools:
        for size in wanted:
            there_are = _combinations([len(own) for own in pool.values()], size)
            if there_are < groups:
                raise MergeboundError(
                    f"base {base[:12]}: {groups} groups of {size} experts of different tasks were asked for, but there "
                    f"are {there_are} ({len(pool)} tasks); ask for fewer, or smaller ones"
                )
    count = _bounded(groups * len(wanted) * len(pools))
    return Design("random", wanted, count, _options={"pools": pools, "groups": groups, "seed": seed})


def all_groups(
    frame: pd.DataFrame,
    *,
    sizes: Sequence[int] = (2,),
    fixed: Mapping[str, Any] | None = None,
    steps: Literal["last", "any"] = "last",
) -> Design:
    """Every group of experts of different tasks; by default all pairs.

    Raises:
        MergeboundError: no group, or more than :data:`MOST`.
    """
    pools = _pools(frame, fixed, steps)
    wanted = _sizes(sizes)
    count = sum(_combinations([len(own) for own in pool.values()], size) for _, pool in pools for size in wanted)
    if not count:
        raise MergeboundError(f"there are no groups of {wanted[0]} experts of different tasks; ask for smaller ones")
    return Design("all", wanted, _bounded(count), _options={"pools": pools})


def _factor_groups(design: Design) -> Iterator[Group]:
    matched: bool = design._options["matched"]
    first: int = design._options["seed"]
    for cell in design._cells:
        for number, level in enumerate(design.levels):
            for seed in range(first, first + design._options["groups"]):
                rng = np.random.default_rng([seed, _DRAW])
                if not matched:
                    rng = np.random.default_rng([seed, _LEVEL, number])
                count = len(cell.tasks)
                order, draws, within = rng.permutation(count), rng.random(count), rng.random(count)
                tasks = [cell.tasks[i] for i in order]
                chosen = [
                    _pick(_pick(cell.choices[level][task], u), v)
                    for task, u, v in zip(tasks, draws, within, strict=True)
                ]
                for size in design.sizes:
                    yield group_of(
                        chosen[:size],
                        cell.base(level),
                        design="factor",
                        factor=design.factor,
                        level=level,
                        seed=seed,
                        stratum=cell.stratum,
                        matched=matched,
                        matched_seeds=matched and cell.same_seeds,
                    )


def _random_groups(design: Design) -> Iterator[Group]:
    for base, pool in design._options["pools"]:
        stratum = json.dumps({"base_digest": base})
        for size in design.sizes:
            first, wanted = design._options["seed"], design._options["groups"]
            chosen = itertools.islice(_different(pool, size, first), wanted)
            for seed, group in enumerate(chosen, start=first):
                yield group_of(group, base, design="random", seed=seed, stratum=stratum)


def _different(pool: Mapping[str, Sequence[Member]], size: int, first: int) -> Iterator[tuple[Member, ...]]:
    """All groups, each once, in an order that does not depend on how many are asked for.

    Each is drawn until it is new.  Where that takes long, as most are drawn already, those that are left are listed
    once, and come in an order of their own draw.
    """
    names = sorted(pool)
    there_are = _combinations([len(own) for own in pool.values()], size)
    attempts = _LISTED_AFTER if there_are <= MOST else _ATTEMPTS
    seen: set[tuple[Member, ...]] = set()
    for seed in itertools.count(first):
        for attempt in range(attempts):
            rng = np.random.default_rng([seed, _RANDOM, attempt])
            order, draws = rng.permutation(len(names)), rng.random(len(names))
            chosen = tuple(sorted(_pick(pool[names[order[k]]], draws[k]) for k in range(size)))
            if chosen not in seen:
                break
        else:
            if there_are > MOST:
                raise MergeboundError(
                    f"no new group of {size} experts in {_ATTEMPTS} draws after {len(seen)}; ask for fewer groups"
                )
            left = [group for every in _every(pool, size) if (group := tuple(sorted(every))) not in seen]
            for k in np.random.default_rng([seed, _LEFT, size]).permutation(len(left)):
                yield left[k]
            return
        seen.add(chosen)
        yield chosen


def _all_groups(design: Design) -> Iterator[Group]:
    for base, pool in design._options["pools"]:
        stratum = json.dumps({"base_digest": base})
        for size in design.sizes:
            for chosen in _every(pool, size):
                yield group_of(chosen, base, design="all", stratum=stratum)


def _every(pool: Mapping[str, Sequence[Member]], size: int) -> Iterator[tuple[Member, ...]]:
    for tasks in itertools.combinations(sorted(pool), size):
        yield from itertools.product(*(pool[task] for task in tasks))


def _pools(
    frame: pd.DataFrame, fixed: Mapping[str, Any] | None, steps: str
) -> tuple[tuple[str, dict[str, list[Member]]], ...]:
    """Experts by task, for each base."""
    if steps not in ("last", "any"):
        raise MergeboundError(f"steps = {steps!r}: choose last or any")
    table = restricted(grid_table(frame), fixed or {}, keep_steps=steps == "any")
    found = []
    for base, rows in table.groupby("base_digest", sort=True):
        pool: dict[str, list[Member]] = {}
        for member in members(rows):
            pool.setdefault(member.task, []).append(member)
        found.append((str(base), pool))
    return tuple(found)


def _pick(choices: Sequence[T], u: float) -> T:
    """The choice that a draw u from [0, 1) falls on."""
    return choices[min(int(u * len(choices)), len(choices) - 1)]


def _combinations(counts: Sequence[int], size: int) -> int:
    """Groups of experts of different tasks: the elementary symmetric polynomial of the counts."""
    ways = [1] + [0] * size
    for count in counts:
        for k in range(size, 0, -1):
            ways[k] += ways[k - 1] * count
    return ways[size]


def _sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    found = tuple(sorted(set(sizes)))
    if not found or found[0] < 1:
        raise MergeboundError(f"sizes = {list(sizes)}: give numbers of experts per group, 1 or more")
    return found


def _bounded(count: int) -> int:
    if count > MOST:
        raise MergeboundError(
            f"the design has {count:,} groups, more than {MOST:,}; ask for fewer groups, sizes or levels"
        )
    return count


def _lost(left_out: Sequence[str]) -> str:
    return f" (left out: {'; '.join(left_out)})" if left_out else ""
