"""Measured drift |Delta_i| against every form of Theorem 3 (theory.md section 6).

Form (d) is an identity and a triangle inequality: Delta = -sum w_hat_k g_k for whatever enters the momentum buffer,
part by part.  For one run with its own log it holds surely, for SAM and clipped gradients too; a violation is an error
in code or log.  Forms (a), (b) and (c) bound an expectation over data and batches and use constants that were seen at a
few points: a violation there speaks of the constants first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from experiments.measure.noise.constants import Constants, ExpertConstants
from experiments.measure.noise.objective import objective_of, path_of
from experiments.measure.noise.recipe import Which, expert_of, learning_rates, logged_norms
from experiments.measure.subject import Subject
from theory.clocks import clock
from theory.drift import (
    buffer_weights,
    drift_base,
    drift_energy,
    drift_losses,
    drift_noise,
)
from theory.errors import MergeboundError
from theory.recipe import Expert

ENDS: tuple[Which, ...] = ("value", "low", "high")
PARTS = ("all", "shared", "head")
"""Of the coordinates."""
_SLACK = 1e-4
"""Relative rounding of float32 training that is not called a violation."""
_FORMS: dict[str, Callable[[Expert], np.ndarray]] = {
    "6(a) noise on the path": lambda e: drift_noise(e, clock(e)),
    "6(b) noise at the base": lambda e: drift_base(e, clock(e)),
    "6(c) energy": drift_energy,
    "6(d) loss log": drift_losses,
}
INPUTS = {
    "6(a) noise on the path": ("initial_gradient_norm", "sigma"),
    "6(b) noise at the base": ("initial_gradient_norm", "sigma0"),
    "6(c) energy": ("initial_risk", "training_risk", "sigma", "L"),
    "6(d) loss log": ("L",),
}
"""Measured constants behind each form, as fields of the recipe, but for those of the clock (:func:`clock_inputs`)."""
_CLOCKED = ("6(a) noise on the path", "6(b) noise at the base")


def drift_table(subject: Subject, constants: Constants) -> pd.DataFrame:
    """Measured drift over bound, per expert, form and part of the coordinates.

    Returns:
        Columns ``expert``, ``form``, ``part`` (all, shared, head), ``measured`` (|Delta| of what was trained),
        ``bound``, ``low``, ``high`` (the bound at the ends of the constants' intervals; infinite where one of them is a
        lower estimate, as kappa and L are), ``ratio`` = measured / bound, ``violated`` (measured above the bound at the
        upper ends that are known: with a lower estimate it speaks of that constant), ``applies``, ``why`` (why it does
        not, or what it rests on), ``inputs``, ``tier``, ``seed``.  A form that does not apply has NaN bounds.
    """
    rows = []
    for j, found in enumerate(constants.experts):
        lengths = found.drift.value, found.private_drift.value
        rows += [_from_log(subject, j, found.name, lengths, part) for part in PARTS]
        for form in _FORMS:
            rows.append(_by_constants(subject, j, found, form, constants.per_sample_loss))
    return pd.DataFrame([row | {"seed": constants.seed} for row in rows])


def log_table(subject: Subject) -> pd.DataFrame:
    """The rows of :func:`drift_table` that need no constants: 6(d) from the gradient log, part by part.

    Columns as there, without ``seed``: nothing is drawn, the run's log and checkpoints are all that it needs.
    """
    rows = [
        _from_log(subject, j, name, lengths(subject, j), part) for j, name in enumerate(subject.names) for part in PARTS
    ]
    return pd.DataFrame(rows)


def lengths(subject: Subject, j: int) -> tuple[float, float]:
    """|Delta_j| of the shared part and of the head, both of what was trained."""
    path = path_of(subject, j)
    first, last = (objective_of(subject, j, point) for point in (path[0], path[-1]))
    delta = (last.theta - first.theta).double()
    return float(delta[: first.shared].norm()), float(delta[first.shared :].norm())


def _row(
    name: str,
    form: str,
    part: str,
    measured: float,
    values: tuple[float, float, float],
    why: str,
    *,
    open_end: bool = False,
    **more: object,
) -> dict[str, object]:
    value, low, high = values
    applies = not np.isnan(value)
    ratio = measured / value if applies and value > 0 else np.nan
    return {
        "expert": name,
        "form": form,
        "part": part,
        "measured": measured,
        "bound": value,
        "low": low,
        "high": np.inf if open_end and applies else high,
        "ratio": ratio,
        "violated": bool(applies and measured > max(value, high) * (1 + _SLACK)),
        "applies": applies,
        "why": why,
        "tier": "estimated",
        **more,
    }


def _from_log(subject: Subject, j: int, name: str, moved: tuple[float, float], part: str) -> dict[str, object]:
    """6(d) from the gradient log, by the weights of what was run."""
    run, log = subject.runs[j], subject.logs[j]
    measured = {"all": float(np.hypot(*moved)), "shared": moved[0], "head": moved[1]}[part]
    form = "6(d) gradient log"
    nothing = (np.nan, np.nan, np.nan)
    if run is None or log is None:
        return _row(name, form, part, measured, nothing, "no training log", inputs="")
    reason = log_covers(subject, j)
    if reason:
        return _row(name, form, part, measured, nothing, reason, inputs="")
    weights = buffer_weights(learning_rates(run), run.momentum, nesterov=run.nesterov)
    value = float(weights @ logged_norms(log, part))
    what = "clipped gradients of this run" if run.clip_norm is not None else "gradients of this run"
    why = f"holds surely: triangle inequality on the {what}"
    inputs = f"sum w_hat = {weights.sum():.4g}, mean norm = {logged_norms(log, part).mean():.4g}"
    return _row(name, form, part, measured, (value, value, value), why, inputs=inputs)


def log_covers(subject: Subject, j: int) -> str:
    """Why 6(d) does not apply to the gradient log of an expert; empty if it does."""
    run, log = subject.runs[j], subject.logs[j]
    if run is None or log is None:
        return "no training log"
    if run.optimizer == "adamw":
        return "AdamW's step is no weighted sum of gradients (the weights are those of heavy ball)"
    if run.trained == "low_rank":
        return "the log is of the factors' gradients, the drift of the merged matrices"
    if len(log.batch_loss) != run.steps:
        return f"the log has {len(log.batch_loss)} of {run.steps} steps"
    return ""


def _by_constants(subject: Subject, j: int, found: ExpertConstants, form: str, per_sample: bool) -> dict[str, object]:
    measured = found.total_drift
    values: list[float] = []
    for which in ENDS:
        try:
            values.append(float(_FORMS[form](_expert(subject, j, found, which, form))))
        except MergeboundError as error:
            return _row(found.name, form, "all", measured, (np.nan,) * 3, str(error).split("; ")[0], inputs="")
    centre = expert_of(subject, j, found)
    names = (*INPUTS[form], *(clock_inputs(centre) if form in _CLOCKED else ()))
    shown = {name: getattr(centre, name) for name in names}
    inputs = ", ".join(f"{name} = {value:.4g}" for name, value in shown.items() if value is not None)
    why = f"in expectation, with constants seen at {len(found.points)} points"
    if not per_sample:
        why += "; A3 violated: constants of the evaluation loss, training used batch statistics"
    lower = found.lower_estimates(names)
    why += lower_note(lower)
    low, high = min(values), max(values)
    return _row(found.name, form, "all", measured, (values[0], low, high), why, open_end=bool(lower), inputs=inputs)


def clock_inputs(expert: Expert) -> tuple[str, ...]:
    """Measured constants that the clock takes: kappa (L where it is not known), and with momentum L, too, for the
    stiffness of the buffer's recursion (:func:`theory.clocks.log_response`)."""
    rate = "L" if expert.kappa is None else "kappa"
    return tuple(dict.fromkeys((rate, "L"))) if np.any(np.asarray(expert.momentum) != 0) else (rate,)


def lower_note(names: Sequence[str]) -> str:
    """What a bound from lower estimates is; empty without any."""
    return f"; from lower estimates ({', '.join(names)}): no upper limit, and no proof" if names else ""


def _expert(subject: Subject, j: int, found: ExpertConstants, which: Which, form: str) -> Expert:
    expert = expert_of(subject, j, found, which=which)
    if form == "6(c) energy":  # falls with the end risk
        other: Which = {"low": "high", "high": "low"}.get(which, "value")  # type: ignore[assignment]
        expert = replace(expert, training_risk=found.training_risk.at(other))
    return expert


__all__ = ["INPUTS", "clock_inputs", "drift_table", "lengths", "log_covers", "log_table", "lower_note"]
