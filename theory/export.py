"""Take the theory elsewhere: a standalone LaTeX document, and plain Python functions that need nothing but ``math``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from theory.errors import MergeboundError
from theory.symbolic import Formula
from theory.symbols import glossary, symbol

if TYPE_CHECKING:
    from theory.bound import Bound

Module = Literal["math", "numpy"]


def formulas() -> tuple[Callable[[], Formula], ...]:
    """Every formula of the theory that is compiled from sympy, in the order of the theory.

    >>> [make().name for make in formulas()][:3]
    ['risk', 'risk', 'gap']
    """
    from theory.certificate import output_formula
    from theory.clocks import nu_formula, tau_formula
    from theory.drift import drift_base_formula, drift_energy_formula, drift_noise_formula
    from theory.generalization import deviation_formula, l1_formula, theorem_1_formula
    from theory.laws import lambda_formula, number_formula
    from theory.lemma import lemma_formula
    from theory.linearization_error import largest_loss_formula, taylor_factor_formula
    from theory.master import master_formula
    from theory.operators import masks, matrices, span
    from theory.published import fedavg, hardt, lei_ying, pac_bayes
    from theory.scaling_law import merging_law_formula
    from theory.stability import (
        epsilon_rms_formula,
        epsilon_sup_formula,
        gamma_with_replacement_formula,
        gamma_without_replacement_formula,
    )
    from theory.training import convex_risk_formula, descent_risk_formula, distance_risk_formula, pl_risk_formula

    return (
        *(lemma_formula, theorem_1_formula, l1_formula, deviation_formula, tau_formula, nu_formula),
        *(gamma_without_replacement_formula, gamma_with_replacement_formula),
        *(epsilon_sup_formula, epsilon_rms_formula, drift_noise_formula, drift_base_formula, drift_energy_formula),
        *(pl_risk_formula, convex_risk_formula, distance_risk_formula, descent_risk_formula),
        *(master_formula, lambda_formula, number_formula),
        *(output_formula, largest_loss_formula, taylor_factor_formula),
        *(masks.mask_sensitivity_formula, masks.plain_mask_sensitivity_formula),
        *(masks.mask_noise_formula, masks.plain_mask_noise_formula, masks.trim_change_formula),
        *(span.model_stock_ratio_formula, span.model_stock_slope_formula, span.slerp_weight_formula),
        matrices.iso_gain_formula,
        *(hardt.convex_formula, hardt.strongly_convex_formula, hardt.nonconvex_formula, hardt.burn_in_formula),
        *(lei_ying.l1_step_formula, lei_ying.l2_step_formula),
        *(lei_ying.l1_gap_formula, lei_ying.l2_instability_formula, fedavg.one_round_formula),
        *(pac_bayes.expectation_formula, pac_bayes.best_expectation_formula, pac_bayes.high_probability_formula),
        merging_law_formula,
    )


def _source(expression: Any, names: dict[Any, str], module: Module) -> str:
    import sympy
    from sympy.printing.numpy import NumPyPrinter
    from sympy.printing.pycode import PythonCodePrinter

    if module == "numpy" and expression.has(sympy.gamma):
        raise MergeboundError("export: numpy has no Gamma function; choose module='math'")
    plain = expression.xreplace({item: sympy.Symbol(name, real=True) for item, name in names.items()})

    class Arrays(NumPyPrinter):  # type: ignore[misc]
        """numpy without helpers: the largest of several by pairs (the stock printer needs functools)."""

        def _print_Max(self, expr: Any) -> str:
            first, *rest = (self._print(part) for part in expr.args)
            for part in rest:
                first = f"numpy.maximum({first}, {part})"
            return str(first)

    printer = PythonCodePrinter() if module == "math" else Arrays()
    return str(printer.doprint(plain))


def _function(name: str, arguments: str, expression: Any, names: dict[Any, str], module: Module, text: str) -> str:
    import sympy

    if not name.isidentifier():
        raise MergeboundError(f"export: {name!r} is not a name of a Python function; use letters, digits, underscores")
    if module not in ("math", "numpy"):
        raise MergeboundError(f"export: module is {module!r}; choose 'math' or 'numpy'")
    unknown = expression.free_symbols - set(names)
    if unknown:
        raise MergeboundError(f"export: the expression has symbols without a name: {sorted(map(str, unknown))}")
    shared, (reduced,) = sympy.cse([expression], symbols=sympy.numbered_symbols("part"))
    lines = [f"def {name}({arguments}):", f'    """{text}"""']
    known = dict(names)
    for item, part in shared:
        lines.append(f"    {item} = {_source(part, known, module)}")
        known[item] = str(item)
    lines.append(f"    return {_source(reduced, known, module)}")
    return "\n".join([f"import {module}", "", "", *lines, ""])


def formula_to_python(formula: Formula, name: str | None = None, *, module: Module = "math") -> str:
    """Source of a plain Python function of a formula; it imports ``math`` (or ``numpy``) and nothing else.

    Arguments are the glossary keys in the formula's order.  Assumes arguments in the formula's domain: where the
    calculators use limits or log space (kappa = 0, overflow), the plain function divides by zero or overflows.  Raises
    :class:`MergeboundError` for names that are not identifiers.

    >>> from theory.clocks import tau_formula
    >>> print(formula_to_python(tau_formula(), "training_time"))
    import math
    <BLANKLINE>
    <BLANKLINE>
    def training_time(eta, kappa, K):
        \"\"\"tau (section 4).\"\"\"
        return ((eta*kappa + 1)**K - 1)/kappa
    <BLANKLINE>
    """
    names = {symbol(key): key for key in formula.keys}
    text = f"{formula.name} ({formula.source})."
    return _function(name or formula.name, ", ".join(formula.keys), formula.expression, names, module, text)


def bound_to_python(bound: Bound, name: str = "bound", *, module: Module = "math") -> str:
    """Source of a plain Python function that is the master bound of a recipe in every expert's hyperparameters.

    Keyword arguments like ``eta_1`` (first expert) default to the recipe's numbers, so calling it without arguments
    gives the bound's value.  The branches that were active (which inequality for drift, stability and dispersion) are
    fixed: it is that inequality for other numbers too, and remains valid where its assumptions hold.  Available where
    ``bound.elasticity`` is; raises :class:`MergeboundError` elsewhere.
    """
    from theory.elasticity import expand

    made = expand(bound)
    by_latex = {entry.latex: key for key, entry in glossary().items()}
    names: dict[Any, str] = {}
    for item in made.numbers:
        found = re.fullmatch(r"\{(.*)\}_\{\((\d+)\)\}", str(item))
        assert found is not None
        names[item] = f"{by_latex[found[1]]}_{found[2]}"
    used = {item: names[item] for item in made.numbers if item in made.expression.free_symbols}
    arguments = ", ".join(f"{label}={made.numbers[item]!r}" for item, label in used.items())
    text = "Upper bound on E F(M), the joint risk of the merge."
    return _function(name, f"*, {arguments}" if arguments else "", made.expression, used, module, text)


def _escape(text: str) -> str:
    """Plain text as LaTeX text."""
    special = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
    special |= {char: "\\" + char for char in "&%$#_{}"}
    special |= {"<": r"$<$", ">": r"$>$"}
    return "".join(special.get(char, char) for char in text)


def latex_document(names: Sequence[str] | None = None, *, proofs: bool = True) -> str:
    """A standalone LaTeX document: every compiled formula, the checked proofs, the symbols used.

    ``names`` chooses derivations (default all, see :func:`theory.derivations.derivations`); ``proofs=False`` leaves
    them out.  Compiles with any LaTeX that has amsmath, amssymb and longtable.
    """
    from theory.derivations import derivations, derive

    chosen = derivations() if names is None else tuple(names)
    used: set[str] = set()
    lines = [
        r"\documentclass{article}",
        r"\usepackage{amsmath,amssymb,longtable}",
        r"\begin{document}",
        r"\section*{Formulas}",
        r"Every formula below is the expression from which the numeric function is compiled.",
    ]
    for make in formulas():
        made = make()
        used |= set(made.keys)
        lines += [_escape(made.source) + ":", r"\[ " + _left(made.name) + made.latex() + r" \]"]
    if proofs:
        lines.append(r"\section*{Proofs}")
        lines += [derive(name).latex() for name in chosen]
        text = "\n".join(lines)
        used |= {key for key, entry in glossary().items() if entry.latex in text and len(entry.latex) > 1}
    lines += [r"\section*{Symbols}", r"\begin{longtable}{lp{7cm}ll}", r"symbol & meaning & unit & domain \\ \hline"]
    for key, entry in glossary().items():
        if key in used:
            cells = (f"${entry.latex}$", *(_escape(item) for item in (entry.meaning, entry.unit, entry.domain)))
            lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\end{longtable}", r"\end{document}", ""])


def _left(name: str) -> str:
    sides = {
        "risk": r"\mathbb{E} F \le ",
        "gap": r"\mathbb{E}[F - F_S] \le ",
        "deviation": r"F - F_S - \text{shift} \le ",
        "F_S(M)": r"\mathbb{E} F_S(M) \le ",
        "instability": r"\mathcal I \le ",
        "epsilon^2": r"\varepsilon^2 \text{ grows by } ",
        "sensitivity": "c = ",
        "noise": r"\Delta V / \Vert\Delta\Vert^2 = ",
        "V": r"V' - V = ",
        "t": "t = ",
        "slope": r"\frac{dt}{d\cos} = ",
        "weight": r"\text{weight} = ",
        "gain": r"\text{gain} = ",
        "taylor_factor": r"\psi = ",
        "largest_loss": r"\ell \le ",
        "loss": r"\ell = ",
    }
    if name in sides:
        return sides[name]
    return glossary()[name].latex + (" = " if name in ("tau", "nu", "Gamma") else r" \le ")


def check_latex(text: str) -> list[str]:
    """Structural faults of LaTeX text: unbalanced braces, dollars, brackets, ``left``/``right`` and environments.

    >>> check_latex(r"\\[ \\frac{1}{2} \\]"), check_latex(r"\\begin{a} {x $y")
    ([], ['environment a is not closed', 'braces are not balanced', 'a dollar is not closed'])
    """
    faults: list[str] = []
    stack: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{([^}]*)\}", text):
        if kind == "begin":
            stack.append(name)
        elif not stack or stack.pop() != name:
            faults.append(f"environment {name} is closed but not open")
    faults += [f"environment {name} is not closed" for name in stack]
    plain = re.sub(r"\\begin\{[^}]*\}|\\end\{[^}]*\}", "", text)
    bare = re.sub(r"\\[{}$\\]", "", plain)
    depth = 0
    for char in bare:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth < 0:
            break
    if depth != 0:
        faults.append("braces are not balanced")
    if bare.count("$") % 2:
        faults.append("a dollar is not closed")
    if text.count(r"\[") != text.count(r"\]"):
        faults.append("a displayed formula is not closed")
    if len(re.findall(r"\\left(?![a-z])", text)) != len(re.findall(r"\\right(?![a-z])", text)):
        faults.append("left and right do not pair")
    return faults
