"""How every term scales: exponents per hyperparameter in each regime, and limits, derived symbolically (section 11).

The exponent of a term T in a hyperparameter h is its elasticity ``d log T / d log h``.  In a regime (drift dominates,
noise dominates, training has saturated, ...) the elasticity tends to a limit, which :func:`scaling_table` computes with
sympy from the formulas that the calculators compile.  With an expanding rate (kappa > 0) the limit is not a constant:
the exponents grow with K, because the clock is exponential; the expression says how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from theory.clocks import nu_formula, tau_formula
from theory.drift import drift_base_formula, drift_energy_formula, drift_noise_formula
from theory.errors import MergeboundError
from theory.stability import (
    epsilon_rms_formula,
    epsilon_sup_formula,
    gamma_with_replacement_formula,
    gamma_without_replacement_formula,
)
from theory.symbolic import Formula
from theory.symbols import glossary, symbol
from theory.training import pl_risk_formula

Rate = Literal["flat", "contracting", "expanding", "momentum"]


@dataclass(frozen=True, eq=False)
class Exponent:
    """``term`` behaves like ``hyperparameter ** exponent`` in ``regime``; ``exponent`` is a sympy expression."""

    term: str
    regime: str
    hyperparameter: str
    exponent: Any

    @property
    def is_constant(self) -> bool:
        """Whether the exponent is a number (not an expression in other symbols)."""
        return not self.exponent.free_symbols


@dataclass(frozen=True, eq=False)
class Regime:
    """A regime: its ``name``, what it means, the behaviour of the clock, and the limits that define it.

    ``rate``: ``flat`` kappa = 0, ``contracting`` kappa = -mu with many steps, ``expanding`` kappa > 0 with many steps,
    ``momentum`` convex heavy ball by its certified response.  ``limits`` are (glossary key, target) pairs, taken in
    order; the target may be ``"n"`` (full batch).
    """

    name: str
    meaning: str
    rate: Rate
    limits: tuple[tuple[str, str], ...] = ()


_CLOCKS: dict[str, tuple[Rate, str]] = {
    "flat": ("flat", "kappa = 0"),
    "saturated": ("contracting", "kappa = -mu, many steps"),
    "expanding": ("expanding", "kappa > 0, many steps"),
    "momentum": ("momentum", "convex heavy ball by its certified response"),
}
_KINDS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "full batch": ("b = n, only the mean push remains", (("b", "n"),)),
    "noise": ("few of many samples per batch, noise far above the gradient at the base", (("n", "oo"), ("g", "0"))),
    "drift": ("gradient at the base far above the noise", (("sigma", "0"),)),
}
REGIMES: tuple[Regime, ...] = tuple(Regime(name, meaning, rate) for name, (rate, meaning) in _CLOCKS.items()) + tuple(
    Regime(f"{name}, {kind}", f"{meaning}; {more}", rate, limits)
    for name, (rate, meaning) in _CLOCKS.items()
    for kind, (more, limits) in _KINDS.items()
)
HYPERPARAMETERS = (
    "eta",
    "K",
    "b",
    "n",
    "N",
    "lambda_",
    "beta",
    "L",
    "mu",
    "kappa",
    "omega",
    "sigma",
    "g",
    "D_inf",
    "F0",
)
TERMS = (
    *("tau", "nu", "Gamma", "epsilon", "epsilon (rms)", "drift (a)", "drift (b)", "drift (c)"),
    *("V (orthogonal average)", "dispersion", "instability (average)", "instability (task arithmetic)"),
    "training risk (PL)",
)


def _at(formula: Callable[[], Formula], **values: Any) -> Any:
    return formula().expression.subs({symbol(key): value for key, value in values.items()}, simultaneous=True)


def clock_expressions(rate: Rate) -> tuple[Any, Any]:
    """``(tau, nu)`` as sympy expressions in eta, K and kappa, mu or beta (theory section 4).

    >>> clock_expressions("flat")[0] == symbol("K") * symbol("eta")
    True
    """
    eta, steps, beta = symbol("eta"), symbol("K"), symbol("beta")
    if rate == "flat":
        return eta * steps, eta**2 * steps
    if rate == "momentum":
        response = eta * (1 + beta) / (1 - beta)
        return response * steps, response**2 * steps
    kappa = -symbol("mu") if rate == "contracting" else symbol("kappa")
    return _at(tau_formula, kappa=kappa), _at(nu_formula, kappa=kappa)


@cache
def term_expression(term: str, rate: Rate) -> Any:
    """A term as a sympy expression in hyperparameters; raises :class:`MergeboundError` for unknown names.

    The clock is that of ``rate``; batches without replacement; ``V`` and ``dispersion`` average orthogonal task vectors
    of drift (a); instability merges experts of stability epsilon by averaging (c = 1/N) or task arithmetic (c =
    lambda).  The PL training risk has no clock and is the excess over F*.
    """
    return _term(term, *clock_expressions(rate))


def _term(term: str, tau: Any, nu: Any) -> Any:
    import sympy

    count, lam, L, steps, eta = symbol("N"), symbol("lambda_"), symbol("L"), symbol("K"), symbol("eta")
    gamma = _at(gamma_without_replacement_formula, nu=nu)
    eps = _at(epsilon_sup_formula, tau=tau, Gamma=gamma)
    drift = _at(drift_noise_formula, tau=tau, nu=nu)
    V = drift**2 * (1 - 1 / count)
    makers: dict[str, Callable[[], Any]] = {
        "tau": lambda: tau,
        "nu": lambda: nu,
        "Gamma": lambda: gamma,
        "epsilon": lambda: eps,
        "epsilon (rms)": lambda: _at(epsilon_rms_formula, tau=tau, Gamma=gamma).subs(symbol("D_2"), symbol("D_inf")),
        "drift (a)": lambda: drift,
        "drift (b)": lambda: _at(drift_base_formula, tau=tau, sigma0=symbol("sigma")),
        "drift (c)": lambda: _at(drift_energy_formula, T=eta * steps, N2=eta**2 * steps, FK=sympy.Integer(0)),
        "V (orthogonal average)": lambda: V,
        "dispersion": lambda: sympy.sqrt(L * V / 2),
        "instability (average)": lambda: sympy.sqrt(L / 2) * eps / count,
        "instability (task arithmetic)": lambda: sympy.sqrt(L / 2) * lam * eps,
        "training risk (PL)": lambda: _at(pl_risk_formula, F_star=sympy.Integer(0)),
    }
    if term not in makers:
        raise MergeboundError(f"scaling: {term!r} is not a term; choose one of {', '.join(makers)}")
    return makers[term]()


def _regime(name: str) -> Regime:
    for regime in REGIMES:
        if regime.name == name:
            return regime
    raise MergeboundError(f"scaling: {name!r} is not a regime; choose one of {', '.join(r.name for r in REGIMES)}")


def leading_term(term: str, regime: str) -> Any:
    """What a term tends to in a regime, as a sympy expression in tau, nu and the other symbols; 0 where it vanishes.

    The clock stays symbolic (:func:`long_clock` says what it is in the regime), so the result is a product of powers.
    Raises :class:`MergeboundError` for unknown names.

    >>> str(leading_term("epsilon", "saturated, full batch"))
    'D_\\\\infty*\\\\tau/n'
    """
    return _leading(term, _regime(regime).limits)


@cache
def _leading(term: str, towards: tuple[tuple[str, str], ...]) -> Any:
    import sympy

    if term == "training risk (PL)":
        power = (1 - symbol("mu") * symbol("eta")) ** symbol("K")
        expression = term_expression(term, "contracting").subs(power, 0)
    else:
        expression = _term(term, symbol("tau"), symbol("nu"))
    for key, target in towards:
        item = symbol(key)
        if target == "n":
            expression = expression.subs(item, symbol("n"))
        elif target == "0":
            expression = expression.subs(item, 0)
        elif item in expression.free_symbols:
            expression = _largest_power(expression, item)
    return sympy.simplify(expression)


def _largest_power(expression: Any, item: Any) -> Any:
    """``limit * item^(-s)`` for the s in {0, 1/2, 1, 2} that leaves a finite, non-zero limit at infinity."""
    import sympy

    for power in (0, sympy.Rational(1, 2), 1, 2):
        limit = sympy.limit(sympy.expand(expression * item**power), item, sympy.oo)
        if limit != 0 and limit.is_finite is not False:
            return limit / item**power
    raise MergeboundError(f"scaling: no power of {item} describes {expression}")


def long_clock(rate: Rate) -> tuple[Any, Any]:
    """``(tau, nu)`` after many steps: the exact clock where it is a power already, else its leading behaviour."""
    eta, kappa, mu, steps = symbol("eta"), symbol("kappa"), symbol("mu"), symbol("K")
    if rate == "contracting":
        return 1 / mu, eta / (mu * (2 - eta * mu))
    if rate == "expanding":
        growth = (1 + eta * kappa) ** steps
        return growth / kappa, eta * growth**2 / (kappa * (2 + eta * kappa))
    return clock_expressions(rate)


@cache
def exponent(term: str, hyperparameter: str, regime: str) -> Any:
    """``d log(term)/d log(hyperparameter)`` in a regime: a number, or an expression where it is none.

    The elasticity of the leading term (:func:`leading_term`), to which the elasticity of the term itself tends.
    Returns ``nan`` where the term vanishes in the regime or the regime fixes the hyperparameter.  Raises
    :class:`MergeboundError` for unknown names.

    >>> [str(exponent("epsilon", key, "flat, noise")) for key in ("eta", "K", "b", "n")]
    ['1', '1/2', '-1/2', '-1/2']
    """
    import sympy

    if hyperparameter not in glossary():
        raise MergeboundError(f"scaling: {hyperparameter!r} is not in the glossary")
    expression = leading_term(term, regime)
    chosen = _regime(regime)
    if expression == 0 or (hyperparameter == "b" and ("b", "n") in chosen.limits):
        return sympy.nan
    parts = [_elasticity(expression, hyperparameter)]
    for key, clock in zip(("tau", "nu"), long_clock(chosen.rate), strict=True):
        share = _elasticity(expression, key)
        if share != 0:
            parts.append(share * _elasticity(clock, hyperparameter))  # chain rule
    parts = [part for part in parts if part != 0]
    value = sum(parts, sympy.Integer(0))
    return value if value.is_number else sympy.simplify(value)


@cache
def _elasticity(expression: Any, key: str) -> Any:
    import sympy

    item = symbol(key)
    if item not in expression.free_symbols:
        return sympy.Integer(0)
    return sympy.simplify(item * sympy.diff(sympy.expand_log(sympy.log(expression), force=True), item))


def scaling_table(terms: tuple[str, ...] = TERMS, regimes: tuple[str, ...] | None = None) -> tuple[Exponent, ...]:
    """Every non-zero exponent of every term in the regimes that shape it, by symbolic differentiation.

    Terms of the clock depend on its rate only; stability and instability on full batch or noise; drift and dispersion
    on noise or drift.  Terms that vanish in a regime are left out.  Results are cached.

    >>> rows = scaling_table(("tau",), ("flat",))
    >>> [(row.hyperparameter, str(row.exponent)) for row in rows]
    [('eta', '1'), ('K', '1')]
    """
    import sympy

    names = tuple(regime.name for regime in REGIMES) if regimes is None else regimes
    rows = []
    for term in terms:
        for name in names:
            if not _shapes(term, _regime(name)):
                continue
            for key in HYPERPARAMETERS:
                value = exponent(term, key, name)
                if value is not sympy.nan and value != 0:
                    rows.append(Exponent(term, name, key, value))
    return tuple(rows)


def _shapes(term: str, regime: Regime) -> bool:
    """Whether a regime says something definite about a term."""
    kind = regime.name.partition(", ")[2]
    if term == "training risk (PL)":
        return regime.name == "saturated"
    if term == "drift (c)":
        return regime.name == "flat, drift"
    if term in ("tau", "nu"):
        return kind == ""
    if term in ("drift (a)", "V (orthogonal average)", "dispersion"):  # 6(a) does not cover momentum
        return kind in ("noise", "drift") and regime.rate != "momentum"
    if term == "drift (b)":
        return kind in ("noise", "drift")
    return kind == "noise" or (kind == "full batch" and term != "Gamma")


def scaling_markdown(rows: tuple[Exponent, ...]) -> str:
    """The table as Markdown: one line per term and regime, one column per hyperparameter."""
    keys = [key for key in HYPERPARAMETERS if any(row.hyperparameter == key for row in rows)]
    lines = ["| term | regime | " + " | ".join(keys) + " |", "|" + "---|" * (len(keys) + 2)]
    pairs = dict.fromkeys((row.term, row.regime) for row in rows)
    for term, regime in pairs:
        found = {row.hyperparameter: row.exponent for row in rows if (row.term, row.regime) == (term, regime)}
        cells = [str(found[key]).replace("\\", "") if key in found else "" for key in keys]
        lines.append(f"| {term} | {regime} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def formula_limit(formula: Formula, key: str, target: str) -> Any:
    """Limit of a formula as a glossary key tends to ``target`` (``"0"``, ``"oo"``, or a key such as ``"n"``).

    Positive keys come from above.  Raises :class:`MergeboundError` where the formula does not hold the key.

    >>> from theory.clocks import tau_formula
    >>> str(formula_limit(tau_formula(), "kappa", "0"))
    'K*\\\\eta'
    """
    import sympy

    if key not in formula.keys:
        raise MergeboundError(f"scaling: {formula.source} has no {key!r}; choose one of {', '.join(formula.keys)}")
    item = symbol(key)
    if target in glossary():
        return sympy.simplify(formula.expression.subs(item, symbol(target)))
    goal = {"0": sympy.Integer(0), "oo": sympy.oo}.get(target)
    if goal is None:
        raise MergeboundError(f"scaling: {target!r} is no target of a limit; choose '0', 'oo' or a glossary key")
    return sympy.simplify(sympy.limit(formula.expression, item, goal))


@dataclass(frozen=True, eq=False)
class Limit:
    """``expression`` tends to ``value`` as the glossary key ``variable`` tends to ``target``."""

    name: str
    expression: Any
    variable: str
    target: str
    value: Any


def limits() -> tuple[Limit, ...]:
    """Limits of the formulas, computed by sympy: kappa -> 0, b = n, n -> oo, N -> oo, K -> oo, eta kappa = -2.

    >>> {row.name: str(row.value) for row in limits()}["instability of an average, many experts"]
    '0'
    """
    import sympy

    eta, steps, kappa, n, b = (symbol(key) for key in ("eta", "K", "kappa", "n", "b"))
    tau, nu = tau_formula().expression, nu_formula().expression
    gap, sigma = symbol("D_inf"), symbol("sigma")
    whole = sympy.Symbol("j", integer=True, positive=True)
    flat_eps = term_expression("epsilon", "flat")
    power = (1 - symbol("mu") * eta) ** steps
    saturated = {
        name: term_expression(name, "contracting").replace(
            lambda part: part.is_Pow and part.exp.has(steps), lambda part: sympy.Integer(0)
        )
        for name in ("tau", "nu", "drift (a)")
    }
    pl = term_expression("training risk (PL)", "flat")
    gamma_one, gamma_two = (
        gamma_without_replacement_formula().expression,
        gamma_with_replacement_formula().expression,
    )
    oscillating = sympy.simplify(nu.subs(steps, whole).subs(kappa, (-2 + symbol("a")) / eta))
    return (
        Limit("training time, flat", tau, "kappa", "0", sympy.limit(tau, kappa, 0)),
        Limit("noise time, flat", nu, "kappa", "0", sympy.limit(nu, kappa, 0)),
        Limit(
            "noise time, oscillating (eta kappa = a - 2)",
            oscillating,
            "a",
            "0",
            sympy.simplify(sympy.limit(oscillating, symbol("a"), 0).subs(whole, steps)),
        ),
        Limit("Gamma, full batch", gamma_one, "b", "n", sympy.simplify(gamma_one.subs(b, n))),
        Limit("Gamma with replacement, b = n", gamma_two, "b", "n", sympy.factor(gamma_two.subs(b, n))),
        Limit("stability, full batch", flat_eps, "b", "n", sympy.simplify(flat_eps.subs(b, n))),
        Limit(
            "sqrt(n) times stability, many samples",
            sympy.sqrt(n) * flat_eps,
            "n",
            "oo",
            sympy.simplify(sympy.limit(flat_eps / gap * sympy.sqrt(n), n, sympy.oo) * gap),
        ),
        Limit("stability, many samples", flat_eps, "n", "oo", sympy.limit(flat_eps, n, sympy.oo)),
        Limit(
            "instability of an average, many experts",
            term_expression("instability (average)", "flat"),
            "N",
            "oo",
            sympy.limit(term_expression("instability (average)", "flat"), symbol("N"), sympy.oo),
        ),
        Limit(
            "V of orthogonal averages, many experts",
            term_expression("V (orthogonal average)", "flat"),
            "N",
            "oo",
            sympy.simplify(sympy.limit(term_expression("V (orthogonal average)", "flat"), symbol("N"), sympy.oo)),
        ),
        Limit(
            "training time, many contracting steps", clock_expressions("contracting")[0], "K", "oo", saturated["tau"]
        ),
        Limit("noise time, many contracting steps", clock_expressions("contracting")[1], "K", "oo", saturated["nu"]),
        Limit(
            "drift (a), many contracting steps",
            term_expression("drift (a)", "contracting"),
            "K",
            "oo",
            saturated["drift (a)"],
        ),
        Limit("training risk, many steps", pl, "K", "oo", pl.subs(power, 0)),
        Limit(
            "drift (a), no noise",
            term_expression("drift (a)", "flat"),
            "sigma",
            "0",
            sympy.limit(term_expression("drift (a)", "flat"), sigma, 0),
        ),
    )


__all__ = [
    "HYPERPARAMETERS",
    "REGIMES",
    "TERMS",
    "Exponent",
    "Limit",
    "Regime",
    "clock_expressions",
    "exponent",
    "formula_limit",
    "leading_term",
    "limits",
    "long_clock",
    "scaling_markdown",
    "scaling_table",
    "term_expression",
]
