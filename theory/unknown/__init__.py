"""Bounds when training details are unknown: the interval of bounds over stated ranges, and what widens it most.

Open checkpoints rarely tell how they were trained.  State what is known in the recipe, and a range or a set of values
for everything else; :func:`bound_interval` returns the interval of master bounds over all of them:

* ``found``: the smallest and largest bound among sampled and optimised points, with those points;
* ``lower``, ``upper``: the *guaranteed* interval where the ingredients are proven monotone (:mod:`theory.enclosure`;
  boxes are split until the two agree or their number is spent), otherwise the found one, and ``proven`` says which.

A guarantee is conditional on the stated ranges.  :func:`consistency` confronts them with the checkpoints: task vectors
longer than the drift bound allows contradict the ranges or the assumptions.
"""

from theory.unknown.checkpoints import TaskVectors, task_vectors, with_task_vectors
from theory.unknown.influence import Influence
from theory.unknown.interval import BoundInterval, bound_interval
from theory.unknown.plausibility import Consistency, consistency
from theory.unknown.stated import OneOf, Range

__all__ = [
    "BoundInterval",
    "Consistency",
    "Influence",
    "OneOf",
    "Range",
    "TaskVectors",
    "bound_interval",
    "consistency",
    "task_vectors",
    "with_task_vectors",
]
