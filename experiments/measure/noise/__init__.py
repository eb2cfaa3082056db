"""Gradient noise and what the theory's constants are made of.

Start with :func:`constants.constants_of` (all constants of a subject's experts), then :func:`recipe.recipe_of` (the
theory's recipe), :func:`drift.drift_table` (drift against Theorem 3), :func:`bounds.bounds_table` (every bound next to
its inputs) and :func:`report.gradients_between` (tasks against each other).  Each module can be used alone: they take
an :class:`objective.Objective`, which any differentiable per-sample loss of a flat vector makes.
"""
