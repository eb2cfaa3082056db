"""Elasticities of the master bound (theory section 11).

Plain SGD at a constant learning rate: symbolic differentiation, evaluated with 50 digits.  Schedules, momentum,
reshuffling, trained heads, shared samples and the forms that have no closed expression: central differences of the
bound itself, for fields that vary continuously (a learning-rate schedule is scaled as a whole).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from theory.chunks import one_recipe
from theory.clocks import is_constant, lowest_curvature, nu_formula, smoothness, tau_formula
from theory.errors import MergeboundError
from theory.operators import coefficients
from theory.recipe import Expert, Schedule, per_expert
from theory.symbolic import Formula
from theory.symbols import glossary, symbol

if TYPE_CHECKING:
    from theory.bound import Bound, ExpertTerms

FIELDS = {
    "learning_rate": "eta",
    "steps": "K",
    "batch_size": "b",
    "n": "n",
    "weight_decay": "omega",
    "L": "L",
    "mu": "mu",
    "kappa": "kappa",
    "initial_gradient_norm": "g",
    "sigma": "sigma",
    "sigma0": "sigma0",
    "D_inf": "D_inf",
    "D_2": "D_2",
    "D_envelope": "D_envelope",
    "G": "G",
    "initial_risk": "F0",
    "training_risk": "FK",
    "drift": "d",
    "epsilon": "epsilon",
}
HYPERPARAMETERS = ("learning_rate", "steps", "batch_size", "n", "weight_decay")
WHOLE = ("steps", "batch_size", "n")
STEP = 1e-4


class NotSymbolic(MergeboundError):
    """The bound has no closed expression in its hyperparameters; differences of the bound itself still exist."""


@dataclass(frozen=True, eq=False)
class Expanded:
    """The bound written in every expert's hyperparameters: ``expression``, and the number behind each symbol."""

    expression: Any
    numbers: dict[Any, float]


class _Symbols:
    """The symbols of one expert with their numbers."""

    def __init__(self, expert: Expert, index: int) -> None:
        self.expert, self.index = expert, index
        self.numbers: dict[Any, float] = {}

    def __call__(self, field: str) -> Any:
        value = getattr(self.expert, field)
        found = symbol(FIELDS[field], self.index)
        if np.ndim(value) != 0:
            raise MergeboundError(
                f"expert {self.expert.name!r}: {field} is an array; elasticity takes one configuration at a time"
            )
        self.numbers[found] = float(0.0 if value is None else value)
        return found


def expand(bound: Bound) -> Expanded:
    """Write a master bound of plain SGD experts out in their hyperparameters (the branch that was active)."""
    import sympy

    merge = bound.merge
    if merge is None:
        raise MergeboundError(
            "elasticity: this bound was made from measured numbers; build it by master_bound from recipes"
        )
    one_recipe(merge, "elasticity", "one configuration at a time")
    if merge.shared_samples or any(expert.head == "trained" for expert in merge.experts):
        raise NotSymbolic("elasticity: not symbolic with shared samples or trained heads; compare two bounds instead")
    _refuse_measured(bound)
    numbers: dict[Any, float] = {}
    d, risks, instability, L = [], [], sympy.Integer(0), []
    base: list[Any] = []
    p = [float(value) for value in per_expert(merge, "weights")]
    for index, (expert, row) in enumerate(zip(merge.experts, bound.experts, strict=True)):
        if not is_constant(expert):
            raise NotSymbolic(
                f"expert {expert.name!r}: elasticity needs plain SGD at constant learning rate and batch size (no "
                "momentum, no reshuffling); compare two bounds instead"
            )
        table = _Symbols(expert, index + 1)
        drift, epsilon = _expert_expressions(expert, row, table)
        if row.risk_form != "given":
            raise NotSymbolic(f"expert {expert.name!r}: elasticity needs training_risk to be given")
        stiffness = table("L")
        d.append(drift)
        L.append(stiffness)
        risks.append(table("training_risk"))
        known = expert.initial_risk is not None and expert.head != "trained"
        base.append(table("initial_risk") if known else None)
        instability += p[index] * stiffness / 2 * float(row.sensitivity) ** 2 * epsilon**2
        numbers |= table.numbers
    if bound.dispersion_form.startswith("task by task"):
        left = _task_by_task(bound, d, L, p, risks, base, numbers)
    else:
        joint = sum((w * value for w, value in zip(p, risks, strict=True)), sympy.Integer(0))
        left = sympy.sqrt(joint) + sympy.sqrt(_dispersion_expression(bound, d, L, p))
    return Expanded((left + sympy.sqrt(instability)) ** 2, numbers)


def _refuse_measured(bound: Bound) -> None:
    """How a measured quantity depends on hyperparameters is not known, symbolically or otherwise."""
    for row in bound.experts:
        if row.drift is not None and (row.drift_form == "measured" or row.drift_form.startswith("6(d)")):
            raise MergeboundError(
                f"expert {row.name!r}: its drift is {row.drift_form}, whose dependence on hyperparameters is not "
                "known; give initial_gradient_norm with sigma or sigma0"
            )
        if row.epsilon_form == "measured" or "loss log" in row.epsilon_form:
            raise MergeboundError(
                f"expert {row.name!r}: its stability is {row.epsilon_form}, whose dependence on hyperparameters is not "
                "known; give D_inf or D_2"
            )


def _expert_expressions(expert: Expert, row: ExpertTerms, table: _Symbols) -> tuple[Any, Any]:
    import sympy

    eta, steps, n, b, decay = (table(name) for name in ("learning_rate", "steps", "n", "batch_size", "weight_decay"))
    tau, nu = _times(expert, table)
    factor = (n - b) / (n - 1) if expert.sampling == "without_replacement" and int(expert.n) > 1 else sympy.Integer(1)
    distinct = expert.sampling == "without_replacement"
    spread = nu * (1 / (b * n) - 1 / n**2) if distinct else nu * (1 - 1 / n) / (b * n)

    def drift() -> Any:
        g = "initial_gradient_norm"
        if row.drift_form == "6(a)":
            return table(g) * tau + table("sigma") * sympy.sqrt(factor * nu / b)
        if row.drift_form == "6(b)":
            return tau * sympy.sqrt(table(g) ** 2 + table("sigma0") ** 2 * factor / b)
        if row.drift_form == "6(c)":
            norm = 0.0 if expert.base_norm is None else float(expert.base_norm)
            noise = table("sigma") ** 2 * factor * steps * eta**2 / b
            fall = table("initial_risk") + decay * norm**2 / 2 - table("training_risk")
            return sympy.sqrt(2 * steps * eta * (fall + (table("L") + decay) * noise / 2)) + sympy.sqrt(noise)
        raise NotSymbolic(f"expert {expert.name!r}: its drift, {row.drift_form}, has no closed expression")

    forms = {"Theorem 2 (sup)": "D_inf", "Theorem 2 (envelope)": "D_envelope", "Theorem 2 (sup, 2G)": "G"}
    reach = drift() if row.drift is not None else sympy.Integer(0)
    if row.epsilon_form in forms:
        gap = table(forms[row.epsilon_form]) * (2 if row.epsilon_form == "Theorem 2 (sup, 2G)" else 1)
        return reach, gap * sympy.sqrt((tau / n) ** 2 + spread)
    if row.epsilon_form == "Theorem 2 (rms)":
        return reach, table("D_2") * (tau / n + sympy.sqrt(spread))
    if row.epsilon_form.startswith("cap"):
        return reach, sympy.sqrt(2) * reach
    raise NotSymbolic(f"expert {expert.name!r}: its stability, {row.epsilon_form}, has no closed expression")


def _times(expert: Expert, table: _Symbols) -> tuple[Any, Any]:
    import sympy

    eta, steps, decay = table("learning_rate"), table("steps"), table("weight_decay")
    rate, omega = float(np.asarray(expert.learning_rate)), float(np.asarray(expert.weight_decay))
    if expert.kappa is not None:
        kappa, number = table("kappa"), float(expert.kappa)
    else:
        low, high = float(lowest_curvature(expert)) + omega, float(smoothness(expert)) + omega
        if -rate * low >= rate * high - 2:
            bottom = {"convex": sympy.Integer(0), "strongly_convex": None, "smooth": -table("L")}[expert.curvature]
            kappa, number = -((table("mu") if bottom is None else bottom) + decay), -low
        else:
            kappa, number = table("L") + decay - 2 / eta, high - 2 / rate
    if number == 0:
        return eta * steps, eta**2 * steps
    places = {symbol("eta"): eta, symbol("kappa"): kappa, symbol("K"): steps}
    tau = tau_formula().expression.subs(places, simultaneous=True)
    nu = eta**2 * steps if rate * number == -2 else nu_formula().expression.subs(places, simultaneous=True)
    return tau, nu


def _dispersion_expression(bound: Bound, d: list[Any], L: list[Any], p: list[float]) -> Any:
    import sympy

    merge = bound.merge
    assert merge is not None
    values = [float(smoothness(expert)) for expert in merge.experts]
    largest = L[int(np.argmax(values))]
    if merge.dispersion is not None:
        return largest / 2 * float(merge.dispersion)
    alpha = [float(value) for value in coefficients(merge)]
    weights: list[Any] = list(p)
    form, stiffness = bound.dispersion_form, largest
    if form.endswith("(weights p L)"):
        form, stiffness = form.split(" ")[0], sum(w * s for w, s in zip(p, L, strict=True))
        weights = [w * s / stiffness for w, s in zip(p, L, strict=True)]
    size = range(len(d))
    if form == "centred":
        V = sum(sympy.Abs(alpha[i] - weights[i]) * d[i] for i in size) ** 2 + sum(weights[j] * d[j] ** 2 for j in size)
    elif form == "triangle":
        V = sum(
            weights[j] * (abs(1 - alpha[j]) * d[j] + sum(abs(alpha[i]) * d[i] for i in size if i != j)) ** 2
            for j in size
        )
    else:
        V = sum(
            weights[j] * ((1 - alpha[j]) ** 2 * d[j] ** 2 + sum(alpha[i] ** 2 * d[i] ** 2 for i in size if i != j))
            for j in size
        )
    return stiffness / 2 * (V + _mask_dispersion(bound, d))


def _mask_dispersion(bound: Bound, d: list[Any]) -> Any:
    """What DARE's masks add to every squared distance."""
    merge = bound.merge
    assert merge is not None
    if merge.method != "dare":
        return 0
    drop, lam = float(merge.drop_rate), [float(value) for value in per_expert(merge, "coefficients")]
    scale = drop / (1 - drop) if merge.rescale else drop * (1 - drop)
    if merge.independent_masks:
        return scale * sum(a**2 * x**2 for a, x in zip(lam, d, strict=True))
    return scale * sum(abs(a) * x for a, x in zip(lam, d, strict=True)) ** 2


def _task_by_task(
    bound: Bound,
    d: list[Any],
    L: list[Any],
    p: list[float],
    risks: list[Any],
    base: list[Any],
    numbers: dict[Any, float],
) -> Any:
    """The sharpest aggregation with the anchors that were active, as an expression."""
    import sympy

    merge = bound.merge
    assert merge is not None
    alpha, size, extra = [float(value) for value in coefficients(merge)], range(len(d)), _mask_dispersion(bound, d)

    def number(expression: Any) -> float:
        return float(sympy.sympify(expression).evalf(30, subs=numbers))

    def smaller(*candidates: Any) -> Any:
        return candidates[0] if len(candidates) == 1 else min(candidates, key=number)

    def squared(own: int | None) -> Any:
        parts = [(abs(alpha[i]) if i != own else abs(1 - alpha[i])) * d[i] for i in size]
        triangle = sum(parts, sympy.Integer(0)) ** 2
        if not merge.orthogonal_task_vectors:
            return triangle
        return smaller(triangle, sum((part**2 for part in parts), sympy.Integer(0)))

    total = sympy.Integer(0)
    for j in size:
        choices = [sympy.sqrt(risks[j]) + sympy.sqrt(L[j] / 2 * (squared(j) + extra))]
        if base[j] is not None:
            choices.append(sympy.sqrt(base[j]) + sympy.sqrt(L[j] / 2 * (squared(None) + extra)))
        total += p[j] * smaller(*choices) ** 2
    return sympy.sqrt(total)


def formula_elasticity(formula: Formula, key: str) -> Any:
    """``d log(formula)/d log(key)`` as a sympy expression in the glossary's symbols.

    Zero where the formula does not hold the key.  Raises :class:`MergeboundError` for keys outside the glossary.

    >>> from theory.stability import gamma_with_replacement_formula
    >>> str(formula_elasticity(gamma_with_replacement_formula(), "b"))
    '-1'
    """
    import sympy

    if key not in glossary():
        raise MergeboundError(f"elasticity: {key!r} is not in the glossary; choose one of {', '.join(formula.keys)}")
    item = symbol(key)
    return item * sympy.diff(formula.expression, item) / formula.expression


def elasticity(bound: Bound, name: str, expert: str | None = None) -> float:
    """``d log(bound) / d log(field)``: one expert's field, or that field of all experts together.

    Symbolic (50 digits, so the limits of the clock do not cancel) where the bound has a closed expression; otherwise by
    fourth-order central differences of the bound, which exist for fields that are not whole numbers.  Raises
    :class:`MergeboundError` with the reason.
    """
    import mpmath
    import sympy

    if not isinstance(name, str) or name not in FIELDS:
        raise MergeboundError(f"elasticity: {name!r} is not a field; choose one of {', '.join(FIELDS)}")
    merge = bound.merge
    if merge is not None:
        names = [item.name for item in merge.experts]
        if expert is not None and not (isinstance(expert, str) and expert in names):
            raise MergeboundError(f"elasticity: there is no expert {expert!r}; choose one of {', '.join(names)}")
    try:
        made = expand(bound)
    except NotSymbolic as reason:
        return _difference(bound, name, expert, str(reason))
    assert merge is not None
    chosen = [index + 1 for index, item in enumerate(names) if expert in (None, item)]
    symbols = [symbol(FIELDS[name], index) for index in chosen]
    arguments = list(made.numbers)
    derivative = sum(
        (made.numbers[item] * sympy.diff(made.expression, item) for item in symbols if item in made.numbers),
        sympy.Integer(0),
    )
    function = sympy.lambdify(arguments, [derivative, made.expression], "mpmath", cse=True)
    with mpmath.workdps(50):
        slope, value = function(*(mpmath.mpf(made.numbers[item]) for item in arguments))
        return float(slope / value)


def _difference(bound: Bound, name: str, expert: str | None, reason: str) -> float:
    """The elasticity from the bound at four scaled values of the field."""
    from theory.risk import master_bound

    merge = bound.merge
    assert merge is not None
    _refuse_measured(bound)
    if np.size(bound.value) != 1 or np.ndim(bound.value):
        raise MergeboundError("elasticity: the bound holds several configurations; take one configuration at a time")
    if np.isinf(bound.value):
        raise MergeboundError("elasticity: the bound is infinite, so it has no slope; reduce steps or learning_rate")
    if name in WHOLE:
        raise MergeboundError(f"{reason}; {name} is a whole number here: compare two bounds instead")

    def scaled(item: Expert, factor: float) -> Expert:
        value = getattr(item, name)
        if value is None or expert not in (None, item.name):
            return item
        if isinstance(value, Schedule):
            return replace(item, **{name: Schedule(value.values * factor)})  # type: ignore[arg-type]
        return replace(item, **{name: np.asarray(value, dtype=np.float64) * factor})  # type: ignore[arg-type]

    def log_bound(shift: float) -> float:
        experts = tuple(scaled(item, float(np.exp(shift * STEP))) for item in merge.experts)
        return float(np.log(master_bound(replace(merge, experts=experts)).value))

    return (8 * (log_bound(1) - log_bound(-1)) - (log_bound(2) - log_bound(-2))) / (12 * STEP)
