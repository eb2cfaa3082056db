"""How an effect becomes a verdict: directions beyond the interval, near chance, close to the border.

``agrees`` or ``disagrees`` where the interval leaves zero out, else ``undecided``; ``not testable`` where the experts
of some side of the comparison are near chance, or, for what is measured on held-out tasks, the scores that are compared
there; ``not measured`` where there is no effect.  The numbers are the specification's (``rule``).

That the interval must leave zero out is as old as the study.  The other rules came later (``ADDED``): the rule of
chance for experts and the word *borderline* after an earlier run of size tiny (specification 6095b7e039ff) had been
looked at, before the runs that are published; the interval over held-out tasks
(:mod:`experiments.studies.scale.over_tasks`) and the rule of chance for held-out scores after the published results of
sizes tiny and small had been looked at.  None of them can turn an agreement into a disagreement or back: they take
verdicts away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.statistics import Estimate
from experiments.studies.scale.effects import Effects, Table, estimate
from experiments.studies.scale.spec import RuleSpec
from experiments.tasks.catalogue import find
from experiments.tasks.npz8 import FILES
from theory.errors import MergeboundError

VERDICTS = ("agrees", "disagrees", "undecided", "not testable", "not measured")
ADDED = (
    "Added after results had been looked at: the rule of chance for experts and 'borderline' (after an earlier run of "
    "size tiny, before the published ones), the interval over held-out tasks and the rule of chance for held-out "
    "accuracy (after the published results of sizes tiny and small); they only take verdicts away."
)


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


def poorest(
    sides: Sequence[Table], seed: int = 0, *, kinds: Sequence[str] = ("expert",), measure: str = "held_in_accuracy"
) -> Estimate:
    """Mean test accuracy of one kind of points on the side, and of the kind, where its interval's low end is lowest.

    Args:
        sides: of a comparison, each with all kinds of points and measures.
        seed: names the draws of tasks.
        kinds: of points, each for itself: the experts on their own tasks, or what is compared on held-out tasks.
        measure: an accuracy; the interval is over merged tasks and test images (held-out tasks as they are: whether
            *these* scores are more than guesses).
    """
    found = []
    for side in sides:
        for kind in kinds:
            own = side.where(kind=kind, measure=measure)
            if len(own.rows):
                value = own.rows["value"].to_numpy(dtype=float)
                members = tuple(str(m) or "all" for m in own.rows["members"])
                found.append(estimate(Effects(value, own.draws, members), seed=seed))
    none = float("nan")
    return min(found, key=lambda e: (np.nan_to_num(e.low, nan=e.value), e.value), default=Estimate(none, none, none))


def mean_chance(classes: Mapping[str, int], tasks: Sequence[str]) -> float:
    """Mean over tasks of one over the number of classes; NaN where a task's is not known."""
    return float(np.mean([1.0 / classes[task] if classes.get(task) else np.nan for task in tasks]))


def classes_named(task: str) -> int:
    """Number of classes of a task that the package knows by name, without reading data; 0 where it knows none."""
    if task.startswith("digits8:"):
        return 10
    if task.startswith("npz8:"):
        return next((file.classes for file in FILES if file.name == task.removeprefix("npz8:")), 0)
    try:
        return find(task).classes
    except MergeboundError:
        return 0
