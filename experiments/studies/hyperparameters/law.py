"""What the theory says about exponents: the laws of section 11, and its formulas with constants held at the centre."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.studies.hyperparameters.constants import from_json, without_logs
from experiments.studies.hyperparameters.spec import StudySpec
from experiments.studies.hyperparameters.trends import Floats, group_slopes, position
from experiments.studies.hyperparameters.work import Row
from theory.errors import MergeboundError
from theory.expert_terms import expert_drift, expert_epsilon
from theory.recipe import Expert

QUANTITIES = ("drift", "V", "epsilon")
"""Theorem 3 (d), Theorem 4 (V), Theorem 2 (epsilon, root mean square over experts; divided by N where N varies)."""


@dataclass(frozen=True)
class Law:
    """A range in which an exponent lies, and where that is said."""

    low: float
    high: float
    source: str


_S11, _S4 = "theory.md section 11", "theory.md section 4"
LAWS: Mapping[tuple[str, str], Law] = {
    ("learning_rate", "drift"): Law(1.0, 1.0, _S11),
    ("learning_rate", "V"): Law(2.0, 2.0, _S11),
    ("learning_rate", "epsilon"): Law(1.0, 1.0, _S11),
    ("step", "drift"): Law(0.5, 1.0, _S11),
    ("step", "V"): Law(1.0, 2.0, _S11),
    ("step", "epsilon"): Law(0.5, 1.0, _S11),
    ("batch_size", "drift"): Law(-0.5, 0.0, _S11),
    ("batch_size", "V"): Law(-1.0, 0.0, _S11),
    ("batch_size", "epsilon"): Law(-0.5, 0.0, _S11),
    ("data_share", "drift"): Law(0.0, 0.0, _S11),
    ("data_share", "V"): Law(0.0, 0.0, _S11),
    ("data_share", "epsilon"): Law(-1.0, -0.5, _S11),
    ("momentum", "drift"): Law(0.0, 1.0, f"{_S4}, as a power of 1/(1 - beta), 1 for long runs"),
    ("momentum", "V"): Law(0.0, 2.0, f"{_S4}, as a power of 1/(1 - beta), 2 for long runs"),
    ("momentum", "epsilon"): Law(0.0, 1.0, f"{_S4}, as a power of 1/(1 - beta), 1 for long runs"),
    ("experts", "epsilon"): Law(-1.0, -1.0, f"{_S11}: averaging divides by N"),
}
"""Before saturation, constants fixed.  Number of experts: V grows as 1 - 1/N (orthogonal task vectors)."""


def law_of(factor: str, quantity: str, levels: Sequence[object]) -> Law | None:
    """The law for a factor and quantity over some levels; ``None`` where the theory states none."""
    if (factor, quantity) == ("experts", "V"):
        if len(levels) < 2:
            return None
        x = position(factor, levels)
        slope = float(group_slopes(x, np.log(1.0 - 1.0 / x)[None])[0])
        return Law(slope, slope, f"{_S11}: V (1 - 1/N), orthogonal task vectors, over these levels")
    return LAWS.get((factor, quantity))


def varied(expert: Expert, factor: str, level: object, spec: StudySpec) -> Expert:
    """The recipe of an expert of the centre with another level of one factor and all constants as they are."""
    plain = without_logs(expert)
    if factor == "step":
        return replace(plain, steps=int(level))  # type: ignore[call-overload]
    if factor == "data_share":
        n = max(2, round(float(np.asarray(expert.n)) / spec.centre.data_share * float(level)))  # type: ignore[arg-type]
        return replace(plain, n=n, batch_size=min(int(np.asarray(expert.batch_size)), n))
    if factor == "batch_size":
        return replace(plain, batch_size=min(int(level), int(np.asarray(expert.n))))  # type: ignore[call-overload]
    return replace(plain, **{factor: level})  # type: ignore[arg-type]


def centre_curves(rows: Sequence[Row], factor: str, levels: Sequence[object], spec: StudySpec) -> dict[str, Floats]:
    """Theorems 3, 4 and 2 over the levels of a factor with constants of the centre's experts, (E, L) each.

    ``V`` is d^2, which the dispersion of an average of like experts is proportional to.  NaN where no form applies.
    """
    found = {name: np.full((len(rows), len(levels)), np.nan) for name in QUANTITIES}
    for e, row in enumerate(rows):
        centre = from_json(row["recipe"])
        for l, level in enumerate(levels):
            try:
                expert = varied(centre, factor, level, spec)
                drift = float(expert_drift(expert)[0])
                found["drift"][e, l], found["V"][e, l] = drift, drift**2
                found["epsilon"][e, l] = float(expert_epsilon(expert, recursion=False)[0])
            except MergeboundError:
                continue
    return found
