"""How an effect becomes a verdict: directions beyond the interval, near chance, close to the border.

``agrees`` or ``disagrees`` where the interval leaves zero out, else ``undecided``; ``not testable`` where the experts
of some side of the comparison are near chance; ``not measured`` where there is no effect.  The numbers are the
specification's (``rule``), fixed before results are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.statistics import Estimate
from experiments.studies.scale.effects import Effects, Table, estimate
from experiments.studies.scale.spec import RuleSpec

VERDICTS = ("agrees", "disagrees", "undecided", "not testable", "not measured")


def verdict(found: Estimate, direction: int) -> str:
    """Whether an effect has the paper's direction (+1 or -1), beyond its interval."""
    if not np.isfinite(found.value):
        return "not measured"
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        return "undecided"
    if found.low > 0 or found.high < 0:
        return "agrees" if found.value * direction > 0 else "disagrees"
    return "undecided"


def borderline(found: Estimate, share: float) -> bool:
    """Whether the end of an interval that is nearest to zero is closer to it than ``share`` of the width."""
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        return False
    return min(abs(found.low), abs(found.high)) < share * (found.high - found.low)


def can_test(experts: Estimate, chance: float, rule: RuleSpec) -> bool:
    """Whether experts are clearly better than chance; where either is not known, nothing speaks against it."""
    if not (np.isfinite(experts.low) and np.isfinite(chance)):
        return True
    return experts.low > rule.chance_times * chance


def poorest(sides: Sequence[Table], seed: int = 0) -> Estimate:
    """Mean test accuracy of the experts on their own tasks, on the side where its interval's low end is lowest.

    Args:
        sides: of a comparison, each with all kinds of points and measures.
        seed: names the draws of tasks.
    """
    found = []
    for side in sides:
        own = side.where(kind="expert", measure="held_in_accuracy")
        if len(own.rows):
            value = own.rows["value"].to_numpy(dtype=float)
            found.append(estimate(Effects(value, own.draws, tuple(own.rows["members"])), seed=seed))
    none = float("nan")
    return min(found, key=lambda e: (np.nan_to_num(e.low, nan=e.value), e.value), default=Estimate(none, none, none))


def mean_chance(classes: Mapping[str, int], tasks: Sequence[str]) -> float:
    """Mean over tasks of one over the number of classes; NaN where a task's is not known."""
    return float(np.mean([1.0 / classes[task] if classes.get(task) else np.nan for task in tasks]))
