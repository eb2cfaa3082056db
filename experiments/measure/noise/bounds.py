"""Theorems 2, 3 and 4 and the master bound from measured constants, each next to what goes into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from experiments.measure.noise.constants import Constants
from experiments.measure.noise.drift import ENDS, clock_inputs, drift_table, lower_note
from experiments.measure.noise.recipe import expert_of, recipe_of
from experiments.measure.subject import Subject
from theory import master_bound
from theory.clocks import Clock, clock, log_response
from theory.errors import MergeboundError
from theory.network import network_bound
from theory.recipe import Expert, Method
from theory.stability import (
    epsilon_cap,
    epsilon_from_losses,
    epsilon_recursion,
    epsilon_recursion_from_losses,
    epsilon_rms,
    epsilon_sup,
    gamma,
)


@dataclass(frozen=True)
class BoundRow:
    """One bound.

    Attributes:
        subject: expert, or ``merge``.
        statement: theorem and form.
        bounds: what is bounded.
        value, low, high: the bound, and at the ends of its constants' intervals (NaN where it does not apply; ``high``
            is infinite where a constant is a lower estimate, which ``why`` names).
        inputs: name = value, in words.
        why: why it does not apply, or what it rests on.
        tier: of the number.
        seed: of the constants.
    """

    subject: str
    statement: str
    bounds: str
    value: float
    low: float
    high: float
    inputs: str
    why: str
    tier: str
    seed: int


def bounds_table(
    subject: Subject,
    constants: Constants,
    *,
    method: Method = "average",
    measured_kappa: bool = True,
    shared_samples: bool | None = None,
    **merge: Any,
) -> pd.DataFrame:
    """Theorem 2 (eps_i) in every form, Theorem 3 (drift) in every form, Theorem 4 and the master bound of a merge.

    Args:
        subject, constants: of the same experts.
        method: how they are merged; ``merge`` are other fields of :class:`theory.Merge`.
        measured_kappa: take the measured one-step rate in the clock; otherwise kappa = L.
        shared_samples: whether tasks share images (A1).

    Returns:
        One row per bound, columns as :class:`BoundRow`.
    """
    rows = [row for j in range(subject.size) for row in _stability(subject, j, constants, measured_kappa)]
    for row in drift_table(subject, constants).to_dict("records"):
        what = "|Delta|" if row["part"] == "all" else f"|Delta|, {row['part']} part"
        rows.append(
            BoundRow(
                row["expert"], f"Theorem 3, {row['form']}", what, row["bound"], row["low"], row["high"],
                row["inputs"], row["why"], row["tier"], constants.seed,
            )
        )  # fmt: skip
    rows += _merges(subject, constants, method, measured_kappa, shared_samples, merge)
    return pd.DataFrame([vars(row) for row in rows])


_Stability = Callable[[Expert, Clock], Any]
_FORMS: dict[str, tuple[tuple[str, ...], _Stability]] = {
    "sup": (("D_inf",), lambda e, c: epsilon_sup(e.D_inf, c.tau, e.n, gamma(e, c))),  # type: ignore[arg-type]
    "sup, 2G": (("G",), lambda e, c: epsilon_sup(2 * np.asarray(e.G), c.tau, e.n, gamma(e, c))),
    "rms": (("D_2",), lambda e, c: epsilon_rms(e.D_2, c.tau, e.n, gamma(e, c))),  # type: ignore[arg-type]
    "rms recursion": (("D_2",), lambda e, c: epsilon_recursion(e, e.D_2)),  # type: ignore[arg-type]
    "gap from the loss log": (
        ("L",),
        lambda e, c: epsilon_from_losses(e, c, log_response(e) if c.log_w is None else c.log_w),
    ),
    "recursion, gap from the loss log": (("L",), lambda e, c: epsilon_recursion_from_losses(e)),
}


def _stability(subject: Subject, j: int, constants: Constants, measured_kappa: bool) -> list[BoundRow]:
    found = constants.experts[j]
    rows = []
    for form, (names, compute) in _FORMS.items():
        values: list[float] = []
        why, inputs, tier = "constants seen at a few points of the path", "", "estimated"
        timed: tuple[str, ...] = ()
        try:
            for which in ENDS:
                expert = expert_of(subject, j, found, which=which, measured_kappa=measured_kappa)
                values.append(_epsilon(expert, form, compute))
                if which == "value":
                    inputs, timed = _inputs(expert, names), clock_inputs(expert)
        except MergeboundError as error:
            values, why = [np.nan] * 3, str(error).split("; ")[0]
        else:
            if not constants.per_sample_loss:
                why += "; A3 violated: constants of the evaluation loss"
        lower = found.lower_estimates((*names, *timed))
        low, high, note = _ends(values, lower)
        why += note
        rows.append(
            BoundRow(found.name, f"Theorem 2, {form}", "eps_i", values[0], low, high, inputs, why, tier, constants.seed)
        )
    cap = float(epsilon_cap(found.total_drift))
    rows.append(
        BoundRow(
            found.name, "Theorem 2, cap sqrt(2) d", "eps_i", cap, cap, cap, f"|Delta| = {found.total_drift:.4g}",
            "measured drift of one run stands for its rms over samples", "estimated", constants.seed,
        )
    )  # fmt: skip
    return rows


def _epsilon(expert: Expert, form: str, compute: _Stability) -> float:
    if form == "rms" and expert.sampling == "reshuffle":
        raise MergeboundError("the rms form holds for the first two samplings only, and this run reshuffled")
    if form.startswith("rms") and expert.D_2 is None:
        raise MergeboundError("D_2 needs fresh samples, and S is not known")
    return float(compute(expert, clock(expert)))


def _inputs(expert: Expert, names: tuple[str, ...]) -> str:
    timing = clock(expert)
    shown: dict[str, Any] = {name: getattr(expert, name) for name in names}
    shown |= {"kappa": expert.kappa if expert.kappa is not None else expert.L}
    shown |= {name: getattr(expert, name) for name in clock_inputs(expert)}
    shown |= {"tau": timing.tau, "nu": timing.nu, "Gamma": gamma(expert, timing), "n": expert.n}
    return ", ".join(f"{name} = {float(value):.4g}" for name, value in shown.items() if value is not None)


def _merges(
    subject: Subject,
    constants: Constants,
    method: Method,
    measured_kappa: bool,
    shared_samples: bool | None,
    merge: dict[str, Any],
) -> list[BoundRow]:
    """Theorem 4 and the master bound: from the recipe where it covers the runs, and from measured drifts always."""
    rows = []
    four: dict[str, list[float]] = {"Theorem 4": [], "master": []}
    inputs, tier, why = "", "estimated", "from the recipe: Theorems 2 and 3 with measured constants"
    names = ("kappa" if measured_kappa else "L", "L", "D_inf")
    lower = tuple(dict.fromkeys(name for e in constants.experts for name in e.lower_estimates(names)))
    try:
        for which in ENDS:
            recipe = recipe_of(
                subject, constants, method=method, which=which, measured_kappa=measured_kappa,
                shared_samples=shared_samples, **merge,
            )  # fmt: skip
            bound = master_bound(recipe)
            terms = {term.name: float(term.value) for term in bound.terms}
            four["Theorem 4"].append((terms["training"] + terms["dispersion"]) ** 2)
            four["master"].append(float(bound.value))
            if which == "value":
                inputs = ", ".join(f"sqrt {name} = {value:.4g}" for name, value in terms.items())
                tier = bound.tier
    except MergeboundError as error:
        four, why = {name: [np.nan] * 3 for name in four}, str(error).split("; ")[0]
    for name, values in four.items():
        what = "F_S(M)" if name == "Theorem 4" else "F(M)"
        low, high, note = _ends(values, lower)
        rows.append(
            BoundRow("merge", f"{name}, from the recipe", what, values[0], low, high, inputs, why + note, tier,
                     constants.seed)
        )  # fmt: skip
    return rows + _measured(subject, constants, method, shared_samples, merge)


def _measured(
    subject: Subject, constants: Constants, method: Method, shared_samples: bool | None, merge: dict[str, Any]
) -> list[BoundRow]:
    """The same from measured drifts and, for the average, the measured dispersion; no clock, any optimizer."""
    settings: dict[str, Any] = {k: v for k, v in merge.items() if k in ("weights", "coefficients", "drop_rate")}
    if method == "average":
        settings["dispersion"] = dispersion_of_average(subject)
    elif "dispersion" in merge:
        settings["dispersion"] = merge["dispersion"]
    heads = any(subject.heads)
    values: dict[str, list[float]] = {"Theorem 4": [], "master": []}
    inputs, why = "", "measured drift; stability by the cap sqrt(2) d; no clock, any optimizer"
    try:
        for which in ENDS:
            bound = network_bound(
                [max(e.training_risk.at(which), 0.0) for e in constants.experts],
                [max(e.L.at(which), e.highest.at(which)) for e in constants.experts],
                [e.drift.value for e in constants.experts],
                private_drift=[e.private_drift.value for e in constants.experts] if heads else None,
                trained_heads=heads,
                names=subject.names,
                method=method,
                shared_samples=shared_samples,
                per_sample_loss=constants.per_sample_loss,
                **settings,
            )
            terms = {term.name: float(term.value) for term in bound.terms}
            values["Theorem 4"].append((terms["training"] + terms["dispersion"]) ** 2)
            values["master"].append(float(bound.value))
            if which == "value":
                inputs = ", ".join(f"sqrt {name} = {value:.4g}" for name, value in terms.items())
                inputs += f", V = {float(bound.V):.4g}"
    except MergeboundError as error:
        values, why = {name: [np.nan] * 3 for name in values}, str(error).split("; ")[0]
    lower = tuple(dict.fromkeys(name for e in constants.experts for name in e.lower_estimates(("L",))))
    rows = []
    for name, found in values.items():
        low, high, note = _ends(found, lower)
        rows.append(
            BoundRow(
                "merge", f"{name}, measured drift", "F_S(M)" if name == "Theorem 4" else "F(M)", found[0], low, high,
                inputs, why + note, "estimated", constants.seed,
            )
        )  # fmt: skip
    return rows


def _ends(values: list[float], lower: tuple[str, ...]) -> tuple[float, float, str]:
    """Lowest and highest of a bound at the ends of its constants' intervals, and a note on lower estimates in it."""
    if np.isnan(values[0]):
        return np.nan, np.nan, ""
    return min(values), np.inf if lower else max(values), lower_note(lower)


def dispersion_of_average(subject: Subject) -> float:
    """V of the average of the merged coordinates (BatchNorm's statistics included), uniform p."""
    centre = subject.vectors.double().mean(dim=0)
    return float((subject.vectors.double() - centre).square().sum(dim=1).mean())


def averaged(subject: Subject) -> torch.Tensor:
    """The average of the experts' merged coordinates, (P,)."""
    return subject.vectors.double().mean(dim=0).to(subject.base.dtype)
