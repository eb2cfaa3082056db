"""What can be collected for predictions, where in coefficient space it lies, and how many passes it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from theory.errors import MergeboundError
from theory.interpolation import Known, derivatives, values

PRODUCT = 3.0
"""Forward passes that a Jacobian product is counted as, where it was not measured."""
SECOND = 7.0
"""The same for a second directional derivative (forward over forward)."""


@dataclass(frozen=True)
class Kind:
    """One sort of measurement on every task.

    Attributes:
        name: what users type.
        meaning: in words.
        derivative: 0 forward passes, 1 Jacobian products, 2 second directional derivatives.
        layers: whether it is collected layer by layer.
    """

    name: str
    meaning: str
    derivative: int = 0
    layers: bool = False


_ALL = (
    Kind("secant", "logits of the base and of every expert"),
    Kind("average", "logits of the average of all experts"),
    Kind("pairs", "logits of the averages of two experts"),
    Kind("halves", "logits half-way from the base to every expert"),
    Kind("sums", "logits at the base plus two task vectors"),
    Kind("between", "logits half-way from the base to the average"),
    Kind("secant_layers", "logits at the base plus one layer of one task vector", layers=True),
    Kind("tangent_base", "Jacobian products with every task vector at the base", 1, True),
    Kind("tangent_own", "Jacobian products with every task vector at the task's own expert", 1, True),
    Kind("tangent_average", "Jacobian products with every task vector at the average", 1, True),
    Kind("tangent_between", "Jacobian products with every task vector half-way from the base to the average", 1, True),
    Kind("second", "second directional derivatives at the base along every task vector", 2),
    Kind("second_mixed", "mixed second derivatives at the base between two task vectors", 2),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
STANDARD = ("secant", "average", "pairs", "halves", "tangent_base")
"""Collected by default: forward passes, and one Jacobian product per task and expert."""


def layout(name: str, size: int, own: int) -> Known:
    """Where the measurements of a kind lie, for N experts and the task of expert ``own``: D rows.

    Kinds that are collected layer by layer are described as if every layer moved together.  ``secant_layers`` has no
    place among whole models.
    """
    zero, units = np.zeros(size), np.eye(size)
    first, second = np.triu_indices(size, 1)
    average = np.full(size, 1.0 / size)
    if name == "secant":
        return values(np.vstack([zero, units]))
    if name == "average":
        return values(average)
    if name in ("pairs", "sums"):
        points = (units[first] + units[second]) * (0.5 if name == "pairs" else 1.0)
        return values(points.reshape(-1, size))
    if name == "halves":
        return values(units / 2)
    if name == "between":
        return values(average / 2)
    if name.startswith("tangent_"):
        where = {"base": zero, "own": units[own], "average": average, "between": average / 2}
        return derivatives(where[name.removeprefix("tangent_")], units)
    if name == "second":
        return derivatives(zero, 2 * units)
    if name == "second_mixed":
        return derivatives(zero, (units[first] + units[second]).reshape(-1, size))
    raise MergeboundError(f"{name!r} has no place among whole models: choose from {', '.join(KINDS)}")


def passes(name: str, size: int, layers: int = 1) -> int:
    """Passes per task: forward passes, Jacobian products or second derivatives, as the kind says."""
    pairs = size * (size - 1) // 2
    counts = {"secant": size + 1, "average": 1, "between": 1, "pairs": pairs, "sums": pairs, "second_mixed": pairs}
    found = counts.get(name, size)
    return found * layers if KINDS[name].layers else found


def forward_equivalents(name: str, size: int, layers: int = 1) -> float:
    """Cost of a kind per task in forward passes of its calibration images."""
    return passes(name, size, layers) * (1.0, PRODUCT, SECOND)[KINDS[name].derivative]


def check_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """The kinds in their standard order, the secant always among them.

    Raises:
        MergeboundError: an unknown kind.
    """
    wanted = set(kinds)
    unknown = sorted(wanted - set(KINDS))
    if unknown:
        raise MergeboundError(f"kinds: {unknown[0]!r} is not known; choose from {', '.join(KINDS)}")
    return tuple(name for name in KINDS if name in wanted | {"secant"})
