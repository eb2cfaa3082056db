"""A predictor of merged risk: which logits it needs and how it puts them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.measure.predictors.kinds import forward_equivalents, layout
from experiments.measure.predictors.statistics import FieldStatistics
from theory.interpolation import (
    Basis,
    InterpolatedField,
    Rule,
    affine,
    own_squares,
    polynomials,
    together,
    with_common_pairs,
)

Shape = Literal["affine", "squares", "affine+pairs", "squares+pairs", "quadratic", "cubic"]

Residual = Literal["none", "base", "own", "average"]

SECTION = "theory.md section 8"

_BASES: dict[Shape, Callable[[int], tuple[Basis, ...]]] = {
    "affine": lambda size: (affine(size),),
    "squares": lambda size: (own_squares(size),),
    "affine+pairs": lambda size: (with_common_pairs(affine(size)),),
    "squares+pairs": lambda size: (with_common_pairs(own_squares(size)),),
    "quadratic": lambda size: (polynomials(size, 2),),
    "cubic": lambda size: (polynomials(size, 2), polynomials(size, 3)),
}


@dataclass(frozen=True)
class Part:
    """A polynomial through some of what is known.

    Attributes:
        shape: of the polynomial in alpha; ``cubic`` is a quadratic, corrected by a cubic for what it leaves.
        kinds: that it goes through; ``point:<kind>`` is the value at the point of a kind's products alone.
        weight: in the sum of parts.
    """

    shape: Shape
    kinds: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Predictor:
    """A way to price every merge from one collection.

    Attributes:
        name: what users type.
        needs: kinds of :data:`experiments.measure.predictors.kinds.KINDS`.
        parts: polynomials whose weighted sum predicts the logits.
        residual: where a non-linear merge's residual is multiplied with the Jacobian; ``none``: it is dropped.
        reference: where it is described.
        exact: for which logits it is exact, in words.
        convex: whether the predicted risk is convex in alpha.
        tier: of its predictions.
        residual_weight: factor on the residual's product.
    """

    name: str
    needs: tuple[str, ...]
    parts: tuple[Part, ...]
    residual: Residual
    reference: str
    exact: str
    convex: bool = False
    tier: str = "estimated"
    residual_weight: float = 1.0

    def cost(self, size: int, layers: int = 1) -> float:
        """Forward passes (or as many as its products are worth) over all N tasks' calibration images."""
        return size * sum(forward_equivalents(kind, size, layers) for kind in self.needs)

    def available(self, statistics: FieldStatistics) -> bool:
        """Whether everything it needs was collected."""
        return set(self.needs) <= set(statistics.kinds)

    def rule(self, size: int, own: int) -> Rule:
        """The weights of task ``own`` for N experts; observations in the order of :meth:`known_kinds`."""
        kinds = self.known_kinds()
        known = [layout(kind, size, own) for kind in kinds]
        starts = np.cumsum([0, *(len(k) for k in known)])
        rows = {kind: tuple(range(starts[k], starts[k + 1])) for k, kind in enumerate(kinds)}
        parts = []
        for part in self.parts:
            chosen: list[int] = []
            for kind in part.kinds:
                chosen += _value_row(kind, own, rows) if kind.startswith("value:") else rows[kind]
            parts.append((part.weight, _BASES[part.shape](size), tuple(chosen)))
        return Rule(tuple(parts), together(known))

    def known_kinds(self) -> tuple[str, ...]:
        """The kinds behind a field's data, in their order."""
        return tuple(dict.fromkeys(self.needs))

    def fields(self, statistics: FieldStatistics) -> list[InterpolatedField]:
        """Logit fields over the N coefficients, one per task.

        Raises:
            MergeboundError: something it needs was not collected.
        """
        made, shared = [], self.rule(statistics.size, 0)
        alike = not any(kind.endswith("own") for part in self.parts for kind in part.kinds)
        for j, labels in enumerate(statistics.labels):
            data = np.concatenate([statistics.of(kind, j) for kind in self.known_kinds()])
            rule = shared if alike else self.rule(statistics.size, j)
            made.append(InterpolatedField(rule, data, labels, self.name))
        return made


def _value_row(kind: str, own: int, rows: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The one value that a tangent starts from."""
    where = kind.removeprefix("value:")
    return {"base": rows["secant"][:1], "own": rows["secant"][1 + own : 2 + own]}.get(where) or rows[where]


def tangent_part(at: str, weight: float = 1.0) -> Part:
    """The tangent at ``base`` or ``own``."""
    return Part("affine", (f"value:{at}", f"tangent_{at}"), weight)


def part_of(shape: Shape, *kinds: str, weight: float = 1.0) -> Part:
    """A polynomial of a shape through the values and derivatives that ``kinds`` name."""
    return Part(shape, kinds, weight)


def bracket(weight: float) -> Predictor:
    """Logits ``(1 - weight)`` secant plus ``weight`` tangent at the base; a fitted weight is of tier *calibrated*."""
    name = "secant_tangent" if weight == 0.5 else f"bracket_{weight:g}"
    return Predictor(
        name,
        ("secant", "tangent_base"),
        (part_of("affine", "secant", weight=1.0 - weight), tangent_part("base", weight)),
        "base",
        f"{SECTION}, secant and tangent averaged",
        "logits affine in alpha",
        convex=True,
        tier="estimated" if weight == 0.5 else "calibrated",
        residual_weight=weight,
    )
