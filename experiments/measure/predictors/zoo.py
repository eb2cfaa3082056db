"""The predictors: what each needs, what it costs, and the logit field it makes of one collection.

Every predictor prices every coefficient vector from the same statistics; ``fields`` are what
:func:`theory.function_space.predict_risk` and :func:`theory.function_space.minimise_risk` take.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from experiments.measure.predictors.predictor import SECTION, Predictor, bracket, part_of, tangent_part
from experiments.measure.predictors.statistics import FieldStatistics
from theory.errors import MergeboundError

_P2 = "quadratic interpolation on the simplex (P2 element), theory.linearization_error.pair_interpolant"
_HERMITE = "smallest polynomial through values and derivatives, theory.interpolation"
_QUADRATIC, _CUBIC = "logits quadratic in alpha", "logits cubic in alpha, as far as the points determine them"

_EVERYTHING = (
    *("secant", "average", "pairs", "halves", "between"),
    *("tangent_base", "tangent_own", "tangent_average", "tangent_between"),
)

_ZOO = (
    Predictor("secant", ("secant",), (part_of("affine", "secant"),), "none", SECTION, "logits affine in alpha", True),
    Predictor("tangent_base", ("secant", "tangent_base"), (tangent_part("base"),), "base", SECTION, "linearised", True),
    Predictor("tangent_own", ("secant", "tangent_own"), (tangent_part("own"),), "own", SECTION, "linearised", True),
    Predictor(
        "tangent_both",
        ("secant", "tangent_base", "tangent_own"),
        (tangent_part("base", 0.5), tangent_part("own", 0.5)),
        "base",
        SECTION,
        "linearised",
        True,
    ),
    Predictor(
        "tangent_average",
        ("secant", "average", "tangent_average"),
        (tangent_part("average"),),
        "average",
        f"{SECTION}, an anchor on the way",
        "linearised; the average for any logits",
        True,
    ),
    bracket(0.5),
    Predictor(
        "second_order",
        ("secant", "tangent_base"),
        (part_of("squares", "secant", "tangent_base"),),
        "base",
        "theory.function_space.second_order_field",
        "quadratic logits without mixed terms",
    ),
    Predictor(
        "second_derivative",
        ("secant", "tangent_base", "second", "second_mixed"),
        (part_of("quadratic", "value:base", "tangent_base", "second", "second_mixed"),),
        "base",
        "Taylor to second order at the base, theory.linearization_error",
        _QUADRATIC,
    ),
    Predictor("pairs", ("secant", "pairs"), (part_of("quadratic", "secant", "pairs"),), "none", _P2, "mixtures"),
    Predictor(
        "pairs_halves",
        ("secant", "pairs", "halves"),
        (part_of("quadratic", "secant", "pairs", "halves"),),
        "none",
        _P2,
        _QUADRATIC,
    ),
    Predictor(
        "pairs_tangent",
        ("secant", "pairs", "tangent_base"),
        (part_of("quadratic", "secant", "pairs", "tangent_base"),),
        "base",
        _P2,
        _QUADRATIC,
    ),
    Predictor(
        "anchored",
        ("secant", "average"),
        (part_of("affine+pairs", "secant", "average"),),
        "none",
        "secant plus one common mixed term that makes the average exact",
        "affine logits plus equal mixed terms; the average for any logits",
    ),
    Predictor(
        "anchored_tangent",
        ("secant", "average", "tangent_base"),
        (part_of("squares+pairs", "secant", "tangent_base", "average"),),
        "base",
        "second order plus one common mixed term that makes the average exact",
        "quadratic logits with equal mixed terms; the average for any logits",
    ),
    Predictor(
        "hermite_average",
        ("secant", "average", "tangent_average"),
        (part_of("quadratic", "secant", "average", "tangent_average"),),
        "average",
        _HERMITE,
        "the base, the experts and the average for any logits",
    ),
    Predictor(
        "hermite_own",
        ("secant", "tangent_base", "tangent_own"),
        (part_of("cubic", "secant", "tangent_base", "tangent_own"),),
        "base",
        _HERMITE,
        "the base and the experts for any logits",
    ),
    Predictor(
        "pairs_average",
        ("secant", "average", "pairs", "halves"),
        (part_of("cubic", "secant", "average", "pairs", "halves"),),
        "none",
        _HERMITE,
        _QUADRATIC,
    ),
    Predictor(
        "pairs_wide",
        ("secant", "average", "pairs", "halves", "sums"),
        (part_of("cubic", "secant", "average", "pairs", "halves", "sums"),),
        "none",
        _HERMITE + "; points beyond the mixtures for sums of coefficients above one",
        _QUADRATIC,
    ),
    Predictor(
        "cubic",
        ("secant", "average", "pairs", "halves", "tangent_base", "tangent_average"),
        (part_of("cubic", "secant", "average", "pairs", "halves", "tangent_base", "tangent_average"),),
        "base",
        _HERMITE,
        _CUBIC,
    ),
    Predictor(
        "cubic_all",
        _EVERYTHING,
        (part_of("cubic", *_EVERYTHING),),
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
