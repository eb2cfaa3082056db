"""Every statement has its expression, LaTeX, proof, elasticities, limits and exports, or says why not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import mpmath
import numpy as np
import pytest
import sympy

import theory
from theory.derivations import derivations, derive
from theory.derivations.core import INTEGERS, RANGES
from theory.elasticity import formula_elasticity
from theory.errors import MergeboundError
from theory.export import check_latex, formulas
from theory.scaling import TERMS, formula_limit, term_expression
from theory.symbolic import Formula
from theory.symbols import glossary, symbol

UNPROVEN = {"merging_law_formula": "an empirical law of the literature: it is fitted, and nothing implies it"}

PROOFS: dict[str, tuple[str, ...]] = {
    "moved_risk": ("lemma 1",),
    "directional_risk": ("lemma 1",),
    "matrix_risk": ("lemma 1 forms",),
    "layered_risk": ("lemma 1 forms",),
    "clock": ("clock", "momentum"),
    "theorem_1": ("theorem 1",),
    "l1_gap": ("gap forms",),
    "high_probability": ("gap forms",),
    "task_stability": ("theorem 1", "sharper stability"),
    "expert_epsilon": ("theorem 2", "sharper stability"),
    "head_split": ("heads",),
    "output_bound": ("output certificate",),
    "output_bound_everywhere": ("output certificate",),
    "output_bound_labelled": ("output certificate",),
    "remainder_bound": ("output certificate",),
    "expert_drift": ("theorem 3",),
    "sharpest_side": ("dispersion", "aggregation"),
    "training_risk": ("training risk", "convex risk", "distance risk", "descent risk"),
    "assemble_master": ("master bound",),
    "master_bound": ("master bound",),
    "network_bound": ("master bound",),
    "lambda_law": ("laws",),
    "best_lambda": ("laws",),
    "number_law": ("laws",),
    "loss_change": ("loss change",),
    "loss_interval": ("output certificate",),
    "operator": ("linear operators", "dare", "masks", "ties", "model stock", "slerp", "iso"),
    "explain_method": ("linear operators", "dare", "masks", "ties", "model stock", "slerp", "iso"),
    "hardt_convex": ("hardt",),
    "hardt_strongly_convex": ("hardt",),
    "hardt_nonconvex": ("hardt",),
    "lei_ying_l1": ("lei-ying",),
    "lei_ying_l2": ("lei-ying",),
    "fedavg_one_round": ("fedavg",),
    "pac_bayes_expectation": ("pac-bayes",),
    "pac_bayes_penalty": ("pac-bayes",),
}
_EXACT = "an exact value of a family (matrices, recursions): no bound and no single expression; tested by simulation"
_PREDICTION = "a prediction (estimated), not a bound: minimised or evaluated numerically from collected logits or forms"
_TOOL = "a tool over other calculators: it states nothing of its own"
_INTERVAL = "a statistical procedure: its coverage is tested by simulation"
_INPUT = "makes or fills in a description; computes no bound"
WITHOUT: dict[str, str] = {
    **dict.fromkeys(
        (
            *("expert_moments", "merge_moments", "one_pass_merge", "one_pass_moments", "one_pass_overlap"),
            *("least_squares_merge", "least_squares_stability", "regression_merge", "ridge_fit", "descent_fit"),
            *("simulate_logistic_gap", "simulate_merge", "confidence_coverage", "named_generator"),
        ),
        _EXACT,
    ),
    **dict.fromkeys(
        (
            *("secant", "tangent", "predict_risk", "predicted_merge", "minimise_risk", "risk_surface", "minimise_on"),
            *("layered_secant", "layered_tangent", "minimise_per_layer", "optimal_coefficients", "averaging"),
            *("task_arithmetic", "additions", "best_coefficient", "lambda_curve", "leave_one_out", "pair_curve"),
            *("best_subset", "best_subsets", "shapley", "local_sensitivity", "fit_merging_law", "fit_size_law"),
            *("secant_error", "tangent_error", "error_account", "predict_curvature", "minimise_curvature"),
        ),
        _PREDICTION,
    ),
    **dict.fromkeys(
        (
            *("bound_interval", "compare", "design", "design_number", "enclose", "derive", "statements", "glossary"),
            *("scaling_table", "bound_to_python", "formula_to_python", "latex_document", "minimise_over"),
            *("coefficient_box", "coefficient_hull", "coefficient_simplex", "coefficients_summing_to", "consistency"),
            "random_batch",
        ),
        _TOOL,
    ),
    **dict.fromkeys(
        ("cross_fitted_risk", "difference_interval", "minimiser_interval", "prediction_interval", "risk_interval"),
        _INTERVAL,
    ),
    **dict.fromkeys(
        (
            *("merge_with", "task_vectors", "with_task_vectors", "with_true_constants", "with_logistic_constants"),
            "given_inputs",
        ),
        _INPUT,
    ),
}


def makers() -> dict[str, Any]:
    """Every function of the package that makes a formula, by its name and module."""
    found = {}
    for item in pkgutil.walk_packages(theory.__path__, "theory."):
        module = importlib.import_module(item.name)
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == item.name and name.endswith("_formula"):
                found[f"{item.name}.{name}"] = value
    return found


def test_every_formula_of_the_package_is_exported_and_proven() -> None:
    known = set(makers().values())
    assert known == set(formulas()), [f.__name__ for f in known ^ set(formulas())]
    assert len(known) == len(formulas()) >= 40
    proven = {make for name in derivations() for make in derive(name).claims}
    assert proven <= known
    assert {make.__name__ for make in known - proven} == set(UNPROVEN)


def test_every_public_calculator_is_proven_or_says_why_not() -> None:
    public = {
        name
        for name in theory.__all__
        if inspect.isfunction(getattr(theory, name)) and not inspect.isclass(getattr(theory, name))
    }
    assert not set(PROOFS) & set(WITHOUT)
    assert public <= set(PROOFS) | set(WITHOUT), public - set(PROOFS) - set(WITHOUT)
    assert set(PROOFS) <= public
    assert {proof for proofs in PROOFS.values() for proof in proofs} == set(derivations())  # no proof without a use


def test_every_proof_is_well_formed_latex() -> None:
    for name in derivations():
        text = derive(name).latex()
        assert check_latex(text) == [], name


def _point(formula: Formula, rng: np.random.Generator) -> dict[str, mpmath.mpf]:
    drawn = {}
    for key in formula.keys:
        low, high = RANGES.get(key, (0.2, 3.0))
        value = rng.uniform(max(low, 0.05), high)
        drawn[key] = mpmath.mpf(round(value) + 2 if key in INTEGERS else value)
    for first, second in (("F0", "FK"), ("F0", "F_star"), ("n", "b")):
        if first in drawn and second in drawn:
            drawn[first] += drawn[second]
    if "drop" in drawn:
        drawn["drop"] /= 4
    return drawn


@pytest.mark.parametrize("make", formulas(), ids=lambda make: f"{make.__module__.rpartition('.')[2]}.{make.__name__}")
def test_elasticities_and_limits_of_every_formula(make: Any) -> None:
    """Symbolic elasticity in every key against a difference with 50 digits; limits against points close to them."""
    formula = make()
    assert check_latex(rf"\[ {formula.latex()} \]") == []
    assert formula.source
    arguments = [symbol(key) for key in formula.keys]
    value = sympy.lambdify(arguments, formula.expression, "mpmath")
    with mpmath.workdps(50):
        point = _point(formula, np.random.default_rng(5))
        step = mpmath.mpf(10) ** -20
        slopes = sympy.lambdify(
            arguments, [formula_elasticity(formula, key) for key in formula.keys], "mpmath", cse=True
        )
        for key, found in zip(formula.keys, slopes(*point.values()), strict=True):
            up, down = (value(*(point | {key: point[key] * (1 + sign * step)}).values()) for sign in (1, -1))
            middle = value(*point.values())
            assert abs((up - down) / (2 * step) / middle - found) < mpmath.mpf(10) ** -15 * (1 + abs(found)), key
        for key, target, near in (("kappa", "0", "1e-25"), ("b", "n", ""), ("N", "oo", "1e25")):
            if key not in formula.keys or (key == "b" and "n" not in formula.keys):
                continue
            limit = formula_limit(formula, key, target)
            close = point | {key: point["n"] if target == "n" else mpmath.mpf(near)}
            end = value(*close.values())
            if limit == sympy.oo:
                assert end > 2 * value(*point.values()) or end > value(*point.values())
                continue
            exact = sympy.lambdify(arguments, limit, "mpmath")(*close.values())
            assert abs(end - exact) <= mpmath.mpf(10) ** -18 * (1 + abs(exact)), key


def test_scaling_terms_have_expressions_and_refusals_name_the_key() -> None:
    for term in TERMS:
        assert term_expression(term, "contracting").free_symbols
    formula = formulas()[0]()
    with pytest.raises(MergeboundError, match="'nothing' is not in the glossary"):
        formula_elasticity(formula, "nothing")
    assert formula_elasticity(formula, "eta") == 0
    with pytest.raises(MergeboundError, match="has no 'eta'"):
        formula_limit(formula, "eta", "0")
    with pytest.raises(MergeboundError, match="'far' is no target"):
        formula_limit(formula, "R", "far")
    assert set(formula.keys) <= set(glossary())
