"""From ingredients to a bound object: verdicts, terms with shares, tier."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from theory.assumptions import Assumption, judge, tier_of
from theory.bound import Bound, ExpertTerms, Term
from theory.errors import AssumptionError
from theory.master import TERM_NAMES, OptimizationSide, assemble_master, assemble_sides, task_stability
from theory.recipe import Merge
from theory.symbolic import FloatArray

RUN_FIELDS = ("n", "batch_size", "learning_rate", "steps", "momentum", "weight_decay")


def refuse_broken(merge: Merge) -> None:
    """Refuse a merge whose recipe says that A2 or A3 do not hold (:class:`AssumptionError`)."""
    if merge.per_sample_loss is False:
        raise AssumptionError(
            "merge: per_sample_loss is false (A3: the loss of one sample depends on others, as with BatchNorm in train "
            "mode), which the stability and drift theorems do not cover; give measured quantities to network_bound, or "
            "use held-out risks"
        )
    if merge.data_independent_choices is False:
        raise AssumptionError(
            "merge: data_independent_choices is false (A2: coefficients, checkpoints or hyperparameters were chosen on "
            "the training samples), which the bound does not cover; choose them on other data, or use held-out risks"
        )


def base_assumptions(
    *,
    shared: bool | None,
    choices: bool | None,
    per_sample: bool | None,
    measured_smoothness: bool,
    held_out: bool,
) -> list[Assumption]:
    independence = judge(
        "A1",
        "samples of different tasks are independent",
        None if shared is None else not shared,
        holds="stated in the recipe",
        violated="tasks share samples; all copies are exchanged at once (sensitivities add up)",
        unknown="not stated; set shared_samples",
    )
    if shared:
        independence = Assumption(independence.name, independence.statement, "violated", independence.why, covered=True)
    smooth = Assumption(
        "A4",
        "per-sample losses are nonnegative and L-smooth",
        "unknown" if measured_smoothness else "holds",
        "L was measured at points, not everywhere" if measured_smoothness else "L is stated as known",
    )
    items = [
        independence,
        judge(
            "A2",
            "base, hyperparameters, checkpoints, coefficients, seeds do not depend on the training samples",
            choices,
            holds="stated in the recipe",
            violated="they do; the bound does not account for it",
            unknown="not stated; set data_independent_choices",
        ),
        judge(
            "A3",
            "the loss is a per-sample loss (no BatchNorm in train mode)",
            per_sample,
            holds="stated in the recipe",
            violated="it is not; the stability and drift theorems do not cover it",
            unknown="not stated; set per_sample_loss",
        ),
        smooth,
    ]
    if not held_out:
        return items
    fresh = judge(
        "held-out",
        "the held-out data served neither training nor any choice",
        choices,
        holds="stated (data_independent_choices)",
        violated="it did; the expert risks are optimistic",
        unknown="not stated; set data_independent_choices",
    )
    return [fresh, smooth]


def measured_run(merge: Merge) -> list[str]:
    """Fields of what was run (hyperparameters, weights, coefficients) that are not known but measured or estimated.

    Every bound depends on them, so they lower the tier of all.
    """
    found = [f"{expert.name}: {name}" for expert in merge.experts for name in RUN_FIELDS if name in expert.measured]
    for name in ("weights", "coefficients", "drop_rate"):
        if name in merge.measured and getattr(merge, name) is not None:
            found.append(f"merge: {name}")
    return found


@dataclass(frozen=True, eq=False)
class Ingredients:
    """Everything the assembly needs; per-expert arrays have shape ``(N, ...)``."""

    names: tuple[str, ...]
    risks: FloatArray
    weights: FloatArray
    smoothness: FloatArray
    sensitivity: FloatArray
    epsilon: FloatArray
    split: tuple[FloatArray, FloatArray] | None
    trained: np.ndarray
    samples: FloatArray | None
    shared: bool
    held_out: bool


def assemble_bound(
    parts: Ingredients,
    V: FloatArray,
    effective_V: FloatArray,
    dispersion_form: str,
    experts: tuple[ExpertTerms, ...],
    assumptions: list[Assumption],
    measured: list[str],
    merge: Merge | None,
    side: OptimizationSide | None = None,
) -> Bound:
    stability = task_stability(
        parts.sensitivity,
        parts.epsilon,
        trained=parts.trained,
        split=parts.split if np.any(parts.trained) else None,
        shared_samples=parts.shared,
        samples=parts.samples,
    )
    root = np.zeros(1) if parts.held_out else np.sqrt(stability)
    if side is None:
        terms = assemble_master(parts.risks, parts.weights, parts.smoothness, V, 1.0, root)
    else:
        terms = assemble_sides(side, parts.weights, parts.smoothness, root)
    values = dict(
        zip(TERM_NAMES, np.broadcast_arrays(terms.training, terms.dispersion, terms.instability), strict=True)
    )
    total = sum(values.values(), np.zeros(()))
    with np.errstate(all="ignore"):
        infinite = np.isinf(total)
        shares = {
            name: np.where(infinite, np.isinf(value) * 1.0, value / np.where((total == 0) | infinite, 1.0, total))
            for name, value in values.items()
        }
        crowd = sum(shares.values(), np.zeros(()))
        shares = {name: share / np.where(crowd == 0, 1.0, crowd) for name, share in shares.items()}
    risk = "held-out" if parts.held_out else "training"
    stability_formula = (
        "sqrt(sum p_i L_i/2 (sum_l c_l eps_l)^2)" if parts.shared else "sqrt(sum p_i L_i/2 c_i^2 eps_i^2)"
    )
    if np.any(parts.trained):
        stability_formula = stability_formula.replace("c_i^2 eps_i^2", "(c_i^2 eps_i^2 + eps_private,i^2)")
    formulas = {
        "training": f"sqrt(sum p_j F_j(x_j)), {risk} risks",
        "dispersion": f"sqrt(L/2 V), V {dispersion_form}",
        "instability": "not needed: held-out risks" if parts.held_out else stability_formula,
    }
    if "task by task" in dispersion_form:
        anchor = "a_j" if "base anchors" in dispersion_form else "x_j"
        both = "" if dispersion_form.startswith("task by task") and " or " not in dispersion_form else " or joint V"
        formulas["training"] = f"sqrt(sum p_j F_j({anchor})), {risk} risks"
        formulas["training"] += ", a_j = x_j or x_0" if anchor == "a_j" else ""
        formulas["dispersion"] = (
            f"sqrt(sum p_j (sqrt F_j({anchor}) + sqrt(L_j/2 E||M-{anchor}||^2))^2) - training term{both}"
        )
    sources = {"training": "Theorem 4", "dispersion": "Theorem 4", "instability": "Theorems 1 and 2"}
    return Bound(
        value=np.asarray(terms.value),
        terms=tuple(Term(name, values[name], shares[name], formulas[name], sources[name]) for name in TERM_NAMES),
        tier=tier_of(assumptions, measured),
        assumptions=tuple(assumptions),
        measured=tuple(dict.fromkeys(measured)),
        experts=experts,
        V=V,
        effective_V=effective_V,
        dispersion_form=dispersion_form,
        merge=merge,
    )
