"""Symbolic exponents and limits against the numeric calculators, deep inside each regime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy

from theory import Expert, clock
from theory.clocks import sgd_times
from theory.dispersion import orthogonal_bound
from theory.drift import drift_base, drift_energy, drift_noise, drift_saturation
from theory.errors import MergeboundError
from theory.scaling import (
    REGIMES,
    TERMS,
    Exponent,
    exponent,
    limits,
    scaling_markdown,
    scaling_table,
    term_expression,
)
from theory.stability import epsilon_rms, epsilon_sup, gamma, gamma_with_replacement
from theory.symbols import symbol
from theory.training import pl_training_risk

NAMES = {
    "eta": "learning_rate", "K": "steps", "b": "batch_size", "n": "n", "mu": "mu", "kappa": "kappa", "beta": "momentum",
    "sigma": "sigma", "g": "initial_gradient_norm", "D_inf": "D_inf", "L": "L", "F0": "initial_risk",
}  # fmt: skip


def deep(regime: str) -> dict[str, float]:
    """Hyperparameters far inside a regime (relative distance to its limit about 1e-6)."""
    clock_name, _, kind = regime.partition(", ")
    point = {"eta": 0.01, "K": 5000.0, "b": 50.0, "n": 50.0, "mu": 0.5, "kappa": 1.0, "beta": 0.6, "sigma": 1.0}
    point |= {"g": 1.0, "D_inf": 2.0, "L": 1.0, "N": 70.0, "lambda_": 0.3, "F0": 3.0}
    if clock_name in ("flat", "momentum"):
        point["K"] = 500.0
    if kind == "noise":
        point |= {"n": 1e12, "b": 8.0, "g": 1e-9}
    if kind == "drift":
        point |= {"sigma": 1e-9, "n": 1000.0}
    if clock_name == "momentum":
        point["eta"] = 0.001
    return point


def value(term: str, regime: str, point: dict[str, float]) -> float:
    """The term by the numeric calculators from a recipe (not from the symbolic expression)."""
    kind = regime.partition(", ")[0]
    rate = {
        "flat": {"curvature": "convex"},
        "saturated": {"curvature": "strongly_convex", "mu": point["mu"]},
        "expanding": {"kappa": point["kappa"]},
        "momentum": {"curvature": "convex", "momentum": point["beta"]},
    }[kind]
    fields: dict[str, Any] = {name: point[key] for key, name in NAMES.items() if key not in ("mu", "kappa", "beta")}
    fields |= {"sigma0": point["sigma"], "minimal_risk": 0.0, "training_risk": 0.0}
    unused = {"drift (c)": (), "training risk (PL)": ("initial_gradient_norm", "D_inf", "training_risk")}
    for name in unused.get(term, ("initial_risk", "minimal_risk", "training_risk")):
        del fields[name]  # numbers that a term does not read need not agree with those that it does
    if kind == "momentum":
        fields["L"] = 1e-6
    fields["sampling"] = "with_replacement" if term in ("drift (a)", "drift (b)", "drift (c)", "V", "R") else None
    whole = {"n": 1, "batch_size": 1, "steps": 1}
    fields = {key: round(item) if key in whole else item for key, item in fields.items() if item is not None}
    expert = Expert("a", **fields, **rate)  # type: ignore[arg-type]
    timing = clock(expert)
    if kind == "momentum":
        # the certified response of every step (the calculator improves the last steps)
        response = point["eta"] * (1 + point["beta"]) / (1 - point["beta"])
        timing = type(timing)(response * point["K"], response**2 * point["K"], None, "", "certified")  # type: ignore[arg-type]
    spread = gamma(expert, timing)
    eps = epsilon_sup(expert.D_inf, timing.tau, expert.n, spread)  # type: ignore[arg-type]
    size, L = int(point["N"]), point["L"]

    def V() -> float:
        d = np.full(size, float(drift_noise(expert, timing)))
        return float(orthogonal_bound(d, np.full(size, 1 / size), np.full(size, 1 / size)))

    makers: dict[str, Callable[[], Any]] = {
        "tau": lambda: timing.tau,
        "nu": lambda: timing.nu,
        "Gamma": lambda: spread,
        "epsilon": lambda: eps,
        "epsilon (rms)": lambda: epsilon_rms(expert.D_inf, timing.tau, expert.n, spread),  # type: ignore[arg-type]
        "drift (a)": lambda: drift_noise(expert, timing),
        "drift (b)": lambda: drift_base(expert, timing),
        "drift (c)": lambda: drift_energy(expert),
        "V (orthogonal average)": V,
        "dispersion": lambda: np.sqrt(L * V() / 2),
        "instability (average)": lambda: np.sqrt(L / 2) * eps / point["N"],
        "instability (task arithmetic)": lambda: np.sqrt(L / 2) * eps * point["lambda_"],
        "training risk (PL)": lambda: pl_training_risk(expert),
    }
    return float(makers[term]())


def numeric_exponent(term: str, key: str, regime: str) -> tuple[float, float, float]:
    """``(exponent, lower, upper)``: slope of the log over a small step of the hyperparameter (integers: one unit)."""
    point = deep(regime)
    if term in ("drift (a)", "drift (b)", "drift (c)", "V (orthogonal average)", "dispersion", "training risk (PL)"):
        point["n"] = 1e12  # the finite-sample factor (n-b)/(n-1) is not part of the symbolic term
    step = {"K": 20.0, "b": 1.0, "n": 1.0, "N": 1.0}.get(key, 0.0)
    if key == "n" and point["n"] > 1e6:
        step = 1e9
    low, high = dict(point), dict(point)
    if step:
        low[key], high[key] = point[key] - step, point[key] + step
    else:
        low[key], high[key] = point[key] * (1 - 1e-3), point[key] * (1 + 1e-3)
    if regime.endswith("full batch") and key == "n":
        low["b"], high["b"] = low["n"], high["n"]
    slope = np.log(value(term, regime, high) / value(term, regime, low)) / np.log(high[key] / low[key])
    return float(slope), low[key], high[key]


def symbolic_number(term: str, key: str, regime: str) -> float:
    found = exponent(term, key, regime)
    point = deep(regime)
    return float(found.subs({symbol(name): number for name, number in point.items()}))


@pytest.fixture(scope="module")
def rows_of() -> dict[str, tuple[Exponent, ...]]:
    """The table, term by term as it is asked for (collecting the tests derives nothing)."""

    class Rows(dict[str, tuple[Exponent, ...]]):
        def __missing__(self, term: str) -> tuple[Exponent, ...]:
            self[term] = scaling_table((term,))
            return self[term]

    return Rows()


@pytest.mark.parametrize("term", TERMS)
def test_exponents_against_the_calculators(term: str, rows_of: dict[str, tuple[Exponent, ...]]) -> None:
    rows = rows_of[term]
    assert rows
    checked = 0
    for row in rows:
        if term in ("V (orthogonal average)", "dispersion", "training risk (PL)") and row.hyperparameter == "n":
            continue
        if row.regime.startswith("momentum") and term in ("drift (b)",):
            continue  # the calculator uses its own, smaller response step by step
        slope, _, _ = numeric_exponent(term, row.hyperparameter, row.regime)
        expected = symbolic_number(term, row.hyperparameter, row.regime)
        assert slope == pytest.approx(expected, rel=4e-3, abs=2e-3), (row.regime, row.hyperparameter)
        checked += 1
    assert checked >= 2


def test_missing_exponents_are_zero(rows_of: dict[str, tuple[Exponent, ...]]) -> None:
    """What the table leaves out does not move the term: saturated terms do not feel more steps."""
    for term in ("tau", "nu", "epsilon", "drift (a)", "V (orthogonal average)"):
        for regime in REGIMES:
            if not regime.name.startswith("saturated") or not any(row.regime == regime.name for row in rows_of[term]):
                continue
            assert exponent(term, "K", regime.name) == 0
            assert abs(numeric_exponent(term, "K", regime.name)[0]) < 1e-6


def test_known_laws() -> None:
    """The laws of section 11, as exact numbers."""
    half = sympy.Rational(1, 2)
    noise = {key: exponent("epsilon", key, "flat, noise") for key in ("eta", "K", "b", "n")}
    assert noise == {"eta": 1, "K": half, "b": -half, "n": -half}
    full = {key: exponent("epsilon", key, "flat, full batch") for key in ("eta", "K", "n")}
    assert full == {"eta": 1, "K": 1, "n": -1}
    assert [exponent("V (orthogonal average)", key, "flat, drift") for key in ("eta", "K")] == [2, 2]
    assert [exponent("V (orthogonal average)", key, "flat, noise") for key in ("eta", "K")] == [2, 1]
    assert exponent("instability (average)", "N", "flat, noise") == -1
    growth = exponent("tau", "K", "expanding")
    assert growth.free_symbols  # no power law: the clock is exponential
    assert float(growth.subs({symbol("K"): 10, symbol("eta"): 0.1, symbol("kappa"): 2})) == pytest.approx(
        10 * np.log(1.2)
    )


def test_exponents_of_the_clock_interpolate_between_regimes() -> None:
    """Elasticity of the full expression tends to the table's entry, from 50-digit evaluation."""
    eta, kappa, steps = symbol("eta"), symbol("kappa"), symbol("K")
    tau = term_expression("tau", "expanding")
    elasticity = steps * sympy.diff(tau, steps) / tau
    for number, entry in ((sympy.Float("1e-25", 50), 1), (sympy.Integer(3), exponent("tau", "K", "expanding"))):
        point = {kappa: number, eta: sympy.Float("0.1", 50), steps: sympy.Integer(400)}
        expected = sympy.sympify(entry).subs(point)
        assert abs(elasticity.evalf(50, subs=point) / expected - 1) < 1e-18


def test_limits_against_the_calculators() -> None:
    rows = {row.name: row for row in limits()}

    def number(name: str, **values: float) -> float:
        return float(rows[name].value.subs({symbol(key): item for key, item in values.items()}))

    tau, nu = sgd_times(0.1, 1e-13, 50)
    assert number("training time, flat", eta=0.1, K=50) == pytest.approx(float(tau), rel=1e-9)
    assert number("noise time, flat", eta=0.1, K=50) == pytest.approx(float(nu), rel=1e-9)
    exactly = number("noise time, oscillating (eta kappa = a - 2)", eta=0.5, K=50)
    assert exactly == pytest.approx(float(sgd_times(0.5, -4.0, 50)[1]), rel=1e-12)
    assert rows["Gamma, full batch"].value == 0
    same = number("Gamma with replacement, b = n", nu=2.0, n=30)
    assert same == pytest.approx(float(gamma_with_replacement(2.0, 30, 30)), rel=1e-12)
    assert same > 0  # with replacement a batch of n is not a full batch
    assert number("stability, full batch", D_inf=2, K=50, eta=0.1, n=30) == pytest.approx(
        float(epsilon_sup(2.0, 5.0, 30, 0.0)), rel=1e-12
    )
    assert rows["stability, many samples"].value == 0
    n = 1e10
    many = float(epsilon_sup(2.0, 5.0, n, 0.5 * (1 / (8 * n) - 1 / n**2)))
    assert number("sqrt(n) times stability, many samples", D_inf=2, K=50, eta=0.1, b=8) == pytest.approx(
        np.sqrt(n) * many, rel=1e-6
    )
    assert rows["instability of an average, many experts"].value == 0
    long_tau, long_nu = sgd_times(0.1, -0.7, 5000)
    assert number("training time, many contracting steps", mu=0.7, eta=0.1) == pytest.approx(float(long_tau), rel=1e-12)
    assert number("noise time, many contracting steps", mu=0.7, eta=0.1) == pytest.approx(float(long_nu), rel=1e-12)
    assert number("drift (a), many contracting steps", mu=0.7, eta=0.1, g=2, sigma=3, b=4) == pytest.approx(
        float(drift_saturation(2, 0.7, 0.1, 3, 4)), rel=1e-12
    )
    assert number("training risk, many steps", L=2, eta=0.1, sigma=3, mu=0.7, b=4) == pytest.approx(
        2 * 9 * 0.1 / (2 * 4 * 0.7), rel=1e-12
    )


def test_markdown_and_refusals(rows_of: dict[str, tuple[Exponent, ...]]) -> None:
    rows = tuple(row for term in TERMS for row in rows_of[term])
    text = scaling_markdown(rows)
    assert text.count("\n") + 1 == 2 + len({(row.term, row.regime) for row in rows})
    assert "| epsilon | flat, noise | 1 | 1/2 | -1/2 | -1/2 |" in text
    assert "nan" not in text
    assert "zoo" not in text
    for bad in (("nothing", "eta", "flat"), ("tau", "nothing", "flat"), ("tau", "eta", "nowhere")):
        with pytest.raises(MergeboundError, match="scaling: 'n"):
            exponent(*bad)
