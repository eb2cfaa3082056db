"""Interval of the drift bound (Theorem 3) on a box: every form at its own corner, the smallest that applies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from theory.clocks import clock
from theory.drift import drift_base, drift_energy, drift_log, drift_losses, drift_noise
from theory.enclosure.boxes import (
    CLOCK_DIRECTIONS,
    NOISE_DIRECTIONS,
    Ranges,
    check_box,
    corner_of,
    is_covered,
    smallest_of,
)
from theory.errors import RecipeError
from theory.expert_terms import expert_drift
from theory.recipe import Expert
from theory.symbolic import FloatArray

_DRIFT: dict[str, tuple[Callable[..., FloatArray], dict[str, int]]] = {
    "6(a)": (drift_noise, {**CLOCK_DIRECTIONS, **NOISE_DIRECTIONS, "initial_gradient_norm": 1, "sigma": 1}),
    "6(b)": (
        drift_base,
        {**CLOCK_DIRECTIONS, **NOISE_DIRECTIONS, "initial_gradient_norm": 1, "sigma0": 1, "base_norm": 1},
    ),
    "6(c)": (
        drift_energy,
        {
            **NOISE_DIRECTIONS,
            **{"learning_rate": 1, "steps": 1, "L": 1, "weight_decay": 1, "initial_risk": 1, "training_risk": -1},
            **{"sigma": 1, "base_norm": 1},
        },
    ),
    "6(d), gradient log": (drift_log, {"base_norm": 1}),
    "6(d), loss log": (drift_losses, {"L": 1}),
}


def drift_range(expert: Expert, ranges: Ranges, *, measured: bool = True) -> tuple[FloatArray, FloatArray]:
    """Interval that contains the drift bound of every expert in the box; ``measured=False`` ignores a measured drift.

    Raises :class:`RecipeError` if no form of Theorem 3 applies on the whole box.
    """
    check_box(expert, ranges)
    if not ranges and (measured or expert.drift is None):
        exact, _ = expert_drift(expert)
        return exact, exact
    sides: list[FloatArray] = []
    for up in (False, True):
        found: list[FloatArray] = []
        for name, (form, directions) in _DRIFT.items():
            corner = corner_of(expert, ranges, directions, up)
            try:
                if name in ("6(a)", "6(b)"):
                    if not is_covered(corner):
                        continue
                    found.append(form(corner, clock(corner)))
                else:
                    found.append(form(corner))
            except RecipeError:
                continue
        if measured and (expert.drift is not None or "drift" in ranges):
            found.append(np.asarray(corner_of(expert, ranges, {}, up).drift, dtype=np.float64))
        if not found:
            raise RecipeError(
                f"expert {expert.name!r}: no bound on the drift applies on the whole box; give initial_gradient_norm "
                "with sigma0 or sigma, or the measured drift"
            )
        sides.append(smallest_of(found))
    return sides[0], sides[1]
