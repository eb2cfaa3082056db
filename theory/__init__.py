"""Symbolic and numeric bounds on the risk of merged models.

Describe what was run with :class:`Expert` and :class:`Merge`, ask :func:`master_bound`, read ``bound.explain()``::

    >>> from theory import Expert, Merge, master_bound
    >>> known = dict(n=1000, batch_size=50, learning_rate=0.1, steps=100, curvature="convex", L=1.0,
    ...              initial_gradient_norm=0.5, sigma=1.0, D_inf=2.0, training_risk=0.05)
    >>> bound = master_bound(Merge((Expert("a", **known), Expert("b", **known))))
    >>> [term.name for term in bound.terms]
    ['training', 'dispersion', 'instability']

Nothing here imports torch; sympy is imported when a formula is first needed.
"""

from theory.assumptions import Assumption
from theory.clock import Clock, clock
from theory.errors import AssumptionError, MergeboundError, RecipeError
from theory.quadratic import QuadraticTask, expert_moments, merge_moments, with_true_constants
from theory.recipe import Expert, Merge, Schedule
from theory.risk import (
    Bound,
    Term,
    assemble_master,
    expert_drift,
    expert_epsilon,
    master_bound,
    network_bound,
    task_stability,
)
from theory.symbols import glossary

__all__ = [
    "Assumption",
    "AssumptionError",
    "Bound",
    "Clock",
    "Expert",
    "Merge",
    "MergeboundError",
    "QuadraticTask",
    "RecipeError",
    "Schedule",
    "Term",
    "assemble_master",
    "clock",
    "expert_drift",
    "expert_epsilon",
    "expert_moments",
    "glossary",
    "master_bound",
    "merge_moments",
    "network_bound",
    "task_stability",
    "with_true_constants",
]
