"""Cells of the study (network and base), the grid of each family, and the chains of nested groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.grid.expand import expand
from experiments.grid.run_spec import RunSpec
from experiments.grid.spec import GridSpec
from experiments.studies.scale.spec import FamilySpec, ScaleSpec
from theory.errors import MergeboundError

CHAINS = 0xC4A1
"""Names the stream of chains: ``default_rng([seed, CHAINS, chain])``."""


@dataclass(frozen=True)
class Cell:
    """One network fine-tuned from one base: ``place`` is the network's place in its family, from 0 (the smallest)."""

    family: str
    architecture: str
    base: str
    place: int

    @property
    def folder(self) -> str:
        """A name for files."""
        return f"{self.architecture}-{self.base}"


@dataclass(frozen=True)
class Chosen:
    """A group: the first N tasks of a chain, by their places among the held-in tasks, and the seed of fine-tuning."""

    chain: int
    members: tuple[int, ...]
    seed: int

    @property
    def size(self) -> int:
        """Number of experts N."""
        return len(self.members)


def cells(spec: ScaleSpec) -> tuple[Cell, ...]:
    """Every cell, family by family, small networks first, weakest base first."""
    return tuple(
        Cell(family.name, architecture, base, place)
        for family in spec.families
        for place, architecture in enumerate(family.architectures)
        for base in spec.bases_of(family)
    )


def chains(spec: ScaleSpec) -> tuple[Chosen, ...]:
    """All groups, nested along each chain; the group of all tasks is there once for each seed, with the first chain."""
    found: list[Chosen] = []
    seen: set[int] = set()
    for chain in range(spec.chains):
        order = np.random.default_rng([spec.seed, CHAINS, chain]).permutation(len(spec.held_in))
        seed = spec.seeds[chain % len(spec.seeds)]
        for size in spec.experts:
            members = tuple(sorted(int(i) for i in order[:size]))
            if size < len(spec.held_in) or seed not in seen:
                seen |= {seed} if size == len(spec.held_in) else set()
                found.append(Chosen(chain, members, seed))
    return tuple(found)


def family_grid(spec: ScaleSpec, family: FamilySpec) -> GridSpec:
    """The grid of a family's experts: every network and base, every held-in task, every seed.

    Raises:
        MergeboundError: an entry that the grid refuses.
    """
    content: dict[str, Any] = {
        "name": f"{spec.name}-{family.name}",
        "tasks": list(spec.held_in),
        "base": [
            _base(spec, family, architecture, base)
            for architecture in family.architectures
            for base in spec.bases_of(family)
        ],
        "seeds": list(spec.seeds),
        **family.recipe,
    }
    try:
        return GridSpec.model_validate(content)
    except ValueError as error:
        raise MergeboundError(f"families.{family.name}: {' '.join(str(error).split())}") from error


def _base(spec: ScaleSpec, family: FamilySpec, architecture: str, base: str) -> dict[str, Any]:
    content = dict(spec.bases[base])
    pattern = str(content.pop("architecture", "{}"))
    if base in family.qualities:
        content["quality"] = {**content["quality"], **family.qualities[base]}
    return {**content, "architecture": pattern.replace("{}", architecture), "options": dict(family.options)}


def runs_of(spec: ScaleSpec, family: FamilySpec) -> Mapping[Cell, tuple[RunSpec, ...]]:
    """The runs of every cell of a family, in the order of the grid (base, task, seed)."""
    grid = family_grid(spec, family)
    mine = [cell for cell in cells(spec) if cell.family == family.name]
    found: dict[Cell, list[RunSpec]] = {cell: [] for cell in mine}
    order: list[Any] = []
    for run in expand(grid):
        if run.base not in order:
            order.append(run.base)
        found[mine[order.index(run.base)]].append(run)
    return {cell: tuple(runs) for cell, runs in found.items()}
