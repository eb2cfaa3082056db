"""Inverse design: the training that minimises the master bound under a budget, or the cheapest that meets a target.

Say which fields are *free* and between which limits; everything else is fixed::

    design(merge, {"learning_rate": (1e-3, 0.5), "each.steps": (10, 5000)}, budgets=[Budget("samples", 1e6)])

``"steps"`` (or ``"all.steps"``) is **one** value common to all experts, ``"each.steps"`` (or ``"*.steps"``) one value
per expert, ``"photos.steps"`` that expert alone.  Free fields: ``learning_rate`` (the peak, where the recipe has a
schedule), ``steps``, ``batch_size``, ``n`` (share of a data budget), and ``coefficients`` of the merge.

How it is solved: a random sample of the box in logarithms, repaired to the budget; a pattern search from the best
points, on whole steps, batches and samples; then branch and bound on boxes, whose guaranteed lower ends come from
:mod:`theory.enclosure`.  The result says how far the best point found is, at most, above the true minimum (``gap``);
where the lower ends are not proven (momentum, schedules, reshuffling, a risk model) there is no gap and it says so.

Constants of the loss (L, g, sigma, D, ...) are taken to hold on the whole design range: choose them accordingly.

Without knowledge of angles the advice is often "train as little as allowed": see
:mod:`theory.inverse_design.least_training` for when that happens, why, and what measurement would change it.
"""

from theory.inverse_design.least_training import LeastTraining
from theory.inverse_design.question import Budget
from theory.inverse_design.result import Design, Sensitivity, ShadowPrice
from theory.inverse_design.solve import design, design_number

__all__ = ["Budget", "Design", "LeastTraining", "Sensitivity", "ShadowPrice", "design", "design_number"]
