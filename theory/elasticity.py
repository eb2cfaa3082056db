"""Elasticities of the master bound by symbolic differentiation (theory section 11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from theory.clock import is_constant, lowest_curvature, nu_formula, smoothness, tau_formula
from theory.errors import MergeboundError
from theory.operators import coefficients
from theory.recipe import Expert, per_expert
from theory.symbols import symbol

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
    "initial_risk": "F0",
    "training_risk": "FK",
    "drift": "d",
    "epsilon": "epsilon",
}
HYPERPARAMETERS = ("learning_rate", "steps", "batch_size", "n", "weight_decay")


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
    if merge.shared_samples or any(expert.head == "trained" for expert in merge.experts):
        raise MergeboundError(
            "elasticity: not available with shared samples or trained heads; compare two bounds instead"
        )
    numbers: dict[Any, float] = {}
    d, risk, instability, L = [], sympy.Integer(0), sympy.Integer(0), []
    p = [float(value) for value in per_expert(merge, "weights")]
    for index, (expert, row) in enumerate(zip(merge.experts, bound.experts, strict=True)):
        if not is_constant(expert):
            raise MergeboundError(
                f"expert {expert.name!r}: elasticity needs plain SGD at constant learning rate and batch size (no "
                "momentum, no reshuffling); compare two bounds instead"
            )
        table = _Symbols(expert, index + 1)
        drift, epsilon = _expert_expressions(expert, row, table)
        if row.risk_form != "given":
            raise MergeboundError(f"expert {expert.name!r}: elasticity needs training_risk to be given")
        stiffness = table("L")
        d.append(drift)
        L.append(stiffness)
        risk += p[index] * table("training_risk")
        instability += p[index] * stiffness / 2 * float(row.sensitivity) ** 2 * epsilon**2
        numbers |= table.numbers
    second = _dispersion_expression(bound, d, L, p)
    value = (sympy.sqrt(risk) + sympy.sqrt(second) + sympy.sqrt(instability)) ** 2
    return Expanded(value, numbers)


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
        raise MergeboundError(
            f"expert {expert.name!r}: its drift is {row.drift_form}, whose dependence on hyperparameters is not known; "
            "give initial_gradient_norm with sigma or sigma0"
        )

    forms = {"Theorem 2 (sup)": "D_inf", "Theorem 2 (envelope)": "D_envelope"}
    reach = drift() if row.drift is not None else sympy.Integer(0)
    if row.epsilon_form in forms:
        return reach, table(forms[row.epsilon_form]) * sympy.sqrt((tau / n) ** 2 + spread)
    if row.epsilon_form == "Theorem 2 (rms)":
        return reach, table("D_2") * (tau / n + sympy.sqrt(spread))
    if row.epsilon_form.startswith("cap"):
        return reach, sympy.sqrt(2) * reach
    raise MergeboundError(
        f"expert {expert.name!r}: its stability is {row.epsilon_form}, whose dependence on hyperparameters is not "
        "known; give D_inf or D_2"
    )


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
    form, stiffness = bound.V_form, largest
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
    if merge.method == "dare":
        drop, lam = float(merge.drop_rate), [float(value) for value in per_expert(merge, "coefficients")]
        scale = drop / (1 - drop) if merge.rescale else drop * (1 - drop)
        if merge.independent_masks:
            V += scale * sum(lam[i] ** 2 * d[i] ** 2 for i in size)
        else:
            V += scale * sum(abs(lam[i]) * d[i] for i in size) ** 2
    return stiffness / 2 * V


def elasticity(bound: Bound, name: str, expert: str | None = None) -> float:
    """``d log(bound) / d log(field)``: one expert's field, or that field of all experts together.

    Evaluated with 50 digits, so the limits of the clock do not cancel.  Raises :class:`MergeboundError`.
    """
    import mpmath
    import sympy

    if name not in FIELDS:
        raise MergeboundError(f"elasticity: {name!r} is not a field; choose one of {', '.join(FIELDS)}")
    made = expand(bound)
    assert bound.merge is not None
    names = [item.name for item in bound.merge.experts]
    if expert is not None and expert not in names:
        raise MergeboundError(f"elasticity: there is no expert {expert!r}; choose one of {', '.join(names)}")
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
