"""The predictors: what each needs, what it costs, and the logit field it makes of one collection.

Every predictor prices every coefficient vector from the same statistics; ``fields`` are what
:func:`theory.function_space.predict_risk` and :func:`theory.function_space.minimise_risk` take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.measure.predictors.kinds import forward_equivalents, layout
from experiments.measure.predictors.statistics import FieldStatistics
from theory.errors import MergeboundError
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
_SECTION = "theory.md section 8"

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


def _tangent(at: str, weight: float = 1.0) -> Part:
    return Part("affine", (f"value:{at}", f"tangent_{at}"), weight)


def _part(shape: Shape, *kinds: str, weight: float = 1.0) -> Part:
    return Part(shape, kinds, weight)


def bracket(weight: float) -> Predictor:
    """Logits ``(1 - weight)`` secant plus ``weight`` tangent at the base; a fitted weight is of tier *calibrated*."""
    name = "secant_tangent" if weight == 0.5 else f"bracket_{weight:g}"
    return Predictor(
        name,
        ("secant", "tangent_base"),
        (_part("affine", "secant", weight=1.0 - weight), _tangent("base", weight)),
        "base",
        f"{_SECTION}, secant and tangent averaged",
        "logits affine in alpha",
        convex=True,
        tier="estimated" if weight == 0.5 else "calibrated",
        residual_weight=weight,
    )


_P2 = "quadratic interpolation on the simplex (P2 element), theory.linearization_error.pair_interpolant"
_HERMITE = "smallest polynomial through values and derivatives, theory.interpolation"
_QUADRATIC, _CUBIC = "logits quadratic in alpha", "logits cubic in alpha, as far as the points determine them"

_EVERYTHING = (
    *("secant", "average", "pairs", "halves", "between"),
    *("tangent_base", "tangent_own", "tangent_average", "tangent_between"),
)

_ZOO = (
    Predictor("secant", ("secant",), (_part("affine", "secant"),), "none", _SECTION, "logits affine in alpha", True),
    Predictor("tangent_base", ("secant", "tangent_base"), (_tangent("base"),), "base", _SECTION, "linearised", True),
    Predictor("tangent_own", ("secant", "tangent_own"), (_tangent("own"),), "own", _SECTION, "linearised", True),
    Predictor(
        "tangent_both",
        ("secant", "tangent_base", "tangent_own"),
        (_tangent("base", 0.5), _tangent("own", 0.5)),
        "base",
        _SECTION,
        "linearised",
        True,
    ),
    Predictor(
        "tangent_average",
        ("secant", "average", "tangent_average"),
        (_tangent("average"),),
        "average",
        f"{_SECTION}, an anchor on the way",
        "linearised; the average for any logits",
        True,
    ),
    bracket(0.5),
    Predictor(
        "second_order",
        ("secant", "tangent_base"),
        (_part("squares", "secant", "tangent_base"),),
        "base",
        "theory.function_space.second_order_field",
        "quadratic logits without mixed terms",
    ),
    Predictor(
        "second_derivative",
        ("secant", "tangent_base", "second", "second_mixed"),
        (_part("quadratic", "value:base", "tangent_base", "second", "second_mixed"),),
        "base",
        "Taylor to second order at the base, theory.linearization_error",
        _QUADRATIC,
    ),
    Predictor("pairs", ("secant", "pairs"), (_part("quadratic", "secant", "pairs"),), "none", _P2, "mixtures"),
    Predictor(
        "pairs_halves",
        ("secant", "pairs", "halves"),
        (_part("quadratic", "secant", "pairs", "halves"),),
        "none",
        _P2,
        _QUADRATIC,
    ),
    Predictor(
        "pairs_tangent",
        ("secant", "pairs", "tangent_base"),
        (_part("quadratic", "secant", "pairs", "tangent_base"),),
        "base",
        _P2,
        _QUADRATIC,
    ),
    Predictor(
        "anchored",
        ("secant", "average"),
        (_part("affine+pairs", "secant", "average"),),
        "none",
        "secant plus one common mixed term that makes the average exact",
        "affine logits plus equal mixed terms; the average for any logits",
    ),
    Predictor(
        "anchored_tangent",
        ("secant", "average", "tangent_base"),
        (_part("squares+pairs", "secant", "tangent_base", "average"),),
        "base",
        "second order plus one common mixed term that makes the average exact",
        "quadratic logits with equal mixed terms; the average for any logits",
    ),
    Predictor(
        "hermite_average",
        ("secant", "average", "tangent_average"),
        (_part("quadratic", "secant", "average", "tangent_average"),),
        "average",
        _HERMITE,
        "the base, the experts and the average for any logits",
    ),
    Predictor(
        "hermite_own",
        ("secant", "tangent_base", "tangent_own"),
        (_part("cubic", "secant", "tangent_base", "tangent_own"),),
        "base",
        _HERMITE,
        "the base and the experts for any logits",
    ),
    Predictor(
        "pairs_average",
        ("secant", "average", "pairs", "halves"),
        (_part("cubic", "secant", "average", "pairs", "halves"),),
        "none",
        _HERMITE,
        _QUADRATIC,
    ),
    Predictor(
        "pairs_wide",
        ("secant", "average", "pairs", "halves", "sums"),
        (_part("cubic", "secant", "average", "pairs", "halves", "sums"),),
        "none",
        _HERMITE + "; points beyond the mixtures for sums of coefficients above one",
        _QUADRATIC,
    ),
    Predictor(
        "cubic",
        ("secant", "average", "pairs", "halves", "tangent_base", "tangent_average"),
        (_part("cubic", "secant", "average", "pairs", "halves", "tangent_base", "tangent_average"),),
        "base",
        _HERMITE,
        _CUBIC,
    ),
    Predictor(
        "cubic_all",
        _EVERYTHING,
        (_part("cubic", *_EVERYTHING),),
        "base",
        _HERMITE,
        _CUBIC + "; least squares where they are more than it has coefficients",
    ),
)
ZOO: dict[str, Predictor] = {predictor.name: predictor for predictor in _ZOO}
"""Every predictor that interpolates logits over the coefficients of whole models, by name."""


def predictors(names: Iterable[str] | None, statistics: FieldStatistics) -> list[Predictor]:
    """The predictors of these names; default all for which everything was collected.

    Raises:
        MergeboundError: an unknown name, or something that was not collected.
    """
    if names is None:
        return [p for p in ZOO.values() if p.available(statistics)]
    found = []
    for name in names:
        if name not in ZOO and not name.startswith("bracket_"):
            raise MergeboundError(f"predictor {name!r} is not known: choose from {', '.join(ZOO)}, bracket_<weight>")
        predictor = ZOO[name] if name in ZOO else bracket(_weight(name))
        missing = [kind for kind in predictor.needs if kind not in statistics.kinds]
        if missing:
            raise MergeboundError(f"predictor {name} needs {', '.join(missing)}: collect these kinds, or leave it out")
        found.append(predictor)
    return found


def kinds_for(names: Sequence[str]) -> tuple[str, ...]:
    """What has to be collected for some predictors."""
    chosen = [ZOO[name] if name in ZOO else bracket(_weight(name)) for name in names]
    return tuple(dict.fromkeys(kind for predictor in chosen for kind in predictor.needs))


def _weight(name: str) -> float:
    try:
        found = float(name.removeprefix("bracket_"))
    except ValueError:
        found = np.nan
    if not np.isfinite(found):
        raise MergeboundError(f"predictor {name!r} is not known: choose from {', '.join(ZOO)}, or bracket_0.25")
    return found
