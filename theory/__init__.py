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

from theory import schedules
from theory.arguments import _is_calculator, advised
from theory.assumptions import Assumption
from theory.certificate import output_bound, output_bound_everywhere, output_bound_labelled, remainder_bound
from theory.clocks import Clock, clock
from theory.comparison import Comparison
from theory.constrained import Polytope, coefficient_box, coefficient_hull, coefficient_simplex, coefficients_summing_to
from theory.convex import minimise_over
from theory.curvature import CurvatureModel, minimise_curvature, predict_curvature
from theory.derivations import Derivation, derive
from theory.enclosure import Enclosure, enclose
from theory.errors import AssumptionError, MergeboundError, RecipeError
from theory.export import bound_to_python, formula_to_python, latex_document
from theory.fixed_inputs import descent_fit, given_inputs, ridge_fit
from theory.function_space import LogitField, minimise_risk, predict_risk, secant, tangent
from theory.generalization import ConfidentRisk, GapBound, high_probability, l1_gap, theorem_1
from theory.heads import head_split
from theory.inverse_design import Budget, Design, design, design_number
from theory.laws import best_lambda, lambda_law, number_law
from theory.lemma import directional_risk, layered_risk, matrix_risk, moved_risk
from theory.linearization_error import (
    LogitCurvature,
    error_account,
    loss_change,
    loss_interval,
    secant_error,
    tangent_error,
)
from theory.logistic import LogisticTask, confidence_coverage, simulate_logistic_gap, with_logistic_constants
from theory.master import sharpest_side
from theory.one_pass import one_pass_merge, one_pass_moments, one_pass_overlap
from theory.operators import Effect, Operator, explain_method, merge_with, operator
from theory.per_layer import layered_secant, layered_tangent, minimise_per_layer
from theory.published import (
    PublishedBound,
    fedavg_one_round,
    hardt_convex,
    hardt_nonconvex,
    hardt_strongly_convex,
    lei_ying_l1,
    lei_ying_l2,
    pac_bayes_expectation,
    pac_bayes_penalty,
)
from theory.quadratic import QuadraticTask, expert_moments, merge_moments, with_true_constants
from theory.recipe import Expert, Merge, Schedule
from theory.regression import RegressionTask, least_squares_merge, least_squares_stability, regression_merge
from theory.resampling import (
    cross_fitted_risk,
    difference_interval,
    minimiser_interval,
    prediction_interval,
    risk_interval,
)
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
from theory.scaling import scaling_table
from theory.scaling_law import MergingLaw, SizeLaw, fit_merging_law, fit_size_law
from theory.sensitivity import LocalSensitivity, local_sensitivity
from theory.side_by_side import compare
from theory.simulation import named_generator, simulate_merge
from theory.statement_labels import Statement, statements
from theory.subsets import best_subset, best_subsets, shapley
from theory.surfaces import (
    MergingRule,
    PredictedMerge,
    Surface,
    averaging,
    minimise_on,
    optimal_coefficients,
    predicted_merge,
    risk_surface,
    task_arithmetic,
)
from theory.symbols import glossary
from theory.tightness import random_batch
from theory.training import training_risk
from theory.unknown import BoundInterval, OneOf, Range, bound_interval, consistency, task_vectors, with_task_vectors
from theory.what_if import additions, best_coefficient, lambda_curve, leave_one_out, pair_curve

__all__ = [
    "Assumption",
    "AssumptionError",
    "Bound",
    "BoundInterval",
    "Budget",
    "Clock",
    "Comparison",
    "ConfidentRisk",
    "CurvatureModel",
    "Derivation",
    "Design",
    "Effect",
    "Enclosure",
    "Expert",
    "GapBound",
    "LocalSensitivity",
    "LogisticTask",
    "LogitCurvature",
    "LogitField",
    "Merge",
    "MergeboundError",
    "MergingLaw",
    "MergingRule",
    "OneOf",
    "Operator",
    "Polytope",
    "PredictedMerge",
    "PublishedBound",
    "QuadraticTask",
    "Range",
    "RecipeError",
    "RegressionTask",
    "Schedule",
    "SizeLaw",
    "Statement",
    "Surface",
    "Term",
    "additions",
    "assemble_master",
    "averaging",
    "best_coefficient",
    "best_lambda",
    "best_subset",
    "best_subsets",
    "bound_interval",
    "bound_to_python",
    "clock",
    "coefficient_box",
    "coefficient_hull",
    "coefficient_simplex",
    "coefficients_summing_to",
    "compare",
    "confidence_coverage",
    "consistency",
    "cross_fitted_risk",
    "derive",
    "descent_fit",
    "design",
    "design_number",
    "difference_interval",
    "directional_risk",
    "enclose",
    "error_account",
    "expert_drift",
    "expert_epsilon",
    "expert_moments",
    "explain_method",
    "fedavg_one_round",
    "fit_merging_law",
    "fit_size_law",
    "formula_to_python",
    "given_inputs",
    "glossary",
    "hardt_convex",
    "hardt_nonconvex",
    "hardt_strongly_convex",
    "head_split",
    "high_probability",
    "l1_gap",
    "lambda_curve",
    "lambda_law",
    "latex_document",
    "layered_risk",
    "layered_secant",
    "layered_tangent",
    "least_squares_merge",
    "least_squares_stability",
    "leave_one_out",
    "lei_ying_l1",
    "lei_ying_l2",
    "local_sensitivity",
    "loss_change",
    "loss_interval",
    "master_bound",
    "matrix_risk",
    "merge_moments",
    "merge_with",
    "minimise_curvature",
    "minimise_on",
    "minimise_over",
    "minimise_per_layer",
    "minimise_risk",
    "minimiser_interval",
    "moved_risk",
    "named_generator",
    "network_bound",
    "number_law",
    "one_pass_merge",
    "one_pass_moments",
    "one_pass_overlap",
    "operator",
    "optimal_coefficients",
    "output_bound",
    "output_bound_everywhere",
    "output_bound_labelled",
    "pac_bayes_expectation",
    "pac_bayes_penalty",
    "pair_curve",
    "predict_curvature",
    "predict_risk",
    "predicted_merge",
    "prediction_interval",
    "random_batch",
    "regression_merge",
    "remainder_bound",
    "ridge_fit",
    "risk_interval",
    "risk_surface",
    "scaling_table",
    "schedules",
    "secant",
    "secant_error",
    "shapley",
    "sharpest_side",
    "simulate_logistic_gap",
    "simulate_merge",
    "statements",
    "tangent",
    "tangent_error",
    "task_arithmetic",
    "task_stability",
    "task_vectors",
    "theorem_1",
    "training_risk",
    "with_logistic_constants",
    "with_task_vectors",
    "with_true_constants",
]

# a wrong kind of argument is answered by the name of the argument and what to give
globals().update({name: advised(item) for name in __all__ if _is_calculator(item := globals()[name])})
