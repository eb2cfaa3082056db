"""A box of recipes: which fields may have a range, where the proofs hold, and the corners of ingredients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import numpy as np
from numpy.typing import ArrayLike

from theory.clocks import is_constant, lowest_curvature, smoothness
from theory.enclosure.relaxed import Unchecked, unchecked
from theory.errors import AssumptionError, RecipeError
from theory.recipe import Expert
from theory.symbolic import FloatArray

Ranges = Mapping[str, tuple[ArrayLike, ArrayLike]]
SCALES = frozenset(
    (
        *("initial_gradient_norm", "sigma", "sigma0", "G", "D_inf", "D_2", "D_envelope", "initial_risk"),
        *("training_risk", "minimal_risk", "base_norm", "minimizer_distance", "drift", "private_drift"),
        "epsilon",
    )
)
CLOSED_FORM = SCALES | {"learning_rate", "steps", "batch_size", "n", "L", "mu", "kappa", "pl_constant", "weight_decay"}
CLOCK_DIRECTIONS = {"learning_rate": 1, "steps": 1, "L": 1, "mu": -1, "kappa": 1, "weight_decay": -1}
NOISE_DIRECTIONS = {"n": 1, "batch_size": -1}


def corner_of(expert: Expert, ranges: Ranges, directions: Mapping[str, int], up: bool) -> Unchecked:
    """The expert at the corner of the box where an increasing (+1) or decreasing (-1) ingredient is largest."""
    chosen = {
        name: np.asarray(bounds[1 if (directions.get(name, 1) > 0) == up else 0], dtype=np.float64)
        for name, bounds in ranges.items()
    }
    return unchecked(expert, **chosen)


def check_box(expert: Expert, ranges: Ranges) -> None:
    """Refuse a box by name: no such field, an empty range, or a field in which the bound is not proven monotone."""
    known = {item.name for item in fields(Expert)}
    for name, bounds in ranges.items():
        if name not in known:
            raise RecipeError(f"expert {expert.name!r}: {name} is not a field; give a range of a field of Expert")
        low, high = (np.asarray(bound, dtype=np.float64) for bound in bounds)
        if np.any(np.isnan(low) | np.isnan(high)) or np.any(low > high):
            raise RecipeError(f"expert {expert.name!r}: the range of {name} is empty; give lower <= upper")
        if name == "kappa" and expert.kappa is None:
            raise RecipeError(f"expert {expert.name!r}: kappa has a range but is not given; give one value in it")
    sample = unchecked(expert, **{name: bounds[0] for name, bounds in ranges.items()})
    plain = is_constant(sample) and "momentum" not in ranges and expert.batch_losses is None
    allowed = CLOSED_FORM if plain else SCALES
    for name in ranges:
        if name not in allowed:
            raise AssumptionError(
                f"expert {expert.name!r}: the bound is not proven monotone in {name} for its kind of training; sample "
                "the range instead (bound_interval does), or fix the field"
            )
    _check_domain(expert, ranges)


def _check_domain(expert: Expert, ranges: Ranges) -> None:
    """Where the proofs of the module docstring need the whole box on one side of a threshold."""
    low, high = (corner_of(expert, ranges, {}, up) for up in (False, True))
    if low.L is not None and high.mu is not None and np.any(np.asarray(high.mu) > np.asarray(low.L)):
        raise RecipeError(f"expert {expert.name!r}: the range of mu reaches above L; lower its upper end")
    if low.kappa is not None and ({"kappa", "learning_rate"} & set(ranges)):
        rate = np.asarray(high.learning_rate, dtype=np.float64)
        if np.any(1 + rate * np.asarray(low.kappa, dtype=np.float64) < 0):
            raise RecipeError(
                f"expert {expert.name!r}: 1 + learning_rate*kappa is negative in the box; narrow one of the two ranges"
            )
    if "weight_decay" not in ranges:
        return
    if high.base_norm is None:
        raise RecipeError(f"expert {expert.name!r}: base_norm is missing; a range of weight_decay needs it")
    if expert.kappa is None and high.L is not None:
        worst = corner_of(expert, ranges, {"learning_rate": 1, "L": 1, "weight_decay": 1, "mu": 1}, True)
        reach = np.asarray(worst.learning_rate) * (
            smoothness(worst) + lowest_curvature(worst) + 2 * np.asarray(worst.weight_decay, dtype=np.float64)
        )
        if np.any(reach > 2):
            raise AssumptionError(
                f"expert {expert.name!r}: learning_rate exceeds 2/(L + m + 2 weight_decay) somewhere in the box, where "
                "the clock is not monotone in weight_decay; lower the upper end of learning_rate or fix the decay"
            )


def is_covered(expert: Expert) -> bool:
    """Whether the theorems on training cover this expert at all."""
    return (
        expert.optimizer.lower() == "sgd"
        and not expert.gradient_clipping
        and (expert.L is not None or expert.kappa is not None)
    )


def smallest_of(found: list[FloatArray]) -> FloatArray:
    """Elementwise minimum."""
    value = found[0]
    for other in found[1:]:
        value = np.minimum(value, other)
    return value
