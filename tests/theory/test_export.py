"""Exported Python computes the same numbers; exported LaTeX is well-formed and explains its symbols."""

from __future__ import annotations

import ast
import re
from typing import Any

import mpmath
import numpy as np
import pytest
import sympy
from matplotlib.mathtext import MathTextParser

from theory import Expert, Merge, master_bound
from theory.derivations import derivations
from theory.derivations.core import INTEGERS, RANGES
from theory.errors import MergeboundError
from theory.export import bound_to_python, check_latex, formula_to_python, formulas, latex_document
from theory.symbolic import Formula, evaluate
from theory.symbols import glossary, symbol


def run(source: str, name: str) -> Any:
    """Execute exported source and return the function; only ``math`` or ``numpy`` may be imported."""
    tree = ast.parse(source)
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert imported in (["math"], ["numpy"])
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    space: dict[str, Any] = {}
    exec(compile(tree, "exported", "exec"), space)
    return space[name]


def points(formula: Formula, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    drawn = {}
    for key in formula.keys:
        low, high = RANGES.get(key, (0.1, 10.0))
        drawn[key] = rng.uniform(low, high, count)
        if key in INTEGERS:
            drawn[key] = np.floor(drawn[key]) + 1
    if "F0" in drawn:  # start above end, so that roots are real
        drawn["F0"] = drawn["F0"] + 20.0
    if "drop" in drawn:
        drawn["drop"] = drawn["drop"] / 11.0
    if "mu" in drawn and "eta" in drawn:
        drawn["eta"] = drawn["eta"] * 0.5
    if "b" in drawn and "n" in drawn:
        drawn["n"] = drawn["n"] + drawn["b"]
    return drawn


def in_mpmath(formula: Formula, drawn: dict[str, np.ndarray]) -> np.ndarray:
    """A formula that numpy cannot compute (the shipped calculator works with logarithms of Gamma functions)."""
    function = sympy.lambdify([symbol(key) for key in formula.keys], formula.expression, "mpmath")
    return np.array([float(function(*map(mpmath.mpf, row))) for row in zip(*drawn.values(), strict=True)])


@pytest.mark.parametrize("make", formulas(), ids=lambda make: f"{make.__module__.rpartition('.')[2]}.{make.__name__}")
def test_exported_formula_is_the_compiled_one(make: Any) -> None:
    formula = make()
    drawn = points(formula, 50)
    compiled = evaluate(make, *drawn.values()) if "burn_in" not in make.__name__ else in_mpmath(formula, drawn)
    plain = run(formula_to_python(formula, "exported"), "exported")
    rows = [plain(**dict(zip(drawn, values, strict=True))) for values in zip(*drawn.values(), strict=True)]
    assert np.allclose(rows, compiled, rtol=1e-12, atol=0)
    if "burn_in" in make.__name__:
        with pytest.raises(MergeboundError, match="Gamma function"):
            formula_to_python(formula, "exported", module="numpy")
        return
    vector = run(formula_to_python(formula, "exported", module="numpy"), "exported")
    assert np.allclose(vector(**drawn), compiled, rtol=1e-12, atol=0)


def example(**changes: Any) -> Merge:
    known: dict[str, Any] = dict(
        n=1000, batch_size=50, learning_rate=0.1, steps=100, curvature="convex", L=1.0, initial_gradient_norm=0.5,
        sigma=1.0, D_inf=2.0, training_risk=0.05,
    )  # fmt: skip
    known.update(changes)
    other = known | {"n": 400, "learning_rate": 0.05, "L": 2.0}
    return Merge((Expert("a", **known), Expert("b", **other)))


@pytest.mark.parametrize(
    "changes", [{}, {"curvature": "strongly_convex", "mu": 0.2}, {"curvature": "smooth", "weight_decay": 0.1}]
)
def test_exported_bound_is_the_bound(changes: dict[str, Any]) -> None:
    bound = master_bound(example(**changes))
    function = run(bound_to_python(bound), "bound")
    assert function() == pytest.approx(float(bound.value), rel=1e-12)
    other = master_bound(example(**(changes | {"D_inf": 3.0})))
    names = [row.epsilon_form for row in bound.experts]
    if names == [row.epsilon_form for row in other.experts]:
        moved = {key: 3.0 for key in ("D_inf_1", "D_inf_2") if key in bound_to_python(bound)}
        assert function(**moved) == pytest.approx(float(other.value), rel=1e-12)


def test_exported_bound_changes_with_the_recipe() -> None:
    bound = master_bound(example())
    function = run(bound_to_python(bound), "bound")
    assert function(training_risk_1=0.05) == function() if "training_risk_1" in bound_to_python(bound) else True
    assert function(n_1=4000.0) < function() < function(sigma_1=2.0)
    assert function(n_1=4000.0, n_2=1600.0) == pytest.approx(float(master_bound(_with_samples(4)).value), rel=1e-12)


def _with_samples(factor: int) -> Merge:
    from dataclasses import replace

    merge = example()
    return replace(merge, experts=tuple(replace(e, n=int(e.n) * factor) for e in merge.experts))  # type: ignore[arg-type]


def test_export_refuses() -> None:
    from theory.clocks import tau_formula

    with pytest.raises(MergeboundError, match="is not a name"):
        formula_to_python(tau_formula(), "no name")
    with pytest.raises(MergeboundError, match="choose 'math' or 'numpy'"):
        formula_to_python(tau_formula(), module="jax")  # type: ignore[arg-type]
    with pytest.raises(MergeboundError, match="plain SGD"):
        bound_to_python(master_bound(example(momentum=0.5, sigma0=1.0)))


@pytest.fixture(scope="module")
def document() -> str:
    return latex_document()


def test_document_is_well_formed(document: str) -> None:
    text = document
    assert check_latex(text) == []
    assert text.startswith(r"\documentclass")
    assert text.rstrip().endswith(r"\end{document}")
    assert text.count(r"\paragraph") == len(derivations())
    without = latex_document(proofs=False)
    assert check_latex(without) == []
    assert r"\paragraph" not in without
    for fault in ("{", "$", r"\[", r"\begin{x}", r"\left("):
        assert check_latex(without + fault)


def test_every_formula_is_valid_mathematics(document: str) -> None:
    """An independent parser reads every displayed formula of the document."""
    parser = MathTextParser("path")
    displayed = dict.fromkeys(re.findall(r"\\\[(.*?)\\\]", document, flags=re.S))
    assert len(displayed) > 60
    for piece in displayed:
        readable = re.sub(r"\\le\b", r"\\leq", piece.replace(r"\text{", r"\mathrm{"))
        readable = re.sub(r"\\mathcal (\w)", r"\\mathcal{\1}", readable)
        readable = readable.replace(r"\tfrac", r"\frac").replace(r"\limits", "")
        parser.parse(f"${readable.strip()}$")


def test_every_symbol_of_the_formulas_is_explained() -> None:
    text = latex_document(proofs=False)
    table = text[text.index(r"\section*{Symbols}") :]
    for make in formulas():
        for key in make().keys:
            entry = glossary()[key]
            assert f"${entry.latex}$ & " in table, key
            assert make().expression.free_symbols <= {
                __import__("theory.symbols").symbols.symbol(k) for k in make().keys
            }
