"""What the bound needs of one expert: the smallest drift and stability that apply, and the measured fields used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from theory.bound import ExpertTerms
from theory.clocks import Clock, clock, log_response, require_sgd
from theory.dispersion import smallest
from theory.drift import decays_outside_buffer, drift_base, drift_energy, drift_log, drift_losses, drift_noise
from theory.errors import AssumptionError, RecipeError
from theory.heads import head_split
from theory.recipe import Expert
from theory.stability import (
    epsilon_cap,
    epsilon_from_losses,
    epsilon_recursion,
    epsilon_recursion_from_losses,
    epsilon_rms,
    epsilon_sup,
    gamma,
)
from theory.symbolic import FloatArray
from theory.training import TRAINING_FIELDS, training_risk

_DRIFT_FIELDS: dict[str, tuple[str, ...]] = {
    "6(a)": ("clock", "initial_gradient_norm", "sigma"),
    "6(b)": ("clock", "initial_gradient_norm", "sigma0"),
    "6(c)": ("initial_risk", "training_risk", "sigma", "L", "base_norm"),
    "6(d), gradient log": ("batch_gradient_norms",),
    "6(d), loss log": ("batch_losses", "L"),
    "measured": ("drift",),
}
BASE_ANCHOR = "no bound, base anchor"
_EPSILON_FIELDS: dict[str, tuple[str, ...]] = {
    "Theorem 2 (sup)": ("clock", "D_inf"),
    "Theorem 2 (sup, 2G)": ("clock", "G"),
    "Theorem 2 (envelope)": ("clock", "D_envelope"),
    "Theorem 2 (rms)": ("clock", "D_2"),
    "Theorem 2 (rms recursion)": ("clock", "D_2"),
    "recursion, gap from the loss log": ("clock", "batch_losses", "held_out_losses", "L"),
    "Theorem 2, gap from the loss log": ("clock", "batch_losses", "held_out_losses", "L"),
    "cap sqrt(2) d": (),
    "measured": ("epsilon",),
}


def _attempt(
    candidates: dict[str, Callable[[], FloatArray]],
) -> tuple[dict[str, FloatArray], list[str]]:
    found: dict[str, FloatArray] = {}
    refused: list[str] = []
    for name, compute in candidates.items():
        try:
            found[name] = compute()
        except AssumptionError as error:
            refused.append(str(error))
        except RecipeError:
            continue
    return found, refused


def _clock_or_none(expert: Expert) -> Clock | None:
    covered = expert.optimizer.lower() == "sgd" and not expert.gradient_clipping
    if not covered or (expert.L is None and expert.kappa is None):
        return None
    return clock(expert)


@np.errstate(all="ignore")
def expert_drift(expert: Expert, timing: Clock | None = None) -> tuple[FloatArray, str]:
    """The smallest drift bound that applies to an expert (Theorem 3 or measured) and its form; shape ``(...)``.

    Raises :class:`AssumptionError` for optimizers that are not covered and have no measured drift, and
    :class:`RecipeError` with the remedy if no form has what it needs.

    >>> run = dict(n=1000, batch_size=10, learning_rate=0.1, steps=50, curvature="convex", L=1.0, D_inf=2.0)
    >>> value, form = expert_drift(Expert("a", initial_gradient_norm=0.5, sigma=1.0, **run))
    >>> round(float(value), 4), form
    (2.7226, '6(a)')
    """
    timing = _clock_or_none(expert) if timing is None else timing
    candidates: dict[str, Callable[[], FloatArray]] = {}
    if timing is not None:
        known = timing
        candidates["6(a)"] = lambda: drift_noise(expert, known)
        candidates["6(b)"] = lambda: drift_base(expert, known)
    candidates["6(c)"] = lambda: drift_energy(expert)
    candidates["6(d), gradient log"] = lambda: drift_log(expert)
    candidates["6(d), loss log"] = lambda: drift_losses(expert)
    if expert.drift is not None:
        candidates["measured"] = lambda: np.asarray(expert.drift, dtype=np.float64)
    found, refused = _attempt(candidates)
    if not found:
        require_sgd(expert)
        reason = f" ({refused[0]})" if refused else ""
        raise RecipeError(
            f"expert {expert.name!r}: no bound on the drift applies; give initial_gradient_norm with sigma0 (any "
            f"sampling) or sigma, batch_gradient_norms from the training log, or the measured drift{reason}"
        )
    return smallest(found)


@np.errstate(all="ignore")
def expert_epsilon(
    expert: Expert, timing: Clock | None = None, total_drift: FloatArray | None = None, *, recursion: bool = True
) -> tuple[FloatArray, str]:
    """The smallest stability bound that applies (Theorem 2, cap, or measured) and its form; shape ``(...)``.

    ``recursion``: also try the sharper recursions of section 5, which pass over every step (they need ``D_2`` or
    ``batch_losses``).  The cap is used where ``total_drift`` is given.

    >>> run = dict(n=1000, batch_size=10, learning_rate=0.1, steps=50, curvature="convex", L=1.0, D_inf=2.0)
    >>> value, form = expert_epsilon(Expert("a", **run))
    >>> round(float(value), 4), form
    (0.0173, 'Theorem 2 (sup)')
    """
    timing = _clock_or_none(expert) if timing is None else timing
    candidates: dict[str, Callable[[], FloatArray]] = {}
    if timing is not None:
        known = timing
        variance = gamma(expert, known)
        double = None if expert.G is None else 2 * np.asarray(expert.G, dtype=np.float64)
        for form, gap in (("sup", expert.D_inf), ("sup, 2G", double), ("envelope", expert.D_envelope)):
            if gap is not None:
                value = epsilon_sup(gap, known.tau, expert.n, variance)
                candidates[f"Theorem 2 ({form})"] = lambda value=value: value  # type: ignore[misc]
        if expert.D_2 is not None and expert.sampling != "reshuffle":
            rms = epsilon_rms(expert.D_2, known.tau, expert.n, variance)
            candidates["Theorem 2 (rms)"] = lambda: rms
            if recursion:
                gap_2 = expert.D_2
                candidates["Theorem 2 (rms recursion)"] = lambda: epsilon_recursion(expert, gap_2)
        if expert.batch_losses is not None:
            log_w = log_response(expert) if known.log_w is None else known.log_w
            candidates["Theorem 2, gap from the loss log"] = lambda: epsilon_from_losses(expert, known, log_w)
            if recursion:
                candidates["recursion, gap from the loss log"] = lambda: epsilon_recursion_from_losses(expert)
    if total_drift is not None:
        candidates["cap sqrt(2) d"] = lambda: epsilon_cap(total_drift)
    if expert.epsilon is not None:
        candidates["measured"] = lambda: np.asarray(expert.epsilon, dtype=np.float64)
    found, _ = _attempt(candidates)
    if not found:
        require_sgd(expert)
        raise RecipeError(
            f"expert {expert.name!r}: no bound on the stability applies; give D_inf or G, D_2 (not under reshuffling) "
            "or D_envelope, the measured epsilon, or what a drift bound needs"
        )
    return smallest(found)


def _used(expert: Expert, timing: Clock | None, forms: Sequence[tuple[str, dict[str, tuple[str, ...]]]]) -> list[str]:
    """The measured fields behind the chosen forms."""
    names: list[str] = []
    for chosen, table in forms:
        for form, needs in table.items():
            if form in chosen.split(" or "):
                names.extend(needs)
    if any("6(b)" in chosen.split(" or ") for chosen, _ in forms) and decays_outside_buffer(expert):
        names.append("base_norm")
    if "clock" in names and timing is not None:
        names.extend(("kappa",) if expert.kappa is not None else ("L", "mu"))
    given = [name for name in dict.fromkeys(names) if name != "clock" and getattr(expert, name) is not None]
    return [f"{expert.name}: {name}" for name in expert.is_measured(*given)]


def epsilon_inputs(expert: Expert, form: str) -> tuple[str, ...]:
    """Fields of an expert behind a form of its stability; for the cap those of its drift."""
    if not form.startswith("cap"):
        return tuple(name for name in _EPSILON_FIELDS.get(form, ()) if name != "clock")
    try:
        _, drift_form = expert_drift(expert)
    except RecipeError:
        return ("drift",)
    names = [name for part in drift_form.split(" or ") for name in _DRIFT_FIELDS[part] if name != "clock"]
    return tuple(dict.fromkeys(names))


def _split(expert: Expert) -> tuple[tuple[FloatArray, FloatArray], tuple[str, ...]]:
    """The smallest bounds on shared and private stability of a trained head, and the fields used; inf if unknown."""
    inner, outer, fields = np.asarray(np.inf), np.asarray(np.inf), []
    if expert.head != "trained":
        return (inner, outer), ()
    if expert.private_drift is not None:
        inner, outer = epsilon_cap(np.asarray(expert.drift, dtype=np.float64)), epsilon_cap(expert.private_drift)
        fields += ["drift", "private_drift"]
    if expert.D_inf_private is not None:
        found, _ = _attempt({"shared": lambda: head_split(expert)[0], "private": lambda: head_split(expert)[1]})
        if len(found) == 2:
            inner, outer = np.minimum(inner, found["shared"]), np.minimum(outer, found["private"])
            fields += ["D_inf_private", "kappa", "L", "mu", "cross_smoothness"]
            fields += ["D_inf_shared"] if expert.D_inf_shared is not None else ["D_inf", "G"]
    return (inner, outer), tuple(fields)


def _total_drift(expert: Expert, timing: Clock | None) -> FloatArray:
    """Drift of shared and private part together: both measured, or a bound of Theorem 3 where that is smaller."""
    assert expert.drift is not None
    assert expert.private_drift is not None
    together = np.hypot(*(np.asarray(part, dtype=np.float64) for part in (expert.drift, expert.private_drift)))
    try:
        bounded, _ = expert_drift(replace(expert, drift=None, private_drift=None), timing)
    except RecipeError:
        return np.asarray(together)
    return np.asarray(np.minimum(together, bounded))


def _risk_or_base(expert: Expert, base_side: bool) -> tuple[FloatArray, str]:
    """The training risk and its form; ``inf`` where no bound covers the run (momentum, reshuffling) but the base can be
    the anchor of Theorem 4 instead: ``initial_risk`` known, no trained head, V not measured.

    Without ``initial_risk`` the refusal asks for it, too.
    """
    try:
        return training_risk(expert)
    except AssumptionError as refusal:
        if not base_side or expert.head == "trained":
            raise
        if expert.initial_risk is None:
            raise AssumptionError(
                f"{refusal}; or give initial_risk, with which the base is the anchor of Theorem 4"
            ) from refusal
        return np.asarray(np.inf), BASE_ANCHOR


def expert_terms(
    expert: Expert, c: FloatArray, *, needs_drift: bool, recursion: bool = True
) -> tuple[ExpertTerms, tuple[FloatArray, FloatArray], list[str]]:
    timing = _clock_or_none(expert)
    try:
        drift, drift_form = expert_drift(expert, timing)
    except RecipeError:
        if needs_drift:
            raise
        drift, drift_form = None, "not needed"
    total = drift
    if drift is not None and expert.private_drift is not None and "measured" in drift_form:
        total = _total_drift(expert, timing)
    epsilon, epsilon_form = expert_epsilon(expert, timing, total, recursion=recursion)
    split, split_fields = _split(expert)
    forms = [(drift_form, _DRIFT_FIELDS), (epsilon_form, _EPSILON_FIELDS), ("split", {"split": split_fields})]
    used = _used(expert, timing, forms)
    risk, risk_form = _risk_or_base(expert, needs_drift)
    risk_fields = {"given": ("training_risk",), BASE_ANCHOR: ("initial_risk",), **TRAINING_FIELDS}
    for form in risk_form.split(" or "):
        given = [name for name in risk_fields[form] if getattr(expert, name) is not None]
        used += [f"{expert.name}: {name}" for name in expert.is_measured(*given)]
    used += [f"{expert.name}: {name}" for name in expert.is_measured("L")]
    row = ExpertTerms(expert.name, risk, risk_form, drift, drift_form, epsilon, epsilon_form, c)
    return row, split, used
